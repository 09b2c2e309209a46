"""What an output folder holds, in numbers."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.results.read import open_output, read_batches, whole_images

HISTOGRAM_EDGES = np.linspace(0.0, 1.0, 21, dtype=np.float32)  # of the type of the column


@dataclass(frozen=True)
class Summary:
    """What an output folder holds, counted in bounded memory."""

    num_images: int
    num_failed: int
    num_failed_shards: int
    """Shards that could not be read: one failed row each."""
    num_empty: int
    """Images that went well and have no box."""
    num_detections: int
    num_bytes: int
    """Of the encoded images."""
    classes: pd.DataFrame
    """`class_name`, `num_detections`, `num_images`, `mean_score`, most frequent first."""
    failures: pd.DataFrame
    """`error_stage`, `error_type`, `num_images`, most frequent first."""
    score_histogram: np.ndarray
    """int64 [20]: boxes by score in steps of 0.05."""
    model: dict[str, Any] = field(default_factory=dict)
    """Architecture, classes, input size, thresholds and weights, as recorded by the run."""

    def __str__(self) -> str:
        counts = zip(self.classes.class_name[:5], self.classes.num_detections[:5], strict=True)
        top = ", ".join(f"{name} {count:,}" for name, count in counts)
        return (
            f"{self.num_images:,} images ({self.num_failed:,} failed, {self.num_empty:,} without a box), "
            f"{self.num_detections:,} detections{': ' if top else ''}{top}"
        )


def summarise(uri: str | Path) -> Summary:
    """Count images, boxes, classes, scores and failures of an output folder in bounded memory.

    Raises: as `load_detections`.
    """
    output = open_output(uri)
    images, failures = Counter[str](), Counter[tuple[str, str]]()
    columns = ["shard_index", "status", "error_stage", "error_type", "num_bytes", "num_detections"]
    for batch in read_batches(output, "images", columns, None):
        # In Arrow: frames of pandas raised the peak of the driver, which counts a million images here.
        well = batch.filter(pc.equal(batch["status"], "ok"))  # type: ignore[attr-defined]
        failed = batch.filter(pc.equal(batch["status"], "failed"))  # type: ignore[attr-defined]
        images.update(all=len(batch), failed=len(failed))
        images.update(failed_shards=int((batch["shard_index"].to_numpy() == -1).sum()))
        images.update(empty=int((well["num_detections"].to_numpy() == 0).sum()))
        images.update(bytes=int(batch["num_bytes"].to_numpy().sum()))
        failures.update(zip(failed["error_stage"].to_pylist(), failed["error_type"].to_pylist(), strict=True))

    histogram = np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)
    counts = []
    for table in whole_images(read_batches(output, "detections", ["image_id", "class_name", "score"], None)):
        histogram += np.histogram(table["score"].to_numpy(), HISTOGRAM_EDGES)[0]
        plain = table.unify_dictionaries()  # each row group has its own
        plain = plain.set_column(1, "class_name", plain["class_name"].cast(pa.string()))
        found = plain.group_by("class_name").aggregate(
            [("image_id", "count"), ("image_id", "count_distinct"), ("score", "sum")]
        )
        counts.append(found.rename_columns(["class_name", "n", "images", "score"]))
    return Summary(
        num_images=images["all"],
        num_failed=images["failed"],
        num_failed_shards=images["failed_shards"],
        num_empty=images["empty"],
        num_detections=int(histogram.sum()),
        num_bytes=images["bytes"],
        classes=_class_counts(counts),
        failures=pd.DataFrame(
            [(stage, kind, count) for (stage, kind), count in failures.most_common()],
            columns=["error_stage", "error_type", "num_images"],
        ),
        score_histogram=histogram,
        model=output.model,
    )


def _class_counts(counts: list[pa.Table]) -> pd.DataFrame:
    """Add up the counts of the batches; an image is in one batch only, so distinct images add up too."""
    columns = {"class_name": pa.string(), "n": pa.int64(), "images": pa.int64(), "score": pa.float64()}
    total = pa.concat_tables([pa.schema(list(columns.items())).empty_table(), *counts])
    total = total.group_by("class_name").aggregate([("n", "sum"), ("images", "sum"), ("score", "sum")])
    total = total.sort_by([("n_sum", "descending"), ("class_name", "ascending")])
    found = {name: total[name].to_pandas() for name in total.column_names}
    return pd.DataFrame(
        {
            "class_name": found["class_name"],
            "num_detections": found["n_sum"],
            "num_images": found["images_sum"],
            "mean_score": found["score_sum"] / found["n_sum"],
        }
    )

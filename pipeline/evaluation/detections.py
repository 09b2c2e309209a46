"""Read detections, from an output folder or a COCO results file, for the images of a data set."""

import gzip
import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.evaluation.boxsets import Detected, GroundTruth
from pipeline.results import iter_detections, load_images

COLUMNS = ("image_id", "class_name", "score", "xmin", "ymin", "xmax", "ymax")


def is_coco_results(uri: str) -> bool:
    """Whether `uri` names a COCO results file; anything else is an output folder."""
    return uri.endswith((".json", ".json.gz"))


def read_coco_results(uri: str, truth: GroundTruth) -> Detected:
    """Read a COCO results file (`[{image_id, category_id, bbox, score}, ...]`, also gzipped).

    Raises:
        ConfigError: not such a file, or its images are not those of the data set.
    """
    if truth.coco_ids is None:
        raise ConfigError(f"{uri} names images by COCO ids, so --annotations must be a COCO file too")
    data = storage.read_bytes(uri)
    try:
        rows = json.loads(gzip.decompress(data) if uri.endswith(".gz") else data)
        coco_ids = np.array([row["image_id"] for row in rows], np.int64)
        labels = np.array([row["category_id"] for row in rows], np.int32)
        boxes_xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
        scores = np.array([row["score"] for row in rows], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{uri} is no COCO results file: {type(error).__name__} {error}") from error
    known = np.isin(coco_ids, truth.coco_ids)
    if not known.all():
        strange = coco_ids[~known][0]
        raise ConfigError(f"{uri}: image {strange} is not in the annotations; are they of the same data set?")
    annotated = np.isin(labels, list(truth.class_names))
    unknown = Counter(f"category {label}" for label in labels[~annotated].tolist())
    index = np.searchsorted(truth.coco_ids, coco_ids).astype(np.int32)
    found = Detected(index, boxes_xywh, labels, scores).select(annotated)
    return Detected(found.image_index, found.boxes_xywh, found.labels, found.scores, dict(unknown))


@dataclass(frozen=True)
class ImageMatch:
    """Which row of the images table is which annotated image."""

    index: dict[str, int]
    """Number of the annotated image by `image_id`."""
    processed: np.ndarray
    """bool [N]: the annotated image is in the run, whether it failed or not."""
    num_failed: int
    """Annotated images that the run could not read."""


def match_images(uri: str, truth: GroundTruth) -> ImageMatch:
    """Find the annotated images among those of an output folder.

    Names are compared without folder and extension; where two images of one side share a name, with as many
    folders as it takes to tell them apart. So `val-0003.tar/0042.jpg` is the annotated `0042.jpg`.

    Raises:
        ConfigError: no image in common.
    """
    images = load_images(uri, columns=["image_id", "status"])
    index = match_names(images.image_id.tolist(), truth.image_ids)
    if truth.num_images and not index:
        raise ConfigError(
            f"none of the {len(images):,} images of {uri} is annotated: "
            f"compare its {_example(images.image_id)} with the annotated {_example(truth.image_ids)}"
        )
    processed = np.zeros(truth.num_images, bool)
    processed[list(index.values())] = True
    failed = images.image_id[images.status == "failed"]
    return ImageMatch(index, processed, int(failed.isin(list(index)).sum()))


def match_names(image_ids: Sequence[str], annotated: Sequence[str]) -> dict[str, int]:
    """Position in `annotated` by image id, where the two certainly are the same image."""
    exact = {name: i for i, name in enumerate(annotated)}
    found = {image_id: exact[image_id] for image_id in image_ids if image_id in exact}
    for depth in range(1, 6):
        taken = set(found.values())
        left = _unique_tails((name for i, name in enumerate(annotated) if i not in taken), depth)
        mine = _unique_tails((image_id for image_id in image_ids if image_id not in found), depth)
        found |= {mine[tail]: exact[left[tail]] for tail in mine.keys() & left.keys()}
    return found


def read_output(
    uri: str,
    truth: GroundTruth,
    images: ImageMatch,
    *,
    class_names: Sequence[str] | None = None,
    min_score: float | None = None,
) -> Detected:
    """Read the detections of an output folder, those of annotated images and classes.

    Classes are told by name. Boxes of unannotated images are left out.

    Args:
        uri: the output folder.
        truth: the data set.
        images: from `match_images`.
        class_names: read only these.
        min_score: read only detections with at least this score.
    """
    label_by_name = {name: label for label, name in truth.class_names.items()}
    unknown: Counter[str] = Counter()
    pieces = [Detected(np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0))]
    for frame in iter_detections(uri, class_names=class_names, min_score=min_score, columns=COLUMNS):
        index = frame.image_id.map(images.index).to_numpy(np.float64)
        labels = frame.class_name.map(label_by_name).to_numpy(np.float64)
        annotated = ~np.isnan(index)
        unknown.update(frame.class_name[annotated & np.isnan(labels)].tolist())
        kept = np.flatnonzero(annotated & ~np.isnan(labels))
        pieces.append(_columns(frame.iloc[kept], index[kept], labels[kept]))
    return Detected(
        image_index=np.concatenate([piece.image_index for piece in pieces]),
        boxes_xywh=np.concatenate([piece.boxes_xywh for piece in pieces]),
        labels=np.concatenate([piece.labels for piece in pieces]),
        scores=np.concatenate([piece.scores for piece in pieces]),
        unknown_classes=dict(unknown),
    )


def _columns(frame: pd.DataFrame, index: np.ndarray, labels: np.ndarray) -> Detected:
    corners = frame[["xmin", "ymin", "xmax", "ymax"]].to_numpy(np.float64)
    return Detected(
        image_index=index.astype(np.int32),
        boxes_xywh=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        labels=labels.astype(np.int32),
        scores=frame["score"].to_numpy(np.float64),
    )


def _unique_tails(names: Iterable[str], depth: int) -> dict[str, str]:
    """The last `depth` parts of each path, without extension, where only one name has them."""
    by_tail: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        stem = posixpath.splitext(name)[0]
        by_tail["/".join(stem.split("/")[-depth:])].append(name)
    return {tail: found[0] for tail, found in by_tail.items() if len(found) == 1}


def _example(names: Iterable[str]) -> str:
    return next(iter(names), "(nothing)")

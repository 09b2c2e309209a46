"""Hand-written output folders, for tests of everything that reads one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema

MODEL = {"architecture": "tiny", "class_names": ["person", "dog", "cat", "naïve 猫"], "score_threshold": 0.05}


def image(image_id: str, num_detections: int = 0, **changes: Any) -> dict[str, Any]:
    """One row of `images/`."""
    row = {
        "image_id": image_id, "uri": f"/in/{image_id}", "shard": "a.tar", "shard_index": 0, "shard_size": 2,
        "width": 100, "height": 50, "num_bytes": 1000, "num_detections": num_detections, "status": "ok",
        "error_stage": "", "error_type": "", "error_message": "",
    }  # fmt: skip
    return row | changes


def failed_image(image_id: str, **changes: Any) -> dict[str, Any]:
    """One row of `images/` of an image that could not be decoded."""
    failed = {"status": "failed", "error_stage": "decode", "error_type": "UnidentifiedImageError"}
    failed |= {"error_message": "cannot identify image file"}
    return image(image_id, width=0, height=0) | failed | changes


def box(image_id: str, class_name: str = "dog", score: float = 0.9, **changes: Any) -> dict[str, Any]:
    """One row of `detections/`."""
    row = {
        "image_id": image_id, "detection_id": 0, "label": 18, "class_name": class_name, "score": score,
        "xmin": 10.0, "ymin": 5.0, "xmax": 50.0, "ymax": 45.0, "image_width": 100, "image_height": 50,
    }  # fmt: skip
    return row | changes


def write_part(
    output: Path,
    name: str,
    images: Sequence[dict[str, Any]],
    boxes: Sequence[dict[str, Any]],
    *,
    round: int = 0,
    replaces: Sequence[str] = (),
    version: str = schema.VERSION,
    model: dict[str, Any] | None = None,
) -> None:
    """Commit one part as a run does: the boxes, then the images whose footer names the boxes' file."""
    meta = {
        schema.META_VERSION: version,
        schema.META_FINGERPRINT: "f1",
        schema.META_MODEL: json.dumps(MODEL if model is None else model),
        schema.META_RUN: "r1",
        schema.META_ROUND: str(round),
        schema.META_REPLACES: json.dumps(replaces),
        schema.META_DETECTIONS_PART: f"{name}-d.parquet",
    }
    _write(output / "detections" / f"{name}-d.parquet", schema.DETECTIONS, boxes, meta)
    _write(output / "images" / f"{name}.parquet", schema.IMAGES, images, meta)


def _write(path: Path, columns: pa.Schema, rows: Sequence[dict[str, Any]], meta: dict[bytes, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=columns).replace_schema_metadata(meta)
    pq.write_table(table, path, compression="zstd")

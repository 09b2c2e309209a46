"""Average precision during training: the detector and the measure that inference and evaluation use."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from pipeline.data.annotations import Classes
from pipeline.errors import ConfigError
from pipeline.evaluation.boxsets import Detected, GroundTruth
from pipeline.evaluation.coco import class_numbers, coco_curves, coco_numbers
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.detector import Detector
from pipeline.model.ssd import SSD
from pipeline.training.index import annotation
from pipeline.training.samples import ValidationImages

BATCH_SIZE = 16


def ground_truth(index: pa.Table, classes: Classes) -> GroundTruth:
    """The annotated boxes of an index; labels are the data set's ids."""
    rows = [annotation(row) for row in index.drop(["uri"]).to_pylist()]
    counts = [len(row.boxes) for row in rows]
    boxes = np.concatenate([row.boxes for row in rows] or [np.zeros((0, 4))]).astype(np.float64)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    ids = np.array([0, *classes.ids], np.int32)
    return GroundTruth(
        image_ids=tuple(index["image_id"].to_pylist()),
        class_names=dict(zip(classes.ids, classes.names, strict=True)),
        image_index=np.repeat(np.arange(len(rows)), counts).astype(np.int32),
        boxes_xywh=xywh,
        labels=ids[_joined([row.labels for row in rows], np.int64)],
        areas=xywh[:, 2] * xywh[:, 3],
        crowd=_joined([row.crowd for row in rows], np.bool_),
        difficult=_joined([row.difficult for row in rows], np.bool_),
    )


def validate(
    model: SSD, parts: Iterable[ValidationImages], truth: GroundTruth, *, device: str = "cpu"
) -> dict[str, float]:
    """COCO's AP of a model; called by every worker with its own images, all get the same numbers.

    Returns:
        The twelve numbers by name, and "AP/<class name>" of each class.
    """
    found = gather(detect(model, parts, device=device))
    curves = coco_curves(truth, found, sorted(truth.class_names))
    by_class = class_numbers(curves)
    return coco_numbers(curves) | {
        f"AP/{truth.class_names[label]}": numbers["AP"] for label, numbers in by_class.items()
    }


def detect(model: SSD, parts: Iterable[ValidationImages], *, device: str) -> Detected:
    """Detections as the inference job would write them, from the same detector."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_checkpoint(model, path)
        detector = Detector(str(path), device=device)
    pieces = [_no_detections()]
    for part in parts:
        for start in range(0, len(part.numbers), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            some = detector(part.images_NHW3[rows].copy(), part.sizes_N2[rows].copy())  # not read-only
            corners = some.boxes.astype(np.float64)
            xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            index = part.numbers[rows][some.image_index].astype(np.int32)
            pieces.append(Detected(index, xywh, some.labels.astype(np.int32), some.scores.astype(np.float64)))
    return _concatenate(pieces)


def gather(mine: Detected) -> Detected:
    """The detections of all workers, in the order of images."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    found: list[Detected] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    joined = _concatenate(found)
    return joined.select(np.argsort(joined.image_index, kind="stable"))


def check_measurable() -> None:
    """Refuse before the first step what could only fail at the first validation."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError("training needs faster-coco-eval: pip install 'shardshot[eval]'") from error


def _no_detections() -> Detected:
    return Detected(np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0))


def _concatenate(pieces: Sequence[Detected]) -> Detected:
    names = ("image_index", "boxes_xywh", "labels", "scores")
    return Detected(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in names))


def _joined(lists: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([*lists, np.zeros(0, dtype)]).astype(dtype)

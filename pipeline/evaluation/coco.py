"""The twelve COCO numbers, by faster-coco-eval.

COCO's measure treats each class alone, so classes can be measured in groups, one after the other in little
memory or side by side on a cluster, and the results are put together afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.evaluation.boxsets import Detected, GroundTruth

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MAX_DETECTIONS = (1, 10, 100)


@dataclass(frozen=True)
class CocoCurves:
    """What `COCOeval.accumulate` gives; -1 where a class has no annotated box of that size.

    T 10 IoU thresholds, R 101 recalls, C classes, A sizes (all, small, medium, large), M limits (1, 10, 100).
    """

    labels: tuple[int, ...]
    precision: np.ndarray
    """float64 [T, R, C, A, M]."""
    recall: np.ndarray
    """float64 [T, C, A, M]."""


def coco_curves(truth: GroundTruth, detected: Detected, labels: Sequence[int]) -> CocoCurves:
    """Measure these classes.

    Raises:
        ConfigError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval.core import COCOeval_faster
    except ImportError as error:
        raise ConfigError("the COCO metric needs faster-coco-eval: pip install 'shardshot[eval]'") from error

    tables = []
    for annotations in (_annotations(truth, labels), _results(detected, labels)):
        table = COCO()
        table.dataset = {
            "images": [{"id": i} for i in range(truth.num_images)],
            "categories": [{"id": label, "name": str(label)} for label in sorted(labels)],
            "annotations": annotations,
        }
        table.createIndex()
        tables.append(table)
    measure = COCOeval_faster(*tables, iouType="bbox", print_function=_silent)
    measure.params.imgIds = list(range(truth.num_images))
    measure.params.catIds = sorted(labels)
    measure.evaluate()
    measure.accumulate()
    T, R, C, A, M = 10, 101, len(labels), 4, len(MAX_DETECTIONS)
    return CocoCurves(
        labels=tuple(sorted(labels)),
        precision=np.asarray(measure.eval["precision"], np.float64).reshape(T, R, C, A, M),
        recall=np.asarray(measure.eval["recall"], np.float64).reshape(T, C, A, M),
    )


def join(groups: Sequence[CocoCurves]) -> CocoCurves:
    """Put groups of classes together, in the order of their labels."""
    labels = [label for group in groups for label in group.labels]
    order = np.argsort(labels)
    return CocoCurves(
        labels=tuple(labels[i] for i in order),
        precision=np.concatenate([group.precision for group in groups], axis=2)[:, :, order],
        recall=np.concatenate([group.recall for group in groups], axis=1)[:, order],
    )


def coco_numbers(curves: CocoCurves) -> dict[str, float]:
    """The twelve numbers by name; -1 where nothing of that size is annotated, as in pycocotools."""
    precision, recall = curves.precision, curves.recall
    values = [
        *(_mean(p) for p in (precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2])),
        *(_mean(precision[..., size, 2]) for size in (1, 2, 3)),
        *(_mean(recall[..., 0, limit]) for limit in (0, 1, 2)),
        *(_mean(recall[..., size, 2]) for size in (1, 2, 3)),
    ]
    return dict(zip(NAMES, values, strict=True))


def class_numbers(curves: CocoCurves) -> dict[int, dict[str, float]]:
    """The twelve numbers of each class, by label."""
    return {
        label: coco_numbers(
            CocoCurves((label,), curves.precision[:, :, i : i + 1], curves.recall[:, i : i + 1])
        )
        for i, label in enumerate(curves.labels)
    }


def _mean(values: np.ndarray) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _silent(*_: object) -> None:
    pass


def _annotations(truth: GroundTruth, labels: Sequence[int]) -> list[dict[str, Any]]:
    rows = np.flatnonzero(np.isin(truth.labels, labels))
    columns = (truth.image_index, truth.labels, truth.boxes_xywh, truth.areas, truth.crowd.astype(int))
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    lists = [(rows + 1).tolist(), *(column[rows].tolist() for column in columns)]
    return [dict(zip(keys, values, strict=True)) for values in zip(*lists, strict=True)]


def _results(detected: Detected, labels: Sequence[int]) -> list[dict[str, Any]]:
    rows = np.flatnonzero(np.isin(detected.labels, labels))
    areas = detected.boxes_xywh[:, 2] * detected.boxes_xywh[:, 3]
    columns = (detected.image_index, detected.labels, detected.boxes_xywh, areas, detected.scores)
    keys = ("id", "image_id", "category_id", "bbox", "area", "score")
    lists = [(rows + 1).tolist(), *(column[rows].tolist() for column in columns)]
    return [dict(zip(keys, values, strict=True), iscrowd=0) for values in zip(*lists, strict=True)]

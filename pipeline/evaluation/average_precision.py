"""Precision, recall and average precision from matched detections."""

import numpy as np

from pipeline.evaluation.matching import Matches

COCO_RECALLS = np.linspace(0, 1, 101)


def precision_recall(matches: Matches, threshold: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection that is not ignored, from the best score down.

    Args:
        matches: of one class.
        threshold: index of the IoU threshold.

    Returns:
        (precision, recall), float64; empty where nothing is annotated or detected.
    """
    if not matches.num_positives:
        return np.zeros(0), np.zeros(0)
    correct = matches.correct[threshold][~matches.ignored[threshold]]
    found = np.cumsum(correct)
    return found / np.arange(1, len(correct) + 1), found / matches.num_positives


def coco_ap(precision: np.ndarray, recall: np.ndarray) -> float:
    """Mean of the best precision at 101 recalls (`COCOeval.accumulate`)."""
    best = _best_from_here(precision)
    steps = np.searchsorted(recall, COCO_RECALLS, side="left")
    return float(np.append(best, 0.0)[steps].mean())


def voc07_ap(precision: np.ndarray, recall: np.ndarray) -> float:
    """Mean of the best precision at 11 recalls (`VOCevaldet.m` of the 2007 devkit)."""
    best = [precision[recall >= step / 10].max(initial=0.0) for step in range(11)]
    return float(np.mean(best))


def all_point_ap(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the best precision (`VOCap.m` of the devkits since 2010)."""
    widths = np.diff(recall, prepend=0.0)
    return float((widths * _best_from_here(precision)).sum())


def _best_from_here(precision: np.ndarray) -> np.ndarray:
    """The highest precision at this or any higher recall."""
    return np.maximum.accumulate(precision[::-1])[::-1]

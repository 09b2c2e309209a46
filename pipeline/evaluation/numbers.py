"""What was measured as plain values, for JSON files and tables."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.evaluation.coco import class_numbers, coco_numbers
from pipeline.evaluation.matching import Matches
from pipeline.evaluation.quality import (
    Calibration,
    all_classes,
    best_threshold,
    interval,
    resample_images,
    resampled_ap,
    shown_from,
)
from pipeline.evaluation.run import AP_RULES, Evaluation

NUM_CONFUSIONS = 20


def numbers(evaluation: Evaluation, *, num_resamples: int = 0, seed: int = 0) -> dict[str, Any]:
    """Everything measured as plain values for JSON; -1 where nothing is annotated, as in pycocotools.

    Args:
        evaluation: from `evaluate`.
        num_resamples: of the images, for 95 % confidence intervals; 0 leaves them out.
        seed: of the resamples.
    """
    truth, source = evaluation.truth, evaluation.source
    found: dict[str, Any] = {"metric": evaluation.metric, **_headline(evaluation)}
    if num_resamples:
        found["confidence_intervals"] = _intervals(evaluation, found, num_resamples, seed)
    found |= {
        "num_images": truth.num_images,
        "num_failed_images": source.num_failed,
        "num_annotated": sum(one.num_positives for one in evaluation.matches.values()),
        "num_detections": sum(len(one.scores) for one in evaluation.matches.values()),
        "not_annotated_classes": source.not_annotated,
        "at_threshold": _at_threshold(evaluation),
        "per_class": {truth.class_names[label]: row for label, row in _per_class(evaluation).items()},
        "confusions": confusions(evaluation)[:NUM_CONFUSIONS],
        "calibration": _calibration(evaluation.calibration),
    }
    return found


def thresholds_by_class(evaluation: Evaluation) -> dict[str, float]:
    """The score threshold of the highest F1 of each detected class, the file of `infer.py --score-threshold`.

    Classes that were never right, or are not annotated, get the threshold that is best for all together.
    """
    overall = best_threshold(all_classes(evaluation.matches.values()))
    found = {}
    for label, one in evaluation.matches.items():
        best = evaluation.best_thresholds.get(label, overall)
        if best is not None and len(one.scores):
            found[evaluation.truth.class_names[label]] = best.threshold
    return found


def confusions(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Pairs of different classes that were taken for each other, the most frequent first."""
    table = evaluation.confusion[:-1, :-1].copy()
    np.fill_diagonal(table, 0)
    rows, columns = np.nonzero(table)
    order = np.argsort(-table[rows, columns], kind="stable")
    names = evaluation.class_names
    return [
        {"annotated": names[row], "detected": names[column], "count": int(table[row, column])}
        for row, column in zip(rows[order], columns[order], strict=True)
    ]


def _headline(evaluation: Evaluation) -> dict[str, float]:
    if evaluation.curves is not None:
        return coco_numbers(evaluation.curves)
    return {"mAP": _mean_ap(evaluation, evaluation.matches.values())}


def _mean_ap(evaluation: Evaluation, matches: Iterable[Matches]) -> float:
    aps = [
        np.mean([evaluation.average_precision(one, t) for t in range(len(one.correct))])
        for one in matches
        if one.num_positives
    ]
    return float(np.mean(aps)) if aps else -1.0


def _at_threshold(evaluation: Evaluation) -> dict[str, float]:
    shown = [shown_from(one, evaluation.score_threshold) for one in evaluation.matches.values()]
    use = evaluation.in_use
    return {
        "score_threshold": use.threshold,
        "precision": use.precision,
        "recall": use.recall,
        "f1": use.f1,
        evaluation.main_name: _mean_ap(evaluation, shown),
    }


def _per_class(evaluation: Evaluation) -> dict[int, dict[str, Any]]:
    if evaluation.curves is not None:
        measured = class_numbers(evaluation.curves)
    else:
        measured = {
            label: {"AP": evaluation.average_precision(one)} for label, one in evaluation.matches.items()
        }
    rows = {}
    for label, one in evaluation.matches.items():
        counts = {"num_annotated": one.num_positives, "num_detections": len(one.scores)}
        best = evaluation.best_thresholds.get(label)
        in_use = {"best_threshold": best.threshold, "best_f1": best.f1} if best else {}
        rows[label] = {**measured[label], **counts, **in_use}
    return rows


def _intervals(
    evaluation: Evaluation, measured: dict[str, Any], num_resamples: int, seed: int
) -> dict[str, Any]:
    aps_ST = resampled_aps(evaluation, num_resamples, seed)
    found: dict[str, Any] = {"level": 0.95, "num_resamples": num_resamples, "seed": seed}
    name = evaluation.main_name
    found[name] = _plain(interval(aps_ST.mean(axis=1), measured[name]))
    if evaluation.metric == "coco":
        found["AP50"] = _plain(interval(aps_ST[:, 0], measured["AP50"]))
    return found


def resampled_aps(evaluation: Evaluation, num_resamples: int, seed: int) -> np.ndarray:
    """AP of resampled images by IoU threshold, [S, T]; the same seed draws the same images for two runs."""
    draws_SN = resample_images(np.random.default_rng(seed), evaluation.truth.num_images, num_resamples)
    return resampled_ap(evaluation.matches.values(), draws_SN, AP_RULES[evaluation.metric])


def _calibration(calibration: Calibration) -> dict[str, Any]:
    columns = {name: values.tolist() for name, values in asdict(calibration).items()}
    bins = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    filled = [{"min_score": i / 10, **row} for i, row in enumerate(bins) if row["num_detections"]]
    return {"expected_calibration_error": calibration.error, "bins": filled}


def _plain(ends: tuple[float, float]) -> list[float]:
    return [-1.0 if math.isnan(end) else end for end in ends]

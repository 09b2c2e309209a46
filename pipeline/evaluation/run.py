"""Measure detections against annotations.

Classes are measured in groups that fit in memory, here or on a Ray cluster, and put together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipeline.evaluation.average_precision import all_point_ap, coco_ap, precision_recall, voc07_ap
from pipeline.evaluation.boxsets import GroundTruth
from pipeline.evaluation.coco import CocoCurves, class_numbers, coco_curves, coco_numbers, join
from pipeline.evaluation.detections import OutputFolder, ResultsFile, open_detections
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.evaluation.matching import Matches, match_coco, match_voc
from pipeline.evaluation.quality import (
    Calibration,
    InUse,
    best_threshold,
    calibrate,
    confusion,
    in_use,
    interval,
    resample_images,
    resampled_ap,
    shown_from,
)

Metric = Literal["coco", "voc", "voc07"]

AP_RULES = {"coco": coco_ap, "voc": all_point_ap, "voc07": voc07_ap}
# The library wants a dict of about 0.7 kB for each detection.
DETECTIONS_PER_GROUP = 500_000
NUM_CONFUSIONS = 20


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one run."""

    metric: Metric
    truth: GroundTruth
    source: ResultsFile | OutputFolder
    matches: dict[int, Matches]
    """By label."""
    curves: CocoCurves | None
    """Of the COCO metric."""
    score_threshold: float
    in_use: InUse
    """At the score threshold."""
    best_thresholds: dict[int, InUse]
    """By label, where the class is annotated and found."""
    calibration: Calibration
    confusion: np.ndarray
    """int64 [C + 1, C + 1] at the score threshold: see `quality.confusion`."""

    @property
    def class_names(self) -> list[str]:
        """In the order of labels, as in `confusion`."""
        return [self.truth.class_names[label] for label in sorted(self.truth.class_names)]

    @property
    def main_name(self) -> str:
        """The key of the one number that sums all up."""
        return "AP" if self.metric == "coco" else "mAP"

    def average_precision(self, matches: Matches, threshold: int = 0) -> float:
        """AP of one class at one IoU threshold; -1 where nothing is annotated."""
        if not matches.num_positives:
            return -1.0
        return AP_RULES[self.metric](*precision_recall(matches, threshold))


def evaluate(
    detections: str,
    annotations: str,
    *,
    metric: Metric = "coco",
    score_threshold: float = 0.5,
    split: str = "",
    partial: bool = False,
    distributed: bool = False,
) -> Evaluation:
    """Measure the detections of a run.

    Args:
        detections: output folder, or a COCO results file.
        annotations: see `read_ground_truth`.
        metric: "coco" (the 12 numbers), "voc" (area under the curve, IoU 0.5) or "voc07" (11 points).
        score_threshold: the one in use, for precision, recall and confusion.
        split: VOC: only the images of this list.
        partial: measure only the annotated images that are in the run.
        distributed: measure groups of classes on the Ray cluster.

    Raises:
        ConfigError: one of them is not there or not readable, or they don't belong together.
    """
    source, truth = open_detections(detections, read_ground_truth(annotations, split=split), partial=partial)
    return measure(truth, source, metric=metric, score_threshold=score_threshold, distributed=distributed)


def measure(
    truth: GroundTruth,
    source: ResultsFile | OutputFolder,
    *,
    metric: Metric,
    score_threshold: float = 0.5,
    distributed: bool = False,
) -> Evaluation:
    """`evaluate` on what is open already."""
    groups = class_groups(source.counts, sorted(truth.class_names), DETECTIONS_PER_GROUP)
    measured = (_on_ray if distributed else _here)(truth, source, groups, metric)
    matches = {label: one for of_group, _ in measured for label, one in of_group.items()}
    matches = {label: matches[label] for label in sorted(matches)}
    best = {label: best_threshold(one) for label, one in matches.items()}
    return Evaluation(
        metric=metric,
        truth=truth,
        source=source,
        matches=matches,
        curves=join([curves for _, curves in measured if curves is not None]) if metric == "coco" else None,
        score_threshold=score_threshold,
        in_use=in_use(matches.values(), score_threshold),
        best_thresholds={label: one for label, one in best.items() if one is not None},
        calibration=calibrate(matches.values()),
        confusion=confusion(truth, source.read(truth, min_score=score_threshold)),
    )


# ---- groups of classes -------------------------------------------------------------------------------

Measured = tuple[dict[int, Matches], CocoCurves | None]


def class_groups(counts: Mapping[int, int], labels: Sequence[int], max_detections: int) -> list[list[int]]:
    """Divide classes into groups of at most so many detections (a larger class is a group of its own)."""
    groups: list[list[int]] = [[]]
    held = 0
    for label in labels:
        if groups[-1] and held + counts.get(label, 0) > max_detections:
            groups.append([])
            held = 0
        groups[-1].append(label)
        held += counts.get(label, 0)
    return groups


def _measure_group(
    truth: GroundTruth, source: ResultsFile | OutputFolder, labels: list[int], metric: Metric
) -> Measured:
    detected = source.read(truth, labels)
    rule = match_coco if metric == "coco" else match_voc
    matches = {label: rule(truth, detected, label) for label in labels}
    return matches, coco_curves(truth, detected, labels) if metric == "coco" else None


def _here(
    truth: GroundTruth, source: ResultsFile | OutputFolder, groups: list[list[int]], metric: Metric
) -> list[Measured]:
    return [_measure_group(truth, source, labels, metric) for labels in groups]


def _on_ray(
    truth: GroundTruth, source: ResultsFile | OutputFolder, groups: list[list[int]], metric: Metric
) -> list[Measured]:
    import ray  # only here: measuring on one machine doesn't wait for it

    from pipeline.runtime import start_ray

    start_ray()
    task = ray.remote(num_cpus=1)(_measure_group)
    shared = ray.put(truth), ray.put(source)
    return ray.get([task.remote(*shared, labels, metric) for labels in groups])


# ---- numbers -----------------------------------------------------------------------------------------


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
    """The score threshold of the highest F1 for each class, for `jobs/infer.py --score-threshold FILE`."""
    return {
        evaluation.truth.class_names[label]: best.threshold
        for label, best in evaluation.best_thresholds.items()
    }


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


def _mean_ap(evaluation: Evaluation, matches: Any) -> float:
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

"""Measure detections against annotations.

Classes are measured in groups that fit in memory, here or on a Ray cluster, and put together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.errors import own_error
from pipeline.evaluation.average_precision import all_point_ap, coco_ap, precision_recall, voc07_ap
from pipeline.evaluation.boxsets import GroundTruth
from pipeline.evaluation.coco import CocoCurves, coco_curves, join
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
)

Metric = Literal["coco", "voc", "voc07"]

AP_RULES = {"coco": coco_ap, "voc": all_point_ap, "voc07": voc07_ap}
# The library wants a dict of about 0.7 kB for each detection.
DETECTIONS_PER_GROUP = 500_000


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
    import ray.exceptions

    from pipeline.runtime import start_ray

    start_ray()
    task = ray.remote(num_cpus=1)(_measure_group)
    shared = ray.put(truth), ray.put(source)
    try:
        return ray.get([task.remote(*shared, labels, metric) for labels in groups])
    except ray.exceptions.RayTaskError as error:
        if ours := own_error(error):
            raise ours from None
        raise

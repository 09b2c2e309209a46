"""Beyond AP: confidence intervals, precision and recall in use, thresholds by class, calibration, confusion.

S resamples, N images, T IoU thresholds, D detections, P annotated boxes of one class, F right detections,
C classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.average_precision import precision_recall
from pipeline.evaluation.boxsets import Detected, GroundTruth
from pipeline.evaluation.matching import Matches, box_ious

AveragePrecision = Callable[[np.ndarray, np.ndarray], float]


# ---- confidence intervals ----------------------------------------------------------------------------


def resample_images(rng: np.random.Generator, num_images: int, num_resamples: int) -> np.ndarray:
    """How often each image is drawn, uint8 [S, N]: N images drawn with replacement, S times.

    The images are what a data set is a sample of; boxes in one image are not independent.
    """
    if not num_images:
        return np.zeros((num_resamples, 0), np.uint8)
    draws = (rng.integers(0, num_images, num_images) for _ in range(num_resamples))
    counts = (np.bincount(draw, minlength=num_images) for draw in draws)
    return (
        np.stack([count.astype(np.uint8) for count in counts]) if num_resamples else np.zeros((0, num_images))
    )


def resampled_ap(
    matches: Iterable[Matches], draws_SN: np.ndarray, average_precision: AveragePrecision
) -> np.ndarray:
    """AP of each resample and IoU threshold, mean over the classes annotated in it; float64 [S, T].

    NaN where a resample has no annotated box at all.
    """
    by_class = [_resampled_class_ap(one, draws_SN, average_precision) for one in matches if one.num_positives]
    if not by_class:
        return np.full((len(draws_SN), 1), np.nan)
    aps_CST = np.stack(by_class)
    measured_CST = ~np.isnan(aps_CST)
    count_ST = measured_CST.sum(axis=0)
    total_ST = np.where(measured_CST, aps_CST, 0.0).sum(axis=0)
    return np.divide(total_ST, count_ST, out=np.full(count_ST.shape, np.nan), where=count_ST > 0)


def _resampled_class_ap(
    matches: Matches, draws_SN: np.ndarray, average_precision: AveragePrecision
) -> np.ndarray:
    """[S, T]; NaN where a resample has no annotated box of the class.

    Precision and recall are computed at right detections only: in between precision falls and recall stays,
    so no AP rule looks there.
    """
    positives_S = draws_SN[:, matches.positives].sum(axis=1)
    weights_SD = draws_SN[:, matches.image_index]
    seen_SD = np.cumsum(weights_SD, axis=1, dtype=np.int64)
    aps_ST = np.full((len(draws_SN), len(matches.correct)), np.nan)
    for t, (correct_D, ignored_D) in enumerate(zip(matches.correct, matches.ignored, strict=True)):
        right, ignored = np.flatnonzero(correct_D), np.flatnonzero(ignored_D)
        found_SF = np.cumsum(weights_SD[:, right], axis=1, dtype=np.int64)
        none_S1 = np.zeros((len(draws_SN), 1), np.int64)
        ignored_S = np.concatenate(
            [none_S1, np.cumsum(weights_SD[:, ignored], axis=1, dtype=np.int64)], axis=1
        )
        counted_SF = seen_SD[:, right] - ignored_S[:, np.searchsorted(ignored, right)]
        precision_SF = found_SF / np.maximum(counted_SF, 1)
        for s in np.flatnonzero(positives_S):
            aps_ST[s, t] = average_precision(precision_SF[s], found_SF[s] / positives_S[s])
    return aps_ST


def interval(values_S: np.ndarray, measured: float, *, level: float = 0.95) -> tuple[float, float]:
    """The central part of the resampled values that holds `level` of them, moved onto the measured value.

    AP of resamples is higher than AP of the set, as they hold fewer different images (COCO-like 5,000 images:
    0.044 against 0.042, as with half of the images drawn without replacement), so only their spread is used.
    NaN where there is no value.
    """
    values_S = values_S[~np.isnan(values_S)]
    if not len(values_S):
        return float("nan"), float("nan")
    low, high = np.quantile(values_S, [(1 - level) / 2, (1 + level) / 2])
    shift = measured - values_S.mean()
    return float(low + shift), float(high + shift)


# ---- in use, at a score threshold --------------------------------------------------------------------


@dataclass(frozen=True)
class InUse:
    """What a user of one score threshold gets, at the first IoU threshold."""

    threshold: float
    precision: float
    recall: float
    f1: float


def in_use(matches: Iterable[Matches], threshold: float) -> InUse:
    """Precision, recall and F1 over all classes together, of detections with at least this score."""
    right = wrong = positives = 0
    for one in matches:
        shown = (one.scores >= threshold) & ~one.ignored[0]
        right += int((one.correct[0] & shown).sum())
        wrong += int((~one.correct[0] & shown).sum())
        positives += one.num_positives
    return InUse(
        threshold=threshold,
        precision=right / max(right + wrong, 1),
        recall=right / max(positives, 1),
        f1=2 * right / max(right + wrong + positives, 1),
    )


def shown_from(matches: Matches, threshold: float) -> Matches:
    """Without the detections below a score: what is left is matched as before, as the best come first."""
    shown = matches.scores >= threshold
    return Matches(
        scores=matches.scores[shown],
        image_index=matches.image_index[shown],
        correct=matches.correct[:, shown],
        ignored=matches.ignored[:, shown],
        truth_row=matches.truth_row[shown],
        positives=matches.positives,
    )


def best_threshold(matches: Matches) -> InUse | None:
    """The score threshold of the highest F1 of a class, the higher of equal ones.

    Returns:
        None where nothing is annotated or found. The threshold is itself a score, so `score >= threshold`
        keeps that detection.
    """
    precision, recall = precision_recall(matches)
    if not recall.any():
        return None
    scores = matches.scores[~matches.ignored[0]]
    last_of_equal = np.append(scores[1:] != scores[:-1], True)  # a threshold keeps all equal scores
    f1 = np.where(last_of_equal, 2 * precision * recall / np.maximum(precision + recall, 1e-12), -1.0)
    best = int(f1.argmax())
    return InUse(float(scores[best]), float(precision[best]), float(recall[best]), float(f1[best]))


def all_classes(matches: Iterable[Matches]) -> Matches:
    """The detections of all classes as if of one, at the first IoU threshold."""
    several = list(matches)
    scores = np.concatenate([np.zeros(0), *(one.scores for one in several)])
    order = np.argsort(-scores, kind="stable")
    empty = np.zeros(0, np.int64)
    return Matches(
        scores=scores[order],
        image_index=np.concatenate([empty, *(one.image_index for one in several)])[order],
        correct=np.concatenate([empty > 0, *(one.correct[0] for one in several)])[None, order],
        ignored=np.concatenate([empty > 0, *(one.ignored[0] for one in several)])[None, order],
        truth_row=np.concatenate([empty, *(one.truth_row for one in several)])[order],
        positives=np.concatenate([empty, *(one.positives for one in several)]),
    )


# ---- calibration -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """How often detections of a score are right: 10 bins of equal width over 0 to 1."""

    num_detections: np.ndarray
    """int64 [10]."""
    mean_score: np.ndarray
    """float64 [10]; NaN in an empty bin."""
    precision: np.ndarray
    """float64 [10]: the share that is right; NaN in an empty bin."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of score and precision, weighted by detections."""
        weights = self.num_detections / max(self.num_detections.sum(), 1)
        return float(np.nansum(weights * np.abs(self.mean_score - self.precision)))


def calibrate(matches: Iterable[Matches]) -> Calibration:
    """Compare scores with the share of right detections, all classes together, at the first IoU threshold."""
    counts, scores, right = np.zeros(10), np.zeros(10), np.zeros(10)
    for one in matches:
        kept = ~one.ignored[0]
        bins = np.clip((one.scores[kept] * 10).astype(int), 0, 9)
        counts += np.bincount(bins, minlength=10)
        scores += np.bincount(bins, weights=one.scores[kept], minlength=10)
        right += np.bincount(bins, weights=one.correct[0][kept], minlength=10)
    filled = counts > 0
    empty = np.full(10, np.nan)
    return Calibration(
        num_detections=counts.astype(np.int64),
        mean_score=np.divide(scores, counts, out=empty.copy(), where=filled),
        precision=np.divide(right, counts, out=empty.copy(), where=filled),
    )


# ---- confusion ---------------------------------------------------------------------------------------


def confusion(truth: GroundTruth, detected: Detected, *, iou: float = 0.5) -> np.ndarray:
    """Which class is taken for which, int64 [C + 1, C + 1]: rows annotated, columns detected, last = nothing.

    In each image, boxes of the same class are paired first, then what is left with any class, the best
    scores first. Detections on crowd or difficult boxes don't count. Classes are in the order of labels.
    """
    labels = np.array(sorted(truth.class_names), np.int64)
    nothing = len(labels)
    table = np.zeros((nothing + 1, nothing + 1), np.int64)
    order_D = np.lexsort((-detected.scores, detected.image_index))
    order_G = np.argsort(truth.image_index, kind="stable")
    images = np.arange(truth.num_images + 1)
    starts_D = np.searchsorted(detected.image_index[order_D], images)
    starts_G = np.searchsorted(truth.image_index[order_G], images)
    class_D = np.searchsorted(labels, detected.labels)
    class_G = np.searchsorted(labels, truth.labels)
    for image in range(truth.num_images):
        found = order_D[starts_D[image] : starts_D[image + 1]]
        there = order_G[starts_G[image] : starts_G[image + 1]]
        for there_row, found_row in _pairs(truth, detected, there, found, iou):
            row = nothing if there_row < 0 else class_G[there_row]
            column = nothing if found_row < 0 else class_D[found_row]
            table[row, column] += 1
    return table


def _pairs(
    truth: GroundTruth, detected: Detected, there: np.ndarray, found: np.ndarray, iou: float
) -> list[tuple[int, int]]:
    """(annotated row, detected row) of one image, -1 for no partner; `found` is sorted by score."""
    ignored_g = truth.crowd[there] | truth.difficult[there]
    pairs: list[tuple[int, int]] = []
    ious_dg = box_ious(detected.boxes_xywh[found], truth.boxes_xywh[there])
    ious_dg[:, ignored_g] = 0.0
    same_dg = detected.labels[found][:, None] == truth.labels[there][None]
    left = list(range(len(found)))
    for allowed_dg in (same_dg, np.ones_like(same_dg)):
        for d in list(left):
            candidates_g = np.where(allowed_dg[d], ious_dg[d], 0.0)
            if candidates_g.max(initial=0.0) >= iou:
                g = int(candidates_g.argmax())
                pairs.append((int(there[g]), int(found[d])))
                ious_dg[:, g] = 0.0
                left.remove(d)
    taken = {g for g, _ in pairs}
    pairs += [(int(g), -1) for g in there[~ignored_g] if g not in taken]
    on_ignored_d = _inside(detected.boxes_xywh[found], truth.boxes_xywh[there[ignored_g]]) >= iou
    pairs += [(-1, int(found[d])) for d in left if not on_ignored_d[d]]
    return pairs


def _inside(boxes_xywh_d4: np.ndarray, regions_xywh_g4: np.ndarray) -> np.ndarray:
    """The largest share of each box that lies in one of the regions, float64 [d]."""
    starts = np.maximum(boxes_xywh_d4[:, None, :2], regions_xywh_g4[None, :, :2])
    ends = np.minimum(
        (boxes_xywh_d4[:, :2] + boxes_xywh_d4[:, 2:])[:, None],
        (regions_xywh_g4[:, :2] + regions_xywh_g4[:, 2:])[None],
    )
    shares = np.clip(ends - starts, 0, None).prod(axis=2)
    shares /= np.maximum(boxes_xywh_d4[:, 2] * boxes_xywh_d4[:, 3], 1e-12)[:, None]
    return shares.max(axis=1, initial=0.0)

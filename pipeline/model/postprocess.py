"""From raw predictions to detections, for a whole batch: candidates, decoding, suppression, best per image.

Shapes: N images, A default boxes, C classes incl. background at 0, K candidates (pairs of a default box and
a class whose score passes), M detections.
"""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline import boxes
from pipeline.model.nms import nms, rank_in_group
from pipeline.model.spec import ModelSpec, ScoreFunction

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True)
class Detections(Generic[Array]):
    """What was found in a batch, sorted by image, then by score, best first.

    Attributes:
        image_index: position of the image in the batch, int64 [M].
        boxes: corners in pixels of the original image, inside it, float32 [M, 4].
        scores: float32 [M].
        labels: ids of the classes in their data set, int64 [M].
    """

    image_index: Array
    boxes: Array
    scores: Array
    labels: Array

    @property
    def has_area(self) -> Array:
        """Which boxes have a width and a height, bool [M].

        Boxes clipped to nothing take part in the suppression and count among the best of an image, as in the
        paper; who writes detections drops (and counts) them.
        """
        return (self.boxes[:, 0] < self.boxes[:, 2]) & (self.boxes[:, 1] < self.boxes[:, 3])

    def numpy(self) -> "Detections[np.ndarray]":
        """The same as NumPy arrays."""
        return Detections(*(np.asarray(torch.as_tensor(field).cpu()) for field in vars(self).values()))


@dataclass(frozen=True)
class _Candidates:
    """Pairs of a default box and a class that pass the score threshold, sorted by image.

    Boxes are corners in fractions of the image, float32 [K, 4]; images and columns (of the logits) int64 [K];
    scores float32 [K].
    """

    images: Tensor
    columns: Tensor
    scores: Tensor
    boxes: Tensor

    def __getitem__(self, index: Tensor) -> "_Candidates":
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        return _Candidates(self.images[index], self.columns[index], self.scores[index], self.boxes[index])


def postprocess(
    deltas_NA4: Tensor,
    logits_NAC: Tensor,
    priors_cxcywh: Tensor,
    *,
    sizes_N2: Tensor,
    spec: ModelSpec,
    score_threshold: float | None = None,
) -> Detections[Tensor]:
    """Detections of a batch, as in the paper's section 2.2 and Caffe's `DetectionOutput` layer.

    Scores above the threshold; the best `pre_nms_top_k` of each class; non-maximum suppression within each
    class; the best `max_detections` of the image over all classes. Runs on the device of its inputs; the
    number of operations doesn't grow with the classes.

    Args:
        deltas_NA4: from `SSD.forward`.
        logits_NAC: from `SSD.forward`.
        priors_cxcywh: default boxes, `SSD.priors_cxcywh`.
        sizes_N2: width and height of each original image in pixels.
        spec: coder, score function and thresholds.
        score_threshold: instead of the one in `spec`.

    Returns:
        Detections on the same device; those without area are still there, see `Detections.has_area`.
    """
    threshold = spec.score_threshold if score_threshold is None else score_threshold
    candidates = _candidates(deltas_NA4, logits_NAC, priors_cxcywh, spec=spec, threshold=threshold)
    if spec.pre_nms_top_k is not None:
        candidates = _best_of_each_class(candidates, k=spec.pre_nms_top_k, columns=spec.num_classes)
    best = _suppress(candidates, num_images=logits_NAC.shape[0], spec=spec)
    label_ids = torch.tensor([0, *spec.label_ids], device=logits_NAC.device)
    sizes_M2 = sizes_N2.to(device=logits_NAC.device, dtype=torch.float32)[best.images]
    return Detections(
        image_index=best.images,
        boxes=boxes.clip(best.boxes) * sizes_M2.repeat(1, 2),
        scores=best.scores,
        labels=label_ids[best.columns],
    )


def _candidates(
    deltas_NA4: Tensor, logits_NAC: Tensor, priors_cxcywh: Tensor, *, spec: ModelSpec, threshold: float
) -> _Candidates:
    """All pairs with a score above the threshold; scores and boxes are computed only where one can be."""
    num_priors = priors_cxcywh.shape[0]
    rows = _promising(logits_NAC, function=spec.score_function, threshold=threshold)
    scores = class_scores(logits_NAC.flatten(0, 1)[rows].float(), function=spec.score_function)
    row, column = (scores > threshold).nonzero(as_tuple=True)
    decoded = decode(deltas_NA4.flatten(0, 1)[rows].float(), priors_cxcywh[rows % num_priors], spec=spec)
    return _Candidates(rows[row] // num_priors, column + 1, scores[row, column], decoded[row])


def decode(deltas: Tensor, priors_cxcywh: Tensor, *, spec: ModelSpec) -> Tensor:
    """Corners [..., 4] in fractions of the image from deltas [..., 4], as the suppression compares them."""
    decoded = boxes.decode(deltas, priors_cxcywh, weights=spec.coder_weights, max_log_size=spec.max_log_size)
    return boxes.clip(decoded) if spec.clip_before_nms else boxes.clip(decoded, low=-_FAR, high=1 + _FAR)


# How far, in image sizes, an unclipped box may reach: beyond any that a trained network decodes.
_FAR = 100.0


def _promising(logits_NAC: Tensor, *, function: ScoreFunction, threshold: float) -> Tensor:
    """Indices into the N * A default boxes of those that can have a score above the threshold, int64.

    softmax_c > t implies logit_c - logit_background > log(t / (1 - t)), and sigmoid_c > t is
    logit_c > log(t / (1 - t)): most boxes need no exponential at all. A margin covers rounding; the exact
    scores decide later.
    """
    margin = 1e-3
    best = logits_NAC[..., 1:].amax(dim=-1).float()
    if function == "softmax":
        best = best - logits_NAC[..., 0].float()
    return (best > _logit(threshold) - margin).flatten().nonzero()[:, 0]


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


def class_scores(logits: Tensor, *, function: ScoreFunction) -> Tensor:
    """Scores [..., C - 1] of the classes without the background, of logits [..., C]."""
    scores = logits.softmax(dim=-1) if function == "softmax" else logits.sigmoid()
    return scores[..., 1:]


def _best_of_each_class(candidates: _Candidates, *, k: int, columns: int) -> _Candidates:
    """The k best candidates of each class of each image, in the order given."""
    groups = _groups(candidates, columns=columns)
    if len(groups) <= k or int(groups.bincount().max()) <= k:
        return candidates
    order, rank = _rank(candidates.scores, groups)
    return candidates[order[rank < k].sort().values]


def _groups(candidates: _Candidates, *, columns: int) -> Tensor:
    """A number for each class of each image, int64 [K]."""
    return candidates.images * columns + candidates.columns


def _rank(scores_K: Tensor, groups_K: Tensor) -> tuple[Tensor, Tensor]:
    """The order by group, then by score, best first, and for each place in it the rank in its group."""
    order = scores_K.argsort(descending=True, stable=True)
    order = order[groups_K[order].argsort(stable=True)]
    return order, rank_in_group(groups_K[order])


def _suppress(candidates: _Candidates, *, num_images: int, spec: ModelSpec) -> _Candidates:
    """The best candidates that no better one of their class overlaps, sorted by image, then by score.

    Whether a candidate is kept depends on better ones alone. So the suppression, whose cost grows with the
    square of the candidates of a class, starts with the best few of each image and takes more for images of
    which these leave less than `max_detections`.
    """
    order, rank = _rank(candidates.scores, candidates.images)
    candidates = candidates[order]
    num_candidates = candidates.images.bincount(minlength=num_images)
    finished, size = [], 4 * spec.max_detections
    while True:
        best = candidates[rank < size]
        groups = _groups(best, columns=spec.num_classes)
        best = best[nms(best.boxes, groups, iou_threshold=spec.nms_iou_threshold)]
        best = best[rank_in_group(best.images) < spec.max_detections]
        num_kept = best.images.bincount(minlength=num_images)
        done = (num_kept >= spec.max_detections) | (num_candidates <= size)
        finished.append(best[done[best.images]])
        unfinished = ~done[candidates.images]
        candidates, rank = candidates[unfinished], rank[unfinished]
        if len(rank) == 0:
            return _by_image(finished)
        size *= 2


def _by_image(parts: list[_Candidates]) -> _Candidates:
    """Parts with different images as one, sorted by image."""
    if len(parts) == 1:
        return parts[0]
    whole = _Candidates(
        *(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True))
    )
    return whole[whole.images.argsort(stable=True)]

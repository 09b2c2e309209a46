"""Slow and obvious versions of the detector's arithmetic, written from the paper and the authors' Caffe code.

Plain Python loops over floats. Never imported by `pipeline`.
"""

import math
import random
from collections.abc import Sequence

import numpy as np

Box = Sequence[float]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes; 0 where the union has no area."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def encode(box: Box, prior: Box) -> tuple[float, float, float, float]:
    """Offsets (dx, dy, dw, dh) of an xyxy box to an xyxy prior, divided by the variances .1 and .2."""
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    prior_width, prior_height = prior[2] - prior[0], prior[3] - prior[1]
    return (
        ((box[0] + box[2]) / 2 - (prior[0] + prior[2]) / 2) / prior_width / 0.1,
        ((box[1] + box[3]) / 2 - (prior[1] + prior[3]) / 2) / prior_height / 0.1,
        math.log(box_width / prior_width) / 0.2,
        math.log(box_height / prior_height) / 0.2,
    )


def match(ious: Sequence[Sequence[float]], num_priors: int, *, threshold: float = 0.5) -> list[int]:
    """The ground truth of each prior, -1 for none; `ious[ground_truth][prior]`.

    `MatchBBox` of the authors' bbox_util.cpp: the best pair of all is matched and both leave, until no pair
    overlaps; then each other prior takes its best ground truth at the threshold or above. Equal IoUs: the
    first prior, then the first ground truth.
    """
    pairs = sorted(
        (-overlap, prior, ground_truth)
        for ground_truth, row in enumerate(ious)
        for prior, overlap in enumerate(row)
        if overlap > 1e-6
    )
    matched: dict[int, int] = {}
    for _, prior, ground_truth in pairs:
        if prior not in matched and ground_truth not in matched.values():
            matched[prior] = ground_truth
    for negative_overlap, prior, ground_truth in pairs:
        if prior not in matched and -negative_overlap >= threshold:
            matched[prior] = ground_truth
    return [matched.get(prior, -1) for prior in range(num_priors)]


def mine(background_losses: Sequence[float], matched: Sequence[int], *, ratio: int = 3) -> set[int]:
    """The priors of one image that serve as negatives: the unmatched ones with the highest losses."""
    num_positives = sum(ground_truth >= 0 for ground_truth in matched)
    candidates = [prior for prior, ground_truth in enumerate(matched) if ground_truth < 0]
    candidates.sort(key=lambda prior: -background_losses[prior])
    return set(candidates[: ratio * num_positives])


def smooth_l1(difference: float) -> float:
    """Half the square below 1, linear above."""
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def focal(probability: float, *, alpha: float, gamma: float = 2.0) -> float:
    """Focal loss of one yes-or-no question whose right answer got this probability."""
    return -alpha * (1 - probability) ** gamma * math.log(probability)


CAFFE_SAMPLERS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)


def sample_patch(boxes: Sequence[Box], rng: random.Random) -> tuple[int, Box]:
    """The number of the chosen batch sampler and its patch; boxes and patch relative to the image, 0 to 1."""
    found: list[tuple[int, Box]] = []
    for number, min_iou in enumerate(CAFFE_SAMPLERS):
        if min_iou is None:
            found.append((number, (0.0, 0.0, 1.0, 1.0)))
            continue
        for _ in range(50):
            patch = random_patch(rng)
            if any(iou(patch, box) >= min_iou for box in boxes):
                found.append((number, patch))
                break
    return found[rng.randrange(len(found))]


def random_patch(rng: random.Random) -> Box:
    """`SampleBBox` of the authors' sampler.cpp, with the limits of ssd_pascal.py."""
    scale = rng.uniform(0.3, 1.0)
    aspect = rng.uniform(0.5, 2.0)
    aspect = max(aspect, scale**2)
    aspect = min(aspect, 1 / scale**2)
    width, height = scale * math.sqrt(aspect), scale / math.sqrt(aspect)
    left, top = rng.uniform(0, max(0.0, 1 - width)), rng.uniform(0, max(0.0, 1 - height))
    return left, top, left + width, top + height


def resize_tf_legacy(pixels_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """TensorFlow 1's bilinear rule, value by value in float32: float32 [height, width, 3], not rounded."""

    def taps(o: int, size: int, n: int) -> tuple[int, int, np.float32]:
        s = np.float32(o) * np.float32(n / size)
        i0 = int(np.floor(s))
        return i0, min(i0 + 1, n - 1), np.float32(s - np.float32(i0))

    one = np.float32(1)
    out = np.zeros((height, width, 3), np.float32)
    for y in range(height):
        y0, y1, fy = taps(y, height, pixels_HW3.shape[0])
        for x in range(width):
            x0, x1, fx = taps(x, width, pixels_HW3.shape[1])
            for c in range(3):
                top = pixels_HW3[y0, x0, c] * (one - fx) + pixels_HW3[y0, x1, c] * fx
                bottom = pixels_HW3[y1, x0, c] * (one - fx) + pixels_HW3[y1, x1, c] * fx
                out[y, x, c] = top * (one - fy) + bottom * fy
    return out


def nms(boxes: Sequence[Box], scores: Sequence[float], *, iou_threshold: float) -> list[int]:
    """Greedy suppression: the best box stays, what overlaps it by more than the threshold goes, and so on."""
    left = sorted(range(len(boxes)), key=lambda index: -scores[index])
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [other for other in left if iou(boxes[best], boxes[other]) <= iou_threshold]
    return kept


def detect(
    boxes: Sequence[Box],
    scores: Sequence[Sequence[float]],
    *,
    threshold: float,
    top_k: int | None,
    iou_threshold: float,
    keep: int,
) -> list[tuple[float, int, Box]]:
    """Detections of one image, best first: (score, class, box); `scores[box][class]` without background.

    The test time of the authors' detection_output_layer.cpp: threshold, top k of each class, suppression
    in each class, best of all classes.
    """
    found = []
    for label in range(len(scores[0])):
        passing = [index for index in range(len(boxes)) if scores[index][label] > threshold]
        passing.sort(key=lambda index: -scores[index][label])
        passing = passing[:top_k]
        kept = nms(
            [boxes[index] for index in passing],
            [scores[index][label] for index in passing],
            iou_threshold=iou_threshold,
        )
        found += [(scores[passing[index]][label], label, boxes[passing[index]]) for index in kept]
    found.sort(key=lambda detection: -detection[0])
    return found[:keep]

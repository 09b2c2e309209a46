"""Which default box learns which object, decided for a whole batch at once.

Shapes: N images, A default boxes, G ground truths (of the image that has most; the others are padded).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import boxes
from pipeline.errors import ImageError

# Caffe's lower limit for the forced pairs: an object that touches no default box stays without one.
_MIN_FORCED_IOU = 1e-6


@dataclass(frozen=True, slots=True)
class Targets:
    """The objects of a batch, padded to the same number per image.

    Attributes:
        boxes: float32 [N, G, 4], corners in fractions of the network's input, as the default boxes.
        labels: int64 [N, G], from 1, numbering the classes without the background; 0 marks padding.
    """

    boxes: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Targets":
        """The same on another device."""
        return Targets(self.boxes.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


def pad_targets(
    boxes_of_images: Sequence[np.ndarray],
    labels_of_images: Sequence[np.ndarray],
    *,
    height: int,
    width: int,
    num_classes: int,
    image_ids: Sequence[str],
) -> Targets:
    """Put the objects of a batch into two tensors.

    Args:
        boxes_of_images: per image float [G, 4] xyxy in pixels of the network's input.
        labels_of_images: per image int [G], from 1.
        height: rows of the network's input.
        width: columns of the network's input.
        num_classes: logit columns of the model, the background included.
        image_ids: what to call the images in errors.

    Raises:
        ImageError: for a box without area (the logarithm of its size is what makes a loss infinite), with an
            infinite side or with a label that the model doesn't have; the message names the image.
    """
    num_padded = max(1, *(len(labels) for labels in labels_of_images)) if labels_of_images else 1
    boxes_NG4 = np.zeros((len(boxes_of_images), num_padded, 4), np.float32)
    labels_NG = np.zeros((len(boxes_of_images), num_padded), np.int64)
    for index, (boxes_G4, labels_G) in enumerate(zip(boxes_of_images, labels_of_images, strict=True)):
        _check_objects(boxes_G4, labels_G, num_classes=num_classes, image_id=image_ids[index])
        boxes_NG4[index, : len(labels_G)] = boxes_G4 / np.array([width, height] * 2)
        labels_NG[index, : len(labels_G)] = labels_G
    return Targets(torch.from_numpy(boxes_NG4), torch.from_numpy(labels_NG))


def match(targets: Targets, priors_cxcywh: Tensor, *, iou_threshold: float = 0.5) -> Tensor:
    """Match default boxes [A, 4] with the objects of each image, see `match_ious`; int64 [N, A]."""
    ious_NGA = boxes.iou(targets.boxes, boxes.to_corners(priors_cxcywh))
    ious_NGA = ious_NGA.masked_fill(targets.labels[..., None] == 0, -1)
    return match_ious(ious_NGA, iou_threshold=iou_threshold)


def match_ious(ious_NGA: Tensor, *, iou_threshold: float = 0.5) -> Tensor:
    """Match as in SSD section 2.2 "Matching strategy".

    First each object gets a default box of its own: the pair with the highest IoU of all leaves, then the
    next. Then every default box that is left takes its best object if their IoU is at least the threshold.
    Source: weiliu89/caffe, branch ssd, src/caffe/util/bbox_util.cpp, `MatchBBox`. (Most ports take the best
    default box of each object on its own instead; then two objects may claim the same one and one gets none.)

    Args:
        ious_NGA: IoU of each object with each default box; -1 in rows that are padding.
        iou_threshold: for the second step.

    Returns:
        int64 [N, A]: the index of the object in its image, -1 for background.
    """
    best_iou_NA, matched_NA = ious_NGA.max(dim=1)
    matched_NA.masked_fill_(best_iou_NA < iou_threshold, -1)
    paired_NG = _pair_greedily(ious_NGA)
    image, ground_truth = (paired_NG >= 0).nonzero(as_tuple=True)
    matched_NA[image, paired_NG[image, ground_truth]] = ground_truth
    return matched_NA


def shares(matched_NA: Tensor, *, num_objects: int) -> Tensor:
    """1 / the number of default boxes that learn the same object, float32 [N, A]; 0 for background.

    Args:
        matched_NA: from `match`.
        num_objects: of an image, padding included.
    """
    positive_NA = (matched_NA >= 0).float()
    object_NA = matched_NA.clamp(min=0)
    counts_NG = positive_NA.new_zeros(len(matched_NA), num_objects).scatter_add_(1, object_NA, positive_NA)
    return positive_NA / counts_NG.clamp(min=1).gather(1, object_NA)


def _pair_greedily(ious_NGA: Tensor) -> Tensor:
    """The default box of each object, int64 [N, G]; -1 for none.

    Equal to taking the best pair of all, again and again; equal IoUs go to the first default box, then to the
    first object. A pair that is the best of its row and of its column will be taken whatever happens
    elsewhere, so each round takes all such pairs of all images: 2 of them for 8 COCO images (at most
    5 seen), not one per object.
    """
    ious_NGA = ious_NGA.clone()
    num_objects = ious_NGA.shape[1]
    itself = torch.arange(num_objects, device=ious_NGA.device)
    paired_NG = torch.full(ious_NGA.shape[:2], -1, device=ious_NGA.device)
    while True:
        best_NG, choice_NG = ious_NGA.max(dim=2)
        wants_NG = best_NG > _MIN_FORCED_IOU
        if not wants_NG.any():
            return paired_NG
        # [n, g, h]: the IoU of object h with the default box that object g wants.
        rivals_NGG = ious_NGA.gather(2, choice_NG[:, None, :].expand(-1, num_objects, -1)).transpose(1, 2)
        wins_NG = wants_NG & (rivals_NGG.argmax(dim=2) == itself)
        image, ground_truth = wins_NG.nonzero(as_tuple=True)
        prior = choice_NG[image, ground_truth]
        paired_NG[image, ground_truth] = prior
        ious_NGA[image, ground_truth] = -1
        ious_NGA[image, :, prior] = -1


def _check_objects(boxes_G4: np.ndarray, labels_G: np.ndarray, *, num_classes: int, image_id: str) -> None:
    """Raise ImageError for objects that can't be learnt."""
    for box, label in zip(boxes_G4.tolist(), labels_G.tolist(), strict=True):
        left, top, right, bottom = box
        if not (np.isfinite(box).all() and left < right and top < bottom):
            raise ImageError(
                f"{image_id}: box {box} has no area; remove it or correct the annotation", stage="annotation"
            )
        if not 1 <= label < num_classes:
            raise ImageError(
                f"{image_id}: label {label} is not one of 1 to {num_classes - 1}; 0 is the background",
                stage="annotation",
            )

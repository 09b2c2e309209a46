"""Greedy non-maximum suppression of many groups of boxes at once.

Shapes: K boxes, P pairs of boxes of the same group.
"""

import torch
from torch import Tensor

from pipeline.boxes import area


def nms(boxes_K4: Tensor, groups_K: Tensor, *, iou_threshold: float) -> Tensor:
    """Which boxes stay when each one suppresses the worse ones of its group that overlap it; bool [K].

    The pairs of all groups are laid out in one list: no pair of different groups is looked at, boxes need no
    offsets per group (torchvision's, in float32, round corners by up to 1e-5 of the image), and the number of
    operations is the same for any number of groups.

    Args:
        boxes_K4: corners; boxes of the same group sorted by score, best first.
        groups_K: the group of each box, for example one for each class of each image; int64, not negative.
        iou_threshold: with a higher intersection over union than this, the worse box goes.
    """
    order = groups_K.argsort(stable=True)
    rank = rank_in_group(groups_K[order])
    better, worse = _overlapping(boxes_K4[order], _pairs(rank), iou_threshold=iou_threshold)
    gone = _settle(better, worse, num_boxes=len(rank))
    return torch.empty_like(gone).scatter_(0, order, ~gone)


def _settle(better: Tensor, worse: Tensor, *, num_boxes: int) -> Tensor:
    """Which boxes go, bool [num_boxes], when a box goes if a better one that overlaps it stays.

    In each round, the boxes that are the worse one of no pair stay, those that they overlap go, and so do all
    pairs with them; what is left is a smaller problem of the same kind. The best box of a group is the worse
    one of no pair, so this ends; 8 to 10 rounds in measurements.
    """
    gone = torch.zeros(num_boxes, dtype=torch.bool, device=better.device)
    while len(better):
        waiting = torch.zeros_like(gone).index_fill_(0, worse, True)
        gone.index_fill_(0, worse[~waiting.index_select(0, better)], True)
        open_pairs = ~(gone.index_select(0, better) | gone.index_select(0, worse))
        better, worse = better[open_pairs], worse[open_pairs]
    return gone


def rank_in_group(groups_K: Tensor) -> Tensor:
    """How many equal numbers stand before each one of an ascending list, int64 [K]."""
    sizes = groups_K.bincount(minlength=1)
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(groups_K), device=groups_K.device) - starts[groups_K]


def _pairs(rank_K: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of members of the same group, the better one first, two int64 [P].

    The member at place k has the `rank_K[k]` members directly before it as partners.
    """
    places = torch.arange(len(rank_K), device=rank_K.device)
    worse = places.repeat_interleave(rank_K)
    first_pair = rank_K.cumsum(0) - rank_K
    first_partner = places - rank_K
    offsets = (first_partner - first_pair).repeat_interleave(rank_K)
    return torch.arange(len(worse), device=worse.device) + offsets, worse


def _overlapping(
    boxes_K4: Tensor, pairs: tuple[Tensor, Tensor], *, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """The pairs whose intersection over union is above the threshold.

    I / (a + b - I) > t is I > (a + b) t / (1 + t), without a division and finite for boxes without area.
    """
    # With the low corner negated, one minimum gives both corners of the intersection.
    low_high_P4 = torch.minimum(*_both(boxes_K4 * boxes_K4.new_tensor([-1, -1, 1, 1]), pairs))
    widths = (low_high_P4[:, 0] + low_high_P4[:, 2]).clamp_(min=0)
    heights = (low_high_P4[:, 1] + low_high_P4[:, 3]).clamp_(min=0)
    areas, other_areas = _both(area(boxes_K4) * (iou_threshold / (1 + iou_threshold)), pairs)
    index = (widths * heights > areas + other_areas).nonzero()[:, 0]
    return pairs[0][index], pairs[1][index]


def _both(values_K: Tensor, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return values_K.index_select(0, pairs[0]), values_K.index_select(0, pairs[1])

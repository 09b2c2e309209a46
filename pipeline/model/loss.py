"""The training objective: class loss over matched and mined default boxes, box loss over matched ones.

Shapes: N images, A default boxes, C classes incl. background, G ground truths, P chosen default boxes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline import boxes
from pipeline.model.matching import Targets


@dataclass(frozen=True, slots=True)
class Losses:
    """The two parts of the objective, each a scalar divided by the number of positives."""

    boxes: Tensor
    classes: Tensor

    @property
    def total(self) -> Tensor:
        """L = (L_conf + alpha L_loc) / N with alpha = 1 (SSD eq. 1)."""
        return self.boxes + self.classes


def multibox_loss(
    deltas_NA4: Tensor,
    logits_NAC: Tensor,
    targets: Targets,
    matched_NA: Tensor,
    priors_cxcywh: Tensor,
    *,
    num_positives: Tensor | float | None = None,
    weights_NA: Tensor | None = None,
    background_index: int = 0,
    coder_weights: tuple[float, float] = (10.0, 5.0),
    negatives_per_positive: int = 3,
    negatives_without_positives: int = 0,
) -> Losses:
    """SSD's objective (section 2.2, eq. 1 to 3): softmax cross entropy and smooth L1, in float32.

    The class loss counts the matched default boxes and, per image, `negatives_per_positive` times as many
    unmatched ones: those that look least like background. The ranking has no gradient. A batch without any
    match has a loss of 0 that can be differentiated.

    Args:
        deltas_NA4: what the model says, relative to the default boxes.
        logits_NAC: what the model says about classes.
        targets: the objects.
        matched_NA: from `match`.
        priors_cxcywh: default boxes [A, 4].
        num_positives: what to divide by where a batch is split over workers or micro-batches: the matches of
            all parts. The matches of this part by default; never less than 1.
        weights_NA: what each matched default box weighs, 1 by default (the paper); others are not looked at.
        background_index: logit column of the background.
        coder_weights: as in `boxes.encode`.
        negatives_per_positive: mined default boxes per matched one.
        negatives_without_positives: mined default boxes of an image without any match. 0 is the paper: an
            image without objects teaches nothing. A few (say 3) let it teach what is no object.
    """
    with torch.autocast(deltas_NA4.device.type, enabled=False):
        positive_NA = matched_NA >= 0
        negative_NA = mine_negatives(
            background_losses(logits_NAC, background_index=background_index),
            positive_NA,
            per_positive=negatives_per_positive,
            without_positives=negatives_without_positives,
        )
        columns_NA = _columns(targets, matched_NA, background_index=background_index)
        chosen_NA = positive_NA | negative_NA
        losses_P = F.cross_entropy(logits_NAC[chosen_NA].float(), columns_NA[chosen_NA], reduction="none")
        weights_NA = _weights(positive_NA, weights_NA)
        class_loss = (losses_P * weights_NA[chosen_NA]).sum()
        box_loss = _box_loss(deltas_NA4, targets, matched_NA, priors_cxcywh, coder_weights, weights_NA)
        divisor = _divisor(positive_NA, num_positives)
        return Losses(boxes=box_loss / divisor, classes=class_loss / divisor)


def focal_loss(
    deltas_NA4: Tensor,
    logits_NAC: Tensor,
    targets: Targets,
    matched_NA: Tensor,
    priors_cxcywh: Tensor,
    *,
    num_positives: Tensor | float | None = None,
    weights_NA: Tensor | None = None,
    background_index: int = 0,
    coder_weights: tuple[float, float] = (10.0, 5.0),
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Losses:
    """The objective for models with sigmoid scores: focal loss (arXiv 1708.02002, eq. 5) instead of mining.

    All default boxes count; the background is where every class says no, its own column is not trained.
    Arguments as in `multibox_loss`.
    """
    from torchvision.ops import sigmoid_focal_loss  # loads torch's compiler: 3 s in every process

    with torch.autocast(deltas_NA4.device.type, enabled=False):
        positive_NA = matched_NA >= 0
        columns_NA = _columns(targets, matched_NA, background_index=background_index)
        wanted_NAC = F.one_hot(columns_NA, logits_NAC.shape[2]).float()
        is_class_C = torch.arange(logits_NAC.shape[2], device=logits_NAC.device) != background_index
        per_logit_NAC = sigmoid_focal_loss(logits_NAC.float(), wanted_NAC, alpha=alpha, gamma=gamma)
        weights_NA = _weights(positive_NA, weights_NA)
        class_loss = (per_logit_NAC[..., is_class_C].sum(dim=2) * weights_NA).sum()
        box_loss = _box_loss(deltas_NA4, targets, matched_NA, priors_cxcywh, coder_weights, weights_NA)
        divisor = _divisor(positive_NA, num_positives)
        return Losses(boxes=box_loss / divisor, classes=class_loss / divisor)


@torch.no_grad()
def background_losses(logits_NAC: Tensor, *, background_index: int = 0) -> Tensor:
    """Cross entropy of "this is background", float32 [N, A]: what negatives are ranked by."""
    return -F.log_softmax(logits_NAC.float(), dim=2)[..., background_index]


@torch.no_grad()
def mine_negatives(
    losses_NA: Tensor, positive_NA: Tensor, *, per_positive: int = 3, without_positives: int = 0
) -> Tensor:
    """The unmatched default boxes with the highest losses of each image, bool [N, A].

    Args:
        losses_NA: from `background_losses`.
        positive_NA: which default boxes are matched.
        per_positive: how many to take for each match of the image, as far as there are any.
        without_positives: how many to take in an image without matches.
    """
    num_positives_N = positive_NA.sum(dim=1)
    wanted_N = per_positive * num_positives_N
    wanted_N = torch.where(num_positives_N == 0, without_positives, wanted_N)
    wanted_N = torch.minimum(wanted_N, positive_NA.shape[1] - num_positives_N)
    most = int(wanted_N.max()) if len(wanted_N) else 0
    hardest = losses_NA.masked_fill(positive_NA, -torch.inf).topk(most, dim=1).indices
    within_reach = torch.arange(most, device=losses_NA.device) < wanted_N[:, None]
    return torch.zeros_like(positive_NA).scatter_(1, hardest, within_reach)


def _columns(targets: Targets, matched_NA: Tensor, *, background_index: int) -> Tensor:
    """The logit column that each default box should answer with, int64 [N, A]."""
    labels_NA = targets.labels.gather(1, matched_NA.clamp(min=0))
    # Labels count from 1; those up to a background in the middle or at the end move down to make room for it.
    columns_NA = labels_NA - (labels_NA <= background_index).long()
    return columns_NA.masked_fill(matched_NA < 0, background_index)


def _box_loss(
    deltas_NA4: Tensor,
    targets: Targets,
    matched_NA: Tensor,
    priors_cxcywh: Tensor,
    coder_weights: tuple[float, float],
    weights_NA: Tensor,
) -> Tensor:
    """Smooth L1 between the deltas of the matched default boxes and those of their objects, summed."""
    image, prior = (matched_NA >= 0).nonzero(as_tuple=True)
    boxes_P4 = boxes.to_centres(targets.boxes[image, matched_NA[image, prior]])
    wanted_P4 = boxes.encode(boxes_P4, priors_cxcywh[prior], weights=coder_weights)
    losses_P4 = F.smooth_l1_loss(deltas_NA4[image, prior].float(), wanted_P4, reduction="none")
    return (losses_P4 * weights_NA[image, prior, None]).sum()


def _weights(positive_NA: Tensor, weights_NA: Tensor | None) -> Tensor:
    """What default boxes weigh: unmatched ones 1."""
    ones_NA = torch.ones_like(positive_NA, dtype=torch.float32)
    return ones_NA if weights_NA is None else torch.where(positive_NA, weights_NA, ones_NA)


def _divisor(positive_NA: Tensor, num_positives: Tensor | float | None) -> Tensor:
    if num_positives is None:
        num_positives = positive_NA.sum()
    return torch.as_tensor(num_positives, device=positive_NA.device).clamp(min=1)

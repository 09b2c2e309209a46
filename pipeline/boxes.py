"""Boxes as tensors: two forms, intersection over union, clipping, and the code that SSD regresses.

Shapes: M, G boxes, A default boxes, N images. Corners are (x1, y1, x2, y2), centres (cx, cy, w, h).
"""

import torch
from torch import Tensor


def to_corners(boxes_cxcywh: Tensor) -> Tensor:
    """(cx, cy, w, h) [..., 4] -> (x1, y1, x2, y2) [..., 4]."""
    centres, sizes = boxes_cxcywh.split(2, dim=-1)
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1)


def to_centres(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) [..., 4] -> (cx, cy, w, h) [..., 4]."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def clip(boxes: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Move every corner [..., 4] into [low, high]; the defaults are the image in normalised units."""
    return boxes.clamp(low, high)


def area(boxes: Tensor) -> Tensor:
    """Area [...] of corner boxes [..., 4]; 0 where a box is inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def iou(boxes_M4: Tensor, boxes_G4: Tensor) -> Tensor:
    """Intersection over union [..., M, G] of corner boxes [..., M, 4] and [..., G, 4], in [0, 1].

    Two boxes without any area have an IoU of 0, never NaN.
    """
    # Each side on its own: ten times as fast as reductions over a last dimension of two.
    left_M, top_M, right_M, bottom_M = boxes_M4[..., :, None, :].unbind(dim=-1)
    left_G, top_G, right_G, bottom_G = boxes_G4[..., None, :, :].unbind(dim=-1)
    width = (torch.minimum(right_M, right_G) - torch.maximum(left_M, left_G)).clamp(min=0)
    height = (torch.minimum(bottom_M, bottom_G) - torch.maximum(top_M, top_G)).clamp(min=0)
    intersection = width * height
    union = area(boxes_M4)[..., :, None] + area(boxes_G4)[..., None, :] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def encode(
    boxes_cxcywh: Tensor, priors_cxcywh: Tensor, *, weights: tuple[float, float] = (10.0, 5.0)
) -> Tensor:
    """The deltas (dx, dy, dw, dh) [..., 4] that turn priors [..., 4] into boxes [..., 4] (SSD eq. 2).

    Args:
        boxes_cxcywh: boxes with positive width and height, in the unit of the priors.
        priors_cxcywh: default boxes, broadcast against the boxes.
        weights: factors of centre and size deltas; 10 and 5 are Caffe's variances 0.1 and 0.2.
    """
    prior_centres, prior_sizes = priors_cxcywh.split(2, dim=-1)
    centres, sizes = boxes_cxcywh.split(2, dim=-1)
    return torch.cat(
        [weights[0] * (centres - prior_centres) / prior_sizes, weights[1] * torch.log(sizes / prior_sizes)],
        dim=-1,
    )


def decode(
    deltas: Tensor,
    priors_cxcywh: Tensor,
    *,
    weights: tuple[float, float] = (10.0, 5.0),
    max_log_size: float = float("inf"),
) -> Tensor:
    """Corner boxes [..., 4] from deltas [..., 4] and their priors [..., 4]; the inverse of `encode`.

    Args:
        deltas: (dx, dy, dw, dh).
        priors_cxcywh: default boxes, broadcast against the deltas.
        weights: as in `encode`.
        max_log_size: upper limit of dw / weight and dh / weight before the exponential.
    """
    prior_centres, prior_sizes = priors_cxcywh.split(2, dim=-1)
    shifts, scales = deltas.split(2, dim=-1)
    centres = prior_centres + shifts / weights[0] * prior_sizes
    halves = torch.exp((scales / weights[1]).clamp(max=max_log_size)) * prior_sizes / 2
    return torch.cat([centres - halves, centres + halves], dim=-1)

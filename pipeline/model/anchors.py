"""Default boxes ("priors") as data: one small table per prior set, one function that lays them out.

Order, everywhere: map -> row (y) -> column (x) -> box of the cell. Units: fractions of the image, so a
box of (0.5, 0.5, 1, 1) is the whole image.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pipeline import boxes

Clip = Literal["none", "corners", "wh", "cxcywh"]

_LEAST_OBJECTS = 10  # fewer tell no size


@dataclass(frozen=True)
class PriorMap:
    """The default boxes of one feature map.

    Attributes:
        grid: cells along each side of the map.
        step: distance of two centres; centre = (index + 0.5) * step. From the paper's code: 8 / 300, not
            1 / 38.
        sizes_wh: width and height of each box of a cell, in order.
    """

    grid: int
    step: float
    sizes_wh: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class PriorSet:
    """All default boxes of a model.

    Attributes:
        name: what it is called in messages and checkpoints.
        maps: one entry per feature map, largest first.
        clip: what is forced into [0, 1]: nothing (Caffe's SSD configurations), corners (Caffe's clip),
            widths and heights only (torchvision), or all four numbers of the centre form (NVIDIA, amdegroot,
            lufficc).
    """

    name: str
    maps: tuple[PriorMap, ...]
    clip: Clip = "none"

    @property
    def num_priors(self) -> int:
        """Number of default boxes of an image."""
        return sum(prior_map.grid**2 * len(prior_map.sizes_wh) for prior_map in self.maps)


def prior_boxes(priors: PriorSet) -> Tensor:
    """All default boxes of an image as (cx, cy, w, h), float32 [A, 4]."""
    priors_A4 = torch.cat([_boxes_of_map(prior_map) for prior_map in priors.maps])
    return _clip(priors_A4, priors.clip).to(torch.float32)


def _boxes_of_map(prior_map: PriorMap) -> Tensor:
    """(cx, cy, w, h) float64 [grid * grid * boxes, 4] of one map."""
    centres = (torch.arange(prior_map.grid, dtype=torch.float64) + 0.5) * prior_map.step
    sizes_wh = torch.tensor(prior_map.sizes_wh, dtype=torch.float64)
    shape = (prior_map.grid, prior_map.grid, len(sizes_wh))
    cx = centres[None, :, None].expand(shape)
    cy = centres[:, None, None].expand(shape)
    return torch.stack([cx, cy, sizes_wh[:, 0].expand(shape), sizes_wh[:, 1].expand(shape)], dim=-1).view(
        -1, 4
    )


def _clip(priors_cxcywh: Tensor, mode: Clip) -> Tensor:
    if mode == "none":
        return priors_cxcywh
    if mode == "corners":
        return boxes.to_centres(boxes.clip(boxes.to_corners(priors_cxcywh)))
    if mode == "cxcywh":
        return priors_cxcywh.clamp(0, 1)
    centres, sizes = priors_cxcywh.split(2, dim=-1)
    return torch.cat([centres, sizes.clamp(0, 1)], dim=-1)


def cell_sizes(
    size: float, next_size: float | None, ratios: tuple[float, ...]
) -> tuple[tuple[float, float], ...]:
    """Widths and heights of one cell in the order of the Caffe code (`prior_box_layer.cpp`).

    The square of side `size`; the square of side sqrt(size * next_size) unless `next_size` is None; then,
    for each ratio r, (size * sqrt(r), size / sqrt(r)) and the same box turned.
    """
    sizes_wh = [(size, size)]
    if next_size is not None:
        extra = math.sqrt(size * next_size)
        sizes_wh.append((extra, extra))
    for ratio in ratios:
        long, short = size * math.sqrt(ratio), size / math.sqrt(ratio)
        sizes_wh += [(long, short), (short, long)]
    return tuple(sizes_wh)


def fit_priors(priors: PriorSet, sizes_G2: Tensor, labels_G: Tensor) -> PriorSet:
    """Default boxes in the shapes of a data set's objects: one round of k-means that begins with `priors`.

    As the dimension clusters of YOLO9000 (arXiv 1612.08242, section 2), an object belongs to the default box
    with the highest IoU of the two around one centre. The mean of its objects becomes the new size, where
    each class counts as much as any other; a default box with fewer than 10 objects stays.

    Args:
        priors: where to begin; cells, steps and the number of boxes stay.
        sizes_G2: width and height of the objects, in fractions of their image.
        labels_G: their classes, int64.
    """
    sizes_G2 = sizes_G2.to(torch.float64)
    shapes_B2 = torch.tensor([size for one in priors.maps for size in one.sizes_wh], dtype=torch.float64)
    nearest_G = boxes.iou(_around_origin(sizes_G2), _around_origin(shapes_B2)).argmax(dim=1)
    weights_G = 1 / torch.bincount(labels_G)[labels_G].to(torch.float64)
    fitted = shapes_B2.tolist()
    for index in range(len(fitted)):
        own = nearest_G == index
        if own.sum() >= _LEAST_OBJECTS:
            mean_2 = (weights_G[own, None] * sizes_G2[own]).sum(dim=0) / weights_G[own].sum()
            fitted[index] = mean_2.tolist()
    sizes = iter(fitted)
    maps = [replace(one, sizes_wh=tuple(tuple(next(sizes)) for _ in one.sizes_wh)) for one in priors.maps]
    return replace(priors, name="fitted", maps=tuple(maps))


def _around_origin(sizes_N2: Tensor) -> Tensor:
    return boxes.to_corners(torch.cat([torch.zeros_like(sizes_N2), sizes_N2], dim=1))


def caffe_priors(
    name: str,
    *,
    image_size: int,
    sizes: tuple[float, ...],
    ratios: tuple[tuple[float, ...], ...],
    grids: tuple[int, ...],
    steps: tuple[int, ...],
) -> PriorSet:
    """A prior set given in pixels, as in the authors' code: m + 1 sizes for m maps, unclipped."""
    maps = []
    for index, (grid, step) in enumerate(zip(grids, steps, strict=True)):
        size, next_size = sizes[index] / image_size, sizes[index + 1] / image_size
        maps.append(PriorMap(grid, step / image_size, cell_sizes(size, next_size, ratios[index])))
    return PriorSet(name, tuple(maps))


def linear_scales(num_maps: int, *, s_min: float = 0.2, s_max: float = 0.9) -> tuple[float, ...]:
    """Scales of m maps by the paper's equation 4: s_k = s_min + (s_max - s_min) (k - 1) / (m - 1).

    Six maps with the defaults: 0.2, 0.34, 0.48, 0.62, 0.76, 0.9.
    """
    if num_maps == 1:
        return (s_min,)
    return tuple(s_min + (s_max - s_min) * k / (num_maps - 1) for k in range(num_maps))


def formula_priors(
    name: str,
    *,
    grids: tuple[int, ...],
    ratios: tuple[tuple[float, ...], ...] | None = None,
    extra_square: bool = True,
    s_min: float = 0.2,
    s_max: float = 0.9,
    s_next: float | None = None,
    clip: Clip = "none",
) -> PriorSet:
    """A prior set for any stack of maps by the formula of the paper (section 2.2).

    Centres lie in the middle of the cells. With the defaults a cell has six boxes: ratios 1, 2, 1/2, 3, 1/3
    of scale s_k, and the square of scale sqrt(s_k s_{k+1}) in second place.

    Args:
        name: name of the set.
        grids: cells per side of each map, largest first.
        ratios: per map, the ratios above 1; each also gives its inverse. (2, 3) everywhere by default.
        extra_square: whether each cell has the square of scale sqrt(s_k s_{k+1}).
        s_min: scale of the first map.
        s_max: scale of the last map.
        s_next: s_{m+1}, the scale after the last; equation 4 continued by default.
        clip: see `PriorSet`.
    """
    scales = linear_scales(len(grids), s_min=s_min, s_max=s_max)
    if s_next is None:
        s_next = scales[-1] + (s_max - s_min) / max(1, len(grids) - 1)
    following = (*scales[1:], s_next)
    ratios = ratios or ((2, 3),) * len(grids)
    maps = tuple(
        PriorMap(grid, 1 / grid, cell_sizes(scale, next_scale if extra_square else None, map_ratios))
        for grid, scale, next_scale, map_ratios in zip(grids, scales, following, ratios, strict=True)
    )
    return PriorSet(name, maps, clip)


_RATIOS_300 = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
_RATIOS_512 = ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,))


def _ssd300(name: str, sizes: tuple[float, ...]) -> PriorSet:
    return caffe_priors(
        name,
        image_size=300,
        sizes=sizes,
        ratios=_RATIOS_300,
        grids=(38, 19, 10, 5, 3, 1),
        steps=(8, 16, 32, 64, 100, 300),
    )


def _ssd512(name: str, sizes: tuple[float, ...]) -> PriorSet:
    return caffe_priors(
        name,
        image_size=512,
        sizes=sizes,
        ratios=_RATIOS_512,
        grids=(64, 32, 16, 8, 4, 2, 1),
        steps=(8, 16, 32, 64, 128, 256, 512),
    )


# caffe:examples/ssd/ssd_pascal.py and ssd_coco.py.
VOC_300 = _ssd300("voc", (30, 60, 111, 162, 213, 264, 315))
COCO_300 = _ssd300("coco", (21, 45, 99, 153, 207, 261, 315))

# NVIDIA's SSD300-ResNet50: the same boxes, all four numbers clamped (it lists them in another order).
NVIDIA_300 = replace(COCO_300, clip="cxcywh")

# The paper's footnotes give 35.84, 76.8, ... (VOC) and 20.48, 51.2, ... (COCO); prior_box_layer.cpp truncates
# sizes to whole pixels, so these are the boxes that the released weights were trained with.
VOC_512 = _ssd512("voc", (35, 76, 153, 230, 307, 384, 460, 537))
COCO_512 = _ssd512("coco", (20, 51, 133, 215, 296, 378, 460, 542))

# torchvision: DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95), widths and heights clipped.
LITE_320 = formula_priors("coco", grids=(20, 10, 5, 3, 2, 1), s_max=0.95, s_next=1.0, clip="wh")


def _lite_300() -> PriorSet:
    """TensorFlow's `create_ssd_anchors`: the extra square comes last, the first map has three boxes.

    The scale of the first map is fixed at 0.1 for its square; ratio 1/3 is written 0.3333 there.
    """
    grids = (19, 10, 5, 3, 2, 1)
    scales = (*linear_scales(6, s_max=0.95), 1.0)
    maps = [PriorMap(grids[0], 1 / grids[0], ((0.1, 0.1), _ratio_box(0.2, 2.0), _ratio_box(0.2, 0.5)))]
    for grid, scale, next_scale in zip(grids[1:], scales[1:-1], scales[2:], strict=True):
        extra = math.sqrt(scale * next_scale)
        boxes_of_cell = [_ratio_box(scale, ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)]
        maps.append(PriorMap(grid, 1 / grid, (*boxes_of_cell, (extra, extra))))
    return PriorSet("coco", tuple(maps))


def _ratio_box(scale: float, ratio: float) -> tuple[float, float]:
    return scale * math.sqrt(ratio), scale / math.sqrt(ratio)


LITE_300 = _lite_300()

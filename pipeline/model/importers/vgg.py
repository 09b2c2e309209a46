"""SSD300 and SSD512 with VGG16 under the names that each release gives to the same layers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.anchors import PriorSet, cell_sizes
from pipeline.model.architectures import find_architecture
from pipeline.model.importers.common import COCO_COLUMNS, VOC_COLUMNS

# Number of each convolution in the list of layers that ssd.pytorch has made the custom.
_TRUNK = {
    "conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
    "conv4_1": 17, "conv4_2": 19, "conv4_3": 21, "conv5_1": 24, "conv5_2": 26, "conv5_3": 28,
    "fc6": 31, "fc7": 33,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a release names the layers; `{...}` are filled in, `.weight` or `.bias` follows.

    Attributes:
        trunk: with `{number}`, the place in the list of layers, or `{layer}`, Caffe's name.
        norm: full name of the scale of conv4_3's L2Norm.
        extra: with `{index}`, counted over all convolutions of the extra blocks, `{block}` and `{part}`
            (0 reduces, 1 makes the map), or `{layer}`.
        boxes: with `{level}`, counted from the largest map, or `{source}`, Caffe's name of the map.
        logits: like `boxes`.
    """

    trunk: str
    norm: str
    extra: str
    boxes: str
    logits: str


def matches(names: Collection[str], naming: Naming) -> bool:
    """Whether there are tensors of these names that only the release with that naming has."""
    first = {"level": 0, "source": "conv4_3_norm"}
    logits, trunk = naming.logits.format(**first), naming.trunk.format(number=0, layer="conv1_1")
    return {naming.norm, f"{logits}.weight", f"{trunk}.weight"} <= set(names)


def translate(
    tensors: Mapping[str, Tensor], naming: Naming, *, release: str
) -> tuple[str, dict[str, Tensor]]:
    """Architecture and state dict in our names; the fifth extra block tells SSD512 from SSD300.

    Raises:
        CheckpointError: names are missing, or there are others.
    """
    large = f"{_extra_name(naming, block=4, part=0)}.weight" in tensors
    names = _names(naming, num_extras=5 if large else 4)
    missing = [theirs for theirs in names.values() if theirs not in tensors]
    unknown = [theirs for theirs in tensors if theirs not in set(names.values())]
    if missing or unknown:
        raise CheckpointError(
            f"not the SSD{512 if large else 300} with VGG16 of {release}: of its {len(names)} tensors "
            f"{len(missing)} are missing {missing[:3]}, {len(unknown)} have other names {unknown[:3]}"
        )
    architecture = "ssd512_vgg16" if large else "ssd300_vgg16"
    return architecture, {ours: tensors[theirs] for ours, theirs in names.items()}


def choose_priors(architecture: str, columns: int, *, otherwise: Literal["voc", "coco"]) -> PriorSet:
    """The default boxes that a release trains with; its files don't hold them, so the classes decide.

    Args:
        architecture: name of the network.
        columns: logit columns; 21 is VOC, 81 is COCO.
        otherwise: the set that the release's code uses unless told otherwise, for other classes.
    """
    name = {VOC_COLUMNS: "voc", COCO_COLUMNS: "coco"}.get(columns, otherwise)
    return find_architecture(architecture).priors[name]


def with_sizes(priors: PriorSet, sizes: tuple[float, ...], *, image_size: int) -> PriorSet:
    """The same set with other box sizes: m + 1 of them for m maps, in pixels of the network's input."""
    fractions = [size / image_size for size in sizes]
    maps = tuple(
        replace(prior_map, sizes_wh=cell_sizes(size, following, (2, 3)[: len(prior_map.sizes_wh) // 2 - 1]))
        for prior_map, (size, following) in zip(priors.maps, pairwise(fractions), strict=True)
    )
    return replace(priors, maps=maps)


def _names(naming: Naming, *, num_extras: int) -> dict[str, str]:
    """Our name of each tensor -> theirs."""
    layers = {
        f"backbone.layers.{layer}": naming.trunk.format(number=number, layer=layer)
        for layer, number in _TRUNK.items()
    }
    for block in range(num_extras):
        layers[f"extras.{block}.reduce.conv"] = _extra_name(naming, block=block, part=0)
        layers[f"extras.{block}.expand.conv"] = _extra_name(naming, block=block, part=1)
    sources = ["conv4_3_norm", "fc7", *(f"conv{block + 6}_2" for block in range(num_extras))]
    for level, source in enumerate(sources):
        layers[f"heads.{level}.boxes"] = naming.boxes.format(level=level, source=source)
        layers[f"heads.{level}.logits"] = naming.logits.format(level=level, source=source)
    names = {
        f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in layers.items() for kind in ("weight", "bias")
    }
    return names | {"backbone.conv4_3_norm.scale": naming.norm}


def _extra_name(naming: Naming, *, block: int, part: int) -> str:
    layer = f"conv{block + 6}_{part + 1}"
    return naming.extra.format(index=2 * block + part, block=block, part=part, layer=layer)

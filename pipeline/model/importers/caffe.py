"""The authors' own release: `.caffemodel` files of SSD300 and SSD512 with VGG16 (weiliu89/caffe, branch ssd).

A caffemodel is the whole training network as a protobuf message with the weights inside; the numbers of its
fields are those of src/caffe/proto/caffe.proto in that branch. The network was trained on BGR images: the
kernels of conv1_1 are turned to RGB.

The file says which default boxes it was trained with, so a VOC model that started from COCO's keeps COCO's.
Where it doesn't, the number of classes decides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.anchors import PriorSet
from pipeline.model.architectures import find_architecture
from pipeline.model.importers import vgg
from pipeline.model.importers.common import class_list, load, num_columns
from pipeline.model.importers.protobuf import fields, floats, integers, message_of
from pipeline.model.ssd import SSD

_RELEASE = "weiliu89/caffe"
_NORM = "conv4_3_norm"
_NAMING = vgg.Naming(
    trunk="{layer}",
    norm=f"{_NORM}.weight",
    extra="{layer}",
    boxes="{source}_mbox_loc",
    logits="{source}_mbox_conf",
)

_NET_LAYER = 100  # of NetParameter
_NAME, _BLOBS, _PRIOR_BOX = 1, 7, 203  # of LayerParameter
_DATA, _SHAPE, _SHAPE_DIM = 5, 7, 1  # of BlobProto and BlobShape
_MIN_SIZE, _MAX_SIZE, _CLIP, _STEP = 1, 2, 5, 10  # of PriorBoxParameter
_MAX_DIMENSIONS = 4

_STARTS = (b"\x0a", b"\xa2\x06")  # tags of NetParameter's first field, its name, and of a layer


@dataclass(frozen=True)
class PriorLayer:
    """What the file says about the default boxes of one map, in pixels of the network's input."""

    min_sizes: tuple[float, ...]
    max_sizes: tuple[float, ...]
    step: float
    clip: bool


@dataclass(frozen=True)
class CaffeNet:
    """Weights of each layer (weight, bias) and the prior box layers, by name, in the order of the file."""

    blobs: Mapping[str, list[Tensor]]
    priors: Mapping[str, PriorLayer]


def recognises(data: bytes) -> bool:
    """Whether the first bytes can be those of a caffemodel."""
    return data.startswith(_STARTS)


def convert(data: bytes) -> SSD:
    """The model of a caffemodel.

    Raises:
        CheckpointError: damaged, or another network.
    """
    net = read_net(data)
    architecture, state = vgg.translate(_by_name(net.blobs), _NAMING, release=_RELEASE)
    columns = num_columns(state)
    class_names, label_ids = class_list(columns)
    defaults = find_architecture(architecture).defaults
    priors = vgg.choose_priors(architecture, columns, otherwise="voc")
    spec = defaults(
        architecture=architecture,
        class_names=class_names,
        label_ids=label_ids,
        priors=priors,
        provenance=_RELEASE,
    )
    if net.priors:
        spec = replace(spec, priors=priors_of(net.priors, priors, image_size=spec.input_height))
    model = load(spec, state, release=_RELEASE)
    _turn_to_rgb(model.get_parameter("backbone.layers.conv1_1.weight"))
    return model


def read_net(data: bytes) -> CaffeNet:
    """Layers with weights and prior box layers of a caffemodel. Raises: CheckpointError for damaged bytes."""
    blobs, priors = {}, {}
    for number, value in fields(memoryview(data)):
        if number != _NET_LAYER:
            continue
        name, layer_blobs, prior_layer = _read_layer(message_of(value))
        if layer_blobs:
            blobs[name] = layer_blobs
        if prior_layer:
            priors[name] = prior_layer
    return CaffeNet(blobs, priors)


def _read_layer(message: memoryview) -> tuple[str, list[Tensor], PriorLayer | None]:
    name, blobs, prior_layer = "", [], None
    for number, value in fields(message):
        if number == _NAME:
            name = bytes(message_of(value)).decode(errors="replace")
        elif number == _BLOBS:
            blobs.append(_read_blob(message_of(value)))
        elif number == _PRIOR_BOX:
            prior_layer = _read_prior_layer(message_of(value))
    return name, blobs, prior_layer


def _read_blob(message: memoryview) -> Tensor:
    chunks: list[memoryview] = []
    shape: list[int] = []
    for number, value in fields(message):
        if number == _DATA:
            chunks.append(message_of(value))
        elif number == _SHAPE:
            dims = [dim for number, dim in fields(message_of(value)) if number == _SHAPE_DIM]
            shape = [size for dim in dims for size in integers(dim)]
    data = bytearray().join(chunks)
    if not data or len(shape) > _MAX_DIMENSIONS or 4 * math.prod(shape) != len(data):
        raise CheckpointError(
            f"damaged caffemodel: {len(data)} bytes of 32-bit weights, shape {shape[: _MAX_DIMENSIONS + 1]}"
        )
    return torch.frombuffer(data, dtype=torch.float32).view(shape)


def _read_prior_layer(message: memoryview) -> PriorLayer:
    found: dict[int, list[int | memoryview]] = {}
    for number, value in fields(message):
        found.setdefault(number, []).append(value)
    min_sizes, max_sizes, steps = (
        tuple(size for value in found.get(number, []) for size in floats(value))
        for number in (_MIN_SIZE, _MAX_SIZE, _STEP)
    )
    return PriorLayer(min_sizes, max_sizes, steps[-1] if steps else 0.0, bool(found.get(_CLIP, [0])[-1]))


@torch.no_grad()
def _turn_to_rgb(kernels_O3HW: Tensor) -> None:
    kernels_O3HW.copy_(kernels_O3HW.flip(1))


def _by_name(blobs: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    named = {
        f"{layer}.{kind}": tensor
        for layer, tensors in blobs.items()
        for kind, tensor in zip(("weight", "bias"), tensors, strict=False)
    }
    if _NAMING.norm in named:  # some versions of the layer store it as [1, C, 1, 1]
        named[_NAMING.norm] = named[_NAMING.norm].flatten()
    return named


def priors_of(layers: Mapping[str, PriorLayer], known: PriorSet, *, image_size: int) -> PriorSet:
    """The default boxes that prior box layers describe: like a known set, perhaps with other sizes.

    Sizes are cut to whole pixels, as src/caffe/layers/prior_box_layer.cpp does.

    Args:
        layers: of all maps, largest map first.
        known: a set of the same network.
        image_size: side of the network's input in pixels.

    Raises:
        CheckpointError: they are of another kind than those of the published networks.
    """
    sizes = [(*layer.min_sizes, *layer.max_sizes) for layer in layers.values()]
    steps = [layer.step for layer in layers.values()]
    if (
        steps != [round(prior_map.step * image_size) for prior_map in known.maps]
        or any(len(pair) != 2 or not all(1 <= size <= 2 * image_size for size in pair) for pair in sizes)
        or any(int(pair[1]) != int(following[0]) for pair, following in pairwise(sizes))
    ):
        raise CheckpointError(
            f"{_RELEASE}: sizes {sizes} and steps {steps} of default boxes; expected one smallest and one "
            f"largest size per map, which is the smallest of the next one, and the steps of SSD{image_size}"
        )
    in_pixels = (*(int(pair[0]) for pair in sizes), int(sizes[-1][1]))
    priors = vgg.with_sizes(known, in_pixels, image_size=image_size)
    return replace(priors, clip="corners" if any(layer.clip for layer in layers.values()) else "none")

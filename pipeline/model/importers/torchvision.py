"""torchvision's `ssd300_vgg16` and `ssdlite320_mobilenet_v3_large` state dicts -> our models."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import SSD300_VGG16_Weights, SSDLite320_MobileNet_V3_Large_Weights

from pipeline.errors import CheckpointError
from pipeline.model.architectures import find_architecture
from pipeline.model.classes import COCO_NAMES_90
from pipeline.model.importers.common import load
from pipeline.model.spec import ModelSpec
from pipeline.model.ssd import SSD

# Names of `--weights torchvision:<name>`.
DOWNLOADS = {
    "ssd300_vgg16_coco": ("ssd300_vgg16", SSD300_VGG16_Weights.COCO_V1.url),
    "ssdlite320_mobilenet_v3_large_coco": (
        "ssdlite320_mobilenet_v3_large",
        SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.url,
    ),
}

# Positions of the layers in torchvision's `features` and `extra.0` -> Caffe's names.
_FEATURES = {
    0: "1_1",
    2: "1_2",
    5: "2_1",
    7: "2_2",
    10: "3_1",
    12: "3_2",
    14: "3_3",
    17: "4_1",
    19: "4_2",
    21: "4_3",
}
_CONV5 = {1: "5_1", 3: "5_2", 5: "5_3"}
_FC = {1: "fc6", 3: "fc7"}

_CONV_OR_NORM = {"0": "conv", "1": "norm"}
_LITE_EXTRA = {"0": "reduce", "1": "depthwise", "2": "expand"}
_HEADS = {"regression": "boxes", "classification": "logits"}


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are one of the two releases."""
    return "head.classification_head.module_list.0.weight" in names or (
        "head.classification_head.module_list.0.1.weight" in names
    )


def convert(tensors: dict[str, Tensor]) -> SSD:
    """The model of a torchvision state dict; the number of classes is read from the heads.

    Raises:
        CheckpointError: the tensors are not those of the two networks.
    """
    light = "head.classification_head.module_list.0.1.weight" in tensors
    architecture = "ssdlite320_mobilenet_v3_large" if light else "ssd300_vgg16"
    part = ".project.bias" if light else ".bias"
    try:
        state = {(_lite_name if light else _vgg_name)(name): tensor for name, tensor in tensors.items()}
        boxes_per_cell = state["heads.0.boxes" + part].numel() // 4
        num_classes = state["heads.0.logits" + part].numel() // boxes_per_cell
    except KeyError as error:
        raise CheckpointError(f"torchvision's {architecture}: no tensor or unknown tensor {error}") from error
    return load(
        spec_of(architecture, num_classes=num_classes), state, release=f"torchvision's {architecture}"
    )


def spec_of(architecture: str, *, num_classes: int = 91) -> ModelSpec:
    """How torchvision runs that network; 91 columns are the COCO ids 1..90, else the classes are numbered."""
    found = find_architecture(architecture)
    ids = tuple(range(1, num_classes))
    changes: dict[str, Any] = {}
    if architecture == "ssd300_vgg16":  # torchvision writes the mean as 0.48235 of 255, and so on
        changes["mean"] = tuple(255 * mean for mean in (0.48235, 0.45882, 0.40784))
    return found.defaults(
        architecture=architecture,
        class_names=COCO_NAMES_90 if num_classes == 91 else tuple(map(str, ids)),
        label_ids=ids,
        priors=replace(found.priors["coco"], clip="wh"),
        max_log_size=_MAX_LOG_SIZE,
        clip_before_nms=True,
        provenance=f"torchvision {architecture}",
        **changes,
    )


_MAX_LOG_SIZE = torch.log(torch.tensor(1000 / 16, dtype=torch.float64)).item()


def find_download(name: str) -> tuple[str, str]:
    """Architecture and address of the weights `name`. Raises: CheckpointError naming those there are."""
    if name not in DOWNLOADS:
        known = ", ".join(f"torchvision:{known}" for known in DOWNLOADS)
        raise CheckpointError(f"unknown weights torchvision:{name}; there are {known}")
    return DOWNLOADS[name]


def download(name: str) -> dict[str, Tensor]:
    """The state dict of `torchvision:<name>`, from torch.hub's cache or the Internet.

    Raises:
        CheckpointError: unknown name, or no way to the server.
    """
    _, url = find_download(name)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"can't download {url} ({error}); fetch it where there is Internet and pass the file as --weights"
        ) from error


def _vgg_name(name: str) -> str:
    if name == "backbone.scale_weight":
        return "backbone.conv4_3_norm.scale"
    *path, last = name.split(".")
    match path:
        case ["backbone", "features", index]:
            return f"backbone.layers.conv{_FEATURES[int(index)]}.{last}"
        case ["backbone", "extra", "0", "7", index]:
            return f"backbone.layers.{_FC[int(index)]}.{last}"
        case ["backbone", "extra", "0", index]:
            return f"backbone.layers.conv{_CONV5[int(index)]}.{last}"
        case ["backbone", "extra", block, index]:
            return f"extras.{int(block) - 1}.{'reduce' if index == '0' else 'expand'}.conv.{last}"
    return _head_name(name)


def _lite_name(name: str) -> str:
    if match := re.fullmatch(r"backbone\.extra\.(\d)\.(\d)\.(\d)\.(\w+)", name):
        block, unit, part, last = match.groups()
        return f"extras.{block}.{_LITE_EXTRA[unit]}.{_CONV_OR_NORM[part]}.{last}"
    if match := re.fullmatch(r"head\.(\w+)_head\.module_list\.(\d)\.0\.(\d)\.(\w+)", name):
        kind, level, part, last = match.groups()
        return f"heads.{level}.{_HEADS[kind]}.depthwise.{_CONV_OR_NORM[part]}.{last}"
    if match := re.fullmatch(r"head\.(\w+)_head\.module_list\.(\d)\.1\.(\w+)", name):
        kind, level, last = match.groups()
        return f"heads.{level}.{_HEADS[kind]}.project.{last}"
    return name


def _head_name(name: str) -> str:
    if match := re.fullmatch(r"head\.(\w+)_head\.module_list\.(\d)\.(\w+)", name):
        kind, level, last = match.groups()
        return f"heads.{level}.{_HEADS[kind]}.{last}"
    return name

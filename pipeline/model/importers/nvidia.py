"""NVIDIA DeepLearningExamples' SSD300 with ResNet-50 (PyTorch); the state dict is the `model` of the file.

The channels of its heads go by coordinate (or class), then by box, and its default boxes by map, box, row and
column; ours by map, row, column and box. So only the channels of the heads have to be put in order.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from pipeline.model.architectures import find_architecture
from pipeline.model.importers.common import class_list, load, num_columns
from pipeline.model.ssd import SSD

_RELEASE = "NVIDIA DeepLearningExamples"
_ARCHITECTURE = "ssd300_resnet50"
_BACKBONE = "feature_extractor.feature_extractor"
# Places in its Sequential of torchvision's ResNet, and of an extra block.
_STEM = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}
_EXTRA = {"0": "reduce.conv", "1": "reduce.norm", "3": "expand.conv", "4": "expand.norm"}
_HEADS = {"loc": "boxes", "conf": "logits"}


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are this release."""
    return {f"{_BACKBONE}.0.weight", "loc.0.weight", "conf.0.weight"} <= set(names)


def convert(tensors: dict[str, Tensor]) -> SSD:
    """The model of a state dict; 81 logit columns are the annotated classes of COCO, others are numbered.

    Raises:
        CheckpointError: other tensors than those of the network.
    """
    found = find_architecture(_ARCHITECTURE)
    state = {_our_name(name): tensor for name, tensor in tensors.items()}
    class_names, label_ids = class_list(num_columns(state))
    spec = found.defaults(
        architecture=_ARCHITECTURE,
        class_names=class_names,
        label_ids=label_ids,
        priors=found.priors["coco"],
        resize_rule="bilinear_antialias",  # it resizes with Pillow
        score_threshold=0.05,
        pre_nms_top_k=200,
        nms_iou_threshold=0.5,
        provenance=_RELEASE,
    )
    model = load(spec, state, release=_RELEASE)
    for head, prior_map in zip(model.heads, spec.priors.maps, strict=True):
        for parameter in head.parameters():
            _by_box(parameter, num_boxes=len(prior_map.sizes_wh))
    return model


def _our_name(name: str) -> str:
    match name.removeprefix(f"{_BACKBONE}.").split("."):
        case [place, *rest] if name.startswith(_BACKBONE) and place in _STEM:
            return ".".join(["backbone", _STEM[place], *rest])
        case ["additional_blocks", block, place, last] if place in _EXTRA:
            return f"extras.{block}.{_EXTRA[place]}.{last}"
        case [("loc" | "conf") as head, level, last]:
            return f"heads.{level}.{_HEADS[head]}.{last}"
    return name


@torch.no_grad()
def _by_box(parameter: Tensor, *, num_boxes: int) -> None:
    """Channels [columns * boxes, ...] -> [boxes * columns, ...]."""
    parameter.copy_(parameter.unflatten(0, (-1, num_boxes)).transpose(0, 1).flatten(0, 1))

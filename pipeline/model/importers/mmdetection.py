"""mmdetection's SSD300 and SSD512 with VGG16; the state dict is the `state_dict` of the file.

The background is its last logit column. Version 2.14 has renamed layers; both ways are read. Files of 1.x,
with the background first, have the same names and can't be told apart: bring them to 2.x with mmdetection's
own upgrade script.

Its limit of 1,000 candidates counts those of a feature map, ours those of a class, so there is none here:
above a score of 0.02 few maps have as many.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from pipeline.model.architectures import find_architecture
from pipeline.model.importers import vgg
from pipeline.model.importers.common import class_list, load, num_columns
from pipeline.model.ssd import SSD

_RELEASE = "mmdetection"
_BEFORE_2_14 = vgg.Naming(
    trunk="backbone.features.{number}",
    norm="backbone.l2_norm.weight",
    extra="backbone.extra.{index}",
    boxes="bbox_head.reg_convs.{level}",
    logits="bbox_head.cls_convs.{level}",
)
_SINCE_2_14 = vgg.Naming(
    trunk="backbone.features.{number}",
    norm="neck.l2_norm.weight",
    extra="neck.extra_layers.{block}.{part}.conv",
    boxes="bbox_head.reg_convs.{level}.0",
    logits="bbox_head.cls_convs.{level}.0",
)


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are this release."""
    return vgg.matches(names, _BEFORE_2_14) or vgg.matches(names, _SINCE_2_14)


def convert(tensors: dict[str, Tensor]) -> SSD:
    """The model of a state dict; 21 logit columns are VOC, others have COCO's default boxes as its configs.

    Raises:
        CheckpointError: other tensors than those of the network.
    """
    naming = _SINCE_2_14 if vgg.matches(tensors, _SINCE_2_14) else _BEFORE_2_14
    architecture, state = vgg.translate(tensors, naming, release=_RELEASE)
    columns = num_columns(state)
    class_names, label_ids = class_list(columns)
    spec = find_architecture(architecture).defaults(
        architecture=architecture,
        class_names=class_names,
        label_ids=label_ids,
        mean=(123.675, 116.28, 103.53),
        priors=vgg.choose_priors(architecture, columns, otherwise="coco"),
        max_log_size=math.log(1000 / 16),
        clip_before_nms=True,
        score_threshold=0.02,
        pre_nms_top_k=None,
        provenance=_RELEASE,
    )
    model = load(spec, state, release=_RELEASE)
    for head in model.heads:
        for parameter in head.get_submodule("logits").parameters():
            _background_first(parameter, columns)
    return model


@torch.no_grad()
def _background_first(parameter: Tensor, columns: int) -> None:
    """Move the last of each box's columns to the front."""
    parameter.copy_(parameter.unflatten(0, (-1, columns)).roll(1, dims=1).flatten(0, 1))

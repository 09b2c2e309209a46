"""lufficc/SSD: SSD300 and SSD512 with VGG16; the state dict is the `model` of the file.

Its default boxes are clamped in centre form and those of SSD512 aren't cut to whole pixels; 100 detections an
image, no limit of candidates.
"""

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from pipeline.model.anchors import PriorSet
from pipeline.model.architectures import find_architecture
from pipeline.model.importers import vgg
from pipeline.model.importers.common import class_list, load, num_columns
from pipeline.model.ssd import SSD

_RELEASE = "lufficc/SSD"
_NAMING = vgg.Naming(
    trunk="backbone.vgg.{number}",
    norm="backbone.l2_norm.weight",
    extra="backbone.extras.{index}",
    boxes="box_head.predictor.reg_headers.{level}",
    logits="box_head.predictor.cls_headers.{level}",
)

# configs/vgg_ssd512_voc0712.yaml and vgg_ssd512_coco_trainval35k.yaml; MIN_SIZES and the last of MAX_SIZES
_SIZES_512 = {
    "voc": (35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.65),
    "coco": (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72),
}


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are this release."""
    return vgg.matches(names, _NAMING)


def convert(tensors: dict[str, Tensor]) -> SSD:
    """The model of a state dict; 81 logit columns are COCO, others have VOC's default boxes as in its code.

    Raises:
        CheckpointError: other tensors than those of the network.
    """
    architecture, state = vgg.translate(tensors, _NAMING, release=_RELEASE)
    columns = num_columns(state)
    class_names, label_ids = class_list(columns)
    spec = find_architecture(architecture).defaults(
        architecture=architecture,
        class_names=class_names,
        label_ids=label_ids,
        priors=priors_of(architecture, columns),
        pre_nms_top_k=None,
        max_detections=100,
        provenance=_RELEASE,
    )
    return load(spec, state, release=_RELEASE)


def priors_of(architecture: str, columns: int) -> PriorSet:
    """The default boxes of its configurations for so many logit columns."""
    priors = replace(vgg.choose_priors(architecture, columns, otherwise="voc"), clip="cxcywh")
    if architecture == "ssd512_vgg16":
        return vgg.with_sizes(priors, _SIZES_512[priors.name], image_size=512)
    return priors

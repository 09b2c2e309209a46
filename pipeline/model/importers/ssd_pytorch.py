"""amdegroot/ssd.pytorch: SSD300 with VGG16; a plain state dict.

Its default boxes are clamped in centre form. Its `Detect` takes the best 200 of each class into the
suppression (Caffe: 400) and means to keep 200 detections an image, but keeps them all by mistake; here it is
200.
"""

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from pipeline.model.architectures import find_architecture
from pipeline.model.importers import vgg
from pipeline.model.importers.common import class_list, load, num_columns
from pipeline.model.ssd import SSD

_RELEASE = "amdegroot/ssd.pytorch"
_NAMING = vgg.Naming(
    trunk="vgg.{number}",
    norm="L2Norm.weight",
    extra="extras.{index}",
    boxes="loc.{level}",
    logits="conf.{level}",
)


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are this release."""
    return vgg.matches(names, _NAMING)


def convert(tensors: dict[str, Tensor]) -> SSD:
    """The model of a state dict; 21 logit columns are VOC, others have COCO's default boxes as in its code.

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
        priors=replace(vgg.choose_priors(architecture, columns, otherwise="coco"), clip="cxcywh"),
        pre_nms_top_k=200,
        provenance=_RELEASE,
    )
    return load(spec, state, release=_RELEASE)

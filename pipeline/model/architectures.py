"""The architectures: each a short piece of data that `pipeline.model.ssd.SSD` turns into a network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from pipeline.errors import ConfigError
from pipeline.model import anchors, backbones
from pipeline.model.anchors import PriorSet
from pipeline.model.layers import conv_unit
from pipeline.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An extra block: a 1x1 convolution to `width` channels, then a larger one that makes the next map."""

    width: int
    channels: int
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What makes one network differ from another.

    Attributes:
        backbone: makes the module that returns the first maps (see `backbones`).
        extras: the blocks that make the further maps.
        unit: makes convolution + batch norm + activation of extra blocks and of light heads.
        light: whether 3x3 convolutions of extra blocks and heads are split in depthwise and pointwise ones
            (SSDLite).
        priors: the default box sets that it can be built with, by name.
        defaults: how a new model of this kind reads images and selects detections.
    """

    backbone: Callable[[], backbones.Backbone]
    extras: tuple[Extra, ...]
    unit: Callable[..., nn.Sequential]
    light: bool
    priors: dict[str, PriorSet]
    defaults: Callable[..., ModelSpec]


_BATCH_NORM = partial(conv_unit, norm=nn.BatchNorm2d)
_LITE_BATCH_NORM = partial(
    conv_unit, norm=partial(nn.BatchNorm2d, eps=0.001, momentum=0.03), activation=nn.ReLU6
)
_LITE_SAME = partial(conv_unit, same=True, activation=nn.ReLU6)

# Normalisation of 0..255 values of red, green and blue.
_MEAN_ONLY = {"mean": (123.0, 117.0, 104.0), "std": (1.0, 1.0, 1.0)}
_IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
_MINUS_ONE_TO_ONE = {"mean": (127.5, 127.5, 127.5), "std": (127.5, 127.5, 127.5)}

ARCHITECTURES: dict[str, Architecture] = {
    "ssd300_vgg16": Architecture(
        backbone=backbones.VGG16,
        extras=(
            Extra(width=256, channels=512),
            Extra(width=128, channels=256),
            Extra(width=128, channels=256, stride=1, padding=0),
            Extra(width=128, channels=256, stride=1, padding=0),
        ),
        unit=conv_unit,
        light=False,
        priors={"coco": anchors.COCO_300, "voc": anchors.VOC_300},
        defaults=partial(ModelSpec, input_height=300, input_width=300, **_MEAN_ONLY),
    ),
    "ssd512_vgg16": Architecture(
        backbone=backbones.VGG16,
        extras=(
            Extra(width=256, channels=512),
            Extra(width=128, channels=256),
            Extra(width=128, channels=256),
            Extra(width=128, channels=256),
            Extra(width=128, channels=256, kernel_size=4, stride=1),
        ),
        unit=conv_unit,
        light=False,
        priors={"coco": anchors.COCO_512, "voc": anchors.VOC_512},
        defaults=partial(ModelSpec, input_height=512, input_width=512, **_MEAN_ONLY),
    ),
    "ssd300_resnet50": Architecture(
        backbone=backbones.ResNet50,
        extras=(
            Extra(width=256, channels=512),
            Extra(width=256, channels=512),
            Extra(width=128, channels=256),
            Extra(width=128, channels=256, stride=1, padding=0),
            Extra(width=128, channels=256, stride=1, padding=0),
        ),
        unit=_BATCH_NORM,
        light=False,
        priors={"coco": anchors.NVIDIA_300, "voc": anchors.VOC_300},
        defaults=partial(ModelSpec, input_height=300, input_width=300, **_IMAGENET),
    ),
    "ssdlite320_mobilenet_v3_large": Architecture(
        backbone=backbones.MobileNetV3Large,
        extras=(
            Extra(width=256, channels=512),
            Extra(width=128, channels=256),
            Extra(width=128, channels=256),
            Extra(width=64, channels=128),
        ),
        unit=_LITE_BATCH_NORM,
        light=True,
        priors={"coco": anchors.LITE_320},
        defaults=partial(
            ModelSpec,
            input_height=320,
            input_width=320,
            **_MINUS_ONE_TO_ONE,
            score_threshold=0.001,
            pre_nms_top_k=300,
            nms_iou_threshold=0.55,
            max_detections=300,
        ),
    ),
    "ssdlite300_mobilenet_v2": Architecture(
        backbone=backbones.MobileNetV2,
        extras=(
            Extra(width=256, channels=512),
            Extra(width=128, channels=256),
            Extra(width=128, channels=256),
            Extra(width=64, channels=128),
        ),
        unit=_LITE_SAME,
        light=True,
        priors={"coco": anchors.LITE_300},
        defaults=partial(
            ModelSpec,
            input_height=300,
            input_width=300,
            **_MINUS_ONE_TO_ONE,
            resize_rule="tf_legacy",
            score_function="sigmoid",
            score_threshold=0.001,
            clip_before_nms=True,
            pre_nms_top_k=None,
            nms_iou_threshold=0.6,
            max_detections=100,
        ),
    ),
}


def architectures() -> tuple[str, ...]:
    """Names of the networks that `build_model` can make."""
    return tuple(ARCHITECTURES)


def find_architecture(name: str) -> Architecture:
    """The architecture of that name. Raises ConfigError with the names that there are."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"no architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]

"""The SSD network: backbone -> extra feature maps -> heads, in one module for all architectures.

Shapes: N images, H W pixels of the network's input, A default boxes, C classes incl. background at 0.

Names in the state dict are stable, since importers and old checkpoints rely on them:

    backbone.*                                    as the backbone names its layers, e.g. for VGG16
    backbone.layers.{conv1_1..conv5_3,fc6,fc7}.{weight,bias}, backbone.conv4_3_norm.scale
    extras.{i}.reduce.{conv,norm}.*               1x1 convolution of extra block i
    extras.{i}.depthwise.{conv,norm}.*            only in light architectures
    extras.{i}.expand.{conv,norm}.*               the convolution that makes the map
    heads.{i}.{boxes,logits}.{weight,bias}        heads of map i, counted from the largest map
    heads.{i}.{boxes,logits}.depthwise.{conv,norm}.*, heads.{i}.{boxes,logits}.project.{weight,bias}
                                                  the same in light architectures

Channels of a head: box by box, `box * 4 + (dx, dy, dw, dh)` and `box * C + class`. `norm` is there where the
architecture trains with batch norm (`ssd300_resnet50`, `ssdlite320_mobilenet_v3_large`).
`ssdlite300_mobilenet_v2` has none anywhere: its public weights come with batch norm folded into the
convolutions, so it is trained without, too.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.anchors import PriorSet, prior_boxes
from pipeline.model.architectures import Architecture, Extra, find_architecture
from pipeline.model.backbones import Backbone
from pipeline.model.spec import ModelSpec


def build_model(architecture: str, *, num_classes: int, priors: str | PriorSet = "coco") -> "SSD":
    """A new network with the initial weights of PyTorch's layers.

    Its classes are called "1", "2", ... with these numbers as ids, until the caller replaces `model.spec`.

    Args:
        architecture: one of `architectures()`.
        num_classes: logit columns, the background included.
        priors: name of a default box set of the architecture, or a set of one's own with one entry per map.

    Raises:
        ConfigError: for an unknown architecture or prior set.
    """
    found = find_architecture(architecture)
    if isinstance(priors, str):
        if priors not in found.priors:
            raise ConfigError(f"{architecture} has no priors {priors!r}; there are {', '.join(found.priors)}")
        priors = found.priors[priors]
    ids = range(1, num_classes)
    spec = found.defaults(
        architecture=architecture, class_names=tuple(map(str, ids)), label_ids=tuple(ids), priors=priors
    )
    return SSD(spec)


class SSD(nn.Module):
    """Single Shot MultiBox Detector (arXiv 1512.02325).

    Attributes:
        spec: everything else that changes its results; what `save_checkpoint` writes into the header.
        priors_cxcywh: default boxes (cx, cy, w, h) float32 [A, 4] in fractions of the image, in the order
            map -> row -> column -> box; not part of the state dict.
    """

    backbone: Backbone
    priors_cxcywh: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        architecture = find_architecture(spec.architecture)
        boxes_per_cell = [len(prior_map.sizes_wh) for prior_map in spec.priors.maps]
        self.spec = spec
        self.backbone = architecture.backbone()
        num_maps = len(self.backbone.channels)
        channels = [*self.backbone.channels, *(extra.channels for extra in architecture.extras)]
        if len(channels) != len(boxes_per_cell):
            raise ConfigError(
                f"priors {spec.priors.name!r} are for {len(boxes_per_cell)} feature maps; "
                f"{spec.architecture} has {len(channels)}"
            )
        self.extras = nn.ModuleList(
            _extra_block(architecture, extra, in_channels)
            for extra, in_channels in zip(architecture.extras, channels[num_maps - 1 :], strict=False)
        )
        light_unit = architecture.unit if architecture.light else None
        self.heads = nn.ModuleList(
            Head(width, num_boxes=num_boxes, num_classes=spec.num_classes, light_unit=light_unit)
            for width, num_boxes in zip(channels, boxes_per_cell, strict=True)
        )
        self.register_buffer("priors_cxcywh", prior_boxes(spec.priors), persistent=False)

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Raw predictions for every default box.

        Args:
            images_N3HW: float RGB images [N, 3, H, W] of the input size in `spec`, normalised as `spec` says.

        Returns:
            deltas [N, A, 4] = (dx, dy, dw, dh) relative to `priors_cxcywh` and times the coder weights, and
            logits [N, A, C]; column 0 is the background.
        """
        maps = self.backbone(images_N3HW)
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        outputs = [head(features) for head, features in zip(self.heads, maps, strict=True)]
        return torch.cat([deltas for deltas, _ in outputs], dim=1), torch.cat(
            [logits for _, logits in outputs], dim=1
        )


def load_weights(model: SSD, state: Mapping[str, Tensor], *, source: str) -> None:
    """Put `state` into the model. Raises: CheckpointError, one line, where names or shapes don't fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        what = " ".join(str(error).split())  # PyTorch gives a line for each of hundreds of names
        if len(what) > 300:
            what = what[:300] + " ..."
        raise CheckpointError(f"not the {model.spec.architecture} weights of {source}: {what}") from error


class Head(nn.Module):
    """Box and class predictions for one feature map; every cell has the same weights.

    Args:
        channels: channels of the map.
        num_boxes: default boxes per cell.
        num_classes: logit columns per box.
        light_unit: makes the depthwise convolution that replaces the 3x3 one in light architectures.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_boxes: int,
        num_classes: int,
        light_unit: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.boxes = _predictor(channels, num_boxes * 4, light_unit)
        self.logits = _predictor(channels, num_boxes * num_classes, light_unit)

    def forward(self, features_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Deltas [N, H * W * num_boxes, 4] and logits [N, H * W * num_boxes, num_classes]."""
        return _by_box(self.boxes(features_NCHW), 4), _by_box(self.logits(features_NCHW), self.num_classes)


def _by_box(output_NKHW: Tensor, columns: int) -> Tensor:
    """[N, boxes * columns, H, W] -> [N, H * W * boxes, columns]."""
    return output_NKHW.permute(0, 2, 3, 1).unflatten(3, (-1, columns)).flatten(1, 3)


def _predictor(channels: int, outputs: int, light_unit: Callable[..., nn.Module] | None) -> nn.Module:
    if light_unit is None:
        return nn.Conv2d(channels, outputs, 3, padding=1)
    depthwise = light_unit(channels, channels, 3, groups=channels)
    return nn.Sequential(OrderedDict(depthwise=depthwise, project=nn.Conv2d(channels, outputs, 1)))


def _extra_block(architecture: Architecture, extra: Extra, in_channels: int) -> nn.Sequential:
    """1x1 reduction, then the convolution that makes the map, split in two in light architectures."""
    unit, width = architecture.unit, extra.width
    shape = {"stride": extra.stride, "padding": extra.padding}
    parts: OrderedDict[str, nn.Module] = OrderedDict(reduce=unit(in_channels, width, 1))
    if architecture.light:
        parts["depthwise"] = unit(width, width, extra.kernel_size, groups=width, **shape)
        parts["expand"] = unit(width, extra.channels, 1)
    else:
        parts["expand"] = unit(width, extra.channels, extra.kernel_size, **shape)
    return nn.Sequential(parts)

"""Backbones: from an image to the first one or two feature maps that carry default boxes.

Each is a module with `channels`, the widths of the maps that it returns, and
`forward(images_N3HW) -> list of maps`. Names of layers are those of the original networks, since
checkpoints of public releases map onto them.
"""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from pipeline.model.layers import L2Norm, conv_unit

_VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16 as SSD uses it: fc6 and fc7 as convolutions, fc6 dilated, no fc8 (paper section 3).

    Returns conv4_3 after its L2Norm (512 channels, stride 8) and fc7 (1024 channels, stride 16).
    Pooling 3 rounds up (75 -> 38) and pooling 5 keeps the size.
    """

    channels = (512, 1024)

    def __init__(self) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        in_channels = 3
        for block, widths in enumerate(_VGG_BLOCKS, start=1):
            for index, width in enumerate(widths, start=1):
                layers[f"conv{block}_{index}"] = nn.Conv2d(in_channels, width, 3, padding=1)
                layers[f"relu{block}_{index}"] = nn.ReLU(inplace=True)
                in_channels = width
            layers[f"pool{block}"] = nn.MaxPool2d(2, 2, ceil_mode=block == 3)
        layers["pool5"] = nn.MaxPool2d(3, stride=1, padding=1)
        layers["fc6"] = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        layers["relu6"] = nn.ReLU(inplace=True)
        layers["fc7"] = nn.Conv2d(1024, 1024, 1)
        layers["relu7"] = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(layers)
        self.conv4_3_norm = L2Norm(512, scale=20.0)

    def forward(self, images_N3HW: Tensor) -> list[Tensor]:
        """The normalised conv4_3 and fc7 of images [N, 3, H, W]."""
        features, maps = images_N3HW, []
        for name, layer in self.layers.named_children():
            features = layer(features)
            if name == "relu4_3":
                maps.append(self.conv4_3_norm(features))
        return [*maps, features]


# (width, stride, repeats) of the blocks after the first; expansion 6 (MobileNetV2, table 2).
_V2_BLOCKS = ((24, 2, 2), (32, 2, 3), (64, 2, 4), (96, 1, 3), (160, 2, 3), (320, 1, 1))


class MobileNetV2(nn.Module):
    """MobileNetV2 of TensorFlow's detection API: "SAME" padding, batch norm already folded into the weights.

    Returns the expansion of block 13 after its ReLU6 (576 channels, stride 16) and the last convolution
    (1280 channels, stride 32).
    """

    channels = (576, 1280)

    def __init__(self) -> None:
        super().__init__()
        unit = partial(conv_unit, same=True, activation=nn.ReLU6)
        self.stem = unit(3, 32, 3, stride=2)
        blocks = [_InvertedResidual(32, 16, stride=1, expansion=1)]
        in_channels = 16
        for width, first_stride, repeats in _V2_BLOCKS:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(_InvertedResidual(in_channels, width, stride=stride, expansion=6))
                in_channels = width
        self.blocks = nn.ModuleList(blocks)
        self.last = unit(320, 1280, 1)

    def forward(self, images_N3HW: Tensor) -> list[Tensor]:
        """The maps of stride 16 and 32 of images [N, 3, H, W]."""
        features, source = self.stem(images_N3HW), images_N3HW
        for index, block in enumerate(self.blocks):
            assert isinstance(block, _InvertedResidual)
            expanded = block.expand(features)
            if index == 13:
                source = expanded
            features = block(features, expanded)
        return [source, self.last(features)]


class _InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (3x3), project (1x1, linear), with a shortcut where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == out_channels
        unit = partial(conv_unit, same=True)
        self.expand = unit(in_channels, width, 1, activation=nn.ReLU6) if expansion > 1 else nn.Identity()
        self.depthwise = unit(width, width, 3, stride=stride, groups=width, activation=nn.ReLU6)
        self.project = unit(width, out_channels, 1, activation=None)

    def forward(self, features: Tensor, expanded: Tensor) -> Tensor:
        projected = self.project(self.depthwise(expanded))
        return features + projected if self.shortcut else projected


class MobileNetV3Large(nn.Module):
    """torchvision's MobileNetV3-large with the reduced tail, as in its `ssdlite320_mobilenet_v3_large`.

    Returns the expansion of the first stride-32 block (672 channels, stride 16) and the last convolution
    (480 channels, stride 32). Batch norm: epsilon 0.001, momentum 0.03.
    """

    channels = (672, 480)

    def __init__(self) -> None:
        from torchvision.models import mobilenet_v3_large  # loads torch's compiler: 3 s in every process

        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
        blocks = mobilenet_v3_large(weights=None, norm_layer=norm, reduced_tail=True).features
        tapped = blocks.get_submodule("13.block")  # of the block that halves 20x20 to 10x10
        assert isinstance(tapped, nn.Sequential)
        # Grouped exactly as torchvision groups them, so that its names fit.
        self.features = nn.Sequential(
            nn.Sequential(*blocks[:13], tapped[0]), nn.Sequential(tapped[1:], *blocks[14:])
        )

    def forward(self, images_N3HW: Tensor) -> list[Tensor]:
        """The maps of stride 16 and 32 of images [N, 3, H, W]."""
        source = self.features[0](images_N3HW)
        return [source, self.features[1](source)]


class ResNet50(nn.Module):
    """ResNet-50 up to conv4_x with stride 1 there: one map of 1024 channels, stride 8 (NVIDIA's SSD300)."""

    channels = (1024,)

    def __init__(self) -> None:
        from torchvision.models import resnet50  # here for the reason in MobileNetV3Large

        super().__init__()
        whole = resnet50(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = whole.conv1, whole.bn1, whole.relu, whole.maxpool
        self.layer1, self.layer2, self.layer3 = whole.layer1, whole.layer2, whole.layer3
        for name in ("0.conv2", "0.downsample.0"):
            conv = self.layer3.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            conv.stride = (1, 1)

    def forward(self, images_N3HW: Tensor) -> list[Tensor]:
        """The map of stride 8 of images [N, 3, H, W]."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images_N3HW))))
        return [self.layer3(self.layer2(self.layer1(features)))]


Backbone = VGG16 | MobileNetV2 | MobileNetV3Large | ResNet50

"""The few layers that PyTorch doesn't have, and the folding of batch norm."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Module = TypeVar("Module", bound=nn.Module)


class L2Norm(nn.Module):
    """Scale each location to unit length over its channels, times a learned factor per channel (ParseNet).

    Computed in float32 whatever the input: squares of values above 15 overflow float16, and float16 has no
    epsilon small enough for an all-zero location.
    """

    def __init__(self, channels: int, *, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Normalised features [N, C, H, W] in the dtype of the input; a location of zeros stays zero."""
        with torch.autocast(features_NCHW.device.type, enabled=False):
            units = F.normalize(features_NCHW.float(), dim=1, eps=1e-10)
            return (units * self.scale.float().view(1, -1, 1, 1)).to(features_NCHW.dtype)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: ceil(n / stride) outputs, odd pixel at the far end.

    The odd pixel goes into the kernel, as a row or column of zeros at its near end, with the far end's
    padding at both ends of the features: the same sums, and no copy of the features (300x300, 8 images, two
    cores: 44 -> 10 ms for the first depthwise layer of stride 2, 27 -> 8 ms for the stem).
    """

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Convolved features [N, C', ceil(H / stride), ceil(W / stride)]."""
        top, bottom = self._padding_of(features_NCHW.shape[2], axis=0)
        left, right = self._padding_of(features_NCHW.shape[3], axis=1)
        weight = self.weight
        if (top, left) != (bottom, right):
            weight = F.pad(weight, (right - left, 0, bottom - top, 0))
        return F.conv2d(features_NCHW, weight, self.bias, self.stride, (bottom, right), groups=self.groups)

    def _padding_of(self, size: int, *, axis: int) -> tuple[int, int]:
        stride, kernel = self.stride[axis], self.kernel_size[axis]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def conv_unit(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    same: bool = False,
    norm: Callable[[int], nn.Module] | None = None,
    activation: type[nn.ReLU] | type[nn.ReLU6] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution `conv`, batch norm `norm` if asked for (then without a bias), activation.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        stride: distance of two kernel positions.
        padding: zeros at each side; half the kernel by default. Not used with `same`.
        groups: as in `nn.Conv2d`.
        same: TensorFlow's asymmetric padding.
        norm: makes the batch norm for a number of channels.
        activation: class of the activation, or None.
    """
    padding = kernel_size // 2 if padding is None else padding
    make = SameConv2d if same else nn.Conv2d
    conv = make(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=norm is None)
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if norm is not None:
        parts["norm"] = norm(out_channels)
    if activation is not None:
        parts["activation"] = activation(inplace=True)
    return nn.Sequential(parts)


def fold_batch_norm(model: Module) -> Module:
    """Merge each batch norm into the convolution just before it, in place; returns the model in eval mode.

    For inference only: the result can't be trained further in the way that it was trained before.
    """
    model.eval()
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return model

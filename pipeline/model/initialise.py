"""The weights before the first step: new layers, an ImageNet backbone, another list of classes."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.anchors import PriorSet
from pipeline.model.backbones import VGG16
from pipeline.model.ssd import SSD

# torchvision's number of each VGG16 convolution in `features`; amdegroot's vgg16_reducedfc has the same.
_VGG16_NUMBERS = {
    "conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
    "conv4_1": 17, "conv4_2": 19, "conv4_3": 21, "conv5_1": 24, "conv5_2": 26, "conv5_3": 28,
}  # fmt: skip

# Of the 0..255 values of photographs (ImageNet: 58.4, 57.1, 57.4 for red, green, blue).
_PIXEL_STD = 57.6

# Probability that an untrained sigmoid model gives every class, so that the mass of background boxes doesn't
# drown the first steps (arXiv 1708.02002, section 3.3).
_SIGMOID_PRIOR = 0.01
# Of the weights of new class logits: as good as none, so that the first steps don't unlearn wrong guesses.
_NEW_CLASS_STD = 0.01


def initialise(model: SSD, *, generator: torch.Generator) -> None:
    """Draw all weights anew, in place.

    Extra layers and heads: as in the authors' code (see `caffe_xavier`). Backbone: normal with a variance of
    2 / fan_in (arXiv 1502.01852), the first layer divided by the spread of its input, so that signals of
    about 1 go through a stack without batch norm. Biases 0, except those of sigmoid classes. Batch norm and
    L2Norm stay as they are made. The values follow the order in memory: convert to channels_last afterwards.
    """
    for conv in _convolutions(model.backbone):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
        _zero_bias(conv)
    first = next(_convolutions(model.backbone))
    with torch.no_grad():
        first.weight.mul_(torch.tensor(model.spec.std).view(1, 3, 1, 1) / _PIXEL_STD)
    for conv in _convolutions(model.extras, model.heads):
        caffe_xavier(conv, generator=generator)
    _set_class_bias(model)


def caffe_xavier(conv: nn.Conv2d, *, generator: torch.Generator) -> None:
    """Uniform weights within +-sqrt(3 / fan_in), bias 0: Caffe's "xavier" (include/caffe/filler.hpp).

    PyTorch's `xavier_uniform_` is another rule: +-sqrt(6 / (fan_in + fan_out)).
    """
    limit = math.sqrt(3 / conv.weight[0].numel())
    nn.init.uniform_(conv.weight, -limit, limit, generator=generator)
    _zero_bias(conv)


def load_vgg16(
    model: SSD,
    state: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> bool:
    """Fill the VGG16 backbone with a classifier's weights, in place.

    fc6 and fc7 are subsampled from the classifier's (SSD section 3, "subsample parameters from fc6 and fc7")
    or taken as they are where the file has them as convolutions. Where it has none, or NaN as torchvision's
    IMAGENET1K_FEATURES, they get `caffe_xavier`.

    Args:
        model: one with a VGG16 backbone.
        state: `features.N.*` and perhaps `classifier.{0,3}.*` (torchvision), or `N.*` with fc6 and fc7 as 31
            and 33 (vgg16_reducedfc).
        generator: for fc6 and fc7 where they are new.
        std: what the images were divided by in the training of `state`, on 0..255 values of RGB: (1, 1, 1)
            for the original (Caffe) weights, (58.395, 57.12, 57.375) for torchvision's IMAGENET1K_V1. It goes
            into conv1_1, whose input this model divides by `model.spec.std`.

    Returns:
        Whether fc6 and fc7 came from `state`.

    Raises:
        ConfigError: the backbone is another one.
        CheckpointError: a convolution is missing or has another shape.
    """
    if not isinstance(model.backbone, VGG16):
        raise ConfigError(
            f"{model.spec.architecture} has no VGG16 backbone; choose ssd300_vgg16 or ssd512_vgg16"
        )
    prefix = "features." if "features.0.weight" in state else ""
    layers = {name: layer for name, layer in model.backbone.layers.named_children()
              if isinstance(layer, nn.Conv2d)}  # fmt: skip
    for name, number in _VGG16_NUMBERS.items():
        _copy(layers[name], _pair(state, f"{prefix}{number}"), name=name)
    scale = torch.tensor(model.spec.std) / torch.tensor(std)
    with torch.no_grad():
        layers["conv1_1"].weight.mul_(scale.view(1, 3, 1, 1))
    reduced = _reduced_classifier(state)
    for name in ("fc6", "fc7"):
        if reduced is None:
            caffe_xavier(layers[name], generator=generator)
        else:
            _copy(layers[name], reduced[name], name=name)
    return reduced is not None


def subsample_fc6(weight_OI: Tensor) -> Tensor:
    """[4096, 512 * 7 * 7] -> [1024, 512, 3, 3]: every 4th output, every 3rd row and column."""
    return weight_OI.reshape(weight_OI.shape[0], -1, 7, 7)[::4, :, ::3, ::3]


def subsample_fc7(weight_OI: Tensor) -> Tensor:
    """[4096, 4096] -> [1024, 1024, 1, 1]: every 4th output, and the inputs that fc6 has kept."""
    return weight_OI[::4, ::4, None, None]


def replace_classes(
    model: SSD, *, class_names: Sequence[str], label_ids: Sequence[int], generator: torch.Generator
) -> SSD:
    """A model for other classes that keeps all that it can of this one.

    Only what turns features into class logits is drawn anew, and only where the names of the classes or
    their order differ; boxes don't depend on classes. New logits are SSD's, whatever they were before:
    softmax, which begins with all columns about as probable (measured against the sigmoids of the COCO
    weights: CONTRIBUTING).
    """
    spec = dataclasses.replace(model.spec, class_names=tuple(class_names), label_ids=tuple(label_ids))
    same = spec.class_names == model.spec.class_names
    new = SSD(spec if same else dataclasses.replace(spec, score_function="softmax")).train(model.training)
    drawn = {} if same else _draw_classes(new, generator)
    new.load_state_dict(model.state_dict() | drawn)
    return new


def replace_priors(model: SSD, priors: PriorSet) -> SSD:
    """A model with other default boxes, as many in each cell, that predicts the same boxes from them.

    Deltas of centres are in units of the default box, and those of sizes are logarithms: the last layer of
    each box head is multiplied and moved. (Equal where `priors.clip` changes nothing.)
    """
    new = SSD(dataclasses.replace(model.spec, priors=priors)).train(model.training)
    new.load_state_dict(model.state_dict())
    for index, (before, after) in enumerate(zip(model.spec.priors.maps, priors.maps, strict=True)):
        *_, last = _convolutions(new.get_submodule(f"heads.{index}.boxes"))
        assert last.bias is not None
        ratio_B2 = torch.tensor(before.sizes_wh) / torch.tensor(after.sizes_wh)
        factor = torch.cat([ratio_B2, torch.ones_like(ratio_B2)], dim=1).flatten()
        shift_B2 = model.spec.coder_weights[1] * ratio_B2.log()
        with torch.no_grad():
            last.weight.mul_(factor[:, None, None, None])
            last.bias.mul_(factor).add_(torch.cat([torch.zeros_like(shift_B2), shift_B2], dim=1).flatten())
    return new


def _draw_classes(model: SSD, generator: torch.Generator) -> dict[str, Tensor]:
    """Class logits that know nothing yet, drawn in place; what they are in the state dict."""
    for conv in _class_convolutions(model):
        nn.init.normal_(conv.weight, std=_NEW_CLASS_STD, generator=generator)
        _zero_bias(conv)
    drawn = {id(parameter) for conv in _class_convolutions(model) for parameter in conv.parameters()}
    return {name: parameter.data for name, parameter in model.named_parameters() if id(parameter) in drawn}


def _convolutions(*modules: nn.Module) -> Iterator[nn.Conv2d]:
    for module in modules:
        yield from (part for part in module.modules() if isinstance(part, nn.Conv2d))


def _class_convolutions(model: SSD) -> Iterator[nn.Conv2d]:
    """The last convolution on the way to the logits, of each head."""
    for index in range(len(model.heads)):
        *_, last = _convolutions(model.get_submodule(f"heads.{index}.logits"))
        yield last


def _set_class_bias(model: SSD) -> None:
    if model.spec.score_function == "sigmoid":
        for conv in _class_convolutions(model):
            assert conv.bias is not None
            nn.init.constant_(conv.bias, math.log(_SIGMOID_PRIOR / (1 - _SIGMOID_PRIOR)))


def _zero_bias(conv: nn.Conv2d) -> None:
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _reduced_classifier(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Weight and bias of fc6 and fc7 as convolutions; None where `state` has none."""
    if "31.weight" in state:
        return {"fc6": _pair(state, "31"), "fc7": _pair(state, "33")}
    if "classifier.0.weight" not in state or bool(state["classifier.0.weight"].isnan().any()):
        return None
    fc6, fc6_bias = _pair(state, "classifier.0")
    fc7, fc7_bias = _pair(state, "classifier.3")
    return {"fc6": (subsample_fc6(fc6), fc6_bias[::4]), "fc7": (subsample_fc7(fc7), fc7_bias[::4])}


def _pair(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of that name."""
    try:
        return state[f"{name}.weight"], state[f"{name}.bias"]
    except KeyError as error:
        raise CheckpointError(
            f"VGG16 weights have no {error.args[0]!r}; expected torchvision's names, features.0.weight to "
            "features.28.bias, or those of vgg16_reducedfc, 0.weight to 33.bias"
        ) from None


def _copy(conv: nn.Conv2d, weights: tuple[Tensor, Tensor], *, name: str) -> None:
    """Copy weight and bias into a convolution, in its dtype."""
    assert conv.bias is not None
    if weights[0].shape != conv.weight.shape:
        raise CheckpointError(
            f"VGG16 weights: {name} is {tuple(weights[0].shape)}, expected {tuple(conv.weight.shape)}"
        )
    with torch.no_grad():
        conv.weight.copy_(weights[0])
        conv.bias.copy_(weights[1])

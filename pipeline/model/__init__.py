"""The detectors, in plain PyTorch.

Read in this order: `anchors` (default boxes) and `backbones`, put together in `ssd` as `architectures` says;
`postprocess` turns raw predictions into detections; `checkpoint` keeps a model in one file with its `spec`;
`detector` runs it all on batches of images. `importers` read the weights of public releases. Training adds
`initialise` (weights before the first step), `matching` and `loss`.
"""

from pipeline.model.anchors import PriorMap, PriorSet
from pipeline.model.architectures import architectures
from pipeline.model.checkpoint import (
    DEFAULT_WEIGHTS,
    bundled_weights,
    load_checkpoint,
    read_spec,
    save_checkpoint,
    weights_sha256,
)
from pipeline.model.detector import Detector
from pipeline.model.loss import multibox_loss
from pipeline.model.postprocess import Detections
from pipeline.model.spec import ModelSpec
from pipeline.model.ssd import SSD, build_model

__all__ = [
    "DEFAULT_WEIGHTS",
    "SSD",
    "Detections",
    "Detector",
    "ModelSpec",
    "PriorMap",
    "PriorSet",
    "architectures",
    "build_model",
    "bundled_weights",
    "load_checkpoint",
    "multibox_loss",
    "read_spec",
    "save_checkpoint",
    "weights_sha256",
]

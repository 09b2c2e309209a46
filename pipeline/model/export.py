"""A model as one ONNX file that runs without this package.

    python -m pipeline.model.export --weights W --output FILE.onnx [--no-postprocess]

Inputs, for any batch size N:

    images  uint8 [N, H, W, 3]  RGB, resized to the network's input by the rule in the model's spec
    sizes   int32 [N, 2]        width and height of the original images (not with --no-postprocess)

Outputs, of fixed size per image (K is the spec's `max_detections`), best detection first:

    boxes           float32 [N, K, 4]  corners in pixels of the original image; 0 after the last detection
    scores          float32 [N, K]
    labels          int64   [N, K]     ids of the classes in their data set; 0 after the last detection
    num_detections  int64   [N]

With --no-postprocess instead `deltas` float32 [N, A, 4] and `logits` float32 [N, A, C], see `SSD.forward`;
the default boxes that they refer to are in the spec. The spec is the file's metadata `shardshot`, as JSON.

Needs the packages of the extra `export`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import boxes, storage
from pipeline.config import run_job
from pipeline.errors import ConfigError
from pipeline.model.checkpoint import load_checkpoint
from pipeline.model.layers import fold_batch_norm
from pipeline.model.postprocess import class_scores, decode
from pipeline.model.spec import ModelSpec
from pipeline.model.ssd import SSD

_METADATA = "shardshot"  # key of the spec, as in checkpoints
_OPSET = 18


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Flags of the command."""

    weights: str
    """A bundled name, torchvision:<name>, or path or URI of a checkpoint or of a public release's file."""
    output: str
    """Path or URI of the ONNX file."""
    postprocess: bool = True
    """Whether the file also decodes boxes and suppresses duplicates, or ends with raw predictions."""


def export_onnx(model: SSD, path: str | Path, *, postprocess: bool = True) -> None:
    """Write a model as an ONNX file, whole or not at all; see the module's docstring.

    Args:
        model: stays as it is; the file has its batch norm folded.
        path: local path or URI.
        postprocess: whether the file gives detections or raw predictions.

    Raises:
        ConfigError: the packages of the extra `export` are missing.
    """
    network = _Network(_folded_copy(model))
    spec = model.spec
    # Two images: a batch of one would be taken for a constant.
    images_NHW3 = torch.zeros(2, spec.input_height, spec.input_width, 3, dtype=torch.uint8)
    sizes_N2 = torch.full((2, 2), 300, dtype=torch.int32)
    if postprocess:
        data = _onnx(_Detector(network), {"images": images_NHW3, "sizes": sizes_N2}, _DETECTIONS, spec=spec)
    else:
        data = _onnx(network, {"images": images_NHW3}, _RAW, spec=spec)
    storage.write_atomic(str(path), data)


_DETECTIONS = ("boxes", "scores", "labels", "num_detections")
_RAW = ("deltas", "logits")


def _onnx(module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], *, spec: ModelSpec) -> bytes:
    """The ONNX file of a module, with any number of images."""
    batch: dict[int, Any] = {0: torch.export.Dim("batch")}
    same: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}  # the exporter warns of one name for two inputs
    try:
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(batch, same)[: len(inputs)],
            opset_version=_OPSET,
            dynamo=True,
            custom_translation_table={torch.ops.shardshot.suppress.default: _suppress_in_onnx()},
            verbose=False,
        )
    except ImportError as error:
        raise ConfigError(
            f"no module {error.name}: the export needs pip install 'shardshot[export]'"
        ) from error
    assert program is not None
    program.model.metadata_props[_METADATA] = spec.to_json()
    return program.model_proto.SerializeToString()


def _folded_copy(model: SSD) -> SSD:
    copy = SSD(model.spec)
    copy.load_state_dict(model.state_dict())
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, _Clamp())
    return fold_batch_norm(copy).requires_grad_(False)


class _Clamp(nn.Module):
    """ReLU6 as one operation: taking `nn.ReLU6` apart is half of the exporter's time."""

    def forward(self, features: Tensor) -> Tensor:
        return features.clamp(0, 6)


class _Network(nn.Module):
    """From uint8 images to raw predictions."""

    factor: Tensor
    shift: Tensor

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.model = model
        std, mean = torch.tensor(model.spec.std), torch.tensor(model.spec.mean)
        self.register_buffer("factor", 1 / std)
        self.register_buffer("shift", -mean / std)

    def forward(self, images_NHW3: Tensor) -> tuple[Tensor, Tensor]:
        images_NHW3 = images_NHW3.float() * self.factor + self.shift
        return self.model(images_NHW3.permute(0, 3, 1, 2))


class _Detector(nn.Module):
    """From uint8 images to detections of fixed size: `postprocess` in operations that ONNX has."""

    label_ids: Tensor

    def __init__(self, network: _Network) -> None:
        super().__init__()
        self.network = network
        self.spec = network.model.spec
        self.register_buffer("label_ids", torch.tensor(self.spec.label_ids))

    def forward(self, images_NHW3: Tensor, sizes_N2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        spec = self.spec
        deltas_NA4, logits_NAC = self.network(images_NHW3)
        boxes_NA4 = decode(deltas_NA4, self.network.model.priors_cxcywh, spec=spec)
        scores_NCA = class_scores(logits_NAC, function=spec.score_function).transpose(1, 2)
        num_boxes = scores_NCA.shape[2]
        if spec.pre_nms_top_k is not None:
            worst_NC1 = scores_NCA.topk(min(spec.pre_nms_top_k, num_boxes)).values[..., -1:]
            scores_NCA = torch.where(scores_NCA >= worst_NC1, scores_NCA, 0.0)
        kept_NCA = torch.ops.shardshot.suppress(
            boxes_NA4, scores_NCA, spec.nms_iou_threshold, spec.score_threshold, spec.max_detections
        )
        best = kept_NCA.flatten(1).topk(min(spec.max_detections, kept_NCA[0].numel()))
        found_NK = best.values > 0
        columns_NK, places_NK = best.indices // num_boxes, best.indices % num_boxes
        boxes_NK4 = boxes.clip(boxes_NA4.gather(1, places_NK[..., None].expand(-1, -1, 4)))
        boxes_NK4 = boxes_NK4 * sizes_N2.float().repeat(1, 2)[:, None] * found_NK[..., None]
        return boxes_NK4, best.values, self.label_ids[columns_NK] * found_NK, found_NK.sum(dim=1)


@torch.library.custom_op("shardshot::suppress", mutates_args=())
def _suppress(
    boxes_NA4: Tensor, scores_NCA: Tensor, iou_threshold: float, score_threshold: float, max_boxes: int
) -> Tensor:
    """The scores of boxes that non-maximum suppression keeps, at most so many of a class, 0 elsewhere.

    A stand-in that only lives until it is translated: ONNX's operator returns a list whose length depends on
    the image, which a traced program can't hold.
    """
    raise NotImplementedError("only in exported files")


@_suppress.register_fake
def _(
    boxes_NA4: Tensor, scores_NCA: Tensor, iou_threshold: float, score_threshold: float, max_boxes: int
) -> Tensor:
    return torch.empty_like(scores_NCA)


def _suppress_in_onnx() -> Callable[..., Any]:
    """The translation of `_suppress`."""
    from onnxscript import opset18

    op: Any = opset18

    def suppress(
        boxes_NA4: Any, scores_NCA: Any, iou_threshold: float, score_threshold: float, max_boxes: int
    ) -> Any:
        kept_M3 = op.NonMaxSuppression(
            boxes_NA4,
            scores_NCA,
            op.Constant(value_ints=[max_boxes]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )
        nothing_NCA = op.Mul(scores_NCA, op.Constant(value_float=0.0))
        return op.ScatterND(nothing_NCA, kept_M3, op.GatherND(scores_NCA, kept_M3))

    return suppress


def main(config: ExportConfig) -> int:
    """Run the command; returns the exit code."""
    export_onnx(load_checkpoint(config.weights), config.output, postprocess=config.postprocess)
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main, ExportConfig, __doc__))

"""Which public release a file is, told by its content alone, and the model in it."""

import io
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.importers import (
    caffe,
    lufficc,
    mmdetection,
    nvidia,
    ssd_pytorch,
    tensorflow,
    torchvision,
)
from pipeline.model.ssd import SSD

_STATE_DICTS = (torchvision, ssd_pytorch, lufficc, mmdetection, nvidia, tensorflow)
_STATE_DICT_KEYS = ("model", "state_dict")  # where lufficc and NVIDIA, mmdetection keep their weights

_KNOWN = (
    "checkpoints of this package; torchvision's ssd300_vgg16 and ssdlite320_mobilenet_v3_large; SSD300 or "
    "SSD512 with VGG16 of amdegroot/ssd.pytorch, lufficc/SSD, mmdetection and the authors' .caffemodel; "
    "NVIDIA's SSD300 with ResNet-50; TensorFlow's ssdlite_mobilenet_v2"
)


class _Ignored:
    """Stands for whatever a training run has left in a file beside the weights; keeps nothing of it."""

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# mmdetection 3 keeps its training log in the file: HistoryBuffers of NumPy numbers. Nothing of NumPy is run.
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, name)
    for name in (
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy.ndarray",
        "numpy.dtype",
        *(
            f"numpy.{core}.multiarray.{function}"
            for core in ("core", "_core")
            for function in ("_reconstruct", "scalar")
        ),
    )
]


def import_release(data: bytes, source: str) -> SSD:
    """The model in the file of a public release.

    Args:
        data: the whole file.
        source: its name, for messages only.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    try:
        if caffe.recognises(data):
            return caffe.convert(data)
        tensors = _read_tensors(data)
        for importer in _STATE_DICTS:
            if importer.recognises(tensors):
                return importer.convert(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    names = ", ".join(map(repr, list(tensors)[:3])) or "none"
    raise CheckpointError(
        f"{source}: weights of an unknown release (first names: {names}); known are {_KNOWN}"
    )


def _read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle by name, the rest left out."""
    try:
        if data[8:9] == b"{":
            contents = safetensors.torch.load(data)
        else:
            with torch.serialization.safe_globals(_SAFE_GLOBALS):
                contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        *(pickle.UnpicklingError, safetensors.SafetensorError, struct.error, RuntimeError, EOFError, OSError),
        *(ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError),
    ) as error:  # damaged bytes lead the unpickler anywhere
        # Without torch's text: it advises to switch its protection off.
        raise CheckpointError(_unreadable(error)) from None
    if isinstance(contents, dict):
        contents = next((contents[key] for key in _STATE_DICT_KEYS if key in contents), contents)
    if not isinstance(contents, dict):
        raise CheckpointError(f"holds a {type(contents).__name__}, not tensors by name")
    return {str(name): tensor for name, tensor in contents.items() if isinstance(tensor, Tensor)}


def _unreadable(error: Exception) -> str:
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return (
            f"a pickle that holds more than tensors, such as {found[1]}; save the model's state_dict() alone"
        )
    why = f" ({error})" if isinstance(error, safetensors.SafetensorError) else ""
    return (
        "neither safetensors nor a pickle of tensors (.pth, .pt) nor a .caffemodel: damaged, or a file of "
        f"another kind{why}"
    )

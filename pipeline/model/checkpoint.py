"""One file per model: a `.safetensors` whose header holds the `ModelSpec`, so that nothing else is needed.

Weights are named by what `--weights` takes: a bundled name, `torchvision:<name>`, or a path or URI of a
checkpoint or of a public release's file.
"""

import hashlib
import json
import struct
from importlib import resources
from pathlib import Path

import safetensors.torch
import torch

from pipeline import storage
from pipeline.errors import CheckpointError, StorageError
from pipeline.model.spec import ModelSpec
from pipeline.model.ssd import SSD, load_weights

DEFAULT_WEIGHTS = "coco_ssdlite300_mobilenet_v2"

_HEADER = "shardshot"  # key of the spec in the metadata of the safetensors file
_TORCHVISION = "torchvision:"


def bundled_weights() -> tuple[str, ...]:
    """Names of the weights that ship inside the package."""
    files = resources.files("pipeline.model").joinpath("weights").iterdir()
    return tuple(
        sorted(file.name.removesuffix(".safetensors") for file in files if file.name.endswith(".safetensors"))
    )


def save_checkpoint(model: SSD, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and spec to a local path or a URI, whole or not at all.

    Args:
        model: its `spec` becomes the header.
        path: where to; a `.safetensors` name.
        dtype: of floating-point weights in the file; `load_checkpoint` always returns float32.
    """
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    storage.write_atomic(str(path), safetensors.torch.save(state, metadata={_HEADER: model.spec.to_json()}))


def load_checkpoint(source: str | Path) -> SSD:
    """The model of bundled weights, of a checkpoint or of a public release's file.

    Args:
        source: see the module's docstring.

    Returns:
        The model in eval mode, float32, on the CPU.

    Raises:
        CheckpointError: no such weights, or a file that is none.
    """
    source = str(source)
    if source.startswith(_TORCHVISION):
        from pipeline.model.importers import torchvision

        return torchvision.convert(torchvision.download(source.removeprefix(_TORCHVISION))).eval()
    data = read_weights(source)
    spec = _spec_in(data)
    if spec is None:
        from pipeline.model.importers.releases import import_release

        return import_release(data, source).eval()
    return _load(data, spec, source).eval()


def read_spec(source: str | Path) -> ModelSpec:
    """The spec of what `load_checkpoint` would load; of a checkpoint only the header is read.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    source = str(source)
    if source.startswith(_TORCHVISION):
        from pipeline.model.importers import torchvision

        architecture, _ = torchvision.find_download(source.removeprefix(_TORCHVISION))
        return torchvision.spec_of(architecture)
    try:
        with storage.open_input(_location(source)) as file:
            start = file.read(8)
            spec = _spec_in(start + file.read(_header_bytes(start)))
    except StorageError as error:
        raise _not_found(source, error) from error
    return load_checkpoint(source).spec if spec is None else spec


def weights_sha256(source: str | Path) -> str:
    """SHA-256 of the weights file in hexadecimal digits; of `torchvision:` the name, which holds a hash."""
    source = str(source)
    if source.startswith(_TORCHVISION):
        from pipeline.model.importers import torchvision

        return torchvision.find_download(source.removeprefix(_TORCHVISION))[1].rsplit("/", 1)[-1]
    return hashlib.sha256(read_weights(source)).hexdigest()


def read_weights(source: str) -> bytes:
    """The bytes of bundled weights or of a file. Raises: CheckpointError where there is none."""
    try:
        return storage.read_bytes(_location(source))
    except StorageError as error:
        raise _not_found(source, error) from error


def _location(source: str) -> str:
    """Path or URI of the file of bundled weights or of a path."""
    if source in bundled_weights():
        return str(resources.files("pipeline.model").joinpath("weights", f"{source}.safetensors"))
    return source


def _not_found(source: str, error: StorageError) -> CheckpointError:
    return CheckpointError(
        f"no weights {source!r} ({error}); give a checkpoint's path or URI, torchvision:<name>, or one of "
        f"the bundled {', '.join(bundled_weights())}"
    )


def _header_bytes(start: bytes) -> int:
    """Length of the JSON header that follows the first eight bytes; 0 in files of another kind."""
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    return length if length <= 100_000_000 else 0  # the format's own limit


def _spec_in(data: bytes) -> ModelSpec | None:
    """The spec in the first bytes of a checkpoint; None in files of another kind."""
    header = data[8 : 8 + _header_bytes(data[:8])]
    if not header.startswith(b"{"):
        return None
    try:
        text = json.loads(header).get("__metadata__", {}).get(_HEADER)
    except ValueError:
        return None
    return ModelSpec.from_json(text) if text else None


def _load(data: bytes, spec: ModelSpec, source: str) -> SSD:
    model = SSD(spec)
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{source}: damaged ({error}); fetch or write it again") from error
    load_weights(model, state, source=f"the header of {source}")
    return model

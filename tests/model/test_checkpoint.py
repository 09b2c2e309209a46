import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch

from pipeline.errors import CheckpointError
from pipeline.model import (
    DEFAULT_WEIGHTS,
    ModelSpec,
    build_model,
    bundled_weights,
    load_checkpoint,
    read_spec,
    save_checkpoint,
    weights_sha256,
)
from pipeline.model.anchors import formula_priors


@pytest.fixture(scope="module")
def model():
    """A small model whose spec differs from the defaults in every field that may differ."""
    priors = formula_priors(
        "mine", grids=(19, 10, 5, 3, 2, 1), ratios=((2, 3),) + ((2,),) * 5, clip="corners"
    )
    model = build_model("ssdlite300_mobilenet_v2", num_classes=3, priors=priors)
    model.spec = dataclasses.replace(
        model.spec,
        class_names=("red cell", "weiße Zelle"),
        label_ids=(7, 3),
        resize_rule="bilinear",
        mean=(1.5, 2.5, 3.5),
        std=(10.0, 20.0, 30.0),
        coder_weights=(8.0, 4.0),
        max_log_size=4.0,
        clip_before_nms=False,
        score_function="softmax",
        score_threshold=0.123,
        pre_nms_top_k=17,
        nms_iou_threshold=0.3,
        max_detections=9,
        provenance="a test",
    )
    return model


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """The model in a file."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(model, path)
    return path


def test_a_checkpoint_brings_back_weights_and_spec(model, path):
    loaded = load_checkpoint(path)
    assert loaded.spec == model.spec
    assert not loaded.training
    assert torch.equal(loaded.priors_cxcywh, model.priors_cxcywh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_every_field_of_the_spec_survives_as_json(model):
    assert ModelSpec.from_json(model.spec.to_json()) == model.spec
    defaults = build_model("ssdlite300_mobilenet_v2", num_classes=3).spec
    same = {
        f.name
        for f in dataclasses.fields(ModelSpec)
        if getattr(defaults, f.name) == getattr(model.spec, f.name)
    }
    assert same == {"architecture", "input_height", "input_width", "channel_order", "background_index"}


def test_half_precision_halves_the_file_and_loads_as_float32(model, path, tmp_path):
    save_checkpoint(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.52 * path.stat().st_size
    loaded = load_checkpoint(tmp_path / "half.safetensors").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.half().float()), name


def test_the_spec_is_read_without_the_weights(model, path, tmp_path):
    whole = path.read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    (tmp_path / "header.safetensors").write_bytes(whole[: 8 + header_bytes])
    assert read_spec(tmp_path / "header.safetensors") == model.spec


def test_a_checkpoint_is_a_plain_safetensors_file(model, path):
    assert set(safetensors.torch.load_file(path)) == set(model.state_dict())


def test_a_uri_serves_as_well_as_a_path(model, path):
    assert read_spec(f"file://{path}") == model.spec
    assert load_checkpoint(f"file://{path}").spec == model.spec


def test_batch_norm_counters_survive_half_precision(tmp_path):
    model = build_model("ssdlite320_mobilenet_v3_large", num_classes=2)
    model.state_dict()["extras.0.reduce.norm.num_batches_tracked"].fill_(100_001)
    save_checkpoint(model, tmp_path / "model.safetensors", dtype=torch.float16)
    loaded = load_checkpoint(tmp_path / "model.safetensors").state_dict()
    assert int(loaded["extras.0.reduce.norm.num_batches_tracked"]) == 100_001


def test_the_default_weights_are_bundled():
    assert DEFAULT_WEIGHTS in bundled_weights()


def test_the_hash_is_that_of_the_file(path):
    import hashlib

    assert weights_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(weights_sha256(DEFAULT_WEIGHTS)) == 64


def damaged(path, folder, *, how):
    """A file that isn't a checkpoint, or a damaged one."""
    data = bytearray(path.read_bytes())
    file = folder / f"{how}.safetensors"
    match how:
        case "cut":
            data = data[: len(data) // 2]
        case "empty":
            data = bytearray()
        case "text":
            data = bytearray(b"this is no checkpoint, whatever its name says")
        case "other model":
            header = json.loads(bytes(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))["__metadata__"]
            data = bytearray(safetensors.torch.save({"weight": torch.zeros(2)}, metadata=header))
        case "other release":
            data = bytearray(safetensors.torch.save({"encoder.weight": torch.zeros(2)}))
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("how", ["cut", "empty", "text", "other model", "other release"])
def test_files_that_are_no_checkpoint_are_refused_by_name(path, tmp_path, how):
    file = damaged(path, tmp_path, how=how)
    with pytest.raises(CheckpointError, match=str(file)) as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)


def test_unknown_weights_are_refused_with_what_there_is():
    for look_up in (load_checkpoint, read_spec, weights_sha256):
        with pytest.raises(CheckpointError, match=DEFAULT_WEIGHTS) as caught:
            look_up("ssd_of_my_dreams")
        assert "\n" not in str(caught.value)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": ("one",)},
        {"channel_order": "bgr"},
        {"background_index": 2},
        {"class_names": (), "label_ids": ()},
    ],
)
def test_specs_that_contradict_themselves_are_refused(model, changes):
    with pytest.raises(CheckpointError):
        dataclasses.replace(model.spec, **changes)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 99}', '{"version": 1, "priors": {}}'])
def test_damaged_headers_are_refused(text):
    with pytest.raises(CheckpointError):
        ModelSpec.from_json(text)


def test_an_unknown_field_in_a_header_is_refused(model):
    fields = json.loads(model.spec.to_json())
    with pytest.raises(CheckpointError, match="flavour"):
        ModelSpec.from_json(json.dumps(fields | {"flavour": "sweet"}))

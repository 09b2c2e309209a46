"""ONNX files run by onnxruntime against the model in PyTorch."""

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.config import run_job
from pipeline.data.images import decode_image, resize_image
from pipeline.errors import CheckpointError
from pipeline.model import DEFAULT_WEIGHTS, Detector, ModelSpec, load_checkpoint, save_checkpoint
from pipeline.model.export import ExportConfig, export_onnx, main
from pipeline.model.importers import ssd_pytorch
from pipeline.model.postprocess import postprocess
from tests.conftest import shared
from tests.model.importers.test_ssd_pytorch import make_state


@functools.cache
def open_session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(path, **inputs) -> dict[str, Any]:
    """The outputs of an ONNX file by name."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


@pytest.fixture(scope="module")
def model():
    """SSD300 with all limits low enough to have an effect."""
    model = ssd_pytorch.convert(make_state(8, seed=3, background=8)).eval()
    model.spec = dataclasses.replace(
        model.spec, label_ids=(3, 5, 7, 11, 13, 17, 19), pre_nms_top_k=60, max_detections=50
    )
    return model


@pytest.fixture(scope="module")
def detector_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    export_onnx(model, path)
    return path


@pytest.fixture(scope="module")
def images():
    """Two images, uint8 [2, 300, 300, 3]; the second one is black."""
    coarse = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(5)) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(300, 300), mode="bilinear")
    return np.concatenate([smooth.permute(0, 2, 3, 1).numpy(), np.zeros((1, 300, 300, 3))]).astype(np.uint8)


SIZES = np.array([[640, 480], [100, 300]], dtype=np.int32)


def raw_predictions(model, images):
    mean, std = torch.tensor(model.spec.mean), torch.tensor(model.spec.std)
    with torch.inference_mode():
        return model(((torch.from_numpy(images).float() - mean) / std).permute(0, 3, 1, 2))


def assert_same_detections(outputs, index, expected):
    """Row `index` of fixed-size outputs holds (labels, scores, boxes), up to two that rounding decides."""
    labels, scores, boxes = expected
    count = int(outputs["num_detections"][index])
    assert abs(count - len(labels)) <= 2
    assert (np.diff(outputs["scores"][index]) <= 0).all()
    unmatched = 0
    for rank in range(count):
        label, score, box = (outputs[name][index][rank] for name in ("labels", "scores", "boxes"))
        same = (labels == label) & (abs(scores - score) < 1e-4) & (abs(boxes - box).max(axis=1) < 0.05)
        unmatched += not same.any()
    assert unmatched <= 2
    for name in ("boxes", "scores", "labels"):
        assert not outputs[name][index][count:].any()


def of_image(found, index):
    found = found.numpy()
    chosen = found.image_index == index
    return found.labels[chosen], found.scores[chosen], found.boxes[chosen]


def test_detections_are_those_of_pytorch(model, detector_file, images):
    deltas, logits = raw_predictions(model, images)
    found = postprocess(
        deltas, logits, model.priors_cxcywh, sizes_N2=torch.from_numpy(SIZES), spec=model.spec
    )
    scores = logits.softmax(dim=-1)[..., 1:]
    assert (
        int((scores > model.spec.score_threshold).sum(dim=1).max()) > 60
    )  # the limit per class has an effect
    assert len(found.scores) > 20
    outputs = run_onnx(detector_file, images=images, sizes=SIZES)
    assert [outputs[name].shape for name in ("boxes", "scores", "labels", "num_detections")] == [
        *[(2, 50, 4), (2, 50), (2, 50), (2,)]
    ]
    for index in range(2):
        assert_same_detections(outputs, index, of_image(found, index))


def test_a_batch_of_one_gives_the_same_detections(detector_file, images):
    whole = run_onnx(detector_file, images=images, sizes=SIZES)
    single = run_onnx(detector_file, images=images[:1], sizes=SIZES[:1])
    count = int(whole["num_detections"][0])
    assert_same_detections(single, 0, [whole[name][0][:count] for name in ("labels", "scores", "boxes")])


def test_the_file_is_valid_and_holds_the_spec(model, detector_file):
    file = onnx.load(detector_file)
    onnx.checker.check_model(file)
    metadata = {item.key: item.value for item in file.metadata_props}
    assert ModelSpec.from_json(metadata["shardshot"]) == model.spec


def test_images_without_detections_give_zeros(detector_file, tmp_path):
    file = onnx.load(detector_file)
    for tensor in file.graph.initializer:
        if tensor.name.endswith("logits.bias"):
            bias = onnx.numpy_helper.to_array(tensor).copy().reshape(-1, 8)
            bias[:, 0] += 1000  # everything is background
            tensor.CopyFrom(onnx.numpy_helper.from_array(bias.ravel(), tensor.name))
    onnx.save(file, path := tmp_path / "background.onnx")
    outputs = run_onnx(path, images=np.zeros((2, 300, 300, 3), np.uint8), sizes=SIZES)
    assert outputs["num_detections"].tolist() == [0, 0]
    assert not any(outputs[name].any() for name in ("boxes", "scores", "labels"))


def test_raw_predictions_are_those_of_pytorch(model, images, tmp_path):
    save_checkpoint(model, tmp_path / "model.safetensors")
    path = tmp_path / "raw.onnx"
    config = ExportConfig(weights=str(tmp_path / "model.safetensors"), output=str(path), postprocess=False)
    assert main(config) == 0
    outputs = run_onnx(path, images=images[:1])
    deltas, logits = raw_predictions(model, images[:1])
    np.testing.assert_allclose(outputs["deltas"], deltas.numpy(), atol=1e-3)
    np.testing.assert_allclose(outputs["logits"], logits.numpy(), atol=1e-3)
    metadata = {item.key: item.value for item in onnx.load(path).metadata_props}
    assert ModelSpec.from_json(metadata["shardshot"]) == model.spec


def test_flags_are_those_of_the_documentation(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("sys.argv", ["export", "--weights", "W", "--output", "F.onnx", "--no-postprocess"])
    assert run_job(lambda config: seen.append(config) or 0, ExportConfig, None) == 0
    assert seen == [ExportConfig(weights="W", output="F.onnx", postprocess=False)]


def test_missing_weights_are_an_error_of_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        main(ExportConfig(weights=str(tmp_path / "none"), output=str(tmp_path / "x.onnx")))
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.slow
def test_the_bundled_model_gives_the_same_detections_of_photographs(tmp_path):
    path = tmp_path / "bundled.onnx"
    model = load_checkpoint(DEFAULT_WEIGHTS)
    export_onnx(model, path)
    paths = sorted(shared("data/coco_val128/images").glob("*.jpg"))[:4]
    photographs = [decode_image(path.read_bytes()) for path in paths]
    images = np.stack(
        [resize_image(p.pixels, height=300, width=300, rule=model.spec.resize_rule) for p in photographs]
    )
    sizes = np.array([[p.width, p.height] for p in photographs], dtype=np.int32)
    found = Detector(DEFAULT_WEIGHTS)(images, sizes)
    outputs = run_onnx(path, images=images, sizes=sizes)
    assert min(outputs["num_detections"]) > 5
    for index in range(len(paths)):
        assert_same_detections(outputs, index, of_image(found, index))

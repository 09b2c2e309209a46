import dataclasses
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.model import DEFAULT_WEIGHTS, SSD, Detector, build_model, load_checkpoint, save_checkpoint
from pipeline.model.postprocess import postprocess

SIZES = np.array([[640, 480], [300, 500], [1200, 900], [64, 64]], dtype=np.int32)


@pytest.fixture(scope="module")
def detector():
    """The bundled model on the CPU."""
    return Detector(DEFAULT_WEIGHTS, score_threshold=0.002)


def coarse_images(number):
    """Images with coarse structure, uint8 [number, 300, 300, 3]."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (number, 3, 6, 6)).astype(np.float32))
    fine = nn.functional.interpolate(coarse, (300, 300), mode="bicubic").clamp(0, 255)
    return fine.permute(0, 2, 3, 1).contiguous().numpy().astype(np.uint8)


@pytest.fixture(scope="module")
def images():
    return coarse_images(4)


def test_detections_have_the_types_of_the_contract(detector, images):
    found = detector(images, SIZES)
    assert len(found.scores) > 20
    assert (found.image_index.dtype, found.labels.dtype) == (np.int64, np.int64)
    assert (found.boxes.dtype, found.scores.dtype) == (np.float32, np.float32)
    limits = np.tile(SIZES, 2)[found.image_index]
    assert (found.boxes >= 0).all()
    assert (found.boxes <= limits).all()
    assert set(found.labels) <= set(detector.spec.label_ids)


def test_detections_do_not_depend_on_the_batch(detector, images):
    whole = detector(images, SIZES)
    for index in range(4):
        alone = detector(images[index : index + 1], SIZES[index : index + 1])
        here = whole.image_index == index
        np.testing.assert_array_equal(alone.labels, whole.labels[here])
        np.testing.assert_allclose(alone.scores, whole.scores[here], atol=1e-4)
        np.testing.assert_allclose(alone.boxes, whole.boxes[here], atol=0.01)


def test_it_computes_what_the_model_does_on_normalised_images(detector, images):
    model = load_checkpoint(DEFAULT_WEIGHTS)
    normalised = torch.from_numpy(images).permute(0, 3, 1, 2) * 0.007843137718737125 - 1
    with torch.inference_mode():
        deltas, logits = model(normalised.contiguous())
        expected = postprocess(
            deltas,
            logits,
            model.priors_cxcywh,
            sizes_N2=torch.from_numpy(SIZES),
            spec=model.spec,
            score_threshold=0.002,
        )
    found = detector(images, SIZES)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)


def test_mean_and_std_of_each_channel_are_used(tmp_path):
    model = build_model("ssdlite300_mobilenet_v2", num_classes=2)
    model.spec = dataclasses.replace(model.spec, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
    save_checkpoint(model, tmp_path / "model.safetensors")
    detector = Detector(str(tmp_path / "model.safetensors"))
    seen = []
    detector.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    detector(np.full((1, 300, 300, 3), 50, np.uint8), SIZES[:1])
    assert seen[0].shape == (1, 3, 300, 300)
    assert seen[0][0, :, 150, 150].tolist() == pytest.approx([40.0, 15.0, 5.0])


def test_batch_norm_is_folded(tmp_path):
    save_checkpoint(
        build_model("ssdlite320_mobilenet_v3_large", num_classes=2), tmp_path / "model.safetensors"
    )
    detector = Detector(str(tmp_path / "model.safetensors"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.model.modules())


def test_without_a_threshold_the_checkpoints_counts(images):
    default, strict = Detector(DEFAULT_WEIGHTS), Detector(DEFAULT_WEIGHTS, score_threshold=0.99)
    assert default.score_threshold == default.spec.score_threshold == 0.001
    assert len(default(images, SIZES).scores) > len(strict(images, SIZES).scores)


def test_images_may_be_read_only_as_those_of_a_block_are(detector, images):
    found = detector(images, SIZES)
    images = images.view()
    images.flags.writeable = False
    np.testing.assert_array_equal(detector(images, SIZES).boxes, found.boxes)


def test_an_empty_batch_is_normal(detector):
    found = detector(np.zeros((0, 300, 300, 3), np.uint8), np.zeros((0, 2), np.int32))
    assert found.boxes.shape == (0, 4)


class Crowded(nn.Module):
    """A model whose device has memory for two images."""

    def __init__(self, model):
        super().__init__()
        self.model, self.priors_cxcywh, self.batches = model, model.priors_cxcywh, []

    def forward(self, images_N3HW):
        self.batches.append(len(images_N3HW))
        if len(images_N3HW) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.model(images_N3HW)


def test_out_of_memory_halves_the_batch_and_changes_nothing(images):
    detector = Detector(DEFAULT_WEIGHTS, score_threshold=0.002)
    expected = detector(images, SIZES)
    crowded = Crowded(detector.model)
    detector.model = cast("SSD", crowded)
    found = detector(images, SIZES)
    assert crowded.batches == [4, 2, 2]
    np.testing.assert_array_equal(found.image_index, expected.image_index)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)


def test_out_of_memory_with_one_image_is_an_error(images):
    detector = Detector(DEFAULT_WEIGHTS)

    def fail(images_N3HW):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    detector.model.forward = fail
    with pytest.raises(torch.cuda.OutOfMemoryError):
        detector(images[:1], SIZES[:1])

"""The weights inside the package: published reference outputs, header, licence."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.model import DEFAULT_WEIGHTS, load_checkpoint, read_spec
from pipeline.model.importers import tensorflow
from pipeline.model.postprocess import postprocess

SOURCE = "models/coco_ssdlite_mobilenet_v2/ssdlite_mobilenet_v2_coco.safetensors"
IMAGES = ("000000000139", "000000000632", "000000001000")


@pytest.fixture(scope="module")
def bundled():
    """The model as it ships, half precision in the file."""
    return load_checkpoint(DEFAULT_WEIGHTS)


@pytest.fixture(scope="module")
def converted():
    """The model converted anew from the published float32 tensors."""
    from tests.conftest import shared

    return tensorflow.convert(load_file(shared(SOURCE))).eval()


@pytest.fixture(scope="module")
def reference():
    """Inputs and outputs of the published graph."""
    from tests.conftest import shared

    return np.load(shared("models/coco_ssdlite_mobilenet_v2/reference_outputs.npz"))


def predict(model, reference, image):
    images_N3HW = torch.from_numpy(reference[f"{image}.input"]).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return model(images_N3HW)


@pytest.mark.parametrize("image", IMAGES)
def test_raw_outputs_are_the_published_ones(converted, reference, image):
    deltas, logits = predict(converted, reference, image)
    encodings = deltas[0][:, [1, 0, 3, 2]].numpy()
    np.testing.assert_allclose(encodings, reference[f"{image}.box_encodings"], atol=1e-4)
    np.testing.assert_allclose(logits[0].numpy(), reference[f"{image}.class_logits"], atol=1e-4)


@pytest.mark.parametrize("image", IMAGES)
def test_detections_are_the_published_ones(converted, reference, image):
    deltas, logits = predict(converted, reference, image)
    found = postprocess(
        deltas,
        logits,
        converted.priors_cxcywh,
        sizes_N2=torch.from_numpy(reference[f"{image}.image_size_wh"])[None],
        spec=converted.spec,
        score_threshold=0.001,
    )
    boxes_xywh = found.boxes.numpy().copy()
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    np.testing.assert_array_equal(found.labels, reference[f"{image}.detection_categories"])
    np.testing.assert_allclose(found.scores, reference[f"{image}.detection_scores"], atol=1e-5)
    np.testing.assert_allclose(boxes_xywh, reference[f"{image}.detection_boxes_xywh"], atol=2e-3)


@pytest.mark.parametrize("image", IMAGES)
def test_half_precision_moves_scores_by_less_than_a_grey_level_of_noise_does(bundled, reference, image):
    """Noise of one grey level moves single scores by up to 0.035; the rounding of the file by 0.005 here."""
    _, logits = predict(bundled, reference, image)
    scores = logits[0].sigmoid().numpy()
    expected = 1 / (1 + np.exp(-reference[f"{image}.class_logits"].astype(np.float64)))
    assert np.abs(scores - expected).max() < 0.02


def test_the_bundled_file_is_what_the_converter_makes(bundled, converted):
    assert bundled.spec == converted.spec
    for name, tensor in converted.state_dict().items():
        assert torch.equal(bundled.state_dict()[name], tensor.half().float()), name


def test_the_header_says_how_the_weights_are_run():
    spec = read_spec(DEFAULT_WEIGHTS)
    assert (spec.architecture, spec.score_function, spec.resize_rule) == (
        "ssdlite300_mobilenet_v2",
        "sigmoid",
        "tf_legacy",
    )
    assert (spec.nms_iou_threshold, spec.max_detections, spec.pre_nms_top_k) == (0.6, 100, None)
    assert (spec.mean, spec.std, spec.priors.clip) == ((127.5,) * 3, (127.5,) * 3, "none")
    assert spec.num_classes == 91
    assert dict(zip(spec.class_names, spec.label_ids, strict=True))["toothbrush"] == 90
    assert "Apache-2.0" in spec.provenance


def test_class_names_are_those_of_coco(shared_data):
    import json

    categories = json.loads(shared_data("data/coco_val128/annotations.json").read_text())["categories"]
    spec = read_spec(DEFAULT_WEIGHTS)
    names = dict(zip(spec.label_ids, spec.class_names, strict=True))
    assert {category["id"]: names[category["id"]] for category in categories} == {
        category["id"]: category["name"] for category in categories
    }

import re
from copy import deepcopy

import pytest
import torch
from torch import hub
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from pipeline.errors import CheckpointError
from pipeline.model import load_checkpoint, read_spec
from pipeline.model.importers import torchvision
from pipeline.model.layers import fold_batch_norm
from pipeline.model.postprocess import postprocess
from tests.model.random_weights import count_candidates, head_outputs, torchvision_model

ARCHITECTURES = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    """torchvision's model, ours with the same weights, an image in 0..1 and the network's input."""
    theirs, image = torchvision_model(request.param, seed=1)
    ours = torchvision.convert(theirs.state_dict()).eval()
    return theirs, ours, image, theirs.transform([image])[0].tensors


def test_normalised_input_is_theirs(pair):
    _, ours, image, images_N3HW = pair
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.spec.mean, ours.spec.std))
    torch.testing.assert_close((255 * image - mean) / std, images_N3HW[0], rtol=1e-5, atol=1e-4)


def test_head_outputs_are_theirs(pair):
    theirs, ours, _, images_N3HW = pair
    expected_deltas, expected_logits = head_outputs(theirs, images_N3HW)
    assert 2 < expected_logits[..., 1:].std() < 4
    with torch.inference_mode():
        deltas, logits = ours(images_N3HW)
        folded_deltas, folded_logits = fold_batch_norm(deepcopy(ours))(images_N3HW)
    for found, expected in (
        (deltas, expected_deltas),
        (logits, expected_logits),
        (folded_deltas, expected_deltas),
        (folded_logits, expected_logits),
    ):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_priors_are_theirs(pair):
    theirs, ours, _, images_N3HW = pair
    with torch.inference_mode():
        features = list(theirs.backbone(images_N3HW).values())
    images, _ = theirs.transform([images_N3HW[0]])
    corners = theirs.anchor_generator(images, features)[0] / ours.spec.input_width
    centres, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    torch.testing.assert_close(ours.priors_cxcywh, torch.cat([centres, sizes], dim=1), rtol=1e-4, atol=1e-6)


def test_detections_are_theirs(pair):
    theirs, ours, image, images_N3HW = pair
    with torch.inference_mode():
        expected = theirs([image])[0]
        deltas, logits = ours(images_N3HW)
        found = postprocess(
            deltas,
            logits,
            ours.priors_cxcywh,
            sizes_N2=torch.tensor([[image.shape[2], image.shape[1]]]),
            spec=ours.spec,
        )
    assert 200 <= count_candidates(logits) <= 2000
    assert len(expected["scores"]) == ours.spec.max_detections
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-6)
    assert torch.equal(found.labels, expected["labels"])
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=1e-4, atol=1e-2)


def state_of_5_classes():
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    return model.state_dict()


def test_a_saved_state_dict_is_recognised_by_its_names(tmp_path):
    torch.save(state_of_5_classes(), tmp_path / "weights.pth")
    model = load_checkpoint(tmp_path / "weights.pth")
    assert model.spec.architecture == "ssdlite320_mobilenet_v3_large"
    assert model.spec.class_names == ("1", "2", "3", "4")
    assert model.spec.priors.clip == "wh"
    assert read_spec(tmp_path / "weights.pth") == model.spec


def test_91_columns_are_the_ids_of_coco():
    spec = torchvision.spec_of("ssd300_vgg16")
    assert spec.label_ids == tuple(range(1, 91))
    assert (spec.class_names[0], spec.class_names[16], spec.class_names[89]) == (
        "person",
        "cat",
        "toothbrush",
    )
    assert (spec.score_threshold, spec.pre_nms_top_k, spec.nms_iou_threshold, spec.max_detections) == (
        0.01,
        400,
        0.45,
        200,
    )


def test_weights_cut_short_are_refused(tmp_path):
    state = state_of_5_classes()
    del state["backbone.features.1.3.0.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"torchvision's ssdlite320.*Missing key") as caught:
        load_checkpoint(tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)


def test_without_the_internet_the_error_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="Network is unreachable") as caught:
        load_checkpoint("torchvision:ssd300_vgg16_coco")
    assert "\n" not in str(caught.value)
    assert "--weights" in str(caught.value)


def test_the_spec_of_a_download_needs_no_download():
    spec = read_spec("torchvision:ssdlite320_mobilenet_v3_large_coco")
    assert (spec.architecture, spec.num_classes, spec.input_width) == (
        "ssdlite320_mobilenet_v3_large",
        91,
        320,
    )


def test_an_unknown_download_is_refused_with_the_names_that_there_are():
    with pytest.raises(
        CheckpointError, match=re.escape("torchvision:ssd300_vgg16_coco, torchvision:ssdlite320")
    ):
        load_checkpoint("torchvision:fasterrcnn")

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.model.anchors import prior_boxes
from pipeline.model.checkpoint import load_checkpoint
from pipeline.model.classes import COCO_IDS_80, COCO_NAMES_80, VOC_NAMES
from pipeline.model.importers import lufficc
from tests.model.importers import originals

SIZES = {  # MIN_SIZES and MAX_SIZES of configs/vgg_ssd{300,512}_{voc0712,coco_trainval35k}.yaml
    (300, 21): ([30, 60, 111, 162, 213, 264], [60, 111, 162, 213, 264, 315]),
    (300, 81): ([21, 45, 99, 153, 207, 261], [45, 99, 153, 207, 261, 315]),
    (512, 21): (
        [35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8],
        [76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.65],
    ),
    (512, 81): (
        [20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8],
        [51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72],
    ),
}


def name_of(layer, size):
    if layer in (trunk := originals.places_of_trunk()):
        return f"backbone.vgg.{trunk[layer]}"
    source, _, head = layer.partition("_mbox_")
    if head:
        level = [name for name, _, _ in originals.SOURCES[size]].index(source)
        return f"box_head.predictor.{'reg' if head == 'loc' else 'cls'}_headers.{level}"
    return f"backbone.extras.{[name for name, *_ in originals.EXTRAS[size]].index(layer)}"


def make_state(size, num_classes, background):
    layers, scale = originals.random_vgg(size, num_classes, background=background, seed=2)
    state = {"backbone.l2_norm.weight": scale}
    for layer, (weight, bias) in layers.items():
        state[f"{name_of(layer, size)}.weight"] = weight
        state[f"{name_of(layer, size)}.bias"] = bias
    return state


def original_forward(state, image, *, size, num_classes):
    images = (image.permute(1, 2, 0).float() - torch.tensor([123.0, 117.0, 104.0])).permute(2, 0, 1)[None]
    outputs = originals.vgg_forward(
        images,
        lambda layer: (state[f"{name_of(layer, size)}.weight"], state[f"{name_of(layer, size)}.bias"]),
        state["backbone.l2_norm.weight"],
        size=size,
    )
    return originals.by_cell([loc for loc, _ in outputs], 4), originals.by_cell(
        [conf for _, conf in outputs], num_classes
    )


def original_detections(raw, *, size, num_classes):
    deltas, logits = raw
    min_sizes, max_sizes = SIZES[size, num_classes]
    priors = originals.prior_box(size, min_sizes=min_sizes, max_sizes=max_sizes)
    scores = logits.softmax(dim=1)
    assert 200 < int((scores[:, 1:] > 0.01).sum()) < 4000
    return originals.detect(
        originals.decode(deltas, priors), scores, threshold=0.01, iou=0.45, top_k=None, max_detections=100
    )


@pytest.fixture(scope="module")
def ssd512_state():
    return make_state(512, 81, background=20)


@pytest.fixture(scope="module")
def ssd512(ssd512_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model_final.pth"
    # What its CheckPointer saves during training
    optimizer = {
        "state": {0: {"momentum_buffer": torch.zeros(3)}},
        "param_groups": [{"lr": 1e-3, "params": [0]}],
    }
    scheduler = {"milestones": [80000, 100000], "gamma": 0.1, "base_lrs": [1e-3], "last_epoch": 5}
    contents = {"model": ssd512_state, "optimizer": optimizer, "scheduler": scheduler, "iteration": 5}
    path.write_bytes(originals.saved(contents))
    return load_checkpoint(path)


@pytest.mark.slow
def test_ssd512_gives_the_outputs_and_detections_of_the_original(ssd512, ssd512_state):
    image = originals.random_image(512)
    raw = original_forward(ssd512_state, image, size=512, num_classes=81)
    deltas, logits = originals.run_model(ssd512, image)
    originals.assert_close(deltas, raw[0])
    originals.assert_close(logits, raw[1])
    theirs = original_detections(raw, size=512, num_classes=81)
    ours = originals.run_postprocess(ssd512, *raw, width=200, height=700)
    originals.assert_same_detections(ours, theirs, list(COCO_IDS_80), width=200, height=700)


def test_81_columns_are_coco(ssd512):
    assert ssd512.spec.architecture == "ssd512_vgg16"
    assert ssd512.spec.class_names == COCO_NAMES_80
    assert ssd512.spec.label_ids == COCO_IDS_80
    assert originals.limits(ssd512) == (0.01, 0.45, None, 100)
    assert ssd512.spec.provenance == "lufficc/SSD"


def test_ssd300_gives_the_outputs_and_detections_of_the_original():
    state, image = make_state(300, 21, background=12), originals.random_image(300, seed=1)
    model = lufficc.convert(state)
    assert model.spec.class_names == VOC_NAMES
    raw = original_forward(state, image, size=300, num_classes=21)
    deltas, logits = originals.run_model(model, image)
    originals.assert_close(deltas, raw[0])
    originals.assert_close(logits, raw[1])
    theirs = original_detections(raw, size=300, num_classes=21)
    ours = originals.run_postprocess(model, *raw, width=640, height=480)
    originals.assert_same_detections(ours, theirs, list(range(1, 21)), width=640, height=480)


@pytest.mark.parametrize(("size", "num_classes"), SIZES)
def test_default_boxes_are_those_of_the_configuration(size, num_classes):
    min_sizes, max_sizes = SIZES[size, num_classes]
    priors = lufficc.priors_of("ssd300_vgg16" if size == 300 else "ssd512_vgg16", num_classes)
    expected = originals.prior_box(size, min_sizes=min_sizes, max_sizes=max_sizes)
    torch.testing.assert_close(prior_boxes(priors), expected, rtol=0, atol=1e-6)


def test_incomplete_weights_are_refused(ssd512_state):
    # Without its last blocks an SSD512 would have the layers of an SSD300.
    del (state := dict(ssd512_state))["backbone.extras.9.bias"]
    with pytest.raises(CheckpointError, match=r"SSD512 with VGG16 of lufficc/SSD: .* 1 are missing"):
        lufficc.convert(state)

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import load_checkpoint
from pipeline.model.classes import COCO_IDS_80, COCO_NAMES_80, VOC_NAMES
from pipeline.model.importers import ssd_pytorch
from tests.model.importers import originals

NUM_CLASSES = 21


def name_of(layer):
    if layer in (trunk := originals.places_of_trunk()):
        return f"vgg.{trunk[layer]}"
    source, _, head = layer.partition("_mbox_")
    if head:
        level = [name for name, _, _ in originals.SOURCES[300]].index(source)
        return f"{head}.{level}"
    return f"extras.{[name for name, *_ in originals.EXTRAS[300]].index(layer)}"


def make_state(num_classes, *, seed, background=12):
    layers, scale = originals.random_vgg(300, num_classes, background=background, seed=seed)
    state = {"L2Norm.weight": scale}
    for layer, (weight, bias) in layers.items():
        state[f"{name_of(layer)}.weight"] = weight
        state[f"{name_of(layer)}.bias"] = bias
    return state


@pytest.fixture(scope="module")
def state():
    return make_state(NUM_CLASSES, seed=1)


@pytest.fixture(scope="module")
def model(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "any-name"
    path.write_bytes(originals.saved(state, _use_new_zipfile_serialization=False))  # as files of 2017 are
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def image():
    return originals.random_image(300)


@pytest.fixture(scope="module")
def raw(state, image):
    """Deltas [8732, 4] and logits [8732, 21] of the original."""
    bgr = image.flip(0).permute(1, 2, 0).float() - torch.tensor(
        [104.0, 117.0, 123.0]
    )  # test.py, BaseTransform
    images = bgr[:, :, (2, 1, 0)].permute(2, 0, 1)[None]
    outputs = originals.vgg_forward(
        images,
        lambda layer: (state[f"{name_of(layer)}.weight"], state[f"{name_of(layer)}.bias"]),
        state["L2Norm.weight"],
        size=300,
    )
    return originals.by_cell([loc for loc, _ in outputs], 4), originals.by_cell(
        [conf for _, conf in outputs], NUM_CLASSES
    )


def test_names_are_those_of_the_release(state):
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33]
    assert {name for name in state if name.startswith("vgg.")} == {
        f"vgg.{number}.{kind}" for number in numbers for kind in ("weight", "bias")
    }
    assert len(state) == 2 * (15 + 8 + 6 + 6) + 1


def test_raw_outputs_are_those_of_the_original(model, image, raw):
    deltas, logits = originals.run_model(model, image)
    originals.assert_close(deltas, raw[0])
    originals.assert_close(logits, raw[1])


def test_detections_are_the_best_200_of_the_original(model, raw):
    deltas, logits = raw
    priors = originals.prior_box(
        300, min_sizes=[30, 60, 111, 162, 213, 264], max_sizes=[60, 111, 162, 213, 264, 315]
    )
    scores = logits.softmax(dim=1)
    assert 200 < int((scores[:, 1:] > 0.01).sum()) < 4000
    theirs = originals.detect(
        originals.decode(deltas, priors), scores, threshold=0.01, iou=0.45, top_k=200, max_detections=200
    )
    ours = originals.run_postprocess(model, deltas, logits, width=640, height=480)
    originals.assert_same_detections(ours, theirs, list(range(1, 21)), width=640, height=480)


def test_21_columns_are_voc(model):
    assert model.spec.architecture == "ssd300_vgg16"
    assert model.spec.class_names == VOC_NAMES
    assert model.spec.label_ids == tuple(range(1, 21))
    assert originals.limits(model) == (0.01, 0.45, 200, 200)
    assert model.spec.provenance == "amdegroot/ssd.pytorch"


def with_columns(state, columns):
    """The same network with other, empty class heads."""
    heads = {}
    for level, (_, channels, boxes) in enumerate(originals.SOURCES[300]):
        heads[f"conf.{level}.weight"] = torch.zeros(boxes * columns, channels, 3, 3)
        heads[f"conf.{level}.bias"] = torch.zeros(boxes * columns)
    return state | heads


def test_81_columns_are_coco(state):
    model = ssd_pytorch.convert(with_columns(state, 81))
    assert model.spec.class_names == COCO_NAMES_80
    assert model.spec.label_ids == COCO_IDS_80
    priors = originals.prior_box(
        300, min_sizes=[21, 45, 99, 153, 207, 261], max_sizes=[45, 99, 153, 207, 261, 315]
    )
    torch.testing.assert_close(model.priors_cxcywh, priors, rtol=0, atol=1e-6)


def test_other_numbers_of_classes_are_numbered(state):
    assert ssd_pytorch.convert(with_columns(state, 3)).spec.class_names == ("1", "2")


def test_a_network_with_other_layers_is_refused(state):
    smaller = {name: tensor for name, tensor in state.items() if not name.startswith("extras.7")}
    with pytest.raises(CheckpointError, match=r"2 are missing \['extras.7.weight', 'extras.7.bias'\]"):
        ssd_pytorch.convert(smaller)
    with pytest.raises(CheckpointError, match=r"1 have other names \['conv.bias'\]"):
        ssd_pytorch.convert(state | {"conv.bias": torch.zeros(1)})


def test_tensors_of_other_shapes_are_refused(state):
    with pytest.raises(
        CheckpointError, match=r"amdegroot/ssd.pytorch(.|\n)*size mismatch for extras.3.expand"
    ):
        ssd_pytorch.convert(state | {"extras.7.weight": torch.zeros(256, 128, 1, 1)})

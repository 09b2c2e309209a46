import math
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import load_checkpoint
from pipeline.model.classes import COCO_IDS_80, COCO_NAMES_80, VOC_NAMES
from pipeline.model.importers import mmdetection
from pipeline.model.importers.releases import import_release
from tests.model.importers import originals

NUM_CLASSES = 80  # and the background, last


def name_of(layer, *, size, since_2_14):
    if layer in (trunk := originals.places_of_trunk()):
        return f"backbone.features.{trunk[layer]}"
    source, _, head = layer.partition("_mbox_")
    if head:
        level = [name for name, _, _ in originals.SOURCES[size]].index(source)
        return f"bbox_head.{'reg' if head == 'loc' else 'cls'}_convs.{level}{'.0' if since_2_14 else ''}"
    index = [name for name, *_ in originals.EXTRAS[size]].index(layer)
    return f"neck.extra_layers.{index // 2}.{index % 2}.conv" if since_2_14 else f"backbone.extra.{index}"


def make_state(size, *, since_2_14, background, num_classes=NUM_CLASSES):
    """The background moves to the last column of each box here."""
    layers, scale = originals.random_vgg(size, num_classes + 1, background=background, seed=3)
    state = {"neck.l2_norm.weight" if since_2_14 else "backbone.l2_norm.weight": scale}
    for layer, (weight, bias) in layers.items():
        name = name_of(layer, size=size, since_2_14=since_2_14)
        if layer.endswith("_conf"):
            order = [
                box * (num_classes + 1) + column
                for box in range(len(bias) // (num_classes + 1))
                for column in [*range(1, num_classes + 1), 0]
            ]
            weight, bias = weight[order], bias[order]
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
    return state


def anchors(size, smallest_ratio, first_ratio):
    """Corners in pixels as mmdet/core/anchor/anchor_generator.py makes them."""
    min_ratio, max_ratio = int(smallest_ratio * 100), 90
    step = int(np.floor(max_ratio - min_ratio) / (len(originals.GRIDS[size]) - 2))
    min_sizes, max_sizes = [int(size * first_ratio / 100)], [int(size * min_ratio / 100)]
    for ratio in range(min_ratio, max_ratio + 1, step):
        min_sizes.append(int(size * ratio / 100))
        max_sizes.append(int(size * (ratio + step) / 100))
    found = []
    for level, grid in enumerate(originals.GRIDS[size]):
        stride, base = originals.STEPS[size][level], min_sizes[level]
        ratios = [1.0]  # of height and width
        for ratio in originals.RATIOS[size][level]:
            ratios += [1 / ratio, ratio]
        sides = [(base / math.sqrt(ratio), base * math.sqrt(ratio)) for ratio in ratios]
        scaled = base * math.sqrt(max_sizes[level] / base)
        sides.insert(1, (scaled, scaled))
        for row in range(grid):
            for column in range(grid):
                x, y = column * stride + stride / 2, row * stride + stride / 2
                found += [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in sides]
    return torch.tensor(found)


def original_boxes(deltas, anchors, size):
    """delta2bbox with clip_border, in pixels of the network's input."""
    deltas = deltas * torch.tensor([0.1, 0.1, 0.2, 0.2])
    centres, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    limit = abs(math.log(16 / 1000))
    centres = centres + sides * deltas[:, :2]
    sides = sides * deltas[:, 2:].clamp(-limit, limit).exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1).clamp(0, size)


def original_forward(state, image, *, size, since_2_14):
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    names = {"size": size, "since_2_14": since_2_14}
    outputs = originals.vgg_forward(
        (image.float() - mean)[None],
        lambda layer: (state[f"{name_of(layer, **names)}.weight"], state[f"{name_of(layer, **names)}.bias"]),
        state["neck.l2_norm.weight" if since_2_14 else "backbone.l2_norm.weight"],
        size=size,
    )
    return originals.by_cell([loc for loc, _ in outputs], 4), originals.by_cell(
        [conf for _, conf in outputs], NUM_CLASSES + 1
    )


def check(model, state, *, size, since_2_14, smallest_ratio, first_ratio):
    image = originals.random_image(size, seed=2)
    deltas, logits = original_forward(state, image, size=size, since_2_14=since_2_14)
    in_our_order = torch.cat([logits[:, -1:], logits[:, :-1]], dim=1)
    our_deltas, our_logits = originals.run_model(model, image)
    originals.assert_close(our_deltas, deltas)
    originals.assert_close(our_logits, in_our_order)

    scores = logits.softmax(dim=1)[:, :-1]
    assert 200 < int((scores > 0.02).sum()) < 4000
    # No map has more candidates than its nms_pre of 1,000, which this package doesn't have.
    boxes_per_map = [
        grid**2 * boxes
        for grid, (_, _, boxes) in zip(originals.GRIDS[size], originals.SOURCES[size], strict=True)
    ]
    assert max(int((part > 0.02).sum()) for part in scores.split(boxes_per_map)) <= 1000
    boxes = original_boxes(deltas, anchors(size, smallest_ratio, first_ratio), size) / size
    theirs = originals.detect(
        boxes,
        torch.cat([torch.zeros(len(scores), 1), scores], dim=1),
        threshold=0.02,
        iou=0.45,
        top_k=None,
        max_detections=200,
    )
    ours = originals.run_postprocess(model, deltas, in_our_order, width=640, height=480)
    originals.assert_same_detections(ours, theirs, list(COCO_IDS_80), width=640, height=480)


@pytest.fixture(scope="module")
def state():
    return make_state(300, since_2_14=True, background=15)


def test_ssd300_gives_the_outputs_and_detections_of_the_original(state, tmp_path):
    (path := tmp_path / "epoch_24").write_bytes(
        originals.saved({"meta": {"CLASSES": COCO_NAMES_80, "epoch": 24}, "state_dict": state})
    )
    model = load_checkpoint(path)
    assert model.spec.architecture == "ssd300_vgg16"
    assert model.spec.class_names == COCO_NAMES_80
    assert originals.limits(model) == (0.02, 0.45, None, 200)
    assert model.spec.provenance == "mmdetection"
    check(model, state, size=300, since_2_14=True, smallest_ratio=0.15, first_ratio=7)


@pytest.mark.slow
def test_ssd512_before_2_14_gives_the_outputs_and_detections_of_the_original():
    state = make_state(512, since_2_14=False, background=20)
    model = mmdetection.convert(state)
    assert model.spec.architecture == "ssd512_vgg16"
    check(model, state, size=512, since_2_14=False, smallest_ratio=0.1, first_ratio=4)


def test_both_namings_are_the_same_network(state):
    before = {}
    for layer in [name for name, *_ in originals.EXTRAS[300]]:
        for kind in ("weight", "bias"):
            new = name_of(layer, size=300, since_2_14=True)
            before[f"{name_of(layer, size=300, since_2_14=False)}.{kind}"] = state[f"{new}.{kind}"]
    for name, tensor in state.items():  # tools/model_converters/upgrade_ssd_version.py, the other way round
        if name.startswith("bbox_head"):
            before[name[:21] + name[23:]] = tensor
        elif name.startswith("backbone"):
            before[name] = tensor
    before["backbone.l2_norm.weight"] = state["neck.l2_norm.weight"]
    ours, theirs = mmdetection.convert(state), mmdetection.convert(before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert ours.spec == theirs.spec


def test_20_classes_are_voc(state):
    heads = {}
    for level, (_, channels, boxes) in enumerate(originals.SOURCES[300]):
        heads[f"bbox_head.cls_convs.{level}.0.weight"] = torch.zeros(boxes * 21, channels, 3, 3)
        heads[f"bbox_head.cls_convs.{level}.0.bias"] = torch.zeros(boxes * 21)
    model = mmdetection.convert(state | heads)
    assert model.spec.class_names == VOC_NAMES
    corners = anchors(300, 0.2, 10) / 300
    priors = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    torch.testing.assert_close(model.priors_cxcywh, priors, rtol=0, atol=1e-6)


@pytest.fixture
def history_buffer(monkeypatch):
    """A class that pickles as mmengine's HistoryBuffer, while it lasts."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.array([0.5, 0.25])
            self._count_history = np.array([1, 1])

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules["mmengine.logging.history_buffer"])["HistoryBuffer"] = HistoryBuffer
    return HistoryBuffer


def test_the_training_log_of_a_file_is_ignored(state, history_buffer, monkeypatch):
    log = {"log_scalars": {"train/loss": history_buffer()}, "best": np.float64(0.25)}
    data = originals.saved({"meta": {}, "state_dict": state, "message_hub": log})
    monkeypatch.undo()  # from here on there is no mmengine
    assert import_release(data, "epoch_24.pth").spec.provenance == "mmdetection"


def test_other_objects_in_a_pickle_are_refused():
    class Payload:
        def __reduce__(self):
            return print, ("executed",)

    for data in (originals.saved({"state_dict": Payload()}), pickle.dumps(Payload(), protocol=2)):
        with pytest.raises(CheckpointError, match=r"^weights.pth: a pickle that holds .* such as print;"):
            import_release(data, "weights.pth")

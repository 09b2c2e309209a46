import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.errors import CheckpointError
from pipeline.model.checkpoint import load_checkpoint
from pipeline.model.classes import COCO_IDS_80, COCO_NAMES_80
from pipeline.model.importers import nvidia
from tests.model.importers import originals

NUM_CLASSES = 81
BOXES = [4, 6, 6, 6, 4, 4]
# width, channels of the five extra blocks; the first three halve the map
EXTRAS = [(256, 512), (256, 512), (128, 256), (128, 256), (128, 256)]
STAGES = {4: (64, 3, 1), 5: (128, 4, 2), 6: (256, 6, 1)}  # place: width, blocks, stride of the first block
TRUNK = "feature_extractor.feature_extractor"


def add_conv(state, name, out_channels, in_channels, kernel, generator):
    state[f"{name}.weight"] = originals.random_conv(out_channels, in_channels, kernel, generator)[0]


def add_norm(state, name, channels, generator, *, scale=1.0):
    state[f"{name}.weight"] = scale * (0.8 + 0.4 * torch.rand(channels, generator=generator))
    state[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=generator)
    state[f"{name}.running_mean"] = 0.1 * torch.randn(channels, generator=generator)
    state[f"{name}.running_var"] = 0.8 + 0.4 * torch.rand(channels, generator=generator)
    state[f"{name}.num_batches_tracked"] = torch.tensor(100)


@pytest.fixture(scope="module")
def state():
    generator, state = torch.Generator().manual_seed(4), {}
    add_conv(state, f"{TRUNK}.0", 64, 3, 7, generator)
    add_norm(state, f"{TRUNK}.1", 64, generator)
    channels = 64
    for place, (width, num_blocks, _) in STAGES.items():
        for block in range(num_blocks):
            name = f"{TRUNK}.{place}.{block}"
            for index, (out_channels, in_channels, kernel) in enumerate(
                [(width, channels, 1), (width, width, 3), (4 * width, width, 1)], start=1
            ):
                add_conv(state, f"{name}.conv{index}", out_channels, in_channels, kernel, generator)
                add_norm(
                    state, f"{name}.bn{index}", out_channels, generator, scale=0.3 if index == 3 else 1.0
                )
            if block == 0:
                add_conv(state, f"{name}.downsample.0", 4 * width, channels, 1, generator)
                add_norm(state, f"{name}.downsample.1", 4 * width, generator, scale=0.7)
            channels = 4 * width
    for block, (width, out_channels) in enumerate(EXTRAS):
        name = f"additional_blocks.{block}"
        add_conv(state, f"{name}.0", width, channels, 1, generator)
        add_norm(state, f"{name}.1", width, generator)
        add_conv(state, f"{name}.3", out_channels, width, 3, generator)
        add_norm(state, f"{name}.4", out_channels, generator)
        channels = out_channels
    for level, (channels, boxes) in enumerate(zip([1024, 512, 512, 256, 256, 256], BOXES, strict=True)):
        for head, columns, std in (("loc", 4, 2.0), ("conf", NUM_CLASSES, 3.2)):
            weight, bias = originals.random_head(boxes, columns, channels, generator, std=std)
            if head == "conf":
                bias.view(columns, boxes)[0] += 15  # coordinate-major: all boxes of the background come first
            state[f"{head}.{level}.weight"], state[f"{head}.{level}.bias"] = weight, bias
    return state


def original_forward(state, images):
    """ssd/model.py: locs [4, 8732] and confs [81, 8732], boxes by level, box, row and column."""

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], **options)

    def norm(x, name):
        buffers = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, *buffers, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.relu(norm(conv(images, f"{TRUNK}.0", stride=2, padding=3), f"{TRUNK}.1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for place, (_, num_blocks, first_stride) in STAGES.items():
        for block in range(num_blocks):
            name, stride = f"{TRUNK}.{place}.{block}", first_stride if block == 0 else 1
            y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
            y = F.relu(norm(conv(y, f"{name}.conv2", stride=stride, padding=1), f"{name}.bn2"))
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            if block == 0:
                x = norm(conv(x, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
            x = F.relu(x + y)
    maps = [x]
    for block in range(5):
        name, options = f"additional_blocks.{block}", {"stride": 2, "padding": 1} if block < 3 else {}
        x = F.relu(norm(conv(x, f"{name}.0"), f"{name}.1"))
        x = F.relu(norm(conv(x, f"{name}.3", **options), f"{name}.4"))
        maps.append(x)
    heads = {}
    for head, columns in (("loc", 4), ("conf", NUM_CLASSES)):
        outputs = [
            conv(x, f"{head}.{level}", bias=state[f"{head}.{level}.bias"], padding=1).reshape(columns, -1)
            for level, x in enumerate(maps)
        ]
        heads[head] = torch.cat(outputs, dim=1)
    return heads["loc"], heads["conf"]


def original_priors():
    """ssd/utils.py, dboxes300_coco."""
    sizes, found = [21, 45, 99, 153, 207, 261, 315], []
    for level, grid in enumerate(originals.GRIDS[300]):
        first, second = sizes[level] / 300, sizes[level + 1] / 300
        sides = [(first, first), (math.sqrt(first * second), math.sqrt(first * second))]
        for ratio in originals.RATIOS[300][level]:
            w, h = first * math.sqrt(ratio), first / math.sqrt(ratio)
            sides += [(w, h), (h, w)]
        step = originals.STEPS[300][level] / 300
        found += [
            [(column + 0.5) * step, (row + 0.5) * step, w, h]
            for w, h in sides
            for row in range(grid)
            for column in range(grid)
        ]
    return torch.tensor(found).clamp(0, 1)


def our_order():
    """Place in the original's list of each of our boxes."""
    order, start = [], 0
    for grid, boxes in zip(originals.GRIDS[300], BOXES, strict=True):
        for row in range(grid):
            for column in range(grid):
                order += [start + box * grid * grid + row * grid + column for box in range(boxes)]
        start += boxes * grid * grid
    return torch.tensor(order)


@pytest.fixture(scope="module")
def model(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "epoch_64.pt"
    scheduler = torch.optim.lr_scheduler.MultiStepLR(  # its state holds a Counter
        torch.optim.SGD([torch.zeros(1)], lr=1e-3), milestones=[43, 54]
    )
    label_map = {0: "background", 1: "person"}
    contents = {"epoch": 64, "iteration": 9, "scheduler": scheduler.state_dict(), "label_map": label_map}
    path.write_bytes(originals.saved(contents | {"model": state}))
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def image():
    return originals.random_image(300, seed=3)


@pytest.fixture(scope="module")
def raw(state, image):
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return original_forward(state, ((image.float() / 255 - mean) / std)[None])


def test_raw_outputs_are_those_of_the_original_in_our_order(model, image, raw):
    deltas, logits = originals.run_model(model, image)
    originals.assert_close(deltas, raw[0].T[our_order()])
    originals.assert_close(logits, raw[1].T[our_order()])


def test_default_boxes_are_those_of_the_original_in_our_order(model):
    torch.testing.assert_close(model.priors_cxcywh, original_priors()[our_order()], rtol=0, atol=1e-6)


def test_detections_are_those_of_the_original(model, raw):
    deltas, logits = (output.T for output in raw)
    scores = logits.softmax(dim=1)
    assert 200 < int((scores[:, 1:] > 0.05).sum()) < 4000
    boxes = originals.decode(deltas, original_priors())
    theirs = originals.detect(boxes, scores, threshold=0.05, iou=0.5, top_k=200, max_detections=200)
    order = our_order()
    ours = originals.run_postprocess(model, deltas[order], logits[order], width=640, height=480)
    originals.assert_same_detections(ours, theirs, list(COCO_IDS_80), width=640, height=480)


def test_classes_are_the_annotated_ones_of_coco(model):
    assert model.spec.architecture == "ssd300_resnet50"
    assert model.spec.class_names == COCO_NAMES_80
    assert model.spec.label_ids == COCO_IDS_80
    assert originals.limits(model) == (0.05, 0.5, 200, 200)
    assert model.spec.resize_rule == "bilinear_antialias"
    assert model.spec.provenance == "NVIDIA DeepLearningExamples"


def test_another_backbone_is_refused(state):
    block = f"{TRUNK}.6.5."  # a ResNet-34 has other blocks
    fewer = {name: tensor for name, tensor in state.items() if not name.startswith(block)}
    with pytest.raises(CheckpointError, match=r"NVIDIA DeepLearningExamples(.|\n)*Missing key"):
        nvidia.convert(fewer)
    with pytest.raises(CheckpointError, match=r"no biases of the heads"):
        nvidia.convert({name: tensor for name, tensor in state.items() if name != "conf.0.bias"})

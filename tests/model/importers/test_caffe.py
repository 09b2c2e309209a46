import math
import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pipeline.errors import CheckpointError
from pipeline.model.anchors import VOC_300
from pipeline.model.checkpoint import load_checkpoint
from pipeline.model.classes import COCO_IDS_80, COCO_NAMES_80, VOC_NAMES
from pipeline.model.importers import caffe
from tests.model.importers import originals

# min_size and max_size of each map in the published train.prototxt files
SIZES = {
    (300, "voc"): [(30, 60), (60, 111), (111, 162), (162, 213), (213, 264), (264, 315)],
    (300, "coco"): [(21, 45), (45, 99), (99, 153), (153, 207), (207, 261), (261, 315)],
    (512, "coco"): [
        *[(20.48, 51.2), (51.2, 133.12), (133.12, 215.04), (215.04, 296.96), (296.96, 378.88)],
        *[(378.88, 460.8), (460.8, 542.72)],
    ],
}


def varint(number):
    groups = []
    while True:
        groups.append(number & 0x7F)
        number >>= 7
        if not number:
            return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def number_field(number, value):
    return varint(number << 3 | 0) + varint(value)


def bytes_field(number, value):
    return varint(number << 3 | 2) + varint(len(value)) + value


def float_field(number, value):
    return varint(number << 3 | 5) + struct.pack("<f", value)


def blob(tensor):
    shape = b"".join(varint(size) for size in tensor.shape)
    data = tensor.contiguous().numpy().astype("<f4").tobytes()
    return bytes_field(5, data) + bytes_field(7, bytes_field(1, shape))


def layer(name, kind, *, blobs=(), more=b""):
    head = bytes_field(1, name.encode()) + bytes_field(2, kind.encode()) + bytes_field(3, b"data")
    return bytes_field(100, head + b"".join(bytes_field(7, blob(tensor)) for tensor in blobs) + more)


def prior_layer(name, smallest, largest, *, step, ratios, clip=False):
    parameter = float_field(1, smallest) + float_field(2, largest)
    parameter += b"".join(float_field(3, ratio) for ratio in ratios)
    parameter += number_field(4, 1) + number_field(5, clip)
    parameter += b"".join(float_field(6, variance) for variance in (0.1, 0.1, 0.2, 0.2))
    parameter += float_field(10, step) + float_field(13, 0.5)
    return layer(name, "PriorBox", more=bytes_field(203, parameter))


def prior_layers(size, sizes, *, clip=False):
    return b"".join(
        prior_layer(f"{source}_mbox_priorbox", *pair, step=step, ratios=ratios, clip=clip)
        for (source, _, _), pair, step, ratios in zip(
            originals.SOURCES[size], sizes, originals.STEPS[size], originals.RATIOS[size], strict=True
        )
    )


def caffemodel(layers, scale, *, priors=b""):
    """Bytes of a training network: weights, and layers without any."""
    net = [bytes_field(1, b"VGG_SSD_train"), layer("data", "AnnotatedData", more=number_field(10, 0))]
    for name, blobs in layers.items():
        net.append(layer(name, "Convolution", blobs=blobs))
        if not name.endswith(("_loc", "_conf")):
            net.append(layer(f"{name}_relu", "ReLU"))
    net += [layer("conv4_3_norm", "Normalize", blobs=[scale]), priors, layer("mbox_loss", "MultiBoxLoss")]
    return b"".join(net)


def original_priors(size, sizes, *, clip=False):
    """src/caffe/layers/prior_box_layer.cpp: corners of all boxes."""
    found = []
    for level, grid in enumerate(originals.GRIDS[size]):
        smallest, largest = (int(side) for side in sizes[level])
        sides = [(smallest, smallest), (math.sqrt(smallest * largest),) * 2]
        for ratio in originals.RATIOS[size][level]:
            for value in (ratio, 1 / ratio):  # flip
                sides.append((smallest * math.sqrt(value), smallest / math.sqrt(value)))
        step = originals.STEPS[size][level]
        for row in range(grid):
            for column in range(grid):
                x, y = (column + 0.5) * step, (row + 0.5) * step
                for w, h in sides:
                    found.append(
                        [(x - w / 2) / size, (y - h / 2) / size, (x + w / 2) / size, (y + h / 2) / size]
                    )
    priors = torch.tensor(found)
    return priors.clamp(0, 1) if clip else priors


def centre_form(corners):
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)


def check(model, layers, scale, *, size, sizes, num_classes, label_ids):
    image = originals.random_image(size, seed=5)
    bgr = image.flip(0).float() - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    outputs = originals.vgg_forward(bgr[None], layers.__getitem__, scale, size=size)
    deltas = originals.by_cell([loc for loc, _ in outputs], 4)
    logits = originals.by_cell([conf for _, conf in outputs], num_classes)
    our_deltas, our_logits = originals.run_model(model, image)
    originals.assert_close(our_deltas, deltas)
    originals.assert_close(our_logits, logits)

    scores = logits.softmax(dim=1)
    assert 200 < int((scores[:, 1:] > 0.01).sum()) < 4000
    boxes = originals.decode(deltas, centre_form(original_priors(size, sizes)))
    theirs = originals.detect(boxes, scores, threshold=0.01, iou=0.45, top_k=400, max_detections=200)
    ours = originals.run_postprocess(model, deltas, logits, width=640, height=480)
    originals.assert_same_detections(ours, theirs, list(label_ids), width=640, height=480)


@pytest.fixture(scope="module")
def ssd300():
    return originals.random_vgg(300, 21, background=12, seed=6)


def test_ssd300_gives_the_outputs_and_detections_of_the_original(ssd300, tmp_path):
    layers, scale = ssd300
    sizes = SIZES[300, "voc"]
    (path := tmp_path / "weights").write_bytes(caffemodel(layers, scale, priors=prior_layers(300, sizes)))
    model = load_checkpoint(path)
    assert model.spec.architecture == "ssd300_vgg16"
    assert model.spec.class_names == VOC_NAMES
    assert originals.limits(model) == (0.01, 0.45, 400, 200)
    assert model.spec.provenance == "weiliu89/caffe"
    check(model, layers, scale, size=300, sizes=sizes, num_classes=21, label_ids=range(1, 21))


@pytest.mark.slow
def test_ssd512_gives_the_outputs_and_detections_of_the_original():
    layers, scale = originals.random_vgg(512, 81, background=20, seed=7)
    sizes = SIZES[512, "coco"]
    model = caffe.convert(caffemodel(layers, scale, priors=prior_layers(512, sizes)))
    assert model.spec.architecture == "ssd512_vgg16"
    assert model.spec.class_names == COCO_NAMES_80
    check(model, layers, scale, size=512, sizes=sizes, num_classes=81, label_ids=COCO_IDS_80)


def test_a_voc_model_that_started_from_cocos_keeps_the_default_boxes_of_its_file(ssd300):
    sizes = SIZES[300, "coco"]
    model = caffe.convert(caffemodel(*ssd300, priors=prior_layers(300, sizes, clip=True)))
    assert model.spec.class_names == VOC_NAMES
    expected = centre_form(original_priors(300, sizes, clip=True))
    torch.testing.assert_close(model.priors_cxcywh, expected, rtol=0, atol=1e-6)


def test_without_default_boxes_in_the_file_the_classes_decide(ssd300):
    model = caffe.convert(caffemodel(*ssd300))
    expected = centre_form(original_priors(300, SIZES[300, "voc"]))
    torch.testing.assert_close(model.priors_cxcywh, expected, rtol=0, atol=1e-6)


def test_default_boxes_that_can_not_be_built_are_refused():
    nan = [(math.nan, 60), *SIZES[300, "voc"][1:]]
    gap = [(30, 59), *SIZES[300, "voc"][1:]]
    no_step = prior_layers(300, SIZES[300, "voc"]).replace(float_field(10, 64), float_field(10, 60))
    for priors in (prior_layers(300, nan), prior_layers(300, gap), no_step):
        with pytest.raises(CheckpointError, match="of default boxes; expected"):
            caffe.priors_of(caffe.read_net(priors).priors, VOC_300, image_size=300)


def test_another_network_is_refused_with_the_names_looked_for(tmp_path):
    weights = {"conv1": (torch.ones(2, 3, 1, 1), torch.zeros(2))}
    (path := tmp_path / "alexnet.caffemodel").write_bytes(caffemodel(weights, torch.ones(512)))
    with pytest.raises(
        CheckpointError, match=r"alexnet.caffemodel: not the SSD300 with VGG16 .*'conv1_1.weight'"
    ):
        load_checkpoint(path)


SMALL = caffemodel({"conv1_1": (torch.ones(2, 3, 1, 1), torch.zeros(2))}, torch.ones(4))
SMALL += prior_layer("a_mbox_priorbox", 30, 60, step=8, ratios=[2])


def test_layers_are_read_as_written():
    net = caffe.read_net(SMALL)
    assert list(net.blobs) == ["conv1_1", "conv4_3_norm"]
    assert torch.equal(net.blobs["conv1_1"][0], torch.ones(2, 3, 1, 1))
    assert net.priors == {"a_mbox_priorbox": caffe.PriorLayer((30.0,), (60.0,), 8.0, False)}


def test_a_file_cut_off_anywhere_is_refused_or_has_fewer_layers():
    for end in range(len(SMALL)):
        try:
            net = caffe.read_net(SMALL[:end])
        except CheckpointError:
            continue
        assert len(net.blobs) + len(net.priors) < 3


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_are_refused_cleanly(data):
    damaged = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(SMALL) - 1))] = data.draw(st.integers(0, 255))
    with pytest.raises(CheckpointError):  # never complete, so never converted
        caffe.convert(bytes(damaged))


@pytest.mark.parametrize(
    "message",
    [
        b"\xff" * 11,  # a number without an end
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # 9 exabytes
        varint(100 << 3 | 0) + b"\x01",  # a number in the place of a layer
        bytes_field(100, bytes_field(7, number_field(5, 3))),
        bytes_field(100, bytes_field(7, bytes_field(5, b"123"))),
        bytes_field(
            100, bytes_field(7, bytes_field(5, b"1234") + bytes_field(7, bytes_field(1, varint(1 << 62))))
        ),
        bytes_field(
            100, bytes_field(7, bytes_field(5, b"1234") + bytes_field(7, bytes_field(1, b"\x01" * 999)))
        ),
        bytes_field(100, bytes_field(203, bytes_field(1, b"123"))),
        varint(100 << 3 | 3),  # a group, which the format has given up
    ],
    ids=range(9),
)
def test_impossible_messages_are_refused(message):
    with pytest.raises(CheckpointError, match=r"^damaged"):
        caffe.read_net(message)

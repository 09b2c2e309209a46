import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from pipeline import boxes
from pipeline.errors import ImageError
from pipeline.model.anchors import COCO_300, VOC_300, prior_boxes
from pipeline.model.matching import Targets, match, match_ious, pad_targets, shares
from tests import oracles
from tests.conftest import shared


def make_targets(*boxes_of_images, size=300):
    """Targets of images of `size` pixels, all objects of class 1."""
    return pad_targets(
        [np.array(some, np.float32).reshape(-1, 4) for some in boxes_of_images],
        [np.ones(len(some), np.int64) for some in boxes_of_images],
        height=size,
        width=size,
        num_classes=21,
        image_ids=[f"image {index}" for index in range(len(boxes_of_images))],
    )


@pytest.fixture(scope="module")
def coco_boxes():
    """The boxes of each of the 128 photographs, scaled to 300x300."""
    annotations = json.loads((shared("data/coco_val128") / "annotations.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in annotations["images"]}
    found = {image_id: [] for image_id in sizes}
    for item in annotations["annotations"]:
        if not item.get("iscrowd"):
            x, y, width, height = item["bbox"]
            sx, sy = (300 / size for size in sizes[item["image_id"]])
            found[item["image_id"]].append([x * sx, y * sy, (x + width) * sx, (y + height) * sy])
    return list(found.values())


@pytest.mark.parametrize("priors", [COCO_300, VOC_300], ids=["coco", "voc"])
def test_matches_of_coco_are_those_of_the_slow_oracle(coco_boxes, priors):
    priors_A4 = prior_boxes(priors)
    for start in range(0, 128, 32):
        batch = coco_boxes[start : start + 32]
        targets = make_targets(*batch)
        matched_NA = match(targets, priors_A4)

        ious_NGA = boxes.iou(targets.boxes, boxes.to_corners(priors_A4))
        for index, objects in enumerate(batch):
            expected = oracles.match(ious_NGA[index, : len(objects)].tolist(), len(priors_A4))
            assert matched_NA[index].tolist() == expected


def test_every_object_of_coco_gets_a_prior_where_torchvision_leaves_ten_without(coco_boxes):
    priors_A4 = torchvision_priors()
    num_different = num_lost_by_torchvision = num_lost = num_objects = 0
    for objects in coco_boxes:
        ious_GA = box_iou(torch.tensor(objects), priors_A4)
        theirs = SSDMatcher(0.5)(ious_GA)
        ours = match_ious(ious_GA[None])[0]
        num_objects += len(objects)
        num_different += not torch.equal(theirs, ours)
        num_lost_by_torchvision += len(objects) - len(theirs[theirs >= 0].unique())
        num_lost += len(objects) - len(ours[ours >= 0].unique())

    assert num_objects == 898
    assert (num_different, num_lost_by_torchvision, num_lost) == (13, 10, 0)


def torchvision_priors():
    """Default boxes of torchvision's ssd300_vgg16, corners in pixels."""
    generator = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    maps = [torch.zeros(1, 1, size, size) for size in (38, 19, 10, 5, 3, 1)]
    return generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)[0]


# Few different values, so that equal IoUs and objects that want the same prior are common.
iou_tables = st.lists(
    st.lists(st.sampled_from([0.0, 1e-7, 0.2, 0.4999, 0.5, 0.5001, 0.7, 0.9]), min_size=7, max_size=7),
    min_size=1,
    max_size=9,
)


@settings(max_examples=200)
@given(st.lists(iou_tables, min_size=1, max_size=3))
def test_any_table_of_ious_is_matched_as_by_the_slow_oracle(tables):
    num_objects = max(len(table) for table in tables)
    ious_NGA = torch.full((len(tables), num_objects, 7), -1.0)
    for index, table in enumerate(tables):
        ious_NGA[index, : len(table)] = torch.tensor(table)
    before = ious_NGA.clone()

    matched_NA = match_ious(ious_NGA)

    for index, table in enumerate(tables):
        assert matched_NA[index].tolist() == oracles.match(ious_NGA[index, : len(table)].tolist(), 7)
    assert torch.equal(ious_NGA, before)


def test_two_objects_that_want_one_prior_get_one_each():
    ious_1GA = torch.tensor([[[0.9, 0.3, 0.0], [0.8, 0.1, 0.2]]])

    assert match_ious(ious_1GA).tolist() == [[0, -1, 1]]
    assert SSDMatcher(0.5)(ious_1GA[0]).tolist() == [1, -1, -1]  # object 0 gets none


def test_an_object_that_touches_no_prior_gets_none_and_one_below_the_threshold_gets_its_best():
    ious_1GA = torch.tensor([[[0.0, 0.0], [0.1, 0.3]]])

    assert match_ious(ious_1GA).tolist() == [[-1, 1]]


def test_an_iou_of_exactly_the_threshold_matches():
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    ious_1GA = torch.tensor([[[0.9, 0.5, below]]])

    assert match_ious(ious_1GA).tolist() == [[0, 0, -1]]


def test_images_of_a_batch_do_not_disturb_each_other():
    one, many, none = [[30, 30, 90, 120]], [[i * 20, i * 15, i * 20 + 40, i * 15 + 30] for i in range(12)], []
    priors_A4 = prior_boxes(VOC_300)

    together = match(make_targets(one, many, none), priors_A4)
    apart = [match(make_targets(objects), priors_A4)[0] for objects in (one, many, none)]

    assert together.tolist() == [matched.tolist() for matched in apart]
    assert (together[2] == -1).all()


def test_padding_never_matches_whatever_its_boxes():
    priors_A4 = prior_boxes(VOC_300)
    targets = Targets(boxes.to_corners(priors_A4)[None, :4], torch.tensor([[1, 0, 0, 1]]))

    assert set(match(targets, priors_A4)[0].tolist()) == {-1, 0, 3}


def test_no_image_at_all_is_matched_with_nothing():
    assert match(make_targets(), prior_boxes(VOC_300)).shape == (0, 8732)


def test_targets_are_fractions_of_the_input_and_padded_with_label_zero():
    targets = pad_targets(
        [np.array([[0, 0, 100, 50], [50, 25, 100, 50]]), np.zeros((0, 4))],
        [np.array([3, 20]), np.zeros(0, np.int64)],
        height=50,
        width=100,
        num_classes=21,
        image_ids=["a", "b"],
    )

    assert targets.boxes.tolist() == [[[0, 0, 1, 1], [0.5, 0.5, 1, 1]], [[0] * 4] * 2]
    assert targets.labels.tolist() == [[3, 20], [0, 0]]
    assert (targets.boxes.dtype, targets.labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    "box", [[10, 10, 10, 40], [10, 10, 40, 10], [40, 10, 10, 30], [np.nan, 0, 10, 10], [0, 0, np.inf, 10]]
)
def test_a_box_without_area_is_refused_with_its_image_named(box):
    with pytest.raises(ImageError, match=r"image 1: box .* has no area"):
        make_targets([[0, 0, 10, 10]], [[0, 0, 5, 5], box])


@pytest.mark.parametrize("label", [0, 21, -1])
def test_a_label_that_the_model_does_not_have_is_refused_with_its_image_named(label):
    with pytest.raises(ImageError, match=rf"7\.jpg: label {label} is not one of 1 to 20"):
        pad_targets(
            [np.array([[0, 0, 5, 5]])],
            [np.array([label])],
            height=9,
            width=9,
            num_classes=21,
            image_ids=["7.jpg"],
        )


@given(st.lists(st.lists(st.integers(-1, 3), min_size=7, max_size=7), min_size=1, max_size=3))
def test_the_default_boxes_of_an_object_share_one(matched):
    expected = [[0.0 if index < 0 else 1 / row.count(index) for index in row] for row in matched]
    torch.testing.assert_close(shares(torch.tensor(matched), num_objects=4), torch.tensor(expected))

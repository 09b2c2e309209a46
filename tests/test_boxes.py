import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import boxes
from tests import oracles

coordinates = st.floats(-2, 2, width=32)


@st.composite
def corner_boxes(draw, min_side=0.0):
    """One box as four floats; sides of `min_side` and more, and, where that is 0, none between 0 and 1e-6."""
    x, y = draw(coordinates), draw(coordinates)
    sides = st.floats(max(min_side, 1e-6), 3)
    width, height = (draw(sides if min_side else st.just(0.0) | sides) for _ in range(2))
    return x, y, x + width, y + height


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@given(corner_boxes())
def test_corners_and_centres_are_inverse(box):
    assert torch.allclose(boxes.to_corners(boxes.to_centres(tensor(box))), tensor(box))


def test_centre_form_of_a_box():
    assert torch.allclose(boxes.to_centres(tensor((0.1, 0.2, 0.5, 0.4))), tensor((0.3, 0.3, 0.4, 0.2)))


@given(st.lists(corner_boxes(), max_size=5), st.lists(corner_boxes(), max_size=5))
def test_iou_is_the_oracles_and_lies_in_0_to_1(first, second):
    a, b = tensor(*first).reshape(-1, 4), tensor(*second).reshape(-1, 4)
    found = boxes.iou(a, b)
    expected = [[oracles.iou(x, y) for y in second] for x in first]
    assert found.shape == (len(first), len(second))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64).reshape(found.shape), atol=1e-9)
    assert torch.equal(found, boxes.iou(b, a).T)
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())


def test_iou_of_boxes_without_area_is_zero():
    point = tensor((0.5, 0.5, 0.5, 0.5))
    assert boxes.iou(point, point).item() == 0


def test_iou_works_on_batches():
    a, b = torch.rand(3, 4, 2).repeat(1, 1, 2), torch.rand(3, 5, 4)
    a[..., 2:] += 0.5
    whole = boxes.iou(a, b)
    assert torch.equal(whole, torch.stack([boxes.iou(x, y) for x, y in zip(a, b, strict=True)]))


def test_area_of_a_box_inside_out_is_zero():
    assert boxes.area(tensor((0, 0, 2, 3), (2, 0, 0, 3))).tolist() == [6, 0]


def test_clip_moves_corners_into_the_image():
    assert boxes.clip(tensor((-0.5, 0.2, 1.5, 0.4))).tolist() == [[0, 0.2, 1, 0.4]]


@given(corner_boxes(min_side=0.01), corner_boxes(min_side=0.01))
def test_decode_is_the_inverse_of_encode(box, prior):
    box_cxcywh, prior_cxcywh = boxes.to_centres(tensor(box)), boxes.to_centres(tensor(prior))
    deltas = boxes.encode(box_cxcywh, prior_cxcywh)
    assert torch.allclose(boxes.decode(deltas, prior_cxcywh), tensor(box), atol=1e-9)


@given(corner_boxes(min_side=0.01), corner_boxes(min_side=0.01))
def test_encode_is_the_oracles(box, prior):
    deltas = boxes.encode(boxes.to_centres(tensor(box)), boxes.to_centres(tensor(prior)))
    assert deltas[0].tolist() == pytest.approx(oracles.encode(box, prior), abs=1e-6)


def test_encode_of_a_worked_example():
    # Centre moved by half the prior's width, twice as wide: 0.5 / 0.1 and ln 2 / 0.2.
    deltas = boxes.encode(tensor((0.6, 0.5, 0.4, 0.2)), tensor((0.5, 0.5, 0.2, 0.2)))
    assert deltas[0].tolist() == pytest.approx([5.0, 0.0, 5 * math.log(2), 0.0])


def test_decode_limits_sizes_before_the_exponential():
    prior = tensor((0.5, 0.5, 0.1, 0.1))
    box = boxes.decode(tensor((0, 0, 1e4, -1e4)), prior, max_log_size=math.log(1000 / 16))
    assert boxes.to_centres(box)[0].tolist() == pytest.approx([0.5, 0.5, 6.25, 0])

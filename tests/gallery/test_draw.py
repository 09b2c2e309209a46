import numpy as np
import pandas as pd
import pytest

from pipeline.gallery import class_color, contact_sheet, draw_boxes
from pipeline.gallery.draw import PAPER
from tests.outputs import box


def frame(*boxes):
    return pd.DataFrame(list(boxes) or [box("none")]).iloc[: len(boxes)]


def grey(height, width):
    return np.full((height, width, 3), 128, np.uint8)


def test_the_outline_lies_on_the_edge_of_the_box():
    drawn = np.asarray(draw_boxes(grey(50, 100), frame(box("a", "dog", xmin=10, ymin=30, xmax=90, ymax=45))))
    colored = (drawn == class_color("dog")).all(axis=2)
    assert colored[30:45, 10].all()
    assert colored[30:45, 89].all()
    assert colored[44, 10:90].all()
    assert not colored[30:45, [9, 90]].any()
    assert not colored[45:].any()
    assert (drawn[37, 50] == 128).all()  # the inside stays visible


def test_boxes_are_scaled_to_a_reduced_picture():
    boxes = frame(box("a", "dog", xmin=200, ymin=0, xmax=400, ymax=100, image_width=400, image_height=100))
    drawn = np.asarray(draw_boxes(grey(25, 100), boxes))
    assert (drawn[:, 50] == class_color("dog")).all()
    assert (drawn[20, 10] == 128).all()


def test_the_picture_given_is_not_changed():
    pixels = grey(50, 100)
    draw_boxes(pixels, frame(box("a")))
    assert (pixels == 128).all()


def test_a_class_has_one_color_everywhere_and_classes_differ():
    assert class_color("dog") == class_color("dog")
    names = ["person", "dog", "cat", "car", "bicycle", "chair", "猫", ""]
    assert len({class_color(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["dog", "Кошка", "naïve ünïcödé", "猫", "a" * 300, "line\nbreak", ""])
def test_any_class_name_can_be_drawn(name):
    drawn = draw_boxes(grey(60, 80), frame(box("a", name)))
    assert drawn.size == (80, 60)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 3)])
def test_tiny_pictures_and_boxes_on_the_border_can_be_drawn(shape):
    boxes = frame(
        box("a", xmin=0, ymin=0, xmax=100, ymax=50), box("a", xmin=99.5, ymin=49.5, xmax=100, ymax=50)
    )
    assert draw_boxes(grey(*shape), boxes).size == shape[::-1]


def test_an_image_without_boxes_is_unchanged():
    assert (np.asarray(draw_boxes(grey(5, 7), frame())) == 128).all()


def test_a_sheet_shows_every_image_and_has_the_width_asked_for():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    images = [(f"{c}.jpg", np.full((60, 90, 3), c, np.uint8), frame()) for c in colors]
    sheet = np.asarray(contact_sheet(images, width=500, row_height=120))
    assert sheet.shape[1] == 500
    for color in colors:
        assert (sheet == color).all(axis=2).sum() > 4000
    assert tuple(sheet[0, 0]) == PAPER


def test_a_sheet_of_nothing_is_still_a_picture():
    assert contact_sheet([]).size[0] == 1600


def test_very_wide_and_very_tall_images_get_a_tile():
    images = [
        ("w", np.zeros((1, 5000, 3), np.uint8), frame()),
        ("h", np.zeros((5000, 1, 3), np.uint8), frame()),
    ]
    assert (np.asarray(contact_sheet(images, width=800)) == 0).all(axis=2).any()

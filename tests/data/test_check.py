"""Which boxes are fit for training, and what is said of the others."""

import pytest

from pipeline.data.annotations import Classes
from pipeline.data.check import check_image
from pipeline.data.sources import SourceBox, SourceImage

CLASSES = Classes((1, 2), ("cat", "dog"))


def box(xyxy, name: str = "cat", *, empty: bool = False) -> SourceBox:
    return SourceBox(name, xyxy, empty, False, False, "a.xml object 1")


def check(*boxes: SourceBox, annotated=(64, 48), shown=(64, 48)):
    image = SourceImage("a.jpg", "/a.jpg", annotated[0], annotated[1], boxes)
    return check_image(image, CLASSES, width=shown[0], height=shown[1])


def test_good_boxes_are_kept_in_order():
    found = check(box((3, 4, 5, 6)), box((0, 0, 64, 48), "dog"), box((3, 4, 5, 6), "dog"))

    assert [(kept.class_name, corners) for kept, corners in found.boxes] == [
        ("cat", (3, 4, 5, 6)), ("dog", (0, 0, 64, 48)), ("dog", (3, 4, 5, 6)),
    ]  # fmt: skip
    assert (found.problems, found.num_clipped, found.num_duplicates) == ((), 0, 0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (box((3, 4, 4, 5), empty=True), "has no area"),
        (box((3, 4, 3, 9)), "lies outside the image"),
        (box((64, 4, 80, 9)), "lies outside the image"),
        (box((-9, 4, 0, 9)), "lies outside the image"),
        (box((3, 4, 5, 6), "cow"), "is of the unknown class 'cow'"),
        (box((40, 4, 40.000001, 6)), "has no area in float32"),
        (box(None, empty=True), "is not four numbers"),
    ],
)
def test_bad_boxes_are_named(bad, words):
    found = check(box((3, 4, 5, 6)), bad)

    assert len(found.boxes) == 1
    assert found.problems == (f"a.xml object 1 {words}",)


def test_boxes_are_clipped_and_counted_beyond_rounding():
    found = check(box((-10, -0.01, 70, 48.3)), box((1, 1, 64.4, 48)))

    assert [corners for _, corners in found.boxes] == [(0, 0, 64, 48), (1, 1, 64, 48)]
    assert found.num_clipped == 1


def test_repeated_boxes_of_one_class_are_left_out_and_counted():
    found = check(box((3, 4, 5, 6)), box((3, 4, 5, 6)), box((3, 4, 5, 6)))

    assert (len(found.boxes), found.num_duplicates, found.problems) == (1, 2, ())


def test_an_image_of_another_size_than_annotated_is_not_usable():
    found = check(box((3, 4, 5, 6)), shown=(48, 64))

    assert not found.usable
    assert found.problems == ("a.jpg is annotated as 64x48, but displayed as 48x64 (EXIF orientation?)",)


def test_a_size_that_is_not_known_clips_only_at_zero():
    found = check(box((-3, 4, 5000, 6)), annotated=(0, 0), shown=(0, 0))

    assert [corners for _, corners in found.boxes] == [(0, 4, 5000, 6)]

"""The form in which annotations travel: reading it, refusing what is something else."""

import numpy as np
import pytest

from pipeline.data.annotations import Classes, parse_annotation, read_classes
from pipeline.errors import ConfigError, ImageError

CLASSES = Classes((1, 18, 90), ("person", "dog", "toothbrush"))
GOOD = {
    "width": 64, "height": 48, "boxes": [[1.5, 2, 3, 4], [0, 0, 64, 48]], "labels": [90, 1],
    "class_names": ["toothbrush", "person"], "difficult": [0, 1], "crowd": [1, 0], "image_id": 139,
}  # fmt: skip


def test_labels_become_class_numbers_and_flags_are_carried():
    annotation = parse_annotation(GOOD, CLASSES, image_id="x")

    assert (annotation.width, annotation.height, annotation.image_id) == (64, 48, 139)
    assert annotation.boxes.dtype == np.float32
    np.testing.assert_array_equal(annotation.boxes, GOOD["boxes"])
    assert annotation.labels.dtype == np.int64
    assert annotation.labels.tolist() == [3, 1]
    assert annotation.difficult.tolist() == [False, True]
    assert annotation.crowd.tolist() == [True, False]


def test_an_image_without_objects_has_empty_arrays_of_the_right_type():
    annotation = parse_annotation({"width": 6, "height": 4, "boxes": [], "labels": []}, CLASSES, image_id="x")

    assert annotation.boxes.shape == (0, 4)
    assert (annotation.boxes.dtype, annotation.labels.dtype) == (np.float32, np.int64)
    assert (annotation.difficult.dtype, annotation.crowd.dtype) == (bool, bool)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": None}, "another form"),
        ({"boxes": [[1, 2, 3]]}, "another form"),
        ({"labels": [90, 2]}, "another form"),
        ({"labels": [90]}, "lists differ in length"),
        ({"crowd": [1]}, "lists differ in length"),
        ({"boxes": [[1, 2, 1, 4], [0, 0, 1, 1]]}, "box without area"),
        ({"boxes": [[1, 2, float("nan"), 4], [0, 0, 1, 1]]}, "box without area"),
        ({"width": "wide"}, "another form"),
    ],
)
def test_another_form_is_refused_with_the_name_of_the_image(change, words):
    with pytest.raises(ImageError, match=words) as caught:
        parse_annotation({**GOOD, **change}, CLASSES, image_id="s.tar/a.jpg")
    assert caught.value.stage == "annotation"
    assert "s.tar/a.jpg" in str(caught.value)


def test_a_missing_annotation_is_refused():
    with pytest.raises(ImageError, match="has no annotation"):
        parse_annotation(None, CLASSES, image_id="x")


def test_classes_survive_writing_and_reading(tmp_path):
    (tmp_path / "classes.json").write_bytes(CLASSES.to_json())

    assert read_classes(str(tmp_path)) == CLASSES


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": []}', '{"classes": [{"id": 1}]}', '{"classes": 3}'])
def test_a_damaged_class_list_is_refused(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)

    with pytest.raises(ConfigError):
        read_classes(str(tmp_path))


def test_a_shard_set_without_classes_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="make_shards") as caught:
        read_classes(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "names"), [((), ()), ((1, 1), ("a", "b")), ((1, 2), ("a", "a")), ((0, 1), ("a", "b"))]
)
def test_impossible_classes_are_refused(ids, names):
    with pytest.raises(ConfigError):
        Classes(ids, names)

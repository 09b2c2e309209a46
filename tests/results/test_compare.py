import pytest

from pipeline.errors import ConfigError
from pipeline.results import compare_runs
from tests.outputs import box, failed_image, image, write_part


def boxes_at(image_id, *places, class_name="dog", score=0.9):
    return [box(image_id, class_name, score, xmin=x, xmax=x + 10, ymin=0, ymax=10) for x in places]


def test_moved_boxes_are_the_same_and_others_are_gained_or_lost(tmp_path):
    write_part(tmp_path / "old", "p", [image("a"), image("b")], boxes_at("a", 0, 50) + boxes_at("b", 0))
    write_part(tmp_path / "new", "p", [image("a"), image("b")], boxes_at("a", 2, 80) + boxes_at("b", 0))
    changes = compare_runs(tmp_path / "new", tmp_path / "old")
    assert changes[["change", "image_id", "xmin"]].to_numpy().tolist() == [
        ["gained", "a", 80],
        ["lost", "a", 50],
    ]


def test_one_box_is_the_same_as_one_other_only(tmp_path):
    write_part(tmp_path / "old", "p", [image("a")], boxes_at("a", 0))
    write_part(tmp_path / "new", "p", [image("a")], boxes_at("a", 1, 0))
    changes = compare_runs(tmp_path / "new", tmp_path / "old")
    assert changes[["change", "xmin"]].to_numpy().tolist() == [["gained", 1]]


def test_another_class_is_another_detection(tmp_path):
    write_part(tmp_path / "old", "p", [image("a")], boxes_at("a", 0))
    write_part(tmp_path / "new", "p", [image("a")], boxes_at("a", 0, class_name="cat"))
    changes = compare_runs(tmp_path / "new", tmp_path / "old")
    assert changes[["change", "class_name"]].to_numpy().tolist() == [["gained", "cat"], ["lost", "dog"]]


def test_scores_below_the_threshold_and_images_of_one_run_only_do_not_count(tmp_path):
    write_part(
        tmp_path / "old", "p", [image("a"), failed_image("b"), image("c")], boxes_at("a", 0, score=0.4)
    )
    write_part(tmp_path / "new", "p", [image("a"), image("b")], boxes_at("a", 0) + boxes_at("b", 0))
    assert compare_runs(tmp_path / "new", tmp_path / "old").image_id.tolist() == ["a"]
    assert compare_runs(tmp_path / "new", tmp_path / "old", min_score=0.95).empty


def test_runs_on_other_images_are_refused_and_empty_runs_are_equal(tmp_path):
    write_part(tmp_path / "old", "p", [image("a")], [])
    write_part(tmp_path / "new", "p", [image("x")], [])
    with pytest.raises(ConfigError, match="no image in common: compare x with a"):
        compare_runs(tmp_path / "new", tmp_path / "old")
    write_part(tmp_path / "none", "p", [], [])
    assert compare_runs(tmp_path / "none", tmp_path / "old").empty


@pytest.mark.parametrize("iou", [2, 0, -0.5, float("nan")])
def test_an_overlap_that_no_two_boxes_or_all_have_is_refused(tmp_path, iou):
    write_part(tmp_path, "p", [image("a")], boxes_at("a", 0))
    assert compare_runs(tmp_path, tmp_path, iou=1).empty
    with pytest.raises(ConfigError, match=r"^iou=.*: give a number above 0 and up to 1$"):
        compare_runs(tmp_path, tmp_path, iou=iou)

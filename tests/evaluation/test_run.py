import json

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.detections import ResultsFile, match_names, open_detections
from pipeline.evaluation.numbers import numbers, thresholds_by_class
from pipeline.evaluation.report import Report
from pipeline.evaluation.run import class_groups, measure
from tests.evaluation.cases import detected, random_case, truth
from tests.outputs import box, failed_image, image, write_part

NAMES = {1: "person", 18: "dog"}
A, B = (10, 5, 40, 40), (60, 5, 20, 20)


def annotated(*boxes, num_images=3):
    return truth(*boxes, num_images=num_images, class_names=NAMES)


def found_box(image_id, class_name, xywh, score):
    x, y, w, h = xywh
    return box(image_id, class_name, score, xmin=x, ymin=y, xmax=x + w, ymax=y + h)


@pytest.fixture
def output(tmp_path):
    """Images 0 and 1 of a tar, image 2 failed; a dog found in 0, a person taken for a dog in 1."""
    boxes = [found_box("t.tar/0.jpg", "dog", A, 0.9), found_box("t.tar/1.jpg", "dog", A, 0.6)]
    boxes += [found_box("t.tar/1.jpg", "naïve 猫", B, 0.8)]
    images = [image("t.tar/0.jpg", 1), image("t.tar/1.jpg", 2), failed_image("t.tar/2.jpg")]
    write_part(tmp_path, "part-0", images, boxes)
    return str(tmp_path)


def test_an_output_folder_is_measured_by_class_name_and_image_name(output):
    source, there = open_detections(output, annotated((0, 18, A), (1, 1, A), (2, 18, A)))
    evaluation = measure(there, source, metric="coco")
    result = numbers(evaluation)
    assert (result["num_images"], result["num_failed_images"]) == (3, 1)
    assert (result["num_annotated"], result["num_detections"]) == (3, 2)
    assert result["not_annotated_classes"] == {"naïve 猫": 1}
    assert result["per_class"]["dog"]["AP50"] == pytest.approx(51 / 101)  # 1 of 2 found, all scores above
    assert result["per_class"]["person"]["AP"] == 0
    assert result["confusions"] == [{"annotated": "person", "detected": "dog", "count": 1}]
    assert result["at_threshold"]["precision"] == 0.5
    assert result["at_threshold"]["recall"] == pytest.approx(1 / 3)
    assert json.loads(json.dumps(result)) == result


def test_the_voc_metrics_give_one_mean(output):
    source, there = open_detections(output, annotated((0, 18, A), (1, 1, A), (2, 18, A)))
    by_area = numbers(measure(there, source, metric="voc"))
    by_points = numbers(measure(there, source, metric="voc07"))
    assert by_area["mAP"] == pytest.approx(0.5 / 2)
    assert by_points["mAP"] == pytest.approx(6 / 11 / 2)
    assert by_area["per_class"]["dog"]["AP"] == pytest.approx(0.5)
    assert "AP" not in by_area


def test_thresholds_are_exact_scores_by_class_name(output):
    source, there = open_detections(output, annotated((0, 18, A)))
    thresholds = thresholds_by_class(measure(there, source, metric="coco"))
    assert thresholds == {"dog": float(np.float32(0.9))}  # `score >= threshold` keeps that detection


def test_a_class_that_was_never_right_gets_the_threshold_of_all_together():
    there = annotated((0, 18, A), (1, 1, A))
    found = detected((0, 18, A, 0.8), (0, 1, B, 0.4), (2, 18, B, 0.3))
    (evaluation,) = evaluations(there, found)
    assert thresholds_by_class(evaluation) == {"person": 0.8, "dog": 0.8}


def test_a_run_on_a_part_of_the_annotated_images_is_measured_only_on_request(output):
    whole = annotated((0, 18, A), (4, 18, A), num_images=5)
    with pytest.raises(ConfigError, match=r"2 of 5 annotated images are not in .*such as 3\.jpg.*--partial"):
        open_detections(output, whole)
    source, there = open_detections(output, whole, partial=True)
    assert there.image_ids == ("0.jpg", "1.jpg", "2.jpg")
    assert numbers(measure(there, source, metric="coco"))["per_class"]["dog"]["AP50"] == 1.0


def test_a_run_without_a_class_or_an_image_in_common_is_refused(output):
    with pytest.raises(ConfigError, match="no class in common: compare"):
        open_detections(output, truth((0, 1, A), num_images=3, class_names={1: "cell"}))
    other = truth((0, 1, A), num_images=1)
    object.__setattr__(other, "image_ids", ("x.jpg",))
    with pytest.raises(ConfigError, match=r"compare its t\.tar/0\.jpg with the annotated x\.jpg"):
        open_detections(output, other)


def test_no_detections_no_annotations_and_no_images_are_measured(tmp_path):
    write_part(tmp_path / "a", "part-0", [image("0.jpg")], [])
    source, there = open_detections(str(tmp_path / "a"), annotated((0, 18, A), num_images=1))
    assert numbers(measure(there, source, metric="coco"), num_resamples=3)["AP"] == 0
    source, there = open_detections(str(tmp_path / "a"), annotated(num_images=1))
    empty = numbers(measure(there, source, metric="voc07"), num_resamples=3)
    assert empty["mAP"] == -1
    assert empty["confidence_intervals"]["mAP"] == [-1, -1]
    write_part(tmp_path / "b", "part-0", [], [])
    source, there = open_detections(str(tmp_path / "b"), truth(class_names=NAMES))
    assert numbers(measure(there, source, metric="coco"), num_resamples=3)["AP"] == -1


def test_one_class_and_a_thousand_classes_are_measured(tmp_path):
    for count in (1, 1000):
        names = {k: f"class {k}" for k in range(1, count + 1)}
        there = truth(*[(0, k, (k % 90, 5, 9, 9)) for k in names], class_names=names)
        boxes = [found_box("0.jpg", name, (k % 90, 5, 9, 9), 0.9) for k, name in names.items()]
        write_part(tmp_path / str(count), "p", [image("0.jpg", count)], boxes, model={})
        source, there = open_detections(str(tmp_path / str(count)), there)
        assert numbers(measure(there, source, metric="coco"))["AP"] == pytest.approx(1.0)


def test_classes_beyond_the_table_are_counted_with_the_flag_that_writes_them():
    names = {k: f"class {k}" for k in range(1, 44)}
    there = truth(*[(0, k, A) for k in names], class_names=names)
    evaluation = measure(there, ResultsFile(detected(), {}, {}), metric="voc")
    text = Report(evaluation, numbers(evaluation)).text()
    assert "and 13 more classes; --output writes all to a JSON file" in text


def test_classes_are_grouped_up_to_a_number_of_detections():
    assert class_groups({1: 5, 2: 4, 3: 9, 5: 1}, [1, 2, 3, 4, 5], 9) == [[1, 2], [3, 4], [5]]
    assert class_groups({1: 50}, [1], 9) == [[1]]
    assert class_groups({}, [], 9) == [[]]


@pytest.mark.ray
def test_a_cluster_measures_the_same_numbers(tmp_path, monkeypatch, ray_cluster):
    monkeypatch.setattr("pipeline.evaluation.run.DETECTIONS_PER_GROUP", 10)
    there, found = random_case(np.random.default_rng(0))
    rows = zip(found.image_index, found.labels, found.boxes_xywh, found.scores, strict=True)
    boxes = [found_box(f"{i}.jpg", f"class {label}", xywh, score) for i, label, xywh, score in rows]
    images = [image(f"{i}.jpg") for i in range(there.num_images)]
    write_part(tmp_path, "p", images, boxes, model={})
    source, there = open_detections(str(tmp_path), there)
    here = numbers(measure(there, source, metric="coco"))
    assert numbers(measure(there, source, metric="coco", distributed=True)) == here


@pytest.mark.parametrize(
    ("image_ids", "names", "expected"),
    [
        (["a.jpg"], ["a.jpg"], {"a.jpg": 0}),
        (["val-0.tar/0042.jpg"], ["0042.jpg"], {"val-0.tar/0042.jpg": 0}),
        (["x/1.png", "y/1.png"], ["y/1.jpg", "x/1.jpg"], {"x/1.png": 1, "y/1.png": 0}),
        (["x/1.png", "y/1.png"], ["1.jpg"], {}),  # which of the two cannot be told
        (["x/1.png"], ["a/1.jpg", "b/1.jpg"], {}),
        (["shard/猫.jpg"], ["猫.jpg"], {"shard/猫.jpg": 0}),
        (["s.tar/v1.2.jpg"], ["v1.2.jpg", "v1.3.jpg"], {"s.tar/v1.2.jpg": 0}),
        ([], ["a.jpg"], {}),
    ],
)
def test_images_are_matched_by_name_only_where_it_is_certain(image_ids, names, expected):
    assert match_names(image_ids, names) == expected


def evaluations(there, *detections):
    from pipeline.evaluation.detections import ResultsFile

    return [
        measure(there, ResultsFile(found, {int(k): 1 for k in found.labels}, {}), metric="coco")
        for found in detections
    ]


def test_two_runs_are_compared_box_by_box():
    there = annotated((0, 18, A), (0, 1, B), (1, 18, A))
    old = detected((0, 18, A, 0.9), (0, 1, B, 0.4))
    new = detected((0, 18, A, 0.4), (0, 1, B, 0.9), (1, 18, A, 0.7))
    change = compare(*evaluations(there, new, old), num_resamples=20)
    assert (change["gained"], change["lost"]) == (2, 1)
    assert change["per_class"]["dog"] == {"difference": pytest.approx(1 - 51 / 101), "gained": 1, "lost": 1}
    assert change["most_changed_images"] == [
        {"image_id": "0.jpg", "gained": 1, "lost": 1},
        {"image_id": "1.jpg", "gained": 1, "lost": 0},
    ]
    assert change["difference"]["AP"] == pytest.approx((1 - 51 / 101) / 2)
    low, high = change["difference_interval"]["AP"]
    assert low <= change["difference"]["AP"] <= high


def test_a_run_compared_with_itself_changes_nothing():
    there, found = random_case(np.random.default_rng(1))
    change = compare(*evaluations(there, found, found), num_resamples=10)
    assert change["difference"]["AP"] == change["gained"] == change["lost"] == 0
    assert change["difference_interval"]["AP"] == [0, 0]
    assert change["most_changed_images"] == []


def test_runs_on_other_images_are_not_compared():
    one, other = annotated((0, 1, A), num_images=1), annotated((0, 1, A), num_images=2)
    found = detected((0, 1, A, 0.5))
    with pytest.raises(ConfigError, match="can't be compared"):
        compare(*evaluations(one, found), *evaluations(other, found))

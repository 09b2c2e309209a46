import gzip
import json
import sys

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.average_precision import coco_ap, precision_recall
from pipeline.evaluation.coco import NAMES, class_numbers, coco_curves, coco_numbers, join
from pipeline.evaluation.detections import open_detections
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.evaluation.matching import match_coco
from tests.evaluation.cases import detected, random_case, truth

SQUARE = (10.0, 10.0, 20.0, 20.0)


def pycocotools_numbers(annotated, found):
    """The twelve numbers of the original implementation."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    there, results = coco.COCO(), coco.COCO()
    images = [{"id": i} for i in range(annotated.num_images)]
    categories = [{"id": label, "name": name} for label, name in annotated.class_names.items()]
    there.dataset = {"images": images, "categories": categories, "annotations": []}
    results.dataset = {"images": images, "categories": categories, "annotations": []}
    for i, box in enumerate(annotated.boxes_xywh.tolist()):
        row = {
            "id": i + 1,
            "image_id": int(annotated.image_index[i]),
            "category_id": int(annotated.labels[i]),
        }
        row |= {"bbox": box, "area": annotated.areas[i], "iscrowd": int(annotated.crowd[i])}
        there.dataset["annotations"].append(row)
    for i, box in enumerate(found.boxes_xywh.tolist()):
        image, label = int(found.image_index[i]), int(found.labels[i])
        row = {"id": i + 1, "image_id": image, "category_id": label}
        row |= {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "score": found.scores[i]}
        results.dataset["annotations"].append(row)
    there.createIndex()
    results.createIndex()
    measure = cocoeval.COCOeval(there, results, "bbox")
    measure.evaluate()
    measure.accumulate()
    measure.summarize()
    return measure.stats.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_the_twelve_numbers_equal_those_of_pycocotools(seed):
    annotated, found = random_case(np.random.default_rng(seed))
    ours = coco_numbers(coco_curves(annotated, found, sorted(annotated.class_names)))
    assert list(ours) == list(NAMES)
    assert list(ours.values()) == pytest.approx(pycocotools_numbers(annotated, found), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_our_own_matching_gives_the_same_average_precision(seed):
    """It serves confidence intervals and thresholds, so it must agree with the library on AP."""
    annotated, found = random_case(np.random.default_rng(100 + seed), num_images=20)
    expected = class_numbers(coco_curves(annotated, found, sorted(annotated.class_names)))
    for label, numbers in expected.items():
        matches = match_coco(annotated, found, label)
        aps = [coco_ap(*precision_recall(matches, t)) for t in range(10)]
        assert np.mean(aps) == pytest.approx(numbers["AP"], abs=1e-12)
        assert aps[0] == pytest.approx(numbers["AP50"], abs=1e-12)


def test_classes_measured_in_groups_give_the_same_numbers():
    annotated, found = random_case(np.random.default_rng(7), num_classes=5)
    whole = coco_curves(annotated, found, [1, 2, 3, 4, 5])
    groups = join([coco_curves(annotated, found, labels) for labels in ([4, 2], [5], [1, 3])])
    assert groups.labels == whole.labels
    np.testing.assert_array_equal(groups.precision, whole.precision)
    np.testing.assert_array_equal(groups.recall, whole.recall)


def test_the_official_numbers_of_the_coco_authors_are_reproduced(shared_data):
    folder = shared_data("data/coco_fakebox100")
    annotated = read_ground_truth(str(folder / "instances_val2014_100.json"))
    found = open_detections(str(folder / "instances_val2014_fakebbox100_results.json"), annotated)[0].read(
        annotated
    )
    ours = coco_numbers(coco_curves(annotated, found, sorted(annotated.class_names)))
    expected = json.loads((folder / "expected.json").read_text())["stats"].values()
    assert list(ours.values()) == pytest.approx(list(expected), abs=1e-6)


def test_the_reference_detections_of_coco_val_give_the_reference_numbers(shared_data):
    folder = shared_data("data/coco_val128")
    annotated = read_ground_truth(str(folder / "annotations.json"))
    found = open_detections(str(folder / "detections.json.gz"), annotated)[0].read(annotated)
    ours = coco_numbers(coco_curves(annotated, found, sorted(annotated.class_names)))
    expected = json.loads((folder / "expected.json").read_text())["stats"].values()
    assert list(ours.values()) == pytest.approx(list(expected), abs=1e-9)


def test_nothing_annotated_is_minus_one_and_nothing_found_is_zero():
    nothing = truth(num_images=1, class_names={1: "dog"})
    numbers = coco_numbers(coco_curves(nothing, detected((0, 1, SQUARE, 0.5)), [1]))
    assert set(numbers.values()) == {-1.0}
    numbers = coco_numbers(coco_curves(truth((0, 1, SQUARE)), detected(), [1]))
    assert numbers["AP"] == numbers["AR100"] == 0.0
    assert set(coco_numbers(coco_curves(truth(num_images=0), detected(), [])).values()) == {-1.0}


def test_a_coco_file_without_areas_takes_those_of_the_boxes(tmp_path):
    data = {
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "categories": [{"id": 9, "name": "猫"}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 9, "bbox": [1, 2, 3, 4]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    annotated = read_ground_truth(str(tmp_path / "a.json"))
    assert annotated.areas.tolist() == [12]
    assert annotated.class_names == {9: "猫"}
    results = [{"image_id": 5, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}] * 2
    results[1] = results[1] | {"category_id": 77}
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(json.dumps(results).encode()))
    source, _ = open_detections(str(tmp_path / "r.json.gz"), annotated)
    assert len(source.read(annotated)) == 1
    assert source.not_annotated == {"category 77": 1}


@pytest.mark.parametrize("content", ["[]", "{}", "no json", '{"images": [{}]}'])
def test_a_file_that_is_not_coco_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match="no COCO instances file"):
        read_ground_truth(str(tmp_path / "a.json"))


@pytest.mark.parametrize("size", [5, 40, -4])
def test_a_cut_or_damaged_results_file_is_refused_in_one_line(tmp_path, size):
    content = bytearray(
        gzip.compress(b'[{"image_id": 0, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]')
    )
    if size == 40:
        content[30] ^= 255
    else:
        content = content[:size]
    (tmp_path / "r.json.gz").write_bytes(content)
    annotated = read_ground_truth(coco_file(tmp_path, 1))
    with pytest.raises(ConfigError, match="no COCO results file"):
        open_detections(str(tmp_path / "r.json.gz"), annotated)


def coco_file(folder, num_images):
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(num_images)],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [],
    }
    (folder / "truth.json").write_text(json.dumps(data))
    return str(folder / "truth.json")


def test_results_of_images_that_are_left_out_are_left_out_on_request(tmp_path):
    """As where the other run of a comparison has a part of the images alone."""
    box = {"category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    (tmp_path / "r.json").write_text(json.dumps([box | {"image_id": i} for i in (0, 1, 2)]))
    annotated = read_ground_truth(coco_file(tmp_path, 3)).of_images(np.array([True, False, True]))
    source, there = open_detections(str(tmp_path / "r.json"), annotated, partial=True)
    assert source.read(there).image_index.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="image 1 is not in the annotations"):
        open_detections(str(tmp_path / "r.json"), annotated)
    (tmp_path / "r.json").write_text(json.dumps([box | {"image_id": 9}]))
    with pytest.raises(ConfigError, match="image 9 is not in the annotations"):
        open_detections(str(tmp_path / "r.json"), annotated, partial=True)


def test_results_of_another_data_set_are_refused(tmp_path):
    (tmp_path / "r.json").write_text('[{"image_id": 3, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]')
    with pytest.raises(ConfigError, match="image 3 is not in the annotations"):
        open_detections(str(tmp_path / "r.json"), truth((0, 1, SQUARE)))
    (tmp_path / "r.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="no COCO results file"):
        open_detections(str(tmp_path / "r.json"), truth((0, 1, SQUARE)))


def test_a_missing_library_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'shardshot\[eval\]'"):
        coco_curves(truth((0, 1, SQUARE)), detected(), [1])

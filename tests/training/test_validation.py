"""Validation uses the detector and the measure of the other jobs."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluation.boxsets import Detected
from pipeline.evaluation.coco import coco_curves, coco_numbers
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.training.samples import load_images
from pipeline.training.validation import detect, ground_truth, validate
from tests.training.makers import SIDE, make_set, read_set, small_model


def images_of(index, numbers):
    return load_images(index, numbers, height=SIDE, width=SIDE, rule="tf_legacy")[0]


def test_ground_truth_is_what_the_evaluate_job_reads(tmp_path):
    index, classes = read_set(make_set(tmp_path, 6, num_shards=2, empty=1))
    mine, wanted = ground_truth(index, classes), read_ground_truth(str(tmp_path))
    assert mine.image_ids == wanted.image_ids
    assert mine.class_names == wanted.class_names
    for name in ("image_index", "boxes_xywh", "labels", "areas", "crowd", "difficult"):
        assert np.array_equal(getattr(mine, name), getattr(wanted, name)), name


def test_perfect_detections_have_an_ap_of_one(tmp_path):
    index, classes = read_set(make_set(tmp_path, 6))
    truth = ground_truth(index, classes)
    perfect = Detected(truth.image_index, truth.boxes_xywh, truth.labels, np.ones(len(truth.labels)))
    assert coco_numbers(coco_curves(truth, perfect, [10, 20]))["AP"] == pytest.approx(1)


def test_parts_of_the_images_give_the_detections_of_all(tmp_path):
    index, _ = read_set(make_set(tmp_path, 5))
    model = small_model()
    whole = detect(model, [images_of(index, range(5))], device="cpu")
    parts = detect(model, [images_of(index, [0, 1, 2]), images_of(index, [3, 4])], device="cpu")
    assert len(whole) > 0
    assert np.array_equal(whole.image_index, parts.image_index)
    np.testing.assert_allclose(whole.boxes_xywh, parts.boxes_xywh, atol=1e-3)


def test_numbers_name_each_class(tmp_path):
    index, classes = read_set(make_set(tmp_path, 2))
    numbers = validate(small_model(), [images_of(index, range(2))], ground_truth(index, classes))
    assert {"AP", "AP50", "AP/disc", "AP/square"} <= numbers.keys()


def test_an_image_that_cannot_be_decoded_is_named_and_has_no_part_in_the_crash(tmp_path):
    index, _ = read_set(make_set(tmp_path, 2))
    sizes = index.set_column(3, "size", pa.array([20, index["size"][1].as_py()]))
    found, failures = load_images(sizes, range(2), height=SIDE, width=SIDE, rule="tf_legacy")
    assert len(failures) == 1
    assert found.images_NHW3[0].min() == found.images_NHW3[0].max() == 128

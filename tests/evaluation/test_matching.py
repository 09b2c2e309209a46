import numpy as np
import pytest

from pipeline.evaluation.average_precision import all_point_ap, coco_ap, precision_recall, voc07_ap
from pipeline.evaluation.matching import match_coco, match_voc
from tests.evaluation.cases import detected, truth

# The seven images of rafaelpadilla/Object-Detection-Metrics, samples/sample_2: one class, xywh, where the
# last pixel belongs to the box (its published numbers hold only with widths of w + 1).
PADILLA_TRUTH = [
    (0, (25, 16, 38, 56)), (0, (129, 123, 41, 62)), (1, (123, 11, 43, 55)), (1, (38, 132, 59, 45)),
    (2, (16, 14, 35, 48)), (2, (123, 30, 49, 44)), (2, (99, 139, 47, 47)), (3, (53, 42, 40, 52)),
    (3, (154, 43, 31, 34)), (4, (59, 31, 44, 51)), (4, (48, 128, 34, 52)), (5, (36, 89, 52, 76)),
    (5, (62, 58, 44, 67)), (6, (28, 31, 55, 63)), (6, (58, 67, 50, 58)),
]  # fmt: skip
PADILLA_DETECTED = [
    (0, (5, 67, 31, 48), 0.88), (0, (119, 111, 40, 67), 0.70), (0, (124, 9, 49, 67), 0.80),
    (1, (64, 111, 64, 58), 0.71), (1, (26, 140, 60, 47), 0.54), (1, (19, 18, 43, 35), 0.74),
    (2, (109, 15, 77, 39), 0.18), (2, (86, 63, 46, 45), 0.67), (2, (160, 62, 36, 53), 0.38),
    (2, (105, 131, 47, 47), 0.91), (2, (18, 148, 40, 44), 0.44), (3, (83, 28, 28, 26), 0.35),
    (3, (28, 68, 42, 67), 0.78), (3, (87, 89, 25, 39), 0.45), (3, (10, 155, 60, 26), 0.14),
    (4, (50, 38, 28, 46), 0.62), (4, (95, 11, 53, 28), 0.44), (4, (29, 131, 72, 29), 0.95),
    (4, (29, 163, 72, 29), 0.23), (5, (43, 48, 74, 38), 0.45), (5, (17, 155, 29, 35), 0.84),
    (5, (95, 110, 25, 42), 0.43), (6, (16, 20, 101, 88), 0.48), (6, (33, 116, 37, 49), 0.95),
]  # fmt: skip
SQUARE = (10, 10, 20, 20)


def flags(matches):
    return matches.correct[0].tolist(), matches.ignored[0].tolist()


def voc_aps(annotated, found, **settings):
    precision, recall = precision_recall(match_voc(annotated, found, 1, **settings))
    return voc07_ap(precision, recall), all_point_ap(precision, recall)


def whole_pixels(box):
    x, y, w, h = box
    return x, y, w + 1, h + 1


def test_the_published_answers_of_the_padilla_images_are_reproduced():
    annotated = truth(*[(image, 1, whole_pixels(box)) for image, box in PADILLA_TRUTH])
    found = detected(*[(image, 1, whole_pixels(box), score) for image, box, score in PADILLA_DETECTED])
    assert voc_aps(annotated, found, iou=0.3) == pytest.approx((0.268398, 0.245687), abs=1e-6)


def test_perfect_detections_give_one():
    annotated = truth((0, 1, SQUARE), (0, 1, (50, 50, 9, 9)), (1, 1, SQUARE))
    found = detected((0, 1, SQUARE, 0.9), (0, 1, (50, 50, 9, 9), 0.8), (1, 1, SQUARE, 0.3))
    assert voc_aps(annotated, found) == (1.0, 1.0)
    assert coco_ap(*precision_recall(match_coco(annotated, found, 1), 9)) == 1.0


def test_an_iou_of_exactly_one_half_is_right():
    annotated = truth((0, 1, (0, 0, 20, 10)))
    found = detected((0, 1, (0, 0, 10, 10), 0.9))
    assert flags(match_voc(annotated, found, 1)) == ([True], [False])
    assert flags(match_coco(annotated, found, 1)) == ([True], [False])


def test_just_below_one_half_is_wrong():
    annotated = truth((0, 1, (0, 0, 20.01, 10)))
    assert flags(match_voc(annotated, detected((0, 1, (0, 0, 10, 10), 0.9)), 1)) == ([False], [False])


def test_a_difficult_box_is_neither_asked_for_nor_punished():
    annotated = truth((0, 1, SQUARE), (1, 1, SQUARE), difficult=[1])
    found = detected((1, 1, SQUARE, 0.99), (1, 1, SQUARE, 0.98), (0, 1, SQUARE, 0.5))
    matches = match_voc(annotated, found, 1)
    assert flags(matches) == ([False, False, True], [True, True, False])
    assert matches.num_positives == 1
    assert voc_aps(annotated, found) == (1.0, 1.0)


def test_where_all_boxes_are_difficult_nothing_is_measured():
    annotated = truth((0, 1, SQUARE), difficult=[0])
    assert match_voc(annotated, detected((0, 1, SQUARE, 0.9)), 1).num_positives == 0
    assert precision_recall(match_voc(annotated, detected((0, 1, SQUARE, 0.9)), 1))[0].size == 0


def test_the_second_detection_of_one_object_is_wrong():
    annotated = truth((0, 1, SQUARE))
    found = detected((0, 1, SQUARE, 0.8), (0, 1, SQUARE, 0.9))
    assert flags(match_voc(annotated, found, 1))[0] == [True, False]
    assert flags(match_coco(annotated, found, 1))[0] == [True, False]


def test_the_rules_differ_where_the_nearest_box_is_taken():
    """VOC looks only at the nearest annotated box, COCO at the nearest free one."""
    annotated = truth((0, 1, (0, 0, 100, 100)), (0, 1, (0, 0, 100, 90)))
    found = detected((0, 1, (0, 0, 100, 100), 0.9), (0, 1, (0, 0, 100, 99), 0.8))
    assert flags(match_voc(annotated, found, 1))[0] == [True, False]
    assert flags(match_coco(annotated, found, 1))[0] == [True, True]


def test_a_crowd_region_ignores_any_number_of_detections_inside_it():
    annotated = truth((0, 1, (0, 0, 100, 100)), (0, 1, (200, 0, 10, 10)), crowd=[0])
    found = detected((0, 1, (5, 5, 10, 10), 0.9), (0, 1, (50, 50, 10, 10), 0.8), (0, 1, (95, 0, 20, 20), 0.7))
    matches = match_coco(annotated, found, 1)
    assert flags(matches) == ([False, False, False], [True, True, False])
    assert matches.num_positives == 1


def test_only_the_best_hundred_detections_of_an_image_count_for_coco():
    annotated = truth((0, 1, SQUARE))
    found = detected(*[(0, 1, (500 + i, 0, 1, 1), 0.9) for i in range(100)], (0, 1, SQUARE, 0.1))
    assert not match_coco(annotated, found, 1).correct.any()
    assert match_coco(annotated, found, 1).scores.shape == (100,)


def test_recall_of_three_tenths_reaches_the_step_at_three_tenths():
    """3 of 10 found with precision 1: 4 of the 11 steps (0, .1, .2, .3), although 3 * 0.1 > 0.3 in floats."""
    annotated = truth(*[(i, 1, SQUARE) for i in range(10)])
    found = detected(*[(i, 1, SQUARE, 0.9 - i / 10) for i in range(3)])
    assert voc_aps(annotated, found) == pytest.approx((4 / 11, 0.3))


def test_no_detections_and_no_annotations_are_normal():
    nothing = truth(num_images=2, class_names={1: "dog"})
    assert match_voc(nothing, detected(), 1).correct.shape == (1, 0)
    assert match_coco(nothing, detected((0, 1, SQUARE, 0.5)), 1).correct.shape == (10, 1)
    assert voc_aps(truth((0, 1, SQUARE)), detected()) == (0.0, 0.0)
    assert coco_ap(np.zeros(0), np.zeros(0)) == 0.0

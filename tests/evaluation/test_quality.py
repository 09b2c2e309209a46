import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.average_precision import all_point_ap, coco_ap, precision_recall, voc07_ap
from pipeline.evaluation.boxsets import Detected, GroundTruth
from pipeline.evaluation.matching import match_coco, match_voc
from pipeline.evaluation.quality import (
    best_threshold,
    calibrate,
    confusion,
    in_use,
    interval,
    resample_images,
    resampled_ap,
    shown_from,
)
from tests.evaluation.cases import detected, random_case, truth

A, B, C = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 10.0, 10.0), (100.0, 0.0, 10.0, 10.0)


def drawn(annotated: GroundTruth, found: Detected, counts) -> tuple[GroundTruth, Detected]:
    """The data set with each image copied `counts` times, under new numbers."""
    boxes, dets, crowd, image = [], [], [], 0
    for i, count in enumerate(counts):
        for _ in range(count):
            for g in np.flatnonzero(annotated.image_index == i):
                crowd += [len(boxes)] * bool(annotated.crowd[g])
                boxes.append((image, int(annotated.labels[g]), tuple(annotated.boxes_xywh[g])))
            for d in np.flatnonzero(found.image_index == i):
                dets.append((image, int(found.labels[d]), tuple(found.boxes_xywh[d]), found.scores[d]))
            image += 1
    names = annotated.class_names
    return truth(*boxes, num_images=max(image, 1), crowd=crowd, class_names=names), detected(*dets)


@pytest.mark.parametrize("rule", [coco_ap, voc07_ap, all_point_ap])
def test_the_ap_of_a_resample_is_that_of_the_copied_images(rule):
    rng = np.random.default_rng(3)
    annotated, found = random_case(rng, num_images=15)
    found = Detected(  # no equal scores: their order may differ in a copy
        found.image_index, found.boxes_xywh, found.labels, rng.permutation(len(found)) / len(found)
    )
    matches = [match_coco(annotated, found, label) for label in (1, 2, 3)]
    draws = resample_images(rng, 15, 5)
    ours = resampled_ap(matches, draws, rule)
    for s, counts in enumerate(draws):
        copied = drawn(annotated, found, counts)
        expected = []
        for label in (1, 2, 3):
            one = match_coco(*copied, label)
            if one.num_positives:
                expected.append([_weighted(rule, one, t) for t in range(10)])
        assert ours[s] == pytest.approx(np.mean(expected, axis=0), abs=1e-9)


def _weighted(rule, matches, t):
    """Copies of one image share their scores: look only after the last of equal ones."""
    precision, recall = precision_recall(matches, t)
    scores = matches.scores[~matches.ignored[t]]
    last = np.append(scores[1:] != scores[:-1], True)[: len(precision)] if len(scores) else np.zeros(0, bool)
    return rule(precision[last], recall[last])


def test_images_are_drawn_with_replacement_as_many_as_there_are():
    draws = resample_images(np.random.default_rng(0), 50, 20)
    assert draws.shape == (20, 50)
    assert (draws.sum(axis=1) == 50).all()
    assert draws.max() > 1


def test_the_interval_holds_the_central_share_around_the_measured_value():
    assert interval(np.arange(1001.0), 500, level=0.9) == pytest.approx((50, 950))
    assert interval(np.arange(1001.0), 20, level=0.9) == pytest.approx((-430, 470))
    assert interval(np.array([np.nan, 2.0]), 2.0) == (2, 2)
    assert all(math.isnan(end) for end in interval(np.array([np.nan]), 1.0))


def test_the_interval_is_as_wide_as_ap_varies_between_data_sets():
    """95 % of sets of the same kind lie within it: its width is about 4 standard deviations of their AP."""
    rng = np.random.default_rng(0)
    aps, widths = [], []
    for _ in range(60):
        annotated, found = random_case(rng, num_images=60, num_classes=1)
        matches = [match_coco(annotated, found, 1, ious_T=np.array([0.5]))]
        aps.append(coco_ap(*precision_recall(matches[0])))
        low, high = interval(resampled_ap(matches, resample_images(rng, 60, 100), coco_ap)[:, 0], aps[-1])
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(aps), rel=0.3)


def test_without_annotations_a_resample_measures_nothing():
    assert np.isnan(resampled_ap([], np.ones((3, 2), np.uint8), coco_ap)).all()
    assert resample_images(np.random.default_rng(0), 0, 3).shape == (3, 0)


def test_precision_recall_and_f1_in_use_are_counted_over_all_classes():
    annotated = truth((0, 1, A), (0, 1, B), (0, 2, C))
    found = detected((0, 1, A, 0.9), (0, 1, C, 0.8), (0, 2, C, 0.6), (0, 1, B, 0.2))
    matches = [match_coco(annotated, found, label) for label in (1, 2)]
    use = in_use(matches, 0.5)
    assert (use.precision, use.recall, use.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert in_use(matches, 0.95).f1 == 0
    assert in_use([], 0.5).recall == 0


def test_ap_at_a_threshold_is_that_of_the_table_without_the_lower_scores():
    annotated, found = random_case(np.random.default_rng(5), num_images=20)
    for label in (1, 2, 3):
        cut = shown_from(match_coco(annotated, found, label), 0.5)
        direct = match_coco(annotated, found.select(found.scores >= 0.5), label)
        np.testing.assert_array_equal(cut.correct, direct.correct)
        assert cut.num_positives == direct.num_positives


def test_the_best_threshold_keeps_the_right_detections():
    annotated = truth((0, 1, A), (0, 1, B), (0, 1, C))
    found = detected((0, 1, A, 0.9), (0, 1, B, 0.7), (0, 1, (30, 30, 5, 5), 0.6), (0, 1, (70, 30, 5, 5), 0.6))
    best = best_threshold(match_coco(annotated, found, 1))
    assert best is not None
    assert (best.threshold, best.precision, best.recall, best.f1) == pytest.approx((0.7, 1, 2 / 3, 0.8))


def test_a_threshold_between_equal_scores_is_impossible():
    """One right and one wrong detection share the score 0.5: a threshold keeps both or none."""
    annotated = truth((0, 1, A))
    best = best_threshold(match_coco(annotated, detected((0, 1, A, 0.5), (0, 1, B, 0.5)), 1))
    assert best is not None
    assert (best.precision, best.recall) == (0.5, 1.0)


@given(st.integers(0, 10_000))
def test_no_other_threshold_has_a_higher_f1(seed):
    annotated, found = random_case(np.random.default_rng(seed), num_images=4, num_classes=1)
    matches = match_coco(annotated, found, 1)
    best = best_threshold(matches)
    others = [in_use([matches], threshold).f1 for threshold in {*matches.scores.tolist()}]
    assert max(others, default=0.0) == pytest.approx(best.f1 if best else 0.0)
    if best:
        assert in_use([matches], best.threshold).f1 == pytest.approx(best.f1)


def test_a_class_without_annotations_or_right_detections_has_no_threshold():
    assert best_threshold(match_coco(truth((0, 1, A)), detected(), 1)) is None
    assert best_threshold(match_coco(truth((0, 1, A)), detected((0, 1, B, 0.9)), 1)) is None
    assert best_threshold(match_coco(truth((0, 1, A)), detected((0, 2, A, 0.9)), 2)) is None


def test_calibration_compares_scores_with_the_share_that_is_right():
    annotated = truth((0, 1, A), (0, 1, B))
    found = detected((0, 1, A, 0.95), (0, 1, (30, 30, 5, 5), 0.91), (0, 1, B, 0.25), (0, 1, C, 1.0))
    measured = calibrate([match_coco(annotated, found, 1)])
    assert measured.num_detections.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 3]
    assert measured.precision[[2, 9]] == pytest.approx([1, 1 / 3])
    assert measured.mean_score[9] == pytest.approx((0.95 + 0.91 + 1.0) / 3)
    assert measured.error == pytest.approx((1 * 0.75 + 3 * ((0.95 + 0.91 + 1) / 3 - 1 / 3)) / 4)
    assert calibrate([]).error == 0


def test_the_confusion_table_counts_classes_background_and_misses():
    annotated = truth((0, 1, A), (0, 2, B), (1, 1, C), class_names={1: "dog", 2: "cat"})
    found = detected((0, 1, A, 0.9), (0, 1, B, 0.8), (1, 2, (30, 30, 9, 9), 0.7))
    assert confusion(annotated, found).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_the_right_class_is_paired_before_a_better_placed_wrong_one():
    annotated = truth((0, 1, A), class_names={1: "dog", 2: "cat"})
    found = detected((0, 2, A, 0.99), (0, 1, (1, 0, 10, 10), 0.5))
    assert confusion(annotated, found).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_crowd_and_difficult_boxes_are_left_out_of_the_confusion_table():
    annotated = truth((0, 1, (0, 0, 100, 100)), (1, 1, A), crowd=[0], difficult=[1], class_names={1: "dog"})
    found = detected((0, 1, (20, 20, 5, 5), 0.9), (1, 1, A, 0.9))
    assert confusion(annotated, found).tolist() == [[0, 0], [0, 0]]


def test_confusion_of_nothing_is_a_table_of_zeros():
    assert confusion(truth(num_images=2, class_names={1: "dog"}), detected()).tolist() == [[0, 0], [0, 0]]


def test_the_row_of_the_annotated_box_that_was_found_is_kept():
    annotated = truth((1, 2, A), (0, 1, A), (0, 1, B))
    found = detected((0, 1, B, 0.9), (0, 1, C, 0.8), (0, 1, A, 0.7))
    assert match_coco(annotated, found, 1).truth_row.tolist() == [2, -1, 1]
    assert match_voc(annotated, found, 1).truth_row.tolist() == [2, -1, 1]

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from pipeline import boxes
from pipeline.model import anchors
from pipeline.model.anchors import PriorMap, PriorSet, prior_boxes
from pipeline.model.nms import nms
from pipeline.model.postprocess import Detections, postprocess
from pipeline.model.spec import ModelSpec
from tests import oracles

PRIORS = PriorSet(
    "small", (PriorMap(4, 1 / 4, ((0.3, 0.3), (0.5, 0.25), (0.25, 0.5))), PriorMap(1, 1.0, ((0.9, 0.9),)))
)


def make_spec(num_classes=4, **changes):
    """A spec for `PRIORS`; classes have the ids 10, 20, ..."""
    names = tuple(f"class {number}" for number in range(1, num_classes))
    return ModelSpec(
        architecture="ssd300_vgg16",
        class_names=names,
        label_ids=tuple(10 * number for number in range(1, num_classes)),
        input_height=300,
        input_width=300,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        priors=PRIORS,
        **changes,
    )


def raw_predictions(*, seed, num_images=2, num_classes=4, priors=PRIORS, spread=2.0, background=1.0):
    """Random deltas and logits, and the priors."""
    generator = torch.Generator().manual_seed(seed)
    shape = num_images, priors.num_priors
    deltas = torch.randn(*shape, 4, generator=generator)
    logits = torch.randn(*shape, num_classes, generator=generator) * spread
    logits[..., 0] += background
    return deltas, logits, prior_boxes(priors)


def predictions_for(boxes_with_scores, *, num_classes=2, clip=True):
    """Predictions of one image whose decoded boxes and softmax scores are the given ones.

    `boxes_with_scores` holds (corner box, {column: score}); the priors are the boxes themselves.
    """
    corners = torch.tensor([box for box, _ in boxes_with_scores], dtype=torch.float32).reshape(-1, 4)
    logits = torch.full((1, len(corners), num_classes), -30.0)
    for row, (_, scores) in enumerate(boxes_with_scores):
        logits[0, row, 0] = math.log(max(1e-9, 1 - sum(scores.values())))
        for column, score in scores.items():
            logits[0, row, column] = math.log(score)
    return torch.zeros(1, len(corners), 4), logits, boxes.to_centres(corners)


def run(predictions, spec, *, sizes=None, **options):
    deltas, logits, priors = predictions
    sizes = torch.tensor([[100, 50]]).repeat(len(logits), 1) if sizes is None else sizes
    return postprocess(deltas, logits, priors, sizes_N2=sizes, spec=spec, **options)


def expected_detections(predictions, spec, *, image):
    """What the slow oracle finds in one image of 100 x 50 pixels: (score, label, box in pixels)."""
    deltas, logits, priors = (tensor.double() for tensor in predictions)
    corners = boxes.decode(deltas[image], priors)
    if spec.clip_before_nms:
        corners = corners.clamp(0, 1)
    if spec.score_function == "softmax":
        scores = torch.softmax(logits[image], dim=-1)[:, 1:]
    else:
        scores = torch.sigmoid(logits[image])[:, 1:]
    found = oracles.detect(
        corners.tolist(),
        scores.tolist(),
        threshold=spec.score_threshold,
        top_k=spec.pre_nms_top_k,
        iou_threshold=spec.nms_iou_threshold,
        keep=spec.max_detections,
    )
    size = np.array([100, 50, 100, 50])
    return [(score, spec.label_ids[label], np.clip(box, 0, 1) * size) for score, label, box in found]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_before_nms": True},
        {"score_function": "sigmoid", "score_threshold": 0.3},
        {"pre_nms_top_k": 3},
        {"pre_nms_top_k": None, "max_detections": 2},
        {"max_detections": 5, "nms_iou_threshold": 0.1},
        {"score_threshold": 0.0},
        {"nms_iou_threshold": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_detections_are_the_oracles(changes, seed):
    spec = make_spec(**changes)
    predictions = raw_predictions(seed=seed, num_images=3)
    found = run(predictions, spec)
    for image in range(3):
        expected = expected_detections(predictions, spec, image=image)
        here = found.image_index == image
        assert expected
        assert found.labels[here].tolist() == [label for _, label, _ in expected]
        np.testing.assert_allclose(found.scores[here], [score for score, _, _ in expected], rtol=1e-5)
        np.testing.assert_allclose(found.boxes[here], [box for _, _, box in expected], atol=1e-3)


def test_detections_are_sorted_by_image_then_by_score():
    found = run(raw_predictions(seed=0, num_images=4), make_spec())
    keys = list(zip(found.image_index.tolist(), (-found.scores).tolist(), strict=True))
    assert keys == sorted(keys)
    assert set(found.image_index.tolist()) == {0, 1, 2, 3}


def test_images_with_many_good_candidates_do_not_change_the_others():
    """The suppression starts with the best few of each image; images differ in how many they need."""
    spec = make_spec(pre_nms_top_k=None, max_detections=3, score_threshold=0.0)
    deltas, logits, priors = raw_predictions(
        seed=3, num_images=3, priors=PriorSet("cells", (PriorMap(9, 1 / 9, ((0.2, 0.2),)),))
    )
    deltas[1] = 0
    priors[:60] = torch.tensor([0.5, 0.5, 0.9, 0.9])  # of image 1, sixty equal boxes score best
    logits[1, :60] += torch.tensor([0.0, 20, 20, 20])
    predictions = deltas, logits, priors
    found = run(predictions, spec)
    for image in range(3):
        expected = expected_detections(predictions, spec, image=image)
        assert len(expected) == 3
        np.testing.assert_allclose(
            found.scores[found.image_index == image], [score for score, _, _ in expected], rtol=1e-5
        )


@pytest.mark.parametrize(("shift", "num_kept"), [(1e-4, 2), (-1e-4, 1)])
def test_boxes_stay_up_to_the_threshold(shift, num_kept):
    # Two boxes 1 wide that overlap by x: IoU = x / (2 - x) = 0.45 at x = 0.62069.
    x = 2 * 0.45 / 1.45 - shift
    found = run(
        predictions_for([((0, 0, 0.5, 1), {1: 0.9}), ((0.5 * (1 - x), 0, 0.5 * (2 - x), 1), {1: 0.8})]),
        make_spec(2, nms_iou_threshold=0.45),
    )
    assert len(found.scores) == num_kept


def test_a_box_that_was_suppressed_suppresses_nothing():
    # Each overlaps the next by 0.6, but the first and the third only by 0.33.
    chain = [((start, 0, start + 0.4, 1), {1: score}) for start, score in ((0, 0.9), (0.1, 0.8), (0.2, 0.7))]
    found = run(predictions_for(chain), make_spec(2))
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])


def test_boxes_of_other_classes_do_not_suppress():
    found = run(predictions_for([((0, 0, 1, 1), {1: 0.5, 2: 0.4})], num_classes=3), make_spec(3))
    assert found.labels.tolist() == [10, 20]
    assert found.scores.tolist() == pytest.approx([0.5, 0.4])


def test_only_the_best_of_each_class_enter_the_suppression():
    far_apart = [((x / 10, 0, x / 10 + 0.05, 1), {1: 0.5 + x / 100}) for x in range(8)]
    found = run(predictions_for(far_apart), make_spec(2, pre_nms_top_k=3))
    assert found.scores.tolist() == pytest.approx([0.57, 0.56, 0.55])


def test_unclipped_models_suppress_before_they_clip():
    # Outside the image the two differ, inside they are equal.
    pair = [((0.5, 0, 1.0, 1), {1: 0.9}), ((0.5, 0, 3.0, 1), {1: 0.8})]
    assert len(run(predictions_for(pair), make_spec(2)).scores) == 2
    assert len(run(predictions_for(pair), make_spec(2, clip_before_nms=True)).scores) == 1


def test_boxes_are_pixels_of_each_original_image():
    predictions = predictions_for([((0.1, 0.2, 0.5, 0.6), {1: 0.9})])
    doubled = tuple(tensor.repeat(2, 1, 1) for tensor in predictions[:2])
    found = run((*doubled, predictions[2]), make_spec(2), sizes=torch.tensor([[640, 480], [100, 300]]))
    torch.testing.assert_close(found.boxes, torch.tensor([[64.0, 96, 320, 288], [10, 60, 50, 180]]))


def test_boxes_without_area_are_kept_and_told_apart():
    found = run(
        predictions_for(
            [
                ((0.1, 0.1, 0.4, 0.4), {1: 0.9}),
                ((1.2, 0.3, 1.5, 0.6), {1: 0.8}),
                ((0.7, 0.7, 0.7, 0.9), {1: 0.7}),
            ]
        ),
        make_spec(2, clip_before_nms=True),
    )
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert found.has_area.tolist() == [True, False, False]
    assert found.numpy().has_area.tolist() == [True, False, False]


def test_nothing_above_the_threshold_gives_empty_arrays_of_the_right_types():
    found = run(raw_predictions(seed=0, background=100.0), make_spec())
    assert found.boxes.shape == (0, 4)
    assert (found.image_index.dtype, found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
        torch.int64,
    )


def test_an_empty_batch_gives_no_detections():
    assert len(run(raw_predictions(seed=0, num_images=0), make_spec()).scores) == 0


def test_the_callers_threshold_replaces_the_models():
    predictions = predictions_for([((0, 0, 0.3, 1), {1: 0.9}), ((0.5, 0, 0.9, 1), {1: 0.2})])
    assert len(run(predictions, make_spec(2)).scores) == 2
    assert len(run(predictions, make_spec(2), score_threshold=0.5).scores) == 1
    assert len(run(predictions, make_spec(2), score_threshold=1.0).scores) == 0


@pytest.mark.parametrize("num_classes", [2, 1001])
def test_one_class_and_a_thousand(num_classes):
    spec = make_spec(num_classes)
    predictions = raw_predictions(seed=1, num_classes=num_classes, spread=4.0, background=8.0)
    found = run(predictions, spec)
    for image in range(2):
        expected = expected_detections(predictions, spec, image=image)
        assert found.labels[found.image_index == image].tolist() == [label for _, label, _ in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_up_to_1e4_give_finite_detections(dtype):
    deltas, logits, priors = raw_predictions(seed=2)
    for clip_before_nms in (True, False):
        found = run(
            ((deltas * 1e4).to(dtype), (logits * 1e4).to(dtype), priors),
            make_spec(clip_before_nms=clip_before_nms),
        )
        assert len(found.scores)
        assert bool(found.boxes.isfinite().all())
        assert bool(found.scores.isfinite().all())
        assert bool((found.boxes >= 0).all())
        assert bool((found.boxes <= torch.tensor([100, 50, 100, 50])).all())


def test_scores_next_to_the_threshold_are_decided_exactly():
    threshold = 0.01
    scores = [threshold * (1 + step * 1e-5) for step in range(-3, 4)]
    found = run(
        predictions_for(
            [((index / 10, 0, index / 10 + 0.05, 1), {1: score}) for index, score in enumerate(scores)]
        ),
        make_spec(2, score_threshold=threshold),
    )
    assert len(found.scores) == sum(score > threshold for score in scores)


def count_operators(num_images, num_classes):
    predictions = raw_predictions(
        seed=5, num_images=num_images, num_classes=num_classes, priors=anchors.LITE_320
    )
    predictions[1][..., 0] += 6.0
    spec = make_spec(num_classes, pre_nms_top_k=20)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = run(predictions, spec)
    rounds = sum(event.count for event in profiler.key_averages() if event.key == "aten::index_fill_") // 2
    total = sum(event.count for event in profiler.key_averages())
    return total, rounds, len(found.scores)


@pytest.mark.filterwarnings("ignore")
def test_number_of_operators_does_not_grow_with_images_or_classes():
    """Apart from the rounds of the suppression, a few operators each, which depend on chains of boxes."""
    small_total, small_rounds, _ = count_operators(num_images=1, num_classes=5)
    large_total, large_rounds, num_found = count_operators(num_images=8, num_classes=90)
    assert num_found == 8 * 200
    assert large_total - small_total <= 30 * max(0, large_rounds - small_rounds) + 10


corner_boxes = st.tuples(*[st.floats(0, 1, width=32)] * 2, *[st.floats(0, 0.5, width=32)] * 2)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(corner_boxes, st.integers(0, 2)), max_size=25),
    st.sampled_from([0.3003, 0.4507, 0.6011]),
)
def test_nms_is_the_oracles_and_idempotent(items, iou_threshold):
    corners = torch.tensor([box for box, _ in items], dtype=torch.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    groups = torch.tensor([group for _, group in items], dtype=torch.int64)
    kept = nms(corners, groups, iou_threshold=iou_threshold)
    for group in range(3):
        index = (groups == group).nonzero()[:, 0].tolist()
        scores = [-place for place in range(len(index))]
        expected = oracles.nms(corners[index].tolist(), scores, iou_threshold=iou_threshold)
        assert kept[index].nonzero()[:, 0].tolist() == expected
    assert bool(nms(corners[kept], groups[kept], iou_threshold=iou_threshold).all())


def test_spec_without_limits_means_all_candidates():
    spec = replace(
        make_spec(), pre_nms_top_k=None, max_detections=10_000, score_threshold=0.0, nms_iou_threshold=1.0
    )
    found = run(raw_predictions(seed=0), spec)
    assert len(found.scores) == 2 * PRIORS.num_priors * 3


def test_detections_become_numpy():
    found = run(raw_predictions(seed=0), make_spec()).numpy()
    assert isinstance(found, Detections)
    assert all(isinstance(field, np.ndarray) for field in vars(found).values())

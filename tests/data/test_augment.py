import colorsys
import random
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2_contingency

from pipeline.data import augment
from pipeline.data.augment import SAMPLERS, Distortion, Sample, Window, sample_rng, whole_image
from tests import oracles


def make_sample(boxes=((10, 20, 60, 50), (70, 5, 110, 75)), *, width=120, height=80, seed=0) -> Sample:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as pixels that come out of an object store
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return whole_image(pixels, boxes, np.arange(1, len(boxes) + 1))


@st.composite
def samples(draw):
    """Images of up to 700x700 pixels with up to five boxes inside, some smaller than a pixel."""
    width, height = draw(st.integers(1, 700)), draw(st.integers(1, 700))
    boxes = [[*_span(draw, width), *_span(draw, height)] for _ in range(draw(st.integers(0, 5)))]
    return make_sample([(x1, y1, x2, y2) for x1, x2, y1, y2 in boxes], width=width, height=height)


def _span(draw, size):
    """Two different multiples of an eighth between 0 and `size`, in order."""
    start = draw(st.integers(0, 8 * size - 1))
    return start / 8, draw(st.integers(start + 1, 8 * size)) / 8


def test_the_generator_of_an_image_depends_on_seed_epoch_and_image_only():
    draws = {
        (seed, epoch, image_id): sample_rng(seed, epoch=epoch, image_id=image_id).random()
        for seed in (0, 1)
        for epoch in (0, 1)
        for image_id in ("a/1.jpg", "a/2.jpg")
    }

    assert len(set(draws.values())) == 8
    assert draws[1, 0, "a/2.jpg"] == sample_rng(1, epoch=0, image_id="a/2.jpg").random()


def test_augment_gives_the_same_image_for_the_same_generator():
    first, second = (augment.augment(make_sample(), sample_rng(0, epoch=5, image_id="x"), height=30, width=40)
                     for _ in range(2))  # fmt: skip

    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.boxes, second.boxes)


@pytest.mark.parametrize("change", [augment.augment, partial(augment.augment_lightly, crops=True)])
@settings(deadline=None, max_examples=60)
@given(samples(), st.integers(0, 2**32))
def test_augmentation_keeps_boxes_inside_with_positive_area(change, sample, seed):
    result = change(sample, np.random.default_rng(seed), height=30, width=40)

    assert (result.pixels.shape, result.pixels.dtype) == ((30, 40, 3), np.uint8)
    assert (result.boxes.dtype, result.labels.dtype) == (np.float32, np.int64)
    assert len(result.boxes) == len(result.labels)
    assert (result.boxes >= 0).all()
    assert (result.boxes <= [40, 30, 40, 30]).all()
    assert (result.boxes[:, 2:] > result.boxes[:, :2]).all()


@settings(deadline=None, max_examples=150)
@given(samples(), st.integers(0, 2**32))
def test_a_crop_satisfies_its_sampler_and_keeps_exactly_the_centred_objects(sample, seed):
    rng = np.random.default_rng(seed)
    expanded = augment.expand(sample, rng)
    state = rng.bit_generator.state
    sampler, patch = augment.sample_window(expanded.boxes, expanded.window, rng)
    rng.bit_generator.state = state
    cropped = augment.crop(expanded, rng)

    assert cropped.window == patch
    outer = expanded.window
    assert outer.left <= patch.left < patch.right <= outer.right
    assert outer.top <= patch.top < patch.bottom <= outer.bottom
    min_iou = SAMPLERS[sampler]
    if min_iou is None:
        assert patch == outer
    else:
        assert max(oracles.iou(patch, box) for box in expanded.boxes.tolist()) >= min_iou - 1e-9
    kept = [
        label
        for label, box in zip(sample.labels, sample.boxes, strict=True)
        if patch.left <= (box[0] + box[2]) / 2 <= patch.right
        and patch.top <= (box[1] + box[3]) / 2 <= patch.bottom
    ]
    assert cropped.labels.tolist() == kept
    assert (cropped.boxes >= patch[:2] * 2).all()
    assert (cropped.boxes <= patch[2:] * 2).all()


@pytest.mark.parametrize(
    "boxes",
    [
        [(0.1, 0.2, 0.5, 0.65), (0.5, 0.5, 0.62, 0.9)],  # often too small for the strict samplers
        [(0.05, 0.1, 0.9, 0.95)],
    ],
)
def test_four_thousand_crops_are_distributed_as_those_of_the_slow_sampler(boxes):
    rng, slow_rng, num_draws, size = np.random.default_rng(1), random.Random(1), 4_000, 1000
    pixel_boxes, window = np.array(boxes, np.float32) * size, Window(0, 0, size, size)

    ours = [augment.sample_window(pixel_boxes, window, rng) for _ in range(num_draws)]
    slow = [oracles.sample_patch(boxes, slow_rng) for _ in range(num_draws)]

    counts = [np.bincount([sampler for sampler, _ in draws], minlength=7) for draws in (ours, slow)]
    assert same_distribution(counts), counts  # column 0 is the whole image
    for quantity in (lambda box: box[2] - box[0], lambda box: box[3] - box[1], lambda box: box[0]):
        values = [quantity(box) / size for _, box in ours], [quantity(box) for _, box in slow]
        assert same_distribution([np.histogram(some, bins=12, range=(0, 1.0001))[0] for some in values])


@pytest.mark.parametrize("crops", [False, True])
def test_light_augmentation_shows_at_least_a_quarter_of_an_image_and_all_of_it_without_crops(crops):
    # The red of a pixel is its column, its green its row; colours are left alone here.
    column, row = np.meshgrid(np.arange(200), np.arange(200))
    pixels = np.stack([column, row, np.zeros_like(row)], axis=2).astype(np.uint8)
    boxes, labels = np.array([[75, 75, 125, 125]], np.float32), np.ones(1, np.int64)
    rng, areas = np.random.default_rng(0), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "distort", lambda sample, rng: sample)
        patch.setattr(augment, "INTERPOLATIONS", ("nearest",))
        for _ in range(600):
            sample = whole_image(pixels, boxes, labels)
            seen = augment.augment_lightly(sample, rng, height=200, width=200, crops=crops)
            width = np.ptp(seen.pixels[0, [0, -1], 0].astype(int)) + 1
            height = np.ptp(seen.pixels[[0, -1], 0, 1].astype(int)) + 1
            areas.append(width * height / 200**2)
    if not crops:
        assert set(areas) == {1}
        return
    assert 0.25 - 0.01 < min(areas) < 0.3
    # The object is at most a quarter of such a patch: of the samplers with an IoU only 0.1 finds one, then
    # there are "any patch" and the whole image.
    assert binomtest(sum(area < 1 for area in areas), 600, 2 / 3).pvalue > 0.01


def test_fifty_thousand_candidate_patches_are_distributed_as_the_slow_ones():
    size, slow_rng = 3000, random.Random(2)
    window = Window(0, 0, size, size)
    ours = augment._random_patches(window, 50_000, np.random.default_rng(2)) / size
    slow = np.array([oracles.random_patch(slow_rng) for _ in range(50_000)])

    for quantity in (
        lambda patches: patches[:, 2] - patches[:, 0],
        lambda patches: patches[:, 3] - patches[:, 1],
        lambda patches: (patches[:, 2] - patches[:, 0]) / (patches[:, 3] - patches[:, 1]),
        lambda patches: patches[:, 0],
        lambda patches: patches[:, 3],
    ):
        bins = np.linspace(0, 2.0001 if quantity(slow).max() > 1.5 else 1.0001, 21)
        assert same_distribution([np.histogram(quantity(patches), bins)[0] for patches in (ours, slow)])


def same_distribution(counts) -> bool:
    """Whether two rows of counts can come from one multinomial, at a risk of 1 in 1000 (fixed seeds)."""
    seen = np.array(counts)[:, np.sum(counts, axis=0) > 20]
    return float(np.asarray(chi2_contingency(seen)[1])) > 1e-3


def test_an_image_without_objects_is_never_cropped():
    rng = np.random.default_rng(0)
    window = Window(-10, -20, 200, 100)

    for _ in range(20):
        assert augment.sample_window(np.zeros((0, 4), np.float32), window, rng) == (0, window)


def test_expand_happens_half_the_time_and_keeps_the_image_on_its_canvas():
    rng, sample = np.random.default_rng(0), make_sample()
    windows = [augment.expand(sample, rng).window for _ in range(2000)]
    expanded = [window for window in windows if window != sample.window]

    assert binomtest(len(expanded), 2000, 0.5).pvalue > 1e-3
    for window in expanded:
        assert window.left <= 0 <= window.top + window.height - 80
        assert window.top <= 0 <= window.left + window.width - 120
        assert 120 <= window.width <= 480
        assert window.height == pytest.approx(window.width * 80 / 120, abs=1)


def test_each_colour_change_happens_half_the_time_in_one_of_two_orders():
    rng, sample = np.random.default_rng(0), make_sample()
    chosen = [tuple(d.kind for d in augment.distort(sample, rng).distortions) for _ in range(4000)]

    for kind in ("brightness", "contrast", "saturation", "hue"):
        assert binomtest(sum(kind in kinds for kinds in chosen), 4000, 0.5).pvalue > 1e-3
    all_four = Counter(kinds for kinds in chosen if len(kinds) == 4)
    assert set(all_four) == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }


def test_flip_and_interpolations_are_uniform(monkeypatch):
    rng, sample = np.random.default_rng(0), make_sample()
    used = Counter()
    monkeypatch.setattr(
        augment, "_resize_pixels", lambda pixels, h, w, interpolation: used.update([interpolation]) or pixels
    )
    flipped = 0
    for _ in range(2000):
        augment.resize(sample, rng, height=80, width=120)
        flipped += augment.flip(sample, rng) is not sample

    assert binomtest(flipped, 2000, 0.5).pvalue > 1e-3
    for interpolation in augment.INTERPOLATIONS:
        assert binomtest(used[interpolation], 2000, 0.2).pvalue > 1e-3


@pytest.mark.parametrize("degrees", [-36.0, -10.0, 5.0, 36.0])
def test_hue_turns_as_in_hsv(degrees):
    pixels = make_sample(width=40, height=40).pixels
    ours = augment._distort_pixels(pixels, Distortion("hue", degrees))

    np.testing.assert_allclose(
        ours, through_hsv(pixels, lambda h, s, v: ((h + degrees / 360) % 1, s, v)), atol=1
    )


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.5])
def test_saturation_scales_as_in_hsv(factor):
    pixels = make_sample(width=40, height=40).pixels
    ours = augment._distort_pixels(pixels, Distortion("saturation", factor))

    np.testing.assert_allclose(ours, through_hsv(pixels, lambda h, s, v: (h, min(1, s * factor), v)), atol=1)


def through_hsv(pixels, change):
    """Each pixel to HSV, changed, and back to uint8 RGB, by the standard library."""
    colours = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(pixel / 255))))
               for pixel in pixels.reshape(-1, 3)]  # fmt: skip
    return np.round(np.array(colours) * 255).reshape(pixels.shape)


def test_brightness_adds_and_contrast_multiplies_with_saturation():
    pixels = np.array([[[0, 100, 250]]], dtype=np.uint8)

    assert augment._distort_pixels(pixels, Distortion("brightness", 20.4)).tolist() == [[[20, 120, 255]]]
    assert augment._distort_pixels(pixels, Distortion("brightness", -20.4)).tolist() == [[[0, 80, 230]]]
    assert augment._distort_pixels(pixels, Distortion("contrast", 1.5)).tolist() == [[[0, 150, 255]]]


def test_grey_stays_grey_whatever_the_hue_and_saturation():
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    for change in (Distortion("hue", 30.0), Distortion("saturation", 1.5)):
        np.testing.assert_array_equal(augment._distort_pixels(greys, change), greys)


def test_deciding_first_gives_the_pixels_of_doing_each_step_on_the_whole_image():
    sample, fill = make_sample(), (1, 2, 3)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        decided = augment.crop(augment.expand(augment.distort(sample, rng), rng), rng)
        seen = augment._visible_pixels(decided, fill)

        pixels = sample.pixels
        for distortion in decided.distortions:
            pixels = augment._distort_pixels(pixels, distortion)
        canvas = np.full((80 + 2 * 400, 120 + 2 * 400, 3), fill, dtype=np.uint8)
        canvas[400:480, 400:520] = pixels
        left, top, right, bottom = (side + 400 for side in decided.window)
        np.testing.assert_array_equal(seen, canvas[top:bottom, left:right])


@pytest.mark.parametrize(
    "window", [(-90, 0, -10, 50), (130, 0, 180, 50), (0, -70, 90, -20), (-9, 85, 99, 99)]
)
def test_a_patch_beside_the_image_is_all_fill(window):
    sample = replace(
        make_sample([]),
        window=Window(*window),
        distortions=(Distortion("hue", 30.0), Distortion("contrast", 1.2), Distortion("saturation", 0.6)),
    )
    result = augment.resize(sample, np.random.default_rng(0), height=20, width=30, fill=(1, 2, 3))

    assert np.unique(result.pixels.reshape(-1, 3), axis=0).tolist() == [[1, 2, 3]]


def test_boxes_still_frame_their_object_after_all_steps():
    """A white rectangle on black: the box of what is white in the result is the returned box."""
    pixels = np.zeros((200, 300, 3), dtype=np.uint8)
    pixels[40:120, 90:210] = 255
    sample = whole_image(pixels, np.array([[90, 40, 210, 120]], dtype=np.float32), np.array([1]))
    num_seen = 0
    for seed in range(60):
        result = augment.augment(sample, np.random.default_rng(seed), height=256, width=192, fill=(0, 0, 0))
        if not len(result.boxes):
            continue
        num_seen += 1
        white = result.pixels.min(axis=2) > 60
        rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
        framed = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(result.boxes[0], framed, atol=3)  # interpolation blurs the edges
    assert num_seen > 40


@pytest.mark.parametrize(
    ("flips", "expected"), [("none", {(0, 0)}), ("horizontal", {(0, 0), (1, 0)}), ("both", None)]
)
def test_images_are_mirrored_in_the_ways_asked_for_and_in_each_half_of_the_time(flips, expected):
    sample, rng = make_sample([(10, 20, 60, 50)], width=120, height=80), np.random.default_rng(0)
    seen = Counter()
    for _ in range(1000):
        flipped = augment.flip(sample, rng, flips=flips)
        left, top, right, bottom = flipped.boxes[0]
        seen[int(left == 60), int(top == 30)] += 1
        assert (right - left, bottom - top) == (50, 30)
        shown = flipped.pixels[int(top) : int(bottom), int(left) : int(right)]
        turned = shown[:: -1 if top == 30 else 1, :: -1 if left == 60 else 1]
        np.testing.assert_array_equal(turned, sample.pixels[20:50, 10:60])

    assert set(seen) == (expected or {(0, 0), (0, 1), (1, 0), (1, 1)})
    for count in seen.values():
        assert binomtest(count, 1000, 1 / len(seen)).pvalue > 1e-3


def test_flipping_twice_is_the_same_image():
    sample = make_sample()
    rng = np.random.default_rng(0)
    flipped = sample
    while flipped is sample:
        flipped = augment.flip(sample, rng)
    twice = flipped
    while twice is flipped:
        twice = augment.flip(flipped, rng)

    np.testing.assert_array_equal(twice.pixels, sample.pixels)
    np.testing.assert_array_equal(twice.boxes, sample.boxes)
    assert flipped.boxes[0].tolist() == [60, 20, 110, 50]


def test_objects_that_lose_their_area_in_float32_are_dropped():
    sample = make_sample([(1, 1, np.nextafter(np.float32(1), np.float32(2)), 50)])
    expanded = replace(sample, window=Window(-300, 0, 400, 80))
    result = augment.resize(expanded, np.random.default_rng(0), height=300, width=300)

    assert result.boxes.shape == (0, 4)
    assert result.labels.shape == (0,)


def test_recolouring_makes_the_changes_that_resizing_would():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    kinds = ("brightness", "saturation", "hue", "contrast")
    changes = tuple(Distortion(kind, amount) for kind, amount in zip(kinds, (20, 1.3, -25, 0.7), strict=True))
    plain = whole_image(pixels, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    chosen = replace(plain, distortions=changes)
    now = augment.recolour(chosen)
    assert not now.distortions
    assert not np.array_equal(now.pixels, pixels)
    # At its own size, whatever the interpolation, nothing but colours changes.
    for _ in range(30):
        shown = augment.resize(chosen, rng, height=40, width=60)
        np.testing.assert_array_equal(now.pixels, shown.pixels)

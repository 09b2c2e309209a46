import math
from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from pipeline import boxes
from pipeline.model import anchors
from pipeline.model.anchors import PriorMap, PriorSet, fit_priors, prior_boxes

GRIDS_300, STEPS_300 = (38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300)
GRIDS_512, STEPS_512 = (64, 32, 16, 8, 4, 2, 1), (8, 16, 32, 64, 128, 256, 512)
RATIOS_300 = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
RATIOS_512 = ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,))

# min_sizes and max_sizes as the authors' scripts and the paper's footnotes give them.
CAFFE = {
    "voc300": (anchors.VOC_300, (30, 60, 111, 162, 213, 264), (60, 111, 162, 213, 264, 315)),
    "coco300": (anchors.COCO_300, (21, 45, 99, 153, 207, 261), (45, 99, 153, 207, 261, 315)),
    "voc512": (
        anchors.VOC_512,
        (35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8),
        (76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.6),
    ),
    "coco512": (
        anchors.COCO_512,
        (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8),
        (51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72),
    ),
}


def caffe_prior_box_layer(image_size, min_sizes, max_sizes, grids, steps, ratios):
    """`Forward` of prior_box_layer.cpp, loop by loop, with its `int min_size_`; centre form, fractions."""
    priors = []
    for min_size, max_size, grid, step, map_ratios in zip(
        min_sizes, max_sizes, grids, steps, ratios, strict=True
    ):
        min_size, max_size = int(min_size), int(max_size)
        for h in range(grid):
            for w in range(grid):
                centre = ((w + 0.5) * step, (h + 0.5) * step)
                sizes = [(min_size, min_size), (math.sqrt(min_size * max_size),) * 2]
                for ratio in map_ratios:
                    for ar in (ratio, 1 / ratio):
                        sizes.append((min_size * math.sqrt(ar), min_size / math.sqrt(ar)))
                priors += [[value / image_size for value in (*centre, *size)] for size in sizes]
    return torch.tensor(priors)


@pytest.mark.parametrize("name", CAFFE)
def test_caffe_tables_are_those_of_the_authors_code_order_included(name):
    priors, min_sizes, max_sizes = CAFFE[name]
    if name.endswith("300"):
        expected = caffe_prior_box_layer(300, min_sizes, max_sizes, GRIDS_300, STEPS_300, RATIOS_300)
    else:
        expected = caffe_prior_box_layer(512, min_sizes, max_sizes, GRIDS_512, STEPS_512, RATIOS_512)
    found = prior_boxes(priors)
    assert found.dtype == torch.float32
    assert len(found) == priors.num_priors == {"300": 8732, "512": 24564}[name[-3:]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_sizes_of_512_are_whole_pixels():
    widths = prior_boxes(anchors.COCO_512)[:, 2] * 512
    first_of_map = [0, 16384, 22528, 24064, 24448, 24544, 24560]
    torch.testing.assert_close(widths[first_of_map], torch.tensor([20.0, 51, 133, 215, 296, 378, 460]))
    torch.testing.assert_close(widths[1], torch.tensor(math.sqrt(20 * 51)))


def test_first_cells_of_voc300_by_hand():
    first = prior_boxes(anchors.VOC_300)[:5] * 300
    long, short = 30 * math.sqrt(2), 30 / math.sqrt(2)
    expected = [
        [4, 4, 30, 30],
        [4, 4, math.sqrt(1800), math.sqrt(1800)],
        [4, 4, long, short],
        [4, 4, short, long],
        [12, 4, 30, 30],  # the next column, not the next row
    ]
    torch.testing.assert_close(first, torch.tensor(expected))


def test_300_sets_reach_out_of_the_image_as_published():
    voc, coco = prior_boxes(anchors.VOC_300), prior_boxes(anchors.COCO_300)
    corners = boxes.to_corners(voc)
    crossing = ((corners < 0) | (corners > 1)).any(dim=1)
    assert int((voc[:, 2:] > 1).any(dim=1).sum()) == 20
    assert voc[:, 2:].max().item() == pytest.approx(1.2445, abs=1e-4)
    assert int((voc[:, :2] > 1).any(dim=1).sum()) == 114  # conv6_2's last row and column: 9.5 * 32 = 304
    assert int(crossing.sum()) == 2869
    assert int((coco[:, 2:] > 1).any(dim=1).sum()) == 2


def test_nvidia_set_is_coco300_with_116_boxes_clamped():
    unclipped, clamped = prior_boxes(anchors.COCO_300), prior_boxes(anchors.NVIDIA_300)
    assert torch.equal(clamped, unclipped.clamp(0, 1))
    assert int((clamped != unclipped).any(dim=1).sum()) == 116


def torchvision_priors(generator, image_size, grids):
    """Its default boxes in centre form, fractions of the image."""
    features = [torch.zeros(1, 1, grid, grid) for grid in grids]
    image = ImageList(torch.zeros(1, 3, image_size, image_size), [(image_size, image_size)])
    return boxes.to_centres(generator(image, features)[0] / image_size)


def test_torchvisions_ssd300_priors_are_coco300_with_clipped_sizes():
    generator = DefaultBoxGenerator(
        [list(ratios) for ratios in RATIOS_300],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=list(STEPS_300),
    )
    theirs = torchvision_priors(generator, 300, GRIDS_300)
    ours = prior_boxes(replace(anchors.COCO_300, clip="wh"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert int(((prior_boxes(anchors.COCO_300) - theirs).abs() > 1e-4).any(dim=1).sum()) == 2


def test_lite320_priors_are_torchvisions():
    generator = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
    theirs = torchvision_priors(generator, 320, (20, 10, 5, 3, 2, 1))
    ours = prior_boxes(anchors.LITE_320)
    assert len(ours) == 3234
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_lite300_priors_by_hand():
    corners = boxes.to_corners(prior_boxes(anchors.LITE_300))
    assert len(corners) == 1917
    # First and last box as TensorFlow publishes them, (y1, x1, y2, x2).
    first, last = (
        [-0.02368421, -0.02368421, 0.07631579, 0.07631579],
        [0.01266029, 0.01266029, 0.98733974, 0.98733974],
    )
    torch.testing.assert_close(corners[0], torch.tensor(first), rtol=0, atol=1e-6)
    torch.testing.assert_close(corners[-1], torch.tensor(last), rtol=0, atol=1e-6)
    # Map 1, first cell: ratios 1, 2, 1/2, 3, 0.3333 of scale 0.35, then sqrt(0.35 * 0.5).
    sizes = prior_boxes(anchors.LITE_300)[1083:1089, 2:]
    ratios = (1, 2, 0.5, 3, 0.3333)
    expected = [[0.35 * math.sqrt(ratio), 0.35 / math.sqrt(ratio)] for ratio in ratios] + [
        [math.sqrt(0.175)] * 2
    ]
    torch.testing.assert_close(sizes, torch.tensor(expected))


def test_lite300_priors_are_tensorflows(shared_data):
    from safetensors.torch import load_file

    path = shared_data("models/coco_ssdlite_mobilenet_v2/ssdlite_mobilenet_v2_coco.safetensors")
    theirs = load_file(path)["Postprocessor/ExpandDims"][0][:, [1, 0, 3, 2]]
    ours = boxes.to_corners(prior_boxes(anchors.LITE_300))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)


def test_scales_of_the_papers_worked_example():
    assert anchors.linear_scales(6) == pytest.approx((0.2, 0.34, 0.48, 0.62, 0.76, 0.9))


def test_formula_gives_six_boxes_with_the_square_between_two_scales():
    priors = anchors.formula_priors("custom", grids=(38, 19, 10, 5, 3, 1))
    assert priors.num_priors == 6 * (38**2 + 19**2 + 10**2 + 5**2 + 3**2 + 1)
    cell = prior_boxes(priors)[:6]
    expected = [
        [0.2, 0.2],
        [math.sqrt(0.2 * 0.34)] * 2,
        [0.2 * math.sqrt(2), 0.2 / math.sqrt(2)],
        [0.2 / math.sqrt(2), 0.2 * math.sqrt(2)],
        [0.2 * math.sqrt(3), 0.2 / math.sqrt(3)],
        [0.2 / math.sqrt(3), 0.2 * math.sqrt(3)],
    ]
    torch.testing.assert_close(cell[:, 2:], torch.tensor(expected))
    torch.testing.assert_close(cell[:, :2], torch.full((6, 2), 0.5 / 38))


def test_a_5x5_map_with_3_boxes_has_75():
    priors = anchors.formula_priors("worked example", grids=(5,), ratios=((2,),), extra_square=False)
    assert prior_boxes(priors).shape == (75, 4)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ("none", [0.9, 0.9, 1.2, 0.4]),
        ("wh", [0.9, 0.9, 1.0, 0.4]),
        ("corners", [0.65, 0.85, 0.7, 0.3]),  # (0.3, 0.7) to (1.5, 1.1), cut at 1
        ("cxcywh", [0.9, 0.9, 1.0, 0.4]),
    ],
)
def test_clip_modes(clip, expected):
    grid = anchors.PriorMap(grid=1, step=1.8, sizes_wh=((1.2, 0.4),))
    found = prior_boxes(anchors.PriorSet("one box", (grid,), clip))
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_clip_of_centres():
    grid = anchors.PriorMap(grid=1, step=2.2, sizes_wh=((0.5, 0.4),))
    clipped = {clip: prior_boxes(anchors.PriorSet("one box", (grid,), clip))[0] for clip in ("wh", "cxcywh")}
    torch.testing.assert_close(clipped["wh"], torch.tensor([1.1, 1.1, 0.5, 0.4]))
    torch.testing.assert_close(clipped["cxcywh"], torch.tensor([1.0, 1.0, 0.5, 0.4]))


def test_fitted_default_boxes_are_the_mean_sizes_of_their_objects_with_all_classes_alike():
    priors = PriorSet(
        "two maps", (PriorMap(4, 0.25, ((0.1, 0.1), (0.2, 0.1))), PriorMap(2, 0.5, ((0.5, 0.5),)))
    )
    small = [(0.08, 0.08)] * 30 + [(0.12, 0.1)] * 10  # classes 1 and 2
    wide = [(0.3, 0.1)] * 9  # too few
    large = [(0.6, 0.4), (0.6, 0.6)] * 5
    sizes = torch.tensor(small + wide + large)
    labels = torch.tensor([1] * 30 + [2] * 10 + [3] * 9 + [3] * 10)

    fitted = fit_priors(priors, sizes, labels)

    # A class counts as much as another one where all of it is: 1/30 for each of 30, 1/10 for each of 10.
    assert fitted.maps[0].sizes_wh[0] == pytest.approx((0.10, 0.09))
    assert fitted.maps[0].sizes_wh[1] == (0.2, 0.1)
    assert fitted.maps[1].sizes_wh[0] == pytest.approx((0.6, 0.5))
    assert [(one.grid, one.step) for one in fitted.maps] == [(4, 0.25), (2, 0.5)]
    assert (fitted.name, fitted.num_priors) == ("fitted", priors.num_priors)


def test_objects_that_no_default_box_fits_get_one_that_does():
    # Platelets of BCCD, on 300x300.
    sizes = torch.normal(
        torch.tensor([20.0, 25.0]).expand(100, 2), 1.0, generator=torch.Generator().manual_seed(0)
    )
    sizes, labels = sizes / 300, torch.ones(100, dtype=torch.int64)

    def best_ious(priors):
        shapes = torch.tensor([size for one in priors.maps for size in one.sizes_wh])
        both = [
            boxes.to_corners(torch.cat([torch.zeros_like(some), some], dim=1)) for some in (sizes, shapes)
        ]
        return boxes.iou(*both).max(dim=1).values

    assert best_ious(anchors.LITE_300).max() < 0.7
    assert best_ious(fit_priors(anchors.LITE_300, sizes, labels)).min() > 0.75

import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from pipeline import boxes
from pipeline.model.anchors import COCO_300, prior_boxes
from pipeline.model.loss import background_losses, focal_loss, mine_negatives, multibox_loss
from pipeline.model.matching import Targets, match
from tests import oracles
from tests.model.test_matching import make_targets

PRIORS_A4 = torch.tensor(
    [[0.2, 0.2, 0.3, 0.3], [0.5, 0.5, 0.4, 0.2], [0.8, 0.8, 0.3, 0.3], [0.5, 0.5, 1, 1], [0.9, 0.1, 0.1, 0.1]]
    + [[0.1 * i, 0.7, 0.1, 0.1] for i in range(10)]
)


def make_outputs(num_images, *, num_priors=15, num_classes=21, seed=0, dtype=torch.float32, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(num_images, num_priors, 4, generator=generator) * scale
    logits = torch.randn(num_images, num_priors, num_classes, generator=generator) * scale
    return deltas.to(dtype).requires_grad_(), logits.to(dtype).requires_grad_()


def numbers(losses):
    """The box loss and the class loss as floats."""
    return float(losses.boxes.detach()), float(losses.classes.detach())


def slow_loss(deltas_NA4, logits_NAC, targets, matched_NA, priors_cxcywh, *, background_index=0):
    """Both parts of the paper's equation 1 with the oracles' loops."""
    priors, box_loss, class_loss = boxes.to_corners(priors_cxcywh).tolist(), 0.0, 0.0
    num_positives = int((matched_NA >= 0).sum())
    for deltas, logits, objects, labels, matched in zip(
        deltas_NA4.tolist(),
        logits_NAC.detach(),
        targets.boxes,
        targets.labels,
        matched_NA.tolist(),
        strict=True,
    ):
        log_probabilities = logits.double().log_softmax(1)
        negatives = oracles.mine((-log_probabilities[:, background_index]).tolist(), matched)
        for prior, index in enumerate(matched):
            if index >= 0:
                label = int(labels[index])
                column = label if label > background_index else label - 1
                class_loss -= float(log_probabilities[prior, column])
                wanted = oracles.encode(objects[index].tolist(), priors[prior])
                box_loss += sum(oracles.smooth_l1(a - b) for a, b in zip(deltas[prior], wanted, strict=True))
            elif prior in negatives:
                class_loss -= float(log_probabilities[prior, background_index])
    return box_loss / num_positives, class_loss / num_positives


def make_batch():
    """Objects of several classes, an image with many and one with none."""
    targets = make_targets(
        [[20, 20, 110, 110], [100, 120, 200, 180]], [], [[i * 25, 190, i * 25 + 30, 230] for i in range(9)]
    )
    labels = torch.where(targets.labels > 0, torch.arange(targets.labels.shape[1]) * 2 + 1, 0)
    return Targets(targets.boxes, labels)


@pytest.mark.parametrize("background_index", [0, 20, 7])
def test_the_loss_is_the_one_written_out_in_loops(background_index):
    targets, (deltas, logits) = make_batch(), make_outputs(3)
    matched_NA = match(targets, PRIORS_A4)
    losses = multibox_loss(deltas, logits, targets, matched_NA, PRIORS_A4, background_index=background_index)
    expected = slow_loss(deltas, logits, targets, matched_NA, PRIORS_A4, background_index=background_index)

    assert numbers(losses) == pytest.approx(expected, rel=1e-5)
    assert losses.total == losses.boxes + losses.classes


def test_loss_and_gradients_equal_torchvision_given_its_matches():
    targets = make_batch()
    deltas, logits = make_outputs(3, num_priors=8732)
    priors_A4 = prior_boxes(COCO_300)
    theirs = torchvision_ssd(num_classes=21)
    corners_A4 = boxes.to_corners(priors_A4)
    per_image = [
        {"boxes": objects[labels > 0], "labels": labels[labels > 0]}
        for objects, labels in zip(targets.boxes, targets.labels, strict=True)
    ]
    matches = [theirs.proposal_matcher(boxes.iou(image["boxes"], corners_A4)) if len(image["labels"])
               else torch.full((8732,), -1) for image in per_image]  # fmt: skip
    expected = theirs.compute_loss(
        per_image, {"bbox_regression": deltas, "cls_logits": logits}, [corners_A4] * 3, matches
    )
    expected_gradients = torch.autograd.grad(
        expected["bbox_regression"] + expected["classification"], [deltas, logits]
    )

    losses = multibox_loss(deltas, logits, targets, torch.stack(matches), priors_A4)
    gradients = torch.autograd.grad(losses.total, [deltas, logits])

    torch.testing.assert_close(losses.boxes, expected["bbox_regression"])
    torch.testing.assert_close(losses.classes, expected["classification"])
    for ours, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, other)


def torchvision_ssd(*, num_classes):
    """Its loss needs no backbone worth the name."""

    class Backbone(torch.nn.Identity):
        out_channels = (1,)

    return SSD(Backbone(), DefaultBoxGenerator([[2]]), (300, 300), num_classes)


def test_negatives_are_those_of_the_slow_oracle():
    generator = torch.Generator().manual_seed(3)
    losses_NA = torch.rand(6, 50, generator=generator)
    matched_NA = torch.full((6, 50), -1)
    for index, num_positives in enumerate([0, 1, 4, 12, 20, 50]):  # from 13 on there aren't three for each
        matched_NA[index, torch.randperm(50, generator=generator)[:num_positives]] = 0

    negative_NA = mine_negatives(losses_NA, matched_NA >= 0)

    for losses, matched, negative in zip(losses_NA.tolist(), matched_NA.tolist(), negative_NA, strict=True):
        assert set(negative.nonzero().flatten().tolist()) == oracles.mine(losses, matched)


def test_background_losses_are_the_cross_entropy_and_have_no_gradient():
    _, logits = make_outputs(2)
    losses_NA = background_losses(logits, background_index=20)

    assert not losses_NA.requires_grad
    torch.testing.assert_close(losses_NA, -logits.detach().log_softmax(2)[..., 20])


@pytest.mark.parametrize("loss", [multibox_loss, focal_loss])
def test_a_batch_without_objects_has_no_box_loss_and_finite_gradients(loss):
    targets, outputs = make_targets([], []), make_outputs(2)
    losses = loss(*outputs, targets, match(targets, PRIORS_A4), PRIORS_A4)
    gradients = torch.autograd.grad(losses.total, outputs)

    assert numbers(losses)[0] == 0
    assert (numbers(losses)[1] == 0) == (loss is multibox_loss)
    assert not gradients[0].any()
    assert torch.isfinite(gradients[1]).all()


def test_an_image_without_objects_adds_nothing_unless_it_may_mine():
    with_objects, none = [[20, 20, 110, 110]], []
    deltas, logits = make_outputs(2)

    def class_loss(*images, **options):
        targets, count = make_targets(*images), len(images)
        matched = match(targets, PRIORS_A4)
        losses = multibox_loss(
            deltas[:count], logits[:count], targets, matched, PRIORS_A4, num_positives=1, **options
        )
        return numbers(losses)[1]

    assert class_loss(with_objects, none) == pytest.approx(class_loss(with_objects))
    hardest = float(background_losses(logits)[1].topk(4).values.sum())
    mined = class_loss(with_objects, none, negatives_without_positives=4)
    assert mined - class_loss(with_objects) == pytest.approx(hardest, rel=1e-5)


def test_an_object_below_the_threshold_and_two_on_one_prior_all_count():
    # The first two want prior 0; the third overlaps nothing by 0.5.
    targets = make_targets([[15, 15, 105, 105], [20, 20, 108, 108], [262, 20, 270, 80]])
    matched_NA = match(targets, PRIORS_A4)

    assert set(matched_NA[0].tolist()) == {-1, 0, 1, 2}
    deltas, logits = make_outputs(1)
    losses = multibox_loss(deltas, logits, targets, matched_NA, PRIORS_A4)
    expected = slow_loss(deltas, logits, targets, matched_NA, PRIORS_A4)
    assert numbers(losses) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_classes", [2, 1001])
@pytest.mark.parametrize("loss", [multibox_loss, focal_loss])
def test_one_class_and_a_thousand_classes(loss, num_classes):
    targets, outputs = make_targets([[20, 20, 110, 110]]), make_outputs(1, num_classes=num_classes)
    losses = loss(*outputs, targets, match(targets, PRIORS_A4), PRIORS_A4)
    gradients = torch.autograd.grad(losses.total, outputs)

    assert numbers(losses)[1] > 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [multibox_loss, focal_loss])
def test_half_precision_outputs_of_ten_thousand_are_finite(loss, dtype):
    targets, (deltas, logits) = make_batch(), make_outputs(3, dtype=dtype, scale=3000)
    with torch.no_grad():
        logits[:, ::2] = 1e4
        logits[:, 1::2, 3] = -1e4
        deltas[:, ::3] = -1e4
    with torch.autocast("cpu", dtype=dtype):
        losses = loss(deltas, logits, targets, match(targets, PRIORS_A4), PRIORS_A4)
    gradients = torch.autograd.grad(losses.total, [deltas, logits])

    assert losses.classes.dtype == losses.boxes.dtype == torch.float32
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_parts_of_a_batch_divided_by_the_common_count_sum_to_the_whole():
    targets, (deltas, logits) = make_batch(), make_outputs(3)
    matched_NA = match(targets, PRIORS_A4)
    whole = multibox_loss(deltas, logits, targets, matched_NA, PRIORS_A4)
    num_positives = (matched_NA >= 0).sum()
    parts = [
        multibox_loss(
            deltas[part],
            logits[part],
            Targets(targets.boxes[part], targets.labels[part]),
            matched_NA[part],
            PRIORS_A4,
            num_positives=num_positives,
        ).total
        for part in (slice(0, 1), slice(1, 2), slice(2, 3))
    ]

    torch.testing.assert_close(sum(parts), whole.total)


@pytest.mark.parametrize("loss", [multibox_loss, focal_loss])
def test_a_weight_counts_for_box_and_class_of_a_match_and_nothing_else(loss):
    targets, (deltas, logits) = make_batch(), make_outputs(3)
    matched_NA = match(targets, PRIORS_A4)
    positive_NA = matched_NA >= 0

    def weighed(weights_NA):
        return torch.tensor(
            numbers(loss(deltas, logits, targets, matched_NA, PRIORS_A4, weights_NA=weights_NA))
        )

    plain = torch.tensor(numbers(loss(deltas, logits, targets, matched_NA, PRIORS_A4)))
    torch.testing.assert_close(weighed(torch.where(positive_NA, 1.0, 77.0)), plain)
    none = weighed(torch.zeros(positive_NA.shape))
    assert none[0] == 0
    # Linear in each weight: one match at a time adds up to all of them.
    each = [weighed(torch.zeros(positive_NA.shape).index_put((n, a), torch.tensor(1.0))) - none
            for n, a in zip(*positive_NA.nonzero(as_tuple=True), strict=True)]  # fmt: skip
    assert all(part.min() > 0 for part in each)
    torch.testing.assert_close(torch.stack(each).sum(dim=0) + none, plain)


def test_focal_loss_is_the_formula_and_leaves_the_background_column_alone():
    targets, (deltas, logits) = make_batch(), make_outputs(3)
    matched_NA = match(targets, PRIORS_A4)
    losses = focal_loss(deltas, logits, targets, matched_NA, PRIORS_A4)
    (gradients,) = torch.autograd.grad(losses.total, [logits])

    expected, probabilities = 0.0, logits.detach().double().sigmoid().tolist()
    for image, matched in enumerate(matched_NA.tolist()):
        for prior, index in enumerate(matched):
            for column in range(1, 21):
                probability = probabilities[image][prior][column]
                if index >= 0 and int(targets.labels[image, index]) == column:
                    expected += oracles.focal(probability, alpha=0.25)
                else:
                    expected += oracles.focal(1 - probability, alpha=0.75)
    num_positives = int((matched_NA >= 0).sum())
    assert numbers(losses)[1] == pytest.approx(expected / num_positives, rel=1e-4)
    assert not gradients[..., 0].any()
    assert losses.boxes == multibox_loss(deltas, logits, targets, matched_NA, PRIORS_A4).boxes

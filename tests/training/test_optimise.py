"""Optimizer, schedule, averaging, freezing."""

import math

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.model.ssd import build_model
from pipeline.training.optimise import (
    AveragedWeights,
    Recipe,
    freeze,
    learning_rate,
    make_optimizer,
    set_rate,
    stages,
    train_mode,
)
from tests.training.makers import small_model


def test_sgd_gives_biases_twice_the_rate_and_no_decay():
    model = build_model("ssd300_vgg16", num_classes=3)
    optimizer = make_optimizer(model, Recipe(optimizer="sgd", weight_decay=5e-4))
    set_rate(optimizer, 0.01)
    by_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = by_parameter[id(parameter)]
        plain = not name.endswith(".bias")  # the scale of L2Norm, too: Caffe's default
        assert (group["lr"], group["weight_decay"]) == ((0.01, 5e-4) if plain else (0.02, 0.0)), name


def test_adamw_decays_weights_only():
    optimizer = make_optimizer(small_model(), Recipe(optimizer="adamw", weight_decay=0.1))
    assert [(group["factor"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1, 0.1),
        (1, 0),
    ]
    assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])


def test_cosine_rises_to_the_highest_rate_and_falls_to_zero():
    recipe = Recipe(lr=1.0, warmup=0.1)
    assert learning_rate(0.05, recipe) == pytest.approx(0.5)
    assert learning_rate(0.1, recipe) == pytest.approx(1)
    assert learning_rate(0.55, recipe) == pytest.approx(0.5)
    assert learning_rate(1.0, recipe) == pytest.approx(0, abs=1e-12)
    assert learning_rate(0.325, recipe) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_multistep_is_the_papers_schedule():
    recipe = Recipe(lr=1e-3, schedule="multistep", milestones=(2 / 3, 5 / 6), warmup=0)
    steps = [0, 79_999, 80_001, 99_999, 100_001, 120_000]
    rates = [learning_rate(step / 120_000, recipe) for step in steps]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_averaged_weights_follow_the_formula():
    model = small_model()
    average = AveragedWeights(model, decay=0.25)
    name = "heads.0.logits.project.bias"
    first = model.state_dict()[name].clone()
    with torch.no_grad():
        model.state_dict()[name].add_(1)
    average.update(model, step=1)  # decay 2 / 11
    torch.testing.assert_close(average.model.state_dict()[name], first + (1 - 2 / 11))
    average.update(model, step=100)  # decay 0.25, the limit
    torch.testing.assert_close(average.model.state_dict()[name], first + 1 - 0.25 * 2 / 11)


@pytest.mark.parametrize(
    ("architecture", "count"),
    [
        ("ssd300_vgg16", 15),
        ("ssd300_resnet50", 4),
        ("ssdlite320_mobilenet_v3_large", 18),
        ("ssdlite300_mobilenet_v2", 19),
    ],
)
def test_stages_hold_the_whole_backbone(architecture, count):
    model = build_model(architecture, num_classes=3)
    parts = stages(model)
    assert len(parts) == count
    freeze(model, count)
    free = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert free <= {"conv4_3_norm.scale"}
    assert all(p.requires_grad for p in model.heads.parameters())
    with pytest.raises(ConfigError, match="stages"):
        freeze(model, count + 1)


def test_batch_norm_of_frozen_stages_keeps_its_statistics():
    model = build_model("ssd300_resnet50", num_classes=3)
    freeze(model, 2)
    train_mode(model)
    norms = {n: m.training for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert not norms["backbone.bn1"]
    assert not norms["backbone.layer1.0.bn1"]
    assert norms["backbone.layer2.0.bn1"]


def test_nothing_to_train_is_refused():
    model = small_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        make_optimizer(model, Recipe())

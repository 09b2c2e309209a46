"""The optimizer steps, without Ray."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from pipeline.errors import PipelineError
from pipeline.model.initialise import replace_classes
from pipeline.training.loop import Learner
from pipeline.training.optimise import Recipe, freeze
from pipeline.training.order import picks
from pipeline.training.samples import load_batch, load_images
from pipeline.training.validation import ground_truth, validate
from tests.training.makers import NAMES, SIDE, make_set, read_set, settings, small_model

# The losses of `first_losses` on the machine where the test was written (torch 2.15, CPU).
RECORDED = Path(__file__).with_name("first_losses.txt")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums are the same on machines with other numbers of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_learner(recipe=None, *, frozen=8, device="cpu"):
    model = replace_classes(
        small_model(), class_names=NAMES, label_ids=(10, 20), generator=torch.Generator().manual_seed(0)
    )
    freeze(model, frozen)
    return Learner(model, recipe or Recipe(), device=device)


def global_batch(index, step, *, batch_size, rank=0, num_workers=1, augmentation="none"):
    chosen = picks(
        step, rank=rank, num_workers=num_workers, batch_size=batch_size, num_samples=len(index), seed=0
    )
    return load_batch(chosen, index, settings(augmentation))


def weights(learner):
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def assert_equal(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first)


def first_losses(index, recipe, num_steps=20):
    learner = new_learner(recipe)
    results = [
        learner.step(global_batch(index, step, batch_size=4, augmentation="ssd"), progress=(step + 1) / 100)
        for step in range(num_steps)
    ]
    return learner, [result.loss for result in results]


def test_two_runs_of_one_seed_are_bit_equal(tmp_path):
    index, _ = read_set(make_set(tmp_path, 12))
    first, losses = first_losses(index, Recipe())
    second, again = first_losses(index, Recipe())
    assert losses == again
    assert_equal(weights(first), weights(second))


def test_the_first_losses_follow_a_recorded_curve(tmp_path):
    # Losses change by up to 1.07 in these steps. Processors round differently, and AdamW makes much of it:
    # with other instruction sets (ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA) its losses differ by up to 0.03
    # within 20 steps at 1e-4, those of SGD at 5e-5 by 1e-5.
    index, _ = read_set(make_set(tmp_path, 12))
    _, losses = first_losses(index, Recipe(optimizer="sgd", lr=5e-5))
    np.testing.assert_allclose(losses, np.loadtxt(RECORDED), atol=1e-3)


def test_eight_images_are_learnt_by_heart(tmp_path):
    index, classes = read_set(make_set(tmp_path, 8))
    learner = new_learner(Recipe(lr=2e-3))
    num_steps = 60
    for step in range(num_steps):
        learner.step(global_batch(index, step, batch_size=8), progress=(step + 1) / num_steps)
    images, _ = load_images(index, range(8), height=SIDE, width=SIDE, rule="tf_legacy")
    numbers = validate(learner.averaged, [images], ground_truth(index, classes))
    assert numbers["AP"] >= 0.95


def test_a_resumed_learner_goes_on_as_if_nothing_had_happened(tmp_path):
    index, _ = read_set(make_set(tmp_path, 8))
    recipe = Recipe(optimizer="adamw")
    whole, part = new_learner(recipe), new_learner(recipe)
    for step in range(3):
        whole.step(global_batch(index, step, batch_size=4), progress=(step + 1) / 6)
        part.step(global_batch(index, step, batch_size=4), progress=(step + 1) / 6)
    path = tmp_path / "state.pt"
    torch.save(part.state_dict(), path)
    resumed = new_learner(recipe)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    for step in range(3, 6):
        whole.step(global_batch(index, step, batch_size=4), progress=(step + 1) / 6)
        resumed.step(global_batch(index, step, batch_size=4), progress=(step + 1) / 6)
    assert resumed.num_steps == 6
    assert_equal(weights(whole), weights(resumed))
    assert_equal(whole.averaged.state_dict(), resumed.averaged.state_dict())


@pytest.mark.parametrize(("optimizer", "balance"), [("sgd", "matches"), ("adamw", "objects")])
def test_micro_batches_change_nothing(tmp_path, optimizer, balance):
    index, _ = read_set(make_set(tmp_path, 8))
    recipe = Recipe(optimizer=optimizer, balance=balance, lr=1e-4)
    whole, parts = new_learner(recipe), new_learner(dataclasses.replace(recipe, micro_batches=3))
    for step in range(3):
        batch = global_batch(index, step, batch_size=8)
        one, three = whole.step(batch, progress=0.5), parts.step(batch, progress=0.5)
        assert one.loss == pytest.approx(three.loss, rel=1e-4)
        assert one.num_positives == three.num_positives
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, parts.model.state_dict()[name], atol=1e-5, rtol=1e-3)


def train_share(rank, num_workers, folder, out):
    """20 steps of one worker of several; also the target of `spawn`."""
    torch.set_num_threads(1)
    if num_workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=num_workers)
    index, _ = read_set(folder)
    # A low rate: rounding grows with each step, at 1e-3 to 5e-4 of a weight (in float64 to 2e-16).
    learner = new_learner(Recipe(optimizer="sgd", balance="objects", lr=2e-4))
    losses = [
        learner.step(
            global_batch(index, step, batch_size=16, rank=rank, num_workers=num_workers),
            progress=(step + 1) / 20,
        ).loss
        for step in range(20)
    ]
    if rank == 0:
        torch.save({"weights": learner.model.state_dict(), "losses": losses}, out)
    if num_workers > 1:
        dist.destroy_process_group()


def test_two_workers_of_8_images_do_what_one_of_16_does(tmp_path):
    folder = make_set(tmp_path / "set", 24)
    train_share(0, 1, folder, tmp_path / "one.pt")
    spawn(train_share, args=(2, folder, tmp_path / "two.pt"), nprocs=2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-4)
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][name], atol=1e-4, rtol=0)


def test_a_loss_that_is_not_finite_names_its_images_and_changes_nothing(tmp_path):
    index, _ = read_set(make_set(tmp_path, 4))
    learner = new_learner()
    batch = global_batch(index, 0, batch_size=2)
    with torch.no_grad():
        next(iter(learner.model.heads.parameters())).fill_(float("nan"))
    before = weights(learner)
    with pytest.raises(PipelineError, match=r"step 1: the loss is not finite") as caught:
        learner.step(batch, progress=0.5)
    assert all(image in str(caught.value) for image in batch.image_ids)
    assert learner.num_steps == 0
    assert all(torch.equal(before[n].nan_to_num(), v.nan_to_num()) for n, v in weights(learner).items())


def test_frozen_stages_stay_as_they_are_and_the_rest_moves(tmp_path):
    index, _ = read_set(make_set(tmp_path, 4))
    learner = new_learner(frozen=8)
    before = weights(learner)
    learner.step(global_batch(index, 0, batch_size=4), progress=0.5)
    moved = {name for name, value in weights(learner).items() if not torch.equal(before[name], value)}
    assert "backbone.blocks.6.expand.conv.weight" not in moved
    assert {"backbone.blocks.7.expand.conv.weight", "heads.0.logits.project.weight"} <= moved


def test_images_without_objects_can_be_trained_on(tmp_path):
    index, _ = read_set(make_set(tmp_path, 3, empty=2))
    result = new_learner().step(global_batch(index, 0, batch_size=3), progress=0.5)
    assert np.isfinite(result.loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_comes_close_to_float32(tmp_path):
    index, _ = read_set(make_set(tmp_path, 4))
    batch = global_batch(index, 0, batch_size=4)
    full = new_learner(device="cuda").step(batch, progress=0.5)
    half = new_learner(Recipe(precision="bfloat16"), device="cuda").step(batch, progress=0.5)
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    assert half.num_positives == full.num_positives

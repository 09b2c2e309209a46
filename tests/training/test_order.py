"""The order of samples."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.order import num_steps, permutation, picks

RUNS = st.fixed_dictionaries(
    {
        "num_workers": st.integers(1, 4),
        "share": st.integers(1, 5),
        "num_samples": st.integers(1, 40),
        "seed": st.integers(0, 5),
    }
)


def batch(step, rank, run):
    return picks(
        step,
        rank=rank,
        num_workers=run["num_workers"],
        batch_size=run["share"] * run["num_workers"],
        num_samples=run["num_samples"],
        seed=run["seed"],
    )


@given(RUNS)
def test_every_image_comes_once_in_each_epoch(run):
    size = run["share"] * run["num_workers"]
    steps = num_steps(epochs=3, num_samples=run["num_samples"], batch_size=size)
    workers = range(run["num_workers"])
    seen = [pick for step in range(steps) for rank in workers for pick in batch(step, rank, run)]
    for epoch in range(3):
        assert sorted(p.sample for p in seen if p.epoch == epoch) == list(range(run["num_samples"]))
    assert [p.epoch for p in seen] == sorted(p.epoch for p in seen)
    assert len(seen) - 3 * run["num_samples"] < size


@given(RUNS, st.integers(0, 50))
def test_workers_share_the_batch_that_one_worker_would_have(run, step):
    alone = run | {"num_workers": 1, "share": run["share"] * run["num_workers"]}
    shares = [pick for rank in range(run["num_workers"]) for pick in batch(step, rank, run)]
    assert shares == batch(step, 0, alone)


@given(RUNS, st.integers(0, 50))
def test_a_batch_is_the_same_whatever_was_asked_before(run, step):
    permutation.cache_clear()
    first = batch(step, 0, run)
    for other in range(step):
        batch(other, 0, run)
    assert batch(step, 0, run) == first


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(permutation(seed, epoch, 50)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert not np.array_equal(permutation(0, 0, 50), np.arange(50))

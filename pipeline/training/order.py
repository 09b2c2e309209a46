"""Which images make which batch: a pure function of the seed, so that any process can work it out.

The permutations of the epochs follow each other in one endless sequence, and global batch `step` is its
slice [step * batch_size, (step + 1) * batch_size). So every image comes once in each epoch: none is dropped
and none comes twice; a batch may hold the end of one epoch and the beginning of the next.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Pick(NamedTuple):
    """One place in the sequence."""

    epoch: int
    sample: int
    """Row of the index."""


def num_steps(*, epochs: int, num_samples: int, batch_size: int) -> int:
    """Steps until every image was seen `epochs` times."""
    return math.ceil(epochs * num_samples / batch_size)


def picks(
    step: int, *, rank: int, num_workers: int, batch_size: int, num_samples: int, seed: int
) -> list[Pick]:
    """The share of worker `rank` in global batch `step`: the rank-th of `num_workers` equal slices.

    Args:
        step: from 0.
        rank: from 0.
        num_workers: must divide `batch_size`.
        batch_size: of all workers together.
        num_samples: images in the index.
        seed: of the run.
    """
    share = batch_size // num_workers
    first = step * batch_size + rank * share
    return [pick(position, num_samples=num_samples, seed=seed) for position in range(first, first + share)]


def pick(position: int, *, num_samples: int, seed: int) -> Pick:
    """What is at `position` of the endless sequence."""
    epoch, place = divmod(position, num_samples)
    return Pick(epoch, int(permutation(seed, epoch, num_samples)[place]))


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of one epoch, int64 [num_samples]."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)

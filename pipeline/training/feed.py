"""Batches of a run on Ray Data: made by tasks on any node, dealt out to the workers in a fixed order.

One lazy dataset serves the whole run, so no epoch ends with idle workers. Its rows are batches, in the order
worker 0, worker 1, ... of step 0, then of step 1; a split that keeps the order deals them out one by one.
Every batch says whose it is, and workers look.
"""

import asyncio
import math
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.data import Dataset, ExecutionOptions

from pipeline import runtime
from pipeline.errors import PipelineError
from pipeline.training.order import picks
from pipeline.training.plan import Plan
from pipeline.training.samples import Batch, SampleSettings, from_row, load_batch, to_row

MAX_DATA_TASKS = 8_000  # planning takes about 1.5 ms for each
MAX_RETRIES = 3
DATA_CPUS = 0.9  # logical: data tasks share the cores with workers on the CPU
STEPS_AHEAD = 3  # that batches are made before they are needed, besides what each core is at work on
BLOCK_BYTES = 100_000  # less than any batch, so that each row becomes a block of its own


def batches(rows: Any, plan: Plan, *, first: int, pace: Any, device: str) -> Dataset:
    """The batches from step `first` on, made as they are needed: a task for each, or for some in a row.

    Args:
        rows: reference to the index of usable samples.
        plan: of the run.
        first: step.
        pace: handle of the run's `Pace`.
        device: of the workers. On "cpu" they have the cores first: the threads of a step wait for each
            other, so it loses more than a data task gains.
    """
    runtime.configure_data(block_bytes=BLOCK_BYTES)
    ray.get(pace.move.remote(first))
    config = plan.config
    num_batches = (plan.num_steps - first) * config.workers
    size = math.ceil(num_batches / MAX_DATA_TASKS)
    num_cores = math.ceil(runtime.cluster_resource("CPU"))
    make = partial(
        make_batches,
        rows=rows,
        pace=pace,
        # Enough for each core to be at work on a group of its own.
        steps_ahead=STEPS_AHEAD + math.ceil(num_cores * size / config.workers),
        first=first,
        num_workers=config.workers,
        batch_size=config.batch_size,
        num_samples=plan.num_images,
        settings=plan.samples,
        gives_way=device == "cpu",
    )
    groups = [range(i, min(i + size, num_batches)) for i in range(0, num_batches, size)]
    return runtime.read_tasks(
        "Batches", [partial(make, group) for group in groups], num_cpus=DATA_CPUS, max_retries=MAX_RETRIES
    )


def make_batches(
    numbers: range,
    *,
    rows: Any,
    pace: Any,
    steps_ahead: int,
    first: int,
    num_workers: int,
    batch_size: int,
    num_samples: int,
    settings: SampleSettings,
    gives_way: bool,
) -> Iterator[pa.Table]:
    """A data task: some batches of the sequence, when the workers come near them."""
    torch.set_num_threads(1)
    if gives_way:
        runtime.give_way()
    for number in numbers:
        step, rank = first + number // num_workers, number % num_workers
        ray.get(pace.near.remote(step - steps_ahead))
        began = time.perf_counter()
        chosen = picks(
            step,
            rank=rank,
            num_workers=num_workers,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=settings.seed,
        )
        batch = load_batch(chosen, _fetched(rows), settings)
        yield to_row(batch, step=step, rank=rank, load_s=time.perf_counter() - began)


@lru_cache(maxsize=1)
def _fetched(rows: Any) -> pa.Table:
    return ray.get(rows)


def data_config() -> ray.train.DataConfig:
    """Keep the order of the batches."""
    options = ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(execution_options=options, enable_shard_locality=False)


@ray.remote(num_cpus=0)
class Pace:
    """Holds data tasks back until the workers come near their step.

    Limits of Ray Data do so, too, but while its limits hold finished tasks back, its scheduler turns around
    without a pause (2.60: 577 times a second, half a core and more); it waits quietly for tasks that run.
    """

    def __init__(self) -> None:
        self._step = 0
        self._moved = asyncio.Condition()

    async def move(self, step: int) -> None:
        """The workers are at this step."""
        async with self._moved:
            self._step = step
            self._moved.notify_all()

    async def near(self, step: int) -> None:
        """Return when the workers have come to this step."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._step >= step)


def own_batches(first: int, *, rank: int, height: int, width: int, pace: Any) -> Iterator[Batch]:
    """This worker's batches from step `first` on.

    Raises:
        PipelineError: one is missing, or another worker's came.
    """
    shard: Any = ray.train.get_dataset_shard("train")
    step = first
    for row in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        came = row["step"][0].as_py(), row["rank"][0].as_py()
        if came != (step, rank):
            raise PipelineError(
                f"worker {rank} expected its batch of step {step}, but got that of worker {came[1]}, "
                f"step {came[0]}; this is a bug"
            )
        if rank == 0:
            pace.move.remote(step)
        yield from_row(row, height=height, width=width)
        step += 1

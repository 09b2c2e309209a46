"""Batches of a run on Ray Data: made by tasks on any node, dealt out to the workers in a fixed order.

One lazy dataset serves the whole run, so no epoch ends with idle workers. A row holds the batches of one
worker for a few steps. Rows are in the order worker 0, worker 1, ... of the first steps, then of the next
ones; a split that keeps the order deals them out one by one. Every row says whose it is, and workers look.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
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
# Ray Data (2.60) takes about 25 ms of CPU for each row, and between one task and the next a core was idle for
# a quarter of a second. BCCD, 2 cores, parts of a DataLoader's rate: 0.50 with a task for each batch of 8,
# 0.84 with one for each row of 64 images, 0.99 with one for 4 of them, 1.01 and 0.98 for 8; 1.04 for 8 since
# the next task waits at its node (`runtime.let_wait`).
IMAGES_PER_ROW = 64
ROWS_PER_TASK = 8
BLOCK_BYTES = 100_000  # less than any row, so that each becomes a block of its own


def batches(rows: Any, plan: Plan, *, first: int, pace: Any) -> Dataset:
    """The batches from step `first` on, made as they are needed: a task for some rows.

    Args:
        rows: reference to the index of usable samples.
        plan: of the run.
        first: step.
        pace: handle of the run's `Pace`.
    """
    runtime.configure_data(block_bytes=BLOCK_BYTES)
    ray.get(pace.move.remote(first))
    config = plan.config
    steps_per_row = math.ceil(IMAGES_PER_ROW * config.workers / config.batch_size)
    stretches = [
        (range(step, min(step + steps_per_row, plan.num_steps)), rank)
        for step in range(first, plan.num_steps, steps_per_row)
        for rank in range(config.workers)
    ]
    rows_per_task = max(ROWS_PER_TASK, math.ceil(len(stretches) / MAX_DATA_TASKS))
    num_tasks = math.ceil(runtime.cluster_resource("CPU")) + runtime.num_waiting()
    make = partial(
        make_rows,
        rows=rows,
        pace=pace,
        # Those of the next rows, and enough for each core to be at work on a task of its own, and for those
        # that wait to come before one whose process died.
        steps_ahead=steps_per_row * (2 + math.ceil(num_tasks * rows_per_task / config.workers)),
        num_workers=config.workers,
        batch_size=config.batch_size,
        num_samples=plan.num_images,
        settings=plan.samples,
    )
    starts = range(0, len(stretches), rows_per_task)
    return runtime.read_tasks(
        "Batches",
        [partial(make, stretches[start : start + rows_per_task]) for start in starts],
        num_cpus=DATA_CPUS,
        max_retries=MAX_RETRIES,
    )


def make_rows(
    stretches: Sequence[tuple[range, int]],
    *,
    rows: Any,
    pace: Any,
    steps_ahead: int,
    num_workers: int,
    batch_size: int,
    num_samples: int,
    settings: SampleSettings,
) -> Iterator[pa.Table]:
    """A data task: a row for each stretch of steps and worker, when the workers come near it."""
    torch.set_num_threads(1)
    runtime.give_way()  # the threads of a step wait for each other, so it loses more than this task gains
    order = {"num_workers": num_workers, "batch_size": batch_size, "num_samples": num_samples}
    for steps, rank in stretches:
        ray.get(pace.near.remote(steps[0] - steps_ahead))
        chosen = [picks(step, rank=rank, **order, seed=settings.seed) for step in steps]
        made = [load_batch(picked, _fetched(rows), settings) for picked in chosen]
        yield to_row(made, step=steps[0], rank=rank)


@lru_cache(maxsize=1)
def _fetched(rows: Any) -> pa.Table:
    return ray.get(rows)


def data_config() -> ray.train.DataConfig:
    """Keep the order of the batches; the next task waits for a core."""
    options = ExecutionOptions(preserve_order=True)
    runtime.let_wait(options)
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


def own_batches(dealt: Any, first: int, *, rank: int, height: int, width: int, pace: Any) -> Iterator[Batch]:
    """This worker's batches from step `first` on, out of the rows that it is dealt (a `DataIterator`).

    Raises:
        PipelineError: a row is missing, or another worker's came.
    """
    step = first
    for row in dealt.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        came = row["step"][0].as_py(), row["rank"][0].as_py()
        if came != (step, rank):
            raise PipelineError(
                f"worker {rank} expected its batch of step {step}, but got that of worker {came[1]}, "
                f"step {came[0]}; this is a bug"
            )
        if rank == 0:
            pace.move.remote(step)
        for batch in from_row(row, height=height, width=width):
            yield batch
            step += 1

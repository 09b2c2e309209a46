"""Does training wait for its data? Ingest against a torch DataLoader, and training against bare steps.

    python benchmarks/training_ingest.py --train SHARDS --val SHARDS [--rounds 4] [--steps 100] [--pairs 3]
                                         [--json FILE]

Ingest: the dataset of batches that training reads, with a consumer that does nothing, against a DataLoader
that makes the same batches with the same code in as many processes as there are cores; images per second
of some rounds of tasks, one for each core, after the first. Training: a run of some steps fed by that
dataset, whose tasks work ahead and end early, against the same steps on batches in memory, both in this
process. Sides alternate; ratios are taken pair by pair.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data import ExecutionOptions
from torch.utils.data import DataLoader, Dataset

from pipeline import runtime
from pipeline.config import TrainConfig
from pipeline.training.feed import IMAGES_PER_ROW, ROWS_PER_TASK, Pace, batches, data_config, own_batches
from pipeline.training.loop import Learner
from pipeline.training.order import picks
from pipeline.training.plan import make_recipe
from pipeline.training.run import Prepared, prepare
from pipeline.training.samples import Batch, load_batch

WARM_UP = 10  # steps: processes start and import torch


class Batches(Dataset[Batch]):
    """The batches of a run, for a DataLoader."""

    def __init__(self, prepared: Prepared, count: int) -> None:
        self.table, self.config = prepared.tables["train"][0], prepared.plan.config
        self.settings, self.count = prepared.plan.samples, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        sizes = {"batch_size": self.config.batch_size, "num_samples": len(self.table)}
        chosen = picks(step, rank=0, num_workers=1, seed=self.config.seed, **sizes)
        return load_batch(chosen, self.table, self.settings)


def from_ray(prepared: Prepared, count: int) -> Iterator[Batch]:
    """The first batches as a training worker gets them."""
    spec, plan = prepared.plan.spec, prepared.plan
    rows = ray.put(prepared.tables["train"][0])
    pace: Any = Pace.remote()
    dataset = batches(rows, plan, first=0, pace=pace)
    options = data_config()._resolve_execution_options("train")
    assert isinstance(options, ExecutionOptions)
    dataset.context.execution_options = options
    (shard,) = dataset.streaming_split(1, equal=True)
    size = {"height": spec.input_height, "width": spec.input_width}
    yield from itertools.islice(own_batches(shard, 0, rank=0, **size, pace=pace), count)


def whole_run(prepared: Prepared, count: int) -> Iterator[Batch]:
    """The batches of a run of so many steps as its worker gets them."""
    plan = prepared.plan
    epochs = math.ceil(count * plan.config.batch_size / plan.num_images)
    plan = replace(plan, config=replace(plan.config, epochs=epochs))
    yield from from_ray(replace(prepared, plan=plan), count)


def from_loader(prepared: Prepared, count: int) -> Iterator[Batch]:
    """The same batches from a DataLoader."""
    processes = os.cpu_count() or 1
    yield from DataLoader(
        Batches(prepared, count), batch_size=None, num_workers=processes, multiprocessing_context="spawn"
    )


def in_memory(prepared: Prepared, count: int) -> Iterator[Batch]:
    """The same batches, made before they are asked for."""
    batches = Batches(prepared, min(count, 12))
    made = [batches[i] for i in range(len(batches))]
    torch.set_num_threads(os.cpu_count() or 1)
    yield from itertools.islice(itertools.cycle(made), count)


def images_per_second(batches: Iterator[Batch], use: Callable[[Batch], object], *, warm_up: int) -> float:
    """Of all batches after the first `warm_up`."""
    num_images, started = 0, 0.0
    for number, batch in enumerate(batches):
        use(batch)
        if number == warm_up - 1:
            started = time.perf_counter()
        elif number >= warm_up:
            num_images += len(batch.image_ids)
    return num_images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runtime.start_ray()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(train=args.train, val=args.val, output=f"{folder}/out", epochs=1_000)
        prepared = prepare(config)
        learner = Learner(prepared.model, make_recipe(config, device="cpu"))

        def nothing(batch: Batch) -> None:
            pass

        def step(batch: Batch) -> None:
            learner.step(batch, progress=0.5)

        # Batches come in the order of their tasks: only whole rounds take the time of their making.
        round_size = (os.cpu_count() or 1) * ROWS_PER_TASK * math.ceil(IMAGES_PER_ROW / config.batch_size)
        questions = {
            "ingest": (round_size, args.rounds * round_size, (from_ray, nothing), (from_loader, nothing)),
            "training": (WARM_UP, args.steps, (whole_run, step), (in_memory, step)),
        }
        result = {}
        for name, (warm_up, number, *sides) in questions.items():
            rates = []
            for _ in range(args.pairs):
                rates.append(
                    [
                        images_per_second(feed(prepared, warm_up + number), use, warm_up=warm_up)
                        for feed, use in sides
                    ]
                )
                print(f"{name:<9} {rates[-1][0]:7.1f} {rates[-1][1]:7.1f}", flush=True)
            ratios = [ours / other for ours, other in rates]
            result[name] = {"images_per_second": rates, "ratio": statistics.median(ratios)}
            mine, other = (statistics.median(column) for column in zip(*rates, strict=True))
            against = "DataLoader" if name == "ingest" else "batches in memory"
            print(
                f"{name:<9} {mine:7.1f} images/s   {against} {other:7.1f}   ratio {result[name]['ratio']:.3f}"
            )
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": None, **result}, indent=2))


if __name__ == "__main__":
    runtime.take_worker_environment()
    main()

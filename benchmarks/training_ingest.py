"""Does training wait for its data? Ingest against a torch DataLoader, and training against bare steps.

    python benchmarks/training_ingest.py --train SHARDS --val SHARDS [--batches 200] [--steps 100] [--pairs 3]
                                         [--json FILE]

Ingest: the dataset of batches that training reads, with a consumer that does nothing, against a DataLoader
that makes the same batches with the same code in as many processes as there are cores; images per second
after the first ten batches. Training: a run of some steps fed by that dataset, whose tasks work ahead and end
early, against the same steps on batches in memory, both in this process. Sides alternate; ratios are taken
pair by pair.
"""

import argparse
import itertools
import json
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
from pipeline.training.feed import Pace, batches, data_config, own_batches
from pipeline.training.loop import Learner
from pipeline.training.order import picks
from pipeline.training.plan import make_recipe
from pipeline.training.run import Prepared, prepare
from pipeline.training.samples import Batch, load_batch

WARM_UP = 10  # batches: processes start and import torch


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
    dataset = batches(rows, plan, first=0, pace=pace, device="cpu")
    options = data_config()._resolve_execution_options("train")
    assert isinstance(options, ExecutionOptions)
    dataset.context.execution_options = options
    (shard,) = dataset.streaming_split(1, equal=True)
    size = {"height": spec.input_height, "width": spec.input_width}
    yield from itertools.islice(own_batches(shard, 0, rank=0, **size, pace=pace), count)


def whole_run(prepared: Prepared, count: int) -> Iterator[Batch]:
    """The batches of a run of so many steps as its worker gets them."""
    yield from from_ray(replace(prepared, plan=replace(prepared.plan, num_steps=count)), count)


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


def images_per_second(batches: Iterator[Batch], use: Callable[[Batch], object]) -> float:
    """Of all batches after the first ones."""
    num_images, started = 0, 0.0
    for number, batch in enumerate(batches):
        use(batch)
        if number == WARM_UP - 1:
            started = time.perf_counter()
        elif number >= WARM_UP:
            num_images += len(batch.image_ids)
    return num_images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--batches", type=int, default=200)
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

        questions = {
            "ingest": (args.batches, (from_ray, nothing), (from_loader, nothing)),
            "training": (args.steps, (whole_run, step), (in_memory, step)),
        }
        result = {}
        for name, (number, *sides) in questions.items():
            count, rates = WARM_UP + number, []
            for _ in range(args.pairs):
                rates.append([images_per_second(feed(prepared, count), use) for feed, use in sides])
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
    main()

"""What each of Ray Train's workers does: restore, take the steps of `session`, report checkpoints."""

import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution import context as ray_train_context

from pipeline import storage
from pipeline.config import TrainConfig
from pipeline.data.annotations import Classes
from pipeline.errors import own_error
from pipeline.evaluation.boxsets import GroundTruth
from pipeline.model.checkpoint import load_checkpoint, save_checkpoint
from pipeline.model.ssd import SSD
from pipeline.training.board import failure_on
from pipeline.training.feed import own_batches
from pipeline.training.loop import Learner
from pipeline.training.optimise import freeze
from pipeline.training.output import MODEL
from pipeline.training.plan import make_recipe
from pipeline.training.samples import failures_text
from pipeline.training.session import Outlets, Position, Schedule, run_steps
from pipeline.training.validation import ground_truth, validate


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know."""

    config: TrainConfig
    device: str
    schedule: Schedule
    weights: bytes
    num_frozen: int
    classes: Classes
    val_index: Any
    val_images: list[Any]
    val_failures: list[Any]
    started: float
    elapsed_before_s: float
    board: Any
    pace: Any


def work(arguments: dict[str, Any]) -> None:
    """What each of Ray Train's workers does."""
    job: Job = arguments["job"]
    for name in ("ray.train", ray_train_context.__file__):  # a line for each checkpoint
        logging.getLogger(name).setLevel(logging.ERROR)
    if failure_on(job.board):
        return  # Ray Train tries again, but this error would come again
    try:
        _work(job)
    except Exception as error:  # the top of this process
        if ours := own_error(error):
            ray.get(job.board.fail.remote(ours))
        raise


def _work(job: Job) -> None:
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if job.device == "cpu":
        torch.set_num_threads(max(1, num_cores() // context.get_local_world_size()))
    device = ray.train.torch.get_device() if job.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, MODEL)
        path.write_bytes(job.weights)
        model = load_checkpoint(path)
    freeze(model, job.num_frozen)
    learner = Learner(model, make_recipe(job.config, device=job.device), device=device)
    position = _resume(learner)
    writer = Charts(job.config.output) if rank == 0 else None
    truth = ground_truth(ray.get(job.val_index), job.classes)
    outlets = Outlets(
        validate=partial(_measure, job=job, rank=rank, truth=truth, device=str(learner.device)),
        save=partial(_save, output=job.config.output, writer=writer),
        log=lambda text: job.board.line.remote(text) if rank == 0 else None,
        warn=job.board.once.remote,
        chart=writer.add if writer else lambda numbers, step: None,
    )
    own = own_batches(
        ray.train.get_dataset_shard("train"),
        position.step,
        rank=rank,
        height=model.spec.input_height,
        width=model.spec.input_width,
        pace=job.pace,
    )
    run_steps(
        learner,
        own,
        schedule=job.schedule,
        position=position,
        outlets=outlets,
        clock=lambda: job.elapsed_before_s + time.time() - job.started,
    )


def _measure(model: SSD, *, job: Job, rank: int, truth: GroundTruth, device: str) -> dict[str, float]:
    """Validate on this worker's images; the first worker says which of all can't be decoded."""
    if rank == 0 and (failures := [text for part in ray.get(job.val_failures) for text in part]):
        job.board.once.remote(failures_text(failures, job.schedule.num_val_images))
    mine = job.val_images[rank :: job.config.workers]
    return validate(model, (ray.get(ref) for ref in mine), truth, device=device)


def num_cores() -> int:
    """Cores that this process may use: fewer than the machine's under taskset or in some containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resume(learner: Learner) -> Position:
    """Bring the learner to the last checkpoint."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position()
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder, "learner.pt"), map_location="cpu", weights_only=True)
        learner.load_state_dict(state)
        return Position(**json.loads(Path(folder, "position.json").read_text()))


def _save(
    learner: Learner, position: Position, is_best: bool, *, output: str, writer: "Charts | None"
) -> None:
    """Report a checkpoint; the best model also goes where `infer` finds it."""
    numbers = {"step": position.step, "AP": position.numbers.get("AP", -1.0)}
    if writer is None:
        ray.train.report(numbers)
        return
    if is_best:
        save_checkpoint(learner.averaged, storage.join(output, MODEL))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(learner.state_dict(), Path(folder, "learner.pt"))
        save_checkpoint(learner.averaged, Path(folder, MODEL))
        Path(folder, "position.json").write_text(json.dumps(position.to_dict()))
        ray.train.report(numbers, checkpoint=ray.train.Checkpoint.from_directory(folder))
    writer.publish()


class Charts:
    """Numbers over steps as TensorBoard reads them, in `<output>/tensorboard`."""

    def __init__(self, output: str) -> None:
        from tensorboardX import SummaryWriter  # comes with Ray Train

        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name)
        self._target = storage.join(output, "tensorboard")

    def add(self, numbers: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name.replace(" ", "_"), value, step)

    def publish(self) -> None:
        """Copy what there is to the output."""
        self._writer.flush()
        for path in Path(self._folder.name).iterdir():
            storage.write_atomic(storage.join(self._target, path.name), path.read_bytes())

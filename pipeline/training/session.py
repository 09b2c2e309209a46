"""A run from step to step: batches in, progress lines, validations and checkpoints out. Plain PyTorch.

With several workers all decisions that depend on a clock are the first worker's.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import PipelineError
from pipeline.model.ssd import SSD
from pipeline.training.loop import Learner, StepResult
from pipeline.training.samples import Batch

VALIDATION_SHARE = 0.05  # of a budget; the validation at the end not counted
EPOCH_CHECKPOINT_S = 60.0
RESERVE_S = 15.0  # of a budget, for the end of the job besides the last validation
FORWARD_SHARE = 0.5  # of the time of a training step: what a validation takes, until one was measured


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run validates, keeps checkpoints and ends.

    Attributes:
        num_steps: of the whole run.
        steps_per_epoch: not a whole number in general.
        num_val_images: in a validation.
        num_validations: evenly spread, the last one at the end.
        checkpoint_steps: checkpoints every so many steps; 0 for none besides the usual ones.
        budget_s: seconds of the whole job; 0 for no limit.
        log_s: seconds between progress lines.
    """

    num_steps: int
    steps_per_epoch: float
    num_val_images: int
    num_validations: int = 10
    checkpoint_steps: int = 0
    budget_s: float = 0.0
    log_s: float = 10.0


@dataclass
class Position:
    """How far a run is: the part of a checkpoint that is not weights."""

    step: int = 0
    elapsed_s: float = 0.0
    best_ap: float = -1.0
    best_step: int = 0
    num_validations: int = 0
    validations_s: float = 0.0
    validation_s: float = 0.0
    """The last one, or what it is expected to take."""
    validated_progress: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    """Of the last validation."""
    failures: list[str] = field(default_factory=list)
    """Training images that can't be decoded."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Outlets:
    """Where a run's results go.

    Attributes:
        validate: numbers of a model, "AP" among them; every worker calls it.
        save: keep a checkpoint; every worker calls it, with whether this is the best model so far.
        log: one readable line; of the first worker.
        warn: one line about an image that can't be used; of every worker.
        chart: numbers by name at a step, for TensorBoard.
    """

    validate: Callable[[SSD], dict[str, float]]
    save: Callable[[Learner, Position, bool], None]
    log: Callable[[str], None]
    warn: Callable[[str], None]
    chart: Callable[[dict[str, float], int], None]


def run_steps(
    learner: Learner,
    batches: Iterator[Batch],
    *,
    schedule: Schedule,
    position: Position,
    outlets: Outlets,
    clock: Callable[[], float],
) -> Position:
    """Train from `position` to the end of the schedule.

    Args:
        learner: in the state of `position`.
        batches: this worker's shares from `position.step` on.
        schedule: when to do what.
        position: where to begin; it moves.
        outlets: where results go.
        clock: seconds of the job so far, those of earlier, interrupted ones included.

    Raises:
        PipelineError: the batches end too early, or a step is not finite.
    """
    interval = Interval(clock())
    saved_s = clock()
    first, fastest_s = position.step, math.inf  # seconds for an image
    progress = position.validated_progress  # 1 where the run had come to its end
    while progress < 1:
        progress, unsaved_s = agree(_progress(schedule, position, clock()), clock() - saved_s, learner.device)
        waiting = time.perf_counter()
        batch = next(batches, None)
        waited_s = time.perf_counter() - waiting
        if batch is None:
            raise PipelineError(f"the batches end after step {position.step} of {schedule.num_steps}")
        began = time.perf_counter()
        result = learner.step(batch, progress=progress)
        position.step += 1
        num_images = len(batch.image_ids) * learner.world_size
        fastest_s = min(fastest_s, (time.perf_counter() - began) / num_images)
        if not position.num_validations and position.step > first + 1:  # a single slow step says nothing
            position.validation_s = FORWARD_SHARE * fastest_s * schedule.num_val_images
        _note_failures(batch, position, outlets)
        interval.add(result, num_images, waited_s)
        ends = progress >= 1
        validates = ends or _validation_is_due(schedule, position, progress, learner.device, clock())
        reports = ends or validates or clock() - interval.began_s >= schedule.log_s
        if reports:
            outlets.log(interval.line(schedule, position, clock()))
            outlets.chart(interval.numbers(clock()), position.step)
        is_best = validates and _validate(learner, position, outlets, progress, clock)
        if validates or _checkpoint_is_due(schedule, position.step, unsaved_s):
            position.elapsed_s = clock()
            outlets.save(learner, position, is_best)
            saved_s = clock()
        if reports:
            interval = Interval(clock())  # without the validation: the speed is that of the steps
    return position


def agree(progress: float, since_saved_s: float, device: torch.device) -> tuple[float, float]:
    """The first worker's values, on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return progress, since_saved_s
    values = torch.tensor([progress, since_saved_s], dtype=torch.float64, device=device)
    dist.broadcast(values, src=0)
    first, second = values.tolist()
    return first, second


def _progress(schedule: Schedule, position: Position, elapsed_s: float) -> float:
    """Share of the run that is done after the next step: by steps or by the budget, whichever is further."""
    done = (position.step + 1) / schedule.num_steps
    if not schedule.budget_s:
        return min(1.0, done)
    reserve_s = 1.3 * position.validation_s + RESERVE_S
    return min(1.0, max(done, elapsed_s / max(schedule.budget_s - reserve_s, 1e-9)))


def _validation_is_due(
    schedule: Schedule, position: Position, progress: float, device: torch.device, elapsed_s: float
) -> bool:
    """Whether the next of the evenly spread validations is due and, with a budget, cheap enough."""
    marks = (int(p * schedule.num_validations) for p in (progress, position.validated_progress))
    if next(marks) <= next(marks):
        return False
    if not schedule.budget_s:
        return True
    expected_s = position.validations_s + position.validation_s
    affordable, _ = agree(float(expected_s <= VALIDATION_SHARE * elapsed_s), 0.0, device)
    return bool(affordable)


def _checkpoint_is_due(schedule: Schedule, step: int, unsaved_s: float) -> bool:
    """At the steps asked for, and at ends of epochs unless one was kept a moment ago."""
    if schedule.checkpoint_steps and step % schedule.checkpoint_steps == 0:
        return True
    epoch, before = step // schedule.steps_per_epoch, (step - 1) // schedule.steps_per_epoch
    return epoch > before and unsaved_s > EPOCH_CHECKPOINT_S


def _validate(
    learner: Learner, position: Position, outlets: Outlets, progress: float, clock: Callable[[], float]
) -> bool:
    """Measure the averaged weights; whether they are the best so far (of equal ones the last)."""
    began_s = clock()
    position.numbers = outlets.validate(learner.averaged)
    position.validation_s = clock() - began_s
    position.validations_s += position.validation_s
    position.num_validations += 1
    position.validated_progress = progress
    ap = position.numbers["AP"]
    is_best = ap >= position.best_ap
    if is_best:
        position.best_ap, position.best_step = ap, position.step
    classes = "  ".join(f"{n[3:]} {v:.3f}" for n, v in position.numbers.items() if n.startswith("AP/"))
    outlets.log(
        f"validation after step {position.step:,}: AP {ap:.3f}  AP50 {position.numbers['AP50']:.3f}  "
        f"({classes[:200]})  in {position.validation_s:.1f} s{'  best so far' if is_best else ''}"
    )
    outlets.chart({f"val/{name}": value for name, value in position.numbers.items()}, position.step)
    return is_best


def _note_failures(batch: Batch, position: Position, outlets: Outlets) -> None:
    for failure in batch.failures:
        if failure not in position.failures:
            position.failures.append(failure)
            outlets.warn(f"an image can't be used, another one stands in for it: {failure}")


class Interval:
    """Means of the steps since the last progress line."""

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self._steps: list[StepResult] = []
        self._num_images = 0
        self._waited_s = 0.0

    def add(self, result: StepResult, num_images: int, waited_s: float) -> None:
        """Count one step."""
        self._steps.append(result)
        self._num_images += num_images
        self._waited_s += waited_s

    def numbers(self, now_s: float) -> dict[str, float]:
        """By name, for charts."""
        count, seconds = len(self._steps), max(now_s - self.began_s, 1e-9)
        return {
            "loss/boxes": sum(step.box_loss for step in self._steps) / count,
            "loss/classes": sum(step.class_loss for step in self._steps) / count,
            "gradient_norm": sum(step.gradient_norm for step in self._steps) / count,
            "positives_per_step": sum(step.num_positives for step in self._steps) / count,
            "learning_rate": self._steps[-1].rate,
            "images_per_second": self._num_images / seconds,
            "waiting_for_data": self._waited_s / seconds,
        }

    def line(self, schedule: Schedule, position: Position, now_s: float) -> str:
        """One readable line."""
        n = self.numbers(now_s)
        boxes, classes = n["loss/boxes"], n["loss/classes"]
        parts = [
            f"step {position.step:,}/{schedule.num_steps:,}",
            f"epoch {position.step / schedule.steps_per_epoch:.1f}",
            f"loss {boxes + classes:.3f} (boxes {boxes:.3f}, classes {classes:.3f})",
            f"lr {n['learning_rate']:.2g}",
            f"{n['images_per_second']:,.1f} images/s",
            f"{n['waiting_for_data']:.0%} waiting for data",
        ]
        if position.num_validations:
            parts.append(f"best AP {position.best_ap:.3f}")
        return "   ".join(parts)

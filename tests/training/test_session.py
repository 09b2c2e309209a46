"""A run from step to step: when it validates, keeps checkpoints, speaks and ends."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.training.loop import StepResult
from pipeline.training.samples import Batch
from pipeline.training.session import Outlets, Position, Schedule, run_steps

BATCH = Batch(np.zeros((4, 2, 2, 3), np.uint8), [], [], ["a", "b", "c", "d"])
SCHEDULE = Schedule(num_steps=100, steps_per_epoch=10.0, num_val_images=8, num_validations=5)


class Clock:
    """Time that only passes when something is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Run:
    """A learner and outlets that only take notes; a step takes `step_s`, a validation `validation_s`."""

    def __init__(self, *, step_s=1.0, validation_s=2.0, aps=()):
        self.clock = Clock()
        self.step_s, self.validation_s = step_s, validation_s
        self.aps = list(aps)
        self.progress, self.validated, self.saved, self.lines, self.charts = [], [], [], [], []
        self.warnings = []
        self.learner: Any = SimpleNamespace(step=self.step, averaged=None, world_size=1, device="cpu")
        self.position = Position()

    def step(self, batch, *, progress):
        self.clock.now += self.step_s
        self.progress.append(progress)
        return StepResult(1.0, 2.0, 3.0, 0.1, 5)

    def validate(self, model):
        self.clock.now += self.validation_s
        self.validated.append(len(self.progress))
        ap = self.aps.pop(0) if self.aps else 0.5
        return {"AP": ap, "AP50": ap, "AP/disc": ap}

    def save(self, learner, position, is_best):
        self.saved.append((position.step, is_best))

    def go(self, schedule=SCHEDULE, batches=None, position=None):
        outlets = Outlets(
            validate=self.validate,
            save=self.save,
            log=self.lines.append,
            warn=self.warnings.append,
            chart=lambda numbers, step: self.charts.append((step, numbers)),
        )
        return run_steps(
            self.learner,
            iter([BATCH] * 1000 if batches is None else batches),
            schedule=schedule,
            position=position or self.position,
            outlets=outlets,
            clock=self.clock,
        )


def test_progress_is_the_share_of_steps():
    run = Run()
    assert run.go().step == 100
    assert run.progress == pytest.approx([(i + 1) / 100 for i in range(100)])


def test_validations_are_evenly_spread_and_the_last_is_at_the_end():
    run = Run()
    run.go()
    assert run.validated == [20, 40, 60, 80, 100]


def test_the_best_weights_are_marked_and_of_equal_ones_the_last():
    run = Run(aps=[0.3, 0.5, 0.4, 0.5, 0.1])
    position = run.go()
    best = {step for step, is_best in run.saved if is_best}
    assert best == {20, 40, 80}
    assert (position.best_ap, position.best_step) == (0.5, 80)


def test_a_budget_ends_the_run_in_time_with_the_rate_at_its_end():
    run = Run(step_s=1.0, validation_s=3.0)
    run.go(dataclasses.replace(SCHEDULE, num_steps=10_000, budget_s=100.0))
    assert run.progress[-1] == 1.0
    assert run.progress == sorted(run.progress)
    assert 80 <= run.clock.now <= 100
    assert run.validated[-1] == len(run.progress)


def test_dear_validations_are_left_out_of_a_budget_except_the_last():
    run = Run(step_s=1.0, validation_s=30.0)
    run.go(dataclasses.replace(SCHEDULE, num_steps=10_000, budget_s=200.0))
    assert len(run.validated) <= 2
    assert run.clock.now <= 240


def test_a_budget_that_is_never_reached_changes_nothing():
    run = Run(step_s=0.001, validation_s=0.001)
    run.go(dataclasses.replace(SCHEDULE, budget_s=1e6))
    assert len(run.progress) == 100
    assert len(run.validated) == 5


def test_checkpoints_come_at_ends_of_epochs_a_minute_apart_and_every_so_many_steps():
    run = Run(step_s=10.0, validation_s=0.0)
    run.go(dataclasses.replace(SCHEDULE, num_validations=1))
    assert [step for step, _ in run.saved] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    quick = Run(step_s=0.1, validation_s=0.0)
    quick.go(dataclasses.replace(SCHEDULE, num_validations=1, checkpoint_steps=30))
    assert [step for step, _ in quick.saved] == [30, 60, 90, 100]


def test_a_resumed_run_does_what_is_left():
    run = Run()
    run.go(position=Position(step=50, validated_progress=0.4, num_validations=2))
    assert run.progress[0] == pytest.approx(0.51)
    assert run.validated == [10, 30, 50]


def test_a_run_that_was_killed_after_its_end_takes_no_further_step():
    run = Run()
    end = Position(step=42, validated_progress=1.0, num_validations=3)  # a budget ended it
    assert run.go(position=end) is end
    assert (run.progress, run.saved) == ([], [])


@pytest.mark.parametrize("step", [1, 2, 7])
def test_one_slow_step_does_not_end_a_run_with_a_budget(monkeypatch, step):
    run = Run(step_s=0.1)
    monkeypatch.setattr("pipeline.training.session.time", SimpleNamespace(perf_counter=run.clock))
    usual = run.step

    def slow(batch, *, progress):
        run.clock.now += 20 * (len(run.progress) == step - 1)
        return usual(batch, progress=progress)

    run.learner.step = slow
    run.go(dataclasses.replace(SCHEDULE, num_steps=10_000, num_val_images=100, budget_s=100.0))
    assert len(run.progress) > 500
    assert run.progress == sorted(run.progress)


def test_the_speed_after_a_validation_is_that_of_the_steps():
    run = Run(step_s=1.0, validation_s=50.0)
    run.go(dataclasses.replace(SCHEDULE, log_s=5.0))
    speeds = [numbers["images_per_second"] for _, numbers in run.charts if "images_per_second" in numbers]
    assert len(speeds) == 20
    assert speeds == pytest.approx([4.0] * 20)


def test_a_line_names_loss_rate_speed_and_waiting():
    run = Run(step_s=2.0)
    run.go(dataclasses.replace(SCHEDULE, log_s=20.0))
    first = run.lines[0]
    assert first.startswith("step 10/100   epoch 1.0   loss 3.000 (boxes 1.000, classes 2.000)   lr 0.1")
    assert "2.0 images/s" in first
    assert "waiting for data" in first
    assert "best AP" not in first
    assert any("AP 0.500" in line and "disc 0.500" in line for line in run.lines)


def test_images_that_cannot_be_used_are_named_once():
    bad = dataclasses.replace(BATCH, failures=("x.jpg: cut short",))
    run = Run()
    position = run.go(batches=[bad] * 100)
    assert position.failures == ["x.jpg: cut short"]
    assert run.warnings == ["an image can't be used, another one stands in for it: x.jpg: cut short"]


def test_batches_that_end_too_early_are_an_error():
    with pytest.raises(PipelineError, match="end after step 3 of 100"):
        Run().go(batches=[BATCH] * 3)

"""Real kills; the long versions are `python -m tests.chaos.rounds`, `.moments` and `.held`."""

import pytest

from tests.chaos import held, moments, rounds

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("target", ["driver", "raylet", "s3"])
def test_a_kill_and_a_resume_lose_and_repeat_nothing(undisturbed, target):
    source, folder, whole = undisturbed
    rounds.one_round(rounds.TARGETS.index(target), source, whole, folder, target)


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_while_reading_detecting_and_publishing_lose_and_repeat_nothing(undisturbed, seed):
    source, folder, whole = undisturbed
    kills = moments.deadly_run(source, folder, seed, whole)
    assert kills["reader"] >= 2
    assert kills.total() - kills["reader"] == 3  # while a block is detected or published


def test_a_write_that_outlives_its_head_repeats_and_loses_nothing(undisturbed):
    source, folder, whole = undisturbed
    held.held_write(source, folder, whole, "taken", 8)

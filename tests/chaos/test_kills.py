"""Real kills at random moments; the long version is `python -m tests.chaos.rounds --rounds 50`."""

import pytest

from tests.chaos import rounds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The input and the tables of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("chaos")
    rounds.make_input(folder / "in", shards=4, images=100)
    rounds.finish(str(folder / "in"), str(folder / "whole"))
    return folder, rounds.tables(str(folder / "whole"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("target", ["driver", "detector", "reader", "writer"])
def test_a_kill_and_a_resume_lose_and_repeat_nothing(undisturbed, target):
    folder, whole = undisturbed
    rounds.one_round(rounds.TARGETS.index(target), str(folder / "in"), whole, folder, target)

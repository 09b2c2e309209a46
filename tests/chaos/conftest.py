"""What an undisturbed run makes of the input that the chaos tests share."""

import pytest

from tests.chaos.runs import Setting, finish, make_input, tables


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The input, a folder for more outputs, and the tables of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("chaos")
    make_input(folder / "in", shards=4, images=100)
    setting = Setting(str(folder / "in"), str(folder / "whole"))
    finish(setting)
    return setting.source, folder, tables(setting)

"""How Ray is started."""

import os

import pytest
import ray

from pipeline import runtime
from pipeline.errors import PipelineError


def failing(message):
    def init(**settings):
        raise Exception(message)  # as Ray does

    return init


@pytest.fixture
def no_cluster(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_a_machine_too_busy_to_start_ray_is_told_in_one_line(no_cluster, monkeypatch):
    busy = "The current node timed out during startup. This could happen because ..."  # ray/_private/node.py
    monkeypatch.setattr(ray, "init", failing(busy))
    with pytest.raises(PipelineError, match=r"^Ray did not start in time: other programs have the cores.*$"):
        runtime.start_ray()


def test_what_else_ray_raises_at_its_start_is_not_hidden(no_cluster, monkeypatch):
    monkeypatch.setattr(ray, "init", failing("no space left on device"))
    with pytest.raises(Exception, match="no space left on device") as caught:
        runtime.start_ray()
    assert not isinstance(caught.value, PipelineError)

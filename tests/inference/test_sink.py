"""The actor that detects and publishes, called as Ray calls it: by several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from pipeline.inference.lock import LockRef
from pipeline.inference.sink import DetectAndPublish, Target

TARGET = Target(output="out", run="r0001.0", metadata={}, class_names={}, lock=LockRef("out/_run", 1))
BLOCKS = [pa.table({"number": [number]}) for number in range(20)]


class Recording:
    """A detector that writes down what it is given, and in which threads."""

    def __init__(self) -> None:
        self.threads = {threading.get_ident()}
        self.given: list[int] = []
        self.has_two = threading.Event()

    def __call__(self, block: pa.Table) -> pa.Table:
        self.threads.add(threading.get_ident())
        self.given.append(block["number"][0].as_py())
        if len(self.given) == 2:
            self.has_two.set()
        return block


@pytest.fixture
def made():
    """A class that makes a `Recording` and keeps it."""

    class Made(Recording):
        last: Recording

        def __init__(self) -> None:
            super().__init__()
            Made.last = self

    return Made


def published(made, write, monkeypatch, blocks=BLOCKS):
    monkeypatch.setattr("pipeline.inference.sink.write_part", write)
    stage = DetectAndPublish(made, {}, TARGET, monitor=None)
    with ThreadPoolExecutor(4) as calls:
        return list(calls.map(stage, blocks))


def test_detection_goes_on_while_a_part_waits_for_the_store(made, monkeypatch):
    def write(block, **_):
        assert made.last.has_two.wait(30), "the second block waits until the first is published"
        return block

    assert published(made, write, monkeypatch) == BLOCKS


def test_a_detector_is_made_and_called_in_one_thread(made, monkeypatch):
    published(made, lambda block, **_: block, monkeypatch)
    assert sorted(made.last.given) == list(range(len(BLOCKS)))
    assert len(made.last.threads) == 1
    assert threading.get_ident() not in made.last.threads


def test_what_a_detector_or_the_store_raises_is_raised_of_its_block_alone(made, monkeypatch):
    def write(block, **_):
        if block["number"][0].as_py() == 1:
            raise OSError("the store is full")
        return block

    monkeypatch.setattr("pipeline.inference.sink.write_part", write)
    stage = DetectAndPublish(made, {}, TARGET, monitor=None)
    with pytest.raises(OSError, match="full"):
        stage(BLOCKS[1])
    with pytest.raises(KeyError):
        stage(pa.table({}))
    assert stage(BLOCKS[2]) == BLOCKS[2]

"""What workers tell the driver while a run goes: progress lines, and the error that ends it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.errors import PipelineError
from pipeline.runlog import logger


@ray.remote(num_cpus=0)
class Board:
    """Takes progress lines from the workers to the driver, and the error that ends a run."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._told: set[str] = set()
        self._failure: PipelineError | None = None

    def line(self, text: str) -> None:
        """One line to print."""
        self._lines.append(text)

    def once(self, text: str) -> None:
        """One line to print, unless another worker or an earlier step said the same."""
        if text not in self._told:
            self._told.add(text)
            self._lines.append(text)

    def lines(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, error: PipelineError) -> None:
        """What went wrong; the first one counts."""
        self._failure = self._failure or error

    def failure(self) -> PipelineError | None:
        """What went wrong."""
        return self._failure


def failure_on(board: Any) -> PipelineError | None:
    """What a worker reported, if anything."""
    return ray.get(board.failure.remote())


@contextmanager
def showing() -> Iterator[Any]:
    """A board whose lines are printed as they come."""
    board: Any = Board.remote()
    stop = threading.Event()

    def show() -> None:
        for line in ray.get(board.lines.remote()):
            logger.info("%s", line)

    def watch() -> None:
        while not stop.wait(1.0):
            show()

    thread = threading.Thread(target=watch, name="lines", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        show()
        ray.kill(board)

"""What a run knows while it goes: an actor that tasks report to, and the progress line."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions
from ray.util.metrics import Counter as MetricCounter
from ray.util.metrics import Gauge as MetricGauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import InferConfig
from pipeline.errors import PipelineError
from pipeline.inference.plan import Plan
from pipeline.runlog import Counts, Progress, logger

PROGRESS_S = 5.0
BUDGET_FROM = 1_000  # images before the error budget is looked at during the run
BUDGET_FROM_SHARDS = 100  # a run over fewer goes on to its end, however many of them can't be read


@ray.remote(num_cpus=0)
class Monitor:
    """Keeps the weights, adds up what tasks report, tells the error budget, and publishes live metrics."""

    def __init__(
        self, progress: Progress, max_failed_fraction: float, num_others: int, num_shards: int, weights: bytes
    ) -> None:
        self._progress = progress
        self._allowed = max_failed_fraction
        self._num_others = num_others
        self._num_shards = num_shards
        self._weights = weights
        self._unfinished: set[int] = set()
        self._counted: set[str] = set()
        self._metrics = {
            name: MetricCounter(f"shardshot_{name}_total", description=text)
            for name, text in {
                "images": "images with a row",
                "failed": "failed images",
                "detections": "boxes written",
                "bytes": "bytes of encoded images",
                "num_retries": "storage calls repeated",
                "read_s": "seconds spent waiting for storage",
                "decode_s": "seconds spent decoding and resizing",
                "detect_s": "seconds spent in detectors",
                "write_s": "seconds spent publishing parts",
            }.items()
        }
        self._rate = MetricGauge("shardshot_images_per_second", description="steady speed of the run")

    def add(self, part: str, counts: Counts) -> bool:
        """Count one part, once, however often its task was tried; True when the error budget is spent."""
        if part not in self._counted:
            self._counted.add(part)
            self._progress.add(counts)
            for name, metric in self._metrics.items():
                if value := getattr(counts, name):
                    metric.inc(value)
            self._rate.set(self._progress.steady_rate)
        total = self._progress.counts
        return total.failed_shards > self._allowed * max(self._num_shards, BUDGET_FROM_SHARDS) or (
            total.images >= BUDGET_FROM and total.failed > self._allowed * (total.images + self._num_others)
        )

    def weights(self) -> bytes:
        """The weights file, for detectors that start."""
        return self._weights

    def begin(self) -> None:
        """A new pass: nothing is in flight."""
        self._unfinished = set()

    def reading(self, task: int) -> None:
        """A reader began with its group of shards."""
        self._unfinished.add(task)

    def read(self, task: int) -> None:
        """A reader came to the end of its group."""
        self._unfinished.discard(task)

    def unfinished(self) -> list[int]:
        """Groups whose reader began and never came to the end."""
        return sorted(self._unfinished)

    def progress(self) -> Progress:
        """Everything counted so far."""
        return self._progress


def progress_of(plan: Plan) -> Progress:
    """The progress of a plan of which nothing is done yet."""
    loose = sum(item.shard.kind == "image" for item in plan.work)
    return Progress(
        done_before=plan.num_finished_images,
        done_of_packed=sum(len(item.skip) for item in plan.work),
        num_loose=loose,
        num_packed=len(plan.work) - loose,
    )


def _start(progress: Progress, config: InferConfig, weights: bytes, num_shards: int) -> Any:
    """A monitor that runs, on the driver's node: the loss of another one must not end the run.

    A young cluster cancelled one before it ran, for references that were not gone.
    """
    # A retry consists of images that failed before: they are measured by all of the output.
    num_others = progress.done_before if config.retry_failed else 0
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    for last in (False, False, True):
        monitor: Any = Monitor.options(scheduling_strategy=here).remote(
            progress, config.max_failed_fraction, num_others, num_shards, weights
        )
        try:
            ray.get(monitor.begin.remote())
        except ray.exceptions.ActorDiedError:
            if last:
                raise
        else:
            return monitor
    raise AssertionError("unreachable")


@contextmanager
def monitoring(progress: Progress, config: InferConfig, weights: bytes, *, num_shards: int) -> Iterator[Any]:
    """A monitor, and a thread that prints its progress line every few seconds.

    `num_shards` are all of the input.

    Raises:
        PipelineError: the run has failed because the monitor died.
    """
    monitor = _start(progress, config, weights, num_shards)
    stop = threading.Event()

    def report() -> None:
        with suppress(ray.exceptions.RayActorError):  # the run itself fails of it, too
            while not stop.wait(PROGRESS_S):
                progress: Progress = ray.get(monitor.progress.remote())
                if progress.counts.images:
                    logger.info(progress.line())

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield monitor
    except (ray.exceptions.RayError, PipelineError):  # without it detectors can't start, for one
        if _is_gone(monitor):
            raise PipelineError(
                "the process that counts this run has died; what is published stays, "
                "and the same command goes on from there"
            ) from None
        raise
    finally:
        stop.set()
        thread.join()
        ray.kill(monitor)


def _is_gone(monitor: Any) -> bool:
    try:
        ray.get(monitor.unfinished.remote())
    except ray.exceptions.RayActorError:
        return True
    return False

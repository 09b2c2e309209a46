"""The last stage of the chain: an actor that detects in blocks and publishes each as one part."""

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data._internal.execution.interfaces import TaskContext

from pipeline import storage
from pipeline.errors import BudgetError
from pipeline.inference.blocks import STATS, to_tables
from pipeline.inference.ledger import commit
from pipeline.inference.lock import LockRef
from pipeline.runlog import Counts


@dataclass(frozen=True)
class Target:
    """Where and under which name parts are published."""

    output: str
    run: str
    metadata: dict[bytes, bytes]
    class_names: dict[int, str]
    lock: LockRef


class DetectAndPublish:
    """Detects in one block at a time, while other threads take blocks from Ray and publish parts.

    The detector is made and called in one thread of its own: it need not be safe for several, and the blocks
    go through it in the order in which they came.
    """

    def __init__(
        self, detector: type, detector_args: Mapping[str, object], target: Target, monitor: Any
    ) -> None:
        self._thread = ThreadPoolExecutor(1, "detector")
        self._detector = self._thread.submit(detector, **detector_args).result()
        self._target = target
        self._monitor = monitor

    def __call__(self, block: pa.Table) -> pa.Table:
        """Called by several threads at once. Raises: what `write_part` and the detector raise."""
        detected = self._thread.submit(self._detector, block).result()
        return write_part(detected, target=self._target, monitor=self._monitor)


def write_part(block: pa.Table, *, target: Target, monitor: Any) -> pa.Table:
    """Publish a block as one part, exactly once, and return its number of images.

    The part's name comes from Ray's task index, which stays the same when the task is retried: the first
    attempt that publishes counts, another one stops.

    Args:
        block: rows of `DetectImages`.
        target: where to.
        monitor: handle of the run's `Monitor` actor.

    Raises:
        BudgetError: too many images of the run failed.
    """
    written = pa.table({"num_images": pa.array([len(block)], pa.int64())})
    if not len(block):
        return written
    images, boxes = to_tables(block, target.class_names)
    name = f"part-{target.run}-{_block_name()}.parquet"
    start = time.perf_counter()
    commit(target.output, name, images, boxes, target.metadata, lock=target.lock)
    counts = count(block, boxes)
    counts = replace(
        counts,
        write_s=time.perf_counter() - start,
        num_retries=counts.num_retries + storage.take_retries(),
        detectors=frozenset([ray.get_runtime_context().get_actor_id() or ""]),
    )
    if ray.get(monitor.add.remote(name, counts)):
        raise BudgetError("too many images failed")
    return written


def _block_name() -> str:
    """The number of the task, and of its block where Ray gives a task more than one.

    The same when the task is retried: within a task Ray Data (2.60) retries nothing, `max_map_retries` is 0.
    """
    task = TaskContext.get_current()
    assert task is not None
    number = task.kwargs["block"] = task.kwargs.get("block", -1) + 1
    return f"{task.task_idx:06d}" + (f".{number}" if number else "")


def count(block: pa.Table, boxes: pa.Table) -> Counts:
    """What a part holds, for progress and the report."""
    stages = zip(block["error_stage"].to_pylist(), block["error_type"].to_pylist(), strict=True)
    errors = Counter(f"{stage}: {kind}" for stage, kind in stages if stage)
    sizes = {
        row["shard"]: row["shard_size"]
        for row in block.select(["shard", "shard_size", "image_id"]).to_pylist()
        if row["image_id"] != row["shard"]  # a loose image, or a shard that failed as a whole
    }
    stats: dict[str, Any] = {name: float(block[name].to_numpy().sum()) for name in STATS}
    return Counts(
        images=len(block),
        failed=errors.total(),
        failed_shards=int((block["shard_index"].to_numpy() == -1).sum()),
        detections=len(boxes),
        bytes=int(block["num_bytes"].to_numpy().sum()),
        classes=Counter(boxes["class_name"].to_pylist()),
        errors=errors,
        shard_sizes=sizes,
        **stats,
    )

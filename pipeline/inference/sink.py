"""The last stage of the chain: one task publishes one part of the two tables."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block

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


class PartSink(Datasink[Counts]):
    """Writes each bundle of blocks as one part, exactly once.

    The part's name comes from Ray's task index, which stays the same when the task is retried: the first
    attempt that publishes counts, another one stops.
    """

    def __init__(self, target: Target, monitor: Any) -> None:
        self._target = target
        self._monitor = monitor  # handle of the run's Monitor actor

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> Counts:
        """Publish one part and return what it holds."""
        tables = [block for block in blocks if isinstance(block, pa.Table) and len(block)]
        if not tables:
            return Counts()
        block = pa.concat_tables(tables)
        images, boxes = to_tables(block, self._target.class_names)
        name = f"part-{self._target.run}-{ctx.task_idx:06d}.parquet"
        start, retries = time.perf_counter(), storage.num_retries()
        commit(self._target.output, name, images, boxes, self._target.metadata, lock=self._target.lock)
        counts = count(block, boxes)
        counts = replace(
            counts,
            write_s=time.perf_counter() - start,
            num_retries=counts.num_retries + storage.num_retries() - retries,
        )
        if ray.get(self._monitor.add.remote(name, counts)):
            raise BudgetError("too many images failed")
        return counts

    def get_name(self) -> str:
        """The stage's name in Ray's plan and metrics."""
        return "Parts"


def count(block: pa.Table, boxes: pa.Table) -> Counts:
    """What a part holds, for progress and the report."""
    stages = zip(block["error_stage"].to_pylist(), block["error_type"].to_pylist(), strict=True)
    errors = Counter(f"{stage}: {kind}" for stage, kind in stages if stage)
    sizes = {
        row["shard"]: row["shard_size"]
        for row in block.select(["shard", "shard_size", "image_id"]).to_pylist()
        if row["image_id"] != row["shard"]  # a loose image, or a shard that failed as a whole
    }
    return Counts(
        images=len(block),
        failed=errors.total(),
        detections=len(boxes),
        bytes=int(block["num_bytes"].to_numpy().sum()),
        classes=Counter(boxes["class_name"].to_pylist()),
        errors=errors,
        shard_sizes=sizes,
        **{name: float(block[name].to_numpy().sum()) for name in STATS},
    )

"""The last stage of the chain: one task publishes one part of the two tables."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from ray.actor import ActorHandle
from ray.data import Datasink
from ray.data._internal.execution.interfaces import TaskContext
from ray.data.block import Block

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

    def __init__(self, target: Target, monitor: ActorHandle) -> None:
        self._target = target
        self._monitor = monitor

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> Counts:
        """Publish one part and return what it holds."""
        tables = [block for block in blocks if isinstance(block, pa.Table) and len(block)]
        if not tables:
            return Counts()
        block = pa.concat_tables(tables)
        images, boxes = to_tables(block, self._target.class_names)
        name = f"part-{self._target.run}-{ctx.task_idx:06d}.parquet"
        commit(self._target.output, name, images, boxes, self._target.metadata, lock=self._target.lock)
        counts = count(block, boxes)
        if self._report is not None:
            self._report.add.remote(counts)
        return counts

    def get_name(self) -> str:
        """The stage's name in Ray's plan and metrics."""
        return "Parts"


def count(block: pa.Table, boxes: pa.Table) -> Counts:
    """What a part holds, for progress and the report."""
    failed = block.filter(pc.equal(block["status"].cast(pa.string()), "failed"))
    errors = failed.group_by(["error_stage", "error_type"]).aggregate([("image_id", "count")]).to_pylist()
    classes = boxes["class_name"].cast(pa.string()).value_counts().to_pylist()
    sizes = {
        row["shard"]: row["shard_size"]
        for row in block.select(["shard", "shard_size", "image_id"]).to_pylist()
        if row["image_id"] != row["shard"]  # a loose image, or a shard that failed as a whole
    }
    return Counts(
        images=len(block),
        failed=len(failed),
        detections=len(boxes),
        bytes=pc.sum(block["num_bytes"]).as_py(),
        classes={row["values"]: row["counts"] for row in classes},
        errors={f"{row['error_stage']}: {row['error_type']}": row["image_id_count"] for row in errors},
        shard_sizes=sizes,
        **{name: pc.sum(block[name]).as_py() for name in STATS},
    )

"""Many small parts into few: what a run does last.

A merged part names what it replaces, so wherever this stops, `ledger.sweep` finishes it.
"""

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.inference.ledger import columns, commit, delete_parts, part_metadata
from pipeline.inference.lock import LockRef
from pipeline.results.parts import Part, read_parts

# Of a compacted part: a million images at 7 boxes each make twenty. The driver puts it together in memory.
# With 250,000 images at once its peak grew by 178 MiB, with these by 70 (no boxes).
COMPACT_IMAGES = 50_000
COMPACT_DETECTIONS = 500_000


def compact(output: str, parts: Sequence[Part], run: str, *, superseded: bool, lock: LockRef) -> list[Part]:
    """Merge small parts into few, and drop rows that a later round superseded.

    Args:
        output: the output folder.
        parts: those that count; what lands meanwhile is none of them.
        run: id of this run, for the names of the new parts.
        superseded: whether rows of the same image exist twice (after `--retry-failed`): merges everything.
        lock: this run's lock.
    """
    newest = _newest_rounds(output, parts) if superseded else {}
    left = {part.name for part in parts}
    for number, group in enumerate(_groups(parts, everything=superseded)):
        _return_memory()
        name = f"part-{run}.c{number:05d}.parquet"
        _merge(output, group, name, newest, lock)
        left = left - {part.name for part in group} | {name}
        delete_parts(output, "images", {part.name for part in group})
        delete_parts(output, "detections", {part.detections for part in group})
    return read_parts(output, left)


def _return_memory() -> None:
    """Give what this process has freed back to the system: each group left 45 MiB with the allocators."""
    pa.default_memory_pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def _groups(parts: Sequence[Part], *, everything: bool) -> Iterator[list[Part]]:
    """Runs of parts that together stay below the limits; single parts are left alone."""
    small = [part for part in parts if everything or part.num_images < COMPACT_IMAGES // 2]
    group: list[Part] = []
    images = boxes = 0
    for part in small:
        images, boxes = images + part.num_images, boxes + part.num_detections
        if group and (images > COMPACT_IMAGES or boxes > COMPACT_DETECTIONS):
            yield group
            group, images, boxes = [], part.num_images, part.num_detections
        group.append(part)
    if len(group) > 1 or (group and everything):
        yield group


def _newest_rounds(output: str, parts: Sequence[Part]) -> dict[str, int]:
    """For every image that a later round wrote: that round."""
    newest: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: part.round):
        for table in columns(output, [part], ["image_id"]) if part.round else ():
            newest.update(dict.fromkeys(table["image_id"].cast(pa.string()).to_pylist(), part.round))
    return newest


def _merge(output: str, group: Sequence[Part], name: str, newest: dict[str, int], lock: LockRef) -> None:
    """Write one part with the rows of `group`, in input order, that takes their place."""
    filesystem, root = storage.arrow_filesystem(output)
    images, boxes = [], []
    for part in group:
        image_rows = pq.read_table(f"{root}/images/{part.name}", filesystem=filesystem, schema=schema.IMAGES)
        box_rows = pq.read_table(
            f"{root}/detections/{part.detections}", filesystem=filesystem, schema=schema.DETECTIONS
        )
        if newest:
            keep = np.array(
                [newest.get(i, part.round) == part.round for i in image_rows["image_id"].to_pylist()], bool
            )
            image_rows, box_rows = select(image_rows, box_rows, np.flatnonzero(keep))
        images.append(image_rows)
        boxes.append(box_rows)
    image_table, box_table = pa.concat_tables(images), pa.concat_tables(boxes)
    shards = image_table["shard"].combine_chunks()
    rank = np.argsort(np.argsort(shards.dictionary.to_pylist()))  # of each shard by its name
    order = np.lexsort((image_table["shard_index"].to_numpy(), rank[shards.indices.to_numpy()]))
    image_table, box_table = select(image_table, box_table, order)
    last = max(group, key=lambda part: part.round)
    commit(
        output,
        name,
        image_table,
        box_table,
        part_metadata(
            fingerprint=last.fingerprint,
            model=last.model,
            run=last.run,
            round=last.round,
            replaces=[part.name for part in group],
        ),
        lock=lock,
    )


def select(images: pa.Table, boxes: pa.Table, rows: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """The image `rows` and their boxes, in this order; boxes stand in the order of their images."""
    counts = images["num_detections"].to_numpy()
    starts = np.cumsum(counts) - counts
    taken = counts[rows]
    first = np.cumsum(taken) - taken
    box_rows = np.arange(taken.sum()) - np.repeat(first - starts[rows], taken)
    return images.take(rows), boxes.take(box_rows)

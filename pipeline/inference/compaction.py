"""Parts made anew: many small ones into few, which a run does last, or without the rows of changed shards.

Such a part names what it replaces, so wherever this stops, `ledger.sweep` finishes it.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence, Set

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import StorageError
from pipeline.inference.ledger import columns, commit, delete_parts, part_metadata, read_ledger
from pipeline.inference.lock import LockRef
from pipeline.results.parts import Part, read_parts

# Of a compacted part: a million images at 7 boxes each make 67. The driver puts it together in memory. With
# 250,000 images at once its peak grew by 178 MiB, with 50,000 by 57, with 25,000 by 35, with 15,000 by 28.
COMPACT_IMAGES = 15_000
COMPACT_DETECTIONS = 500_000

Keep = Callable[[Part, pa.Table], np.ndarray]
"""Of a part and its images: bool [images], the rows that stay."""


def compact(output: str, parts: Sequence[Part], run: str, *, superseded: bool, lock: LockRef) -> list[Part]:
    """Merge small parts into few, and drop rows that a later round superseded.

    Args:
        output: the output folder.
        parts: those that count; what lands meanwhile is none of them.
        run: id of this run, for the names of the new parts.
        superseded: whether rows of the same image exist twice (after `--retry-failed`): merges everything.
        lock: this run's lock.
    """
    keep = _newest(output, parts) if superseded else None
    left = {part.name for part in parts}
    for number, group in enumerate(_groups(parts, everything=superseded)):
        _return_memory()
        name = f"part-{run}.c{number:05d}.parquet"
        _merge(output, group, name, keep, lock)
        left = left - {part.name for part in group} | {name}
    return read_parts(output, left)


def forget(output: str, parts: Sequence[Part], shards: Set[str], *, lock: LockRef) -> list[Part]:
    """Drop all rows of `shards`; the parts that are left."""

    def keep(part: Part, images: pa.Table) -> np.ndarray:
        return np.array([shard not in shards for shard in images["shard"].to_pylist()], bool)

    left = {part.name for part in parts}
    for number, part in enumerate(parts):
        of_part = (name for table in columns(output, [part], ["shard"]) for name in table["shard"].unique())
        if any(name.as_py() in shards for name in of_part):
            name = f"part-{lock.run}.f{number:05d}.parquet"
            _merge(output, [part], name, keep, lock)
            left = left - {part.name} | {name}
    return read_parts(output, left)


def _return_memory() -> None:
    """Give what this process has freed back to the system: each group left 45 MiB with the allocators."""
    pa.default_memory_pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def _groups(parts: Sequence[Part], *, everything: bool) -> Iterator[Sequence[Part]]:
    """Runs of parts that together stay below the limits; single parts are left alone."""
    groups: list[list[Part]] = [[]]
    images = boxes = 0
    for part in parts:
        if not everything and _is_full(part):
            continue
        images, boxes = images + part.num_images, boxes + part.num_detections
        if images > COMPACT_IMAGES or boxes > COMPACT_DETECTIONS:
            groups.append([])
            images, boxes = part.num_images, part.num_detections
        groups[-1].append(part)
    return (group for group in groups if len(group) > 1 or (group and everything))


def _is_full(part: Part) -> bool:
    """Whether a part is so large that two of its kind are none."""
    return part.num_images >= COMPACT_IMAGES // 2 or part.num_detections >= COMPACT_DETECTIONS // 2


def _newest(output: str, parts: Sequence[Part]) -> Keep:
    """Keeps of each image the row of the latest round; drops that of a shard whose images have arrived."""
    newest: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: part.round):
        for table in columns(output, [part], ["image_id"]) if part.round else ():
            newest.update(dict.fromkeys(table["image_id"].cast(pa.string()).to_pylist(), part.round))
    healed = read_ledger(output, parts).healed_shards()

    def keep(part: Part, images: pa.Table) -> np.ndarray:
        rows = zip(
            images["image_id"].to_pylist(),
            images["shard"].to_pylist(),
            images["shard_index"].to_pylist(),
            strict=True,
        )
        return np.array(
            [
                newest.get(image, part.round) == part.round and not (index == -1 and shard in healed)
                for image, shard, index in rows
            ],
            bool,
        )

    return keep


def _merge(output: str, group: Sequence[Part], name: str, keep: Keep | None, lock: LockRef) -> None:
    """Write one part with the rows of `group` to keep, in input order, that takes their place.

    Raises:
        StorageError: there is such a part, or another run took the output over.
    """
    image_table, box_table = _rows(output, group, keep)
    shards = image_table["shard"].combine_chunks()
    rank = np.argsort(np.argsort(shards.dictionary.to_pylist()))  # of each shard by its name
    order = np.lexsort((image_table["shard_index"].to_numpy(), rank[shards.indices.to_numpy()]))
    image_table, box_table = select(image_table, box_table, order)
    last = max(group, key=lambda part: part.round)
    published = commit(
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
    if not published:  # nothing is deleted before its rows stand elsewhere
        raise StorageError(
            f"{output}/images/{name} exists already: an earlier run had this run's number (were files of "
            "_run/ deleted?); the same command goes on with the next number"
        )
    delete_parts(output, "images", {part.name for part in group})
    delete_parts(output, "detections", {part.detections for part in group})


def _rows(output: str, group: Sequence[Part], keep: Keep | None) -> tuple[pa.Table, pa.Table]:
    """The images of `group` to keep, and their boxes, part by part."""
    filesystem, root = storage.arrow_filesystem(output)
    images, boxes = [], []
    for part in group:
        image_rows = pq.read_table(f"{root}/images/{part.name}", filesystem=filesystem, schema=schema.IMAGES)
        box_rows = pq.read_table(
            f"{root}/detections/{part.detections}", filesystem=filesystem, schema=schema.DETECTIONS
        )
        if keep:
            image_rows, box_rows = select(image_rows, box_rows, np.flatnonzero(keep(part, image_rows)))
            image_rows, box_rows = _without_unused(image_rows), _without_unused(box_rows)
        images.append(image_rows)
        boxes.append(box_rows)
    return pa.concat_tables(images), pa.concat_tables(boxes)


def _without_unused(table: pa.Table) -> pa.Table:
    """The table without names that no row has any more: a shard in a dictionary counts as one with rows."""
    columns = [
        column.cast(column.type.value_type).dictionary_encode()
        if pa.types.is_dictionary(column.type)
        else column
        for column in table.columns
    ]
    return pa.table(columns, names=table.column_names).cast(table.schema)


def select(images: pa.Table, boxes: pa.Table, rows: np.ndarray) -> tuple[pa.Table, pa.Table]:
    """The image `rows` and their boxes, in this order; boxes stand in the order of their images."""
    counts = images["num_detections"].to_numpy()
    starts = np.cumsum(counts) - counts
    taken = counts[rows]
    first = np.cumsum(taken) - taken
    box_rows = np.arange(taken.sum()) - np.repeat(first - starts[rows], taken)
    return images.take(rows), boxes.take(box_rows)

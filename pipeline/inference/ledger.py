"""What an output already holds: the `images/` table read as a ledger, and its upkeep.

A resume is an anti-join against it; `commit` adds a part; `sweep` removes what dead writers left.
"""

import io
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import StorageError
from pipeline.inference.lock import LockRef
from pipeline.results.parts import Part, part_names, read_parts, reading

FOUND = "found.json"
# So long an overtaken writer waits for the new run to look over the output: 10 s for ten million images.
FOUND_TRIES, FOUND_PAUSE_S = 60, 1.0

_TAKEN_OVER = "{}: another run took this output over; this one stops"
_KEY_BITS = 32  # a key is shard code << 32 | shard_index


@dataclass
class Ledger:
    """Which images of which shards are done. Built in one pass, 8 bytes an image."""

    codes: dict[str, int] = field(default_factory=dict)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [shards]: images in the shard, 0 for one that could not be counted."""
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [images], sorted, unique."""
    failed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64: the keys that failed."""
    num_rows: int = 0
    """Rows read; more than `len(keys)` where an image is there twice."""

    def done(self, shard: str, *, count_failed: bool = True) -> np.ndarray:
        """int64: the finished indices of `shard`, ascending; -1 stands for the shard itself."""
        code = self.codes.get(shard)
        if code is None:
            return np.zeros(0, np.int64)
        keys = self._of(self.keys, code)
        if not count_failed:
            keys = np.setdiff1d(keys, self._of(self.failed, code), assume_unique=True)
        return (keys & ((1 << _KEY_BITS) - 1)) - 1

    def is_finished(self, shard: str) -> bool:
        """Whether every image of `shard`, or the shard itself as a failure, has its row."""
        code = self.codes.get(shard)
        return code is not None and bool(self._finished()[code])

    def finished_shards(self) -> set[str]:
        """The names of all finished shards."""
        finished = self._finished()
        return {shard for shard, code in self.codes.items() if finished[code]}

    @property
    def is_superseded(self) -> bool:
        """Whether there are rows whose place later ones took: a run died before it dropped them."""
        return self.num_rows > len(self.keys) or bool(self.healed_shards())

    def healed_shards(self) -> set[str]:
        """Shards that failed as a whole once, and of which every image has a row now."""
        own = self.keys[self.keys & ((1 << _KEY_BITS) - 1) == 0]  # index -1
        given_up = set((own >> _KEY_BITS).tolist())
        return {
            shard
            for shard, code in self.codes.items()
            if code in given_up and len(self._of(self.keys, code)) == self.sizes[code] + 1 > 1
        }

    def _finished(self) -> np.ndarray:
        counted = np.bincount(self.keys >> _KEY_BITS, minlength=len(self.sizes))
        whole = (self.keys & ((1 << _KEY_BITS) - 1)) == 0  # index -1: the shard's own failure
        given_up = np.bincount(self.keys[whole] >> _KEY_BITS, minlength=len(self.sizes)) > 0
        return given_up | ((self.sizes > 0) & (counted == self.sizes))

    def _of(self, keys: np.ndarray, code: int) -> np.ndarray:
        start, end = np.searchsorted(keys, [code << _KEY_BITS, (code + 1) << _KEY_BITS])
        return keys[start:end]


def read_ledger(output: str, parts: Sequence[Part]) -> Ledger:
    """Read the four columns of `images/` that tell what is done.

    Measured with 10 million rows on 2 cores: see `benchmarks/planning.py`.
    """
    ledger = Ledger()
    keys: list[np.ndarray] = []
    sizes: dict[int, int] = {}
    for round_ in sorted({part.round for part in parts}):
        first, failed = len(keys), []
        of_round = [part for part in parts if part.round == round_]
        for key, batch, codes in _keys(output, of_round, ledger.codes):
            keys.append(key)
            failed.append(key[_is_failed(batch)])
            for code, size in zip(codes.tolist(), _largest_sizes(batch, len(codes)), strict=True):
                sizes[code] = max(size, sizes.get(code, 0))
        if len(ledger.failed):  # what runs again and goes well has not failed any more
            ledger.failed = np.setdiff1d(ledger.failed, np.concatenate(keys[first:]))
        ledger.failed = np.unique(np.concatenate([ledger.failed, *failed]))
    ledger.sizes = np.zeros(len(ledger.codes), np.int64)
    for code, size in sizes.items():
        ledger.sizes[code] = size
    ledger.keys, ledger.num_rows = _sorted_unique(keys)
    return ledger


def _is_failed(batch: pa.RecordBatch) -> np.ndarray:
    """Bool [rows]."""
    statuses = batch["status"].dictionary.to_pylist()
    failed = statuses.index("failed") if "failed" in statuses else -1
    return batch["status"].indices.to_numpy() == failed


def _largest_sizes(batch: pa.RecordBatch, num_shards: int) -> list[int]:
    """The `shard_size` of each shard of the batch; rows of a shard's own failure have 0."""
    sizes = np.zeros(num_shards, np.int64)
    rows = batch["shard"].indices.to_numpy().astype(np.intp)  # with these types 7 ns a row, not 50
    np.maximum.at(sizes, rows, batch["shard_size"].to_numpy().astype(np.int64))
    return sizes.tolist()


def _keys(
    output: str, parts: Sequence[Part], codes: dict[str, int]
) -> Iterator[tuple[np.ndarray, pa.RecordBatch, np.ndarray]]:
    """Keys of the rows of each batch, the batch, and the codes of its shards; new shards go into `codes`."""
    for table in columns(output, parts, ["shard", "shard_index", "shard_size", "status"]):
        for batch in table.to_batches():
            names = batch["shard"].dictionary.to_pylist()
            code_of = np.array([codes.setdefault(name, len(codes)) for name in names], np.int64)
            index = batch["shard_index"].to_numpy().astype(np.int64) + 1
            yield (code_of[batch["shard"].indices.to_numpy()] << _KEY_BITS) | index, batch, code_of


def _sorted_unique(arrays: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """All values sorted without repeats, and how many there were; frees the pieces."""
    if not arrays:
        return np.zeros(0, np.int64), 0
    values = np.concatenate(arrays)
    arrays.clear()
    values.sort()
    keep = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=keep[1:])
    return (values if keep.all() else values[keep]), len(keep)


def columns(output: str, parts: Iterable[Part], names: list[str]) -> Iterator[pa.Table]:
    """Some columns of the images `parts`, a row group at a time."""
    filesystem, root = storage.arrow_filesystem(output)
    for part in parts:
        with reading(f"{output}/images/{part.name}"):
            file = pq.ParquetFile(f"{root}/images/{part.name}", filesystem=filesystem)
        for group in range(file.num_row_groups):
            with reading(f"{output}/images/{part.name}"):
                table = file.read_row_group(group, columns=names, use_threads=False)
            yield table


# ---- upkeep ------------------------------------------------------------------------------------------


def sweep(output: str) -> list[Part]:
    """Delete what dead writers left and return the parts that count. The lock must be held.

    Images parts that another one replaced, or whose boxes were swept before it landed; then detections parts
    that nobody names.
    """
    for table in ("images", "detections"):
        storage.delete_unfinished(storage.join(output, table))
    names = part_names(output, "images")
    listed = read_parts(output, names)
    there = part_names(output, "detections")
    parts = [part for part in listed if part.detections in there]
    delete_parts(output, "images", names - {part.name for part in parts})
    delete_parts(output, "detections", there - {part.detections for part in parts})
    return parts


def without_repeats(output: str, parts: Sequence[Part]) -> list[Part]:
    """Delete every part that holds an image of another, newer part of its round; the parts that are left.

    A writer of a dead run may land, and die before it takes its part back, while another run writes the same
    images and dies, too. What is deleted here and isn't in the newer parts runs again.
    """
    newest_first = sorted(parts, key=lambda part: part.name, reverse=True)
    codes: dict[str, int] = {}
    keys, rank = [], []
    for number, part in enumerate(newest_first):
        for found, _, _ in _keys(output, [part], codes):
            keys.append(found)
            rank.append(np.full(len(found), number, np.int32))
    all_keys = np.concatenate([*keys, np.zeros(0, np.int64)])
    ranks = np.concatenate([*rank, np.zeros(0, np.int32)])
    rounds = np.array([part.round for part in newest_first], np.int64)[ranks]
    order = np.lexsort((ranks, rounds, all_keys))
    same = (np.diff(all_keys[order]) == 0) & (np.diff(rounds[order]) == 0) & (np.diff(ranks[order]) != 0)
    repeats = {newest_first[number].name for number in np.unique(ranks[order][1:][same])}
    kept = [part for part in parts if part.name not in repeats]
    boxes = {part.detections for part in parts if part.name in repeats}
    delete_parts(output, "images", repeats)
    # A part that somebody copied under another name has its boxes in the original's file.
    delete_parts(output, "detections", boxes - {part.detections for part in kept})
    return kept


def remove_late(output: str, known: Sequence[Part], run: str, *, lock: LockRef, over: bool) -> list[Part]:
    """Delete what writers of other runs published since `known` was read; the parts that count.

    A writer can outlive its driver (measured: 61 s on another node when the head dies). Boxes that no images
    part names go, too: a writer that died left them. While writers of this run may still live (`over` is
    False), theirs stay.

    Raises:
        StorageError: another run took the output over: all of this is its business now.
    """
    check_held(output, lock)
    boxes = part_names(output, "detections")  # listed first: those of a later images part are not in it
    names = part_names(output, "images")
    ours = {part.name for part in known} | {name for name in names if name.startswith(f"part-{run}.")}
    parts = read_parts(output, names & ours)
    orphans = boxes - {part.detections for part in parts}
    delete_parts(output, "images", names - ours)
    delete_parts(output, "detections", {n for n in orphans if over or not n.startswith(f"part-{run}.")})
    return parts


def check_held(output: str, lock: LockRef) -> None:
    """Raises: StorageError: another run took the output over."""
    if not lock.is_held():
        raise StorageError(_TAKEN_OVER.format(output))


def delete_parts(output: str, table: str, names: set[str]) -> None:
    """Delete files of `table` ("images" or "detections")."""
    storage.delete(storage.join(output, table, name) for name in sorted(names))


# ---- writing a part ----------------------------------------------------------------------------------


def part_metadata(
    *, fingerprint: str, model: str, run: str, round: int, replaces: Sequence[str] = ()
) -> dict[bytes, bytes]:
    """The key-value metadata of both files of a part."""
    return {
        schema.META_VERSION: schema.VERSION.encode(),
        schema.META_FINGERPRINT: fingerprint.encode(),
        schema.META_MODEL: model.encode(),
        schema.META_RUN: run.encode(),
        schema.META_ROUND: str(round).encode(),
        schema.META_REPLACES: json.dumps(list(replaces)).encode(),
    }


def detections_name(name: str) -> str:
    """A name for the detections part of the images part `name` that no other attempt uses."""
    return name.replace(".parquet", f"-{uuid.uuid4().hex[:12]}.parquet")


def to_parquet(table: pa.Table, metadata: dict[bytes, bytes]) -> bytes:
    """A Parquet file of `table` in memory: zstd, dictionaries, statistics, page index, checksums."""
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        buffer,
        compression="zstd",
        compression_level=1,
        write_statistics=True,
        write_page_index=True,
        write_page_checksum=True,
        row_group_size=262_144,
        store_schema=True,
    )
    return buffer.getvalue()


def commit(
    output: str,
    name: str,
    images: pa.Table,
    boxes: pa.Table,
    metadata: dict[bytes, bytes],
    *,
    lock: LockRef,
) -> bool:
    """Publish a part: the boxes under a fresh name, then the images part that names them, only if absent.

    The lock is looked at before publishing, and once more after: a writer that was held up in between takes
    its part back, unless the run that took over counts on it already.

    Returns:
        False where a part of this name exists: another attempt of the same task was first, and counts.

    Raises:
        StorageError: another run took the output over.
    """
    boxes_name = detections_name(name)
    boxes_uri, images_uri = (
        storage.join(output, "detections", boxes_name),
        storage.join(output, "images", name),
    )
    storage.write_atomic(boxes_uri, to_parquet(boxes, metadata))
    named = {
        **metadata,
        schema.META_DETECTIONS_PART: boxes_name.encode(),
        schema.META_NUM_DETECTIONS: str(len(boxes)).encode(),
    }
    published = [boxes_uri]
    if lock.is_held():
        if not storage.create_exclusive(images_uri, to_parquet(images, named)):
            storage.delete([boxes_uri])
            return False
        if lock.is_held():
            return True
        published = [] if _is_counted(output, name, lock) else [images_uri, boxes_uri]
    storage.delete(published)
    raise StorageError(_TAKEN_OVER.format(output))


def record_found(output: str, parts: Sequence[Part], lock: LockRef) -> None:
    """Write down which parts this run counts on, for late writers of older runs: see `commit`."""
    record = {"run": lock.number, "parts": [part.name for part in parts]}
    storage.write_atomic(storage.join(output, "_run", FOUND), json.dumps(record).encode())


def _is_counted(output: str, name: str, lock: LockRef) -> bool:
    """Whether a run after the lock's counts on the part `name`, or will, because it has not looked yet."""
    uri = storage.join(output, "_run", FOUND)
    for _ in range(FOUND_TRIES):
        record: dict[str, Any] = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {"run": 0}
        if record["run"] > lock.number:
            return name in record["parts"]
        time.sleep(FOUND_PAUSE_S)
    return True  # that run died before it looked; the next one will see the part

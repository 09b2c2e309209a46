"""The proof that an output is complete: every image of every shard exactly once, and nothing else.

Reads every column of every part, with the checksums of its pages; memory is 24 bytes an image and the ids of
one part.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.data.shards import Shard, list_shards
from pipeline.errors import DamagedError, StorageError
from pipeline.inference.ledger import Ledger, read_ledger
from pipeline.inference.plan import recorded_shards
from pipeline.results.parts import Part, counting, part_names, read_parts, reading

EXAMPLES = 3  # names shown of each problem


@dataclass(frozen=True)
class Proof:
    """What `verify` found: the counts, and one line for each kind of problem."""

    num_shards: int
    num_images: int
    num_failed: int
    num_detections: int
    num_parts: int
    problems: list[str]


def verify(input_uri: str, output: str) -> Proof:
    """Check the output of `jobs/infer.py` against its input.

    Shards are not opened: their number of images is the one that their reader counted, and a shard whose size
    or etag is another one now is reported.

    Raises:
        ConfigError: no input, or parts of another schema version.
        StorageError: a run changes the output meanwhile.
    """
    shards = list_shards(input_uri)
    with _standing_still(output):
        return _prove(shards, output)


@contextmanager
def _standing_still(output: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"a file of {output} was deleted meanwhile: a run is at work there; wait for its end"
        ) from error


def _prove(shards: Sequence[Shard], output: str) -> Proof:
    names = part_names(output, "images")
    parts, damaged = _described(output, names)
    problems = [
        *damaged.values(),
        *_orphans(output, names - damaged.keys(), parts, complete=not damaged),
        *_one_value("fingerprint", {part.fingerprint for part in parts}),
    ]
    num_detections = 0
    hashes, readable = [], []
    for part in parts:
        ids, boxes, found = _check_part(output, part)
        num_detections += boxes
        problems += found
        if ids is not None:
            hashes.append(ids)
            readable.append(part)
    ledger = read_ledger(output, readable)
    problems += [*_repeated(hashes), *_shards(shards, ledger), *_changed(output, shards)]
    return Proof(
        num_shards=len(shards),
        num_images=len(ledger.keys),
        num_failed=len(ledger.failed),
        num_detections=num_detections,
        num_parts=len(parts),
        problems=problems,
    )


def _described(output: str, names: set[str]) -> tuple[list[Part], dict[str, str]]:
    """The parts that count, and what is wrong with those whose footer is damaged, by name."""
    try:
        return read_parts(output, names), {}
    except DamagedError:
        pass  # one by one, to name them all
    parts, damaged = [], {}
    for name in sorted(names):
        try:
            parts += read_parts(output, [name])
        except DamagedError as error:
            damaged[name] = str(error)
    return counting(parts), damaged


def proof_text(proof: Proof) -> str:
    """The answer for people."""
    if proof.problems:
        return "\n".join(
            [f"not complete, {len(proof.problems)} problems:", *(f"  {p}" for p in proof.problems)]
        )
    return (
        f"complete: {proof.num_shards:,} shards, {proof.num_images:,} images each exactly once "
        f"({proof.num_failed:,} failed), {proof.num_detections:,} detections in {proof.num_parts:,} parts; "
        "no duplicate, no orphan"
    )


def _such_as(names: Sequence[object]) -> str:
    return f"such as {', '.join(map(str, names[:EXAMPLES]))}"


def _one_value(what: str, values: set[str]) -> Iterator[str]:
    if len(values) > 1:
        yield f"parts of {len(values)} different {what}s: {', '.join(sorted(values)[:EXAMPLES])}"


def _orphans(output: str, names: set[str], parts: Sequence[Part], *, complete: bool) -> Iterator[str]:
    """Files that don't count or are missing; `complete`: every images part could be asked what it names."""
    replaced = sorted(names - {part.name for part in parts})
    if replaced:
        yield f"{len(replaced)} images parts were replaced but not deleted, {_such_as(replaced)}"
    there, named = part_names(output, "detections"), {part.detections for part in parts}
    if complete and (orphans := sorted(there - named)):
        yield f"{len(orphans)} detections parts that no images part names, {_such_as(orphans)}"
    if lost := sorted(named - there):
        yield f"{len(lost)} detections parts are missing, {_such_as(lost)}"


def _shards(shards: Sequence[Shard], ledger: Ledger) -> Iterator[str]:
    finished = ledger.finished_shards()
    unseen = [shard.name for shard in shards if shard.name not in ledger.codes]
    if unseen:
        yield f"{len(unseen)} shards have no row, {_such_as(unseen)}"
    partial = [shard.name for shard in shards if shard.name in ledger.codes and shard.name not in finished]
    if partial:
        counts = [
            f"{n} ({len(ledger.done(n))} of {ledger.sizes[ledger.codes[n]]})" for n in partial[:EXAMPLES]
        ]
        yield f"{len(partial)} shards miss images, {_such_as(counts)}"
    if foreign := sorted(ledger.codes.keys() - {shard.name for shard in shards}):
        yield f"{len(foreign)} shards of the output are not in the input, {_such_as(foreign)}"
    if ledger.num_rows > len(ledger.keys):
        yield f"{ledger.num_rows - len(ledger.keys)} rows repeat a position of a shard"


def _changed(output: str, shards: Sequence[Shard]) -> Iterator[str]:
    try:
        before = recorded_shards(output)
    except DamagedError as error:
        yield str(error)
        return
    now = {shard.name: (shard.num_bytes, shard.etag) for shard in shards}
    if changed := [name for name, state in now.items() if before.get(name, state) != state]:
        yield f"{len(changed)} shards changed since they were run, {_such_as(changed)}"


def _check_part(output: str, part: Part) -> tuple[np.ndarray | None, int, list[str]]:
    """Hashes of the part's image ids (None where they can't be read), its boxes, what is wrong with it."""
    problems: list[str] = []
    try:
        rows = _whole(output, "images", part.name, problems)
    except DamagedError as error:
        return None, 0, [str(error)]
    ids, counts = rows["image_id"].to_pylist(), rows["num_detections"].to_pylist()
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    try:
        boxes = _whole(output, "detections", part.detections, problems)
    except FileNotFoundError:
        return hashes, 0, problems  # reported with the orphans
    except DamagedError as error:
        return hashes, 0, [*problems, str(error)]
    of_image = Counter(boxes["image_id"].cast(pa.string()).to_pylist())
    said = Counter({image: count for image, count in zip(ids, counts, strict=True) if count})
    if wrong := sorted(image for image in said | of_image if said[image] != of_image[image]):
        problems.append(
            f"{part.name}: num_detections differs from the rows in {part.detections}, {_such_as(wrong)}"
        )
    return hashes, of_image.total(), problems


def _whole(output: str, table: str, name: str, problems: list[str]) -> pa.Table:
    """Read all of a file, keep its ids and counts; other columns than the schema's are a problem.

    Raises:
        DamagedError: it can't be parsed.
    """
    filesystem, root = storage.arrow_filesystem(output)
    wanted = schema.IMAGES if table == "images" else schema.DETECTIONS
    kept = [column for column in ("image_id", "num_detections") if column in wanted.names]
    with reading(f"{output}/{table}/{name}"):
        file = pq.ParquetFile(
            f"{root}/{table}/{name}", filesystem=filesystem, page_checksum_verification=True
        )
        if not file.schema_arrow.equals(wanted):
            problems.append(f"{table}/{name}: other columns than schema version {schema.VERSION}")
        groups = [file.read_row_group(group).select(kept) for group in range(file.num_row_groups)]
    return pa.concat_tables(groups) if groups else wanted.empty_table().select(kept)


def _repeated(hashes: list[np.ndarray]) -> Iterator[str]:
    """Image ids that stand in more than one row."""
    if not hashes:
        yield "the output has no part"
        return
    values = np.concatenate(hashes)
    values.sort()
    if repeats := int((values[1:] == values[:-1]).sum()):
        yield f"{repeats} image ids stand in more than one row"

"""The proof that an output is complete: every image of every shard exactly once, and nothing else.

Reads the parts one by one; memory is 24 bytes an image.
"""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.data.shards import Shard, list_shards
from pipeline.inference.ledger import Ledger, read_ledger
from pipeline.results.parts import Part, part_names, read_parts

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
    """
    shards = list_shards(input_uri)
    names = part_names(output, "images")
    parts = read_parts(output, names)
    ledger = read_ledger(output, parts)
    problems = [
        *_orphans(output, names, parts),
        *_one_value("fingerprint", {part.fingerprint for part in parts}),
        *_shards(output, shards, ledger),
    ]
    num_detections = 0
    hashes = []
    for part in parts:
        ids, boxes, found = _check_part(output, part)
        hashes.append(ids)
        num_detections += boxes
        problems += found
    problems += _repeated(hashes)
    return Proof(
        num_shards=len(shards),
        num_images=len(ledger.keys),
        num_failed=len(ledger.failed),
        num_detections=num_detections,
        num_parts=len(parts),
        problems=problems,
    )


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


def _orphans(output: str, names: set[str], parts: Sequence[Part]) -> Iterator[str]:
    replaced = sorted(names - {part.name for part in parts})
    if replaced:
        yield f"{len(replaced)} images parts were replaced but not deleted, {_such_as(replaced)}"
    there, named = part_names(output, "detections"), {part.detections for part in parts}
    if orphans := sorted(there - named):
        yield f"{len(orphans)} detections parts that no images part names, {_such_as(orphans)}"
    if lost := sorted(named - there):
        yield f"{len(lost)} detections parts are missing, {_such_as(lost)}"


def _shards(output: str, shards: Sequence[Shard], ledger: Ledger) -> Iterator[str]:
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
    record = storage.join(output, "_run", "shards.parquet")
    if storage.exists(record):
        rows = pq.read_table(io.BytesIO(storage.read_bytes(record))).to_pylist()
        before = {row["name"]: (row["num_bytes"], row["etag"]) for row in rows}
        changed = [
            s.name for s in shards if before.get(s.name, (s.num_bytes, s.etag)) != (s.num_bytes, s.etag)
        ]
        if changed:
            yield f"{len(changed)} shards changed since they were run, {_such_as(changed)}"


def _check_part(output: str, part: Part) -> tuple[np.ndarray, int, list[str]]:
    """Hashes of the part's image ids, its number of boxes, and what is wrong with it."""
    filesystem, root = storage.arrow_filesystem(output)
    problems: list[str] = []
    images = pq.ParquetFile(f"{root}/images/{part.name}", filesystem=filesystem)
    if not images.schema_arrow.equals(schema.IMAGES):
        problems.append(f"images/{part.name}: other columns than schema version {schema.VERSION}")
    rows = images.read(columns=["image_id", "num_detections"])
    ids, counts = np.asarray(rows["image_id"].to_pylist(), object), rows["num_detections"].to_numpy()
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    try:
        boxes = pq.ParquetFile(f"{root}/detections/{part.detections}", filesystem=filesystem)
    except FileNotFoundError:
        return hashes, 0, problems  # reported with the orphans
    if not boxes.schema_arrow.equals(schema.DETECTIONS):
        problems.append(f"detections/{part.detections}: other columns than schema version {schema.VERSION}")
    of_image = Counter(boxes.read(columns=["image_id"])["image_id"].cast(pa.string()).to_pylist())
    said = Counter(
        {image: count for image, count in zip(ids.tolist(), counts.tolist(), strict=True) if count}
    )
    if wrong := sorted(image for image in said | of_image if said[image] != of_image[image]):
        problems.append(
            f"{part.name}: num_detections differs from the rows in {part.detections}, {_such_as(wrong)}"
        )
    return hashes, of_image.total(), problems


def _repeated(hashes: list[np.ndarray]) -> Iterator[str]:
    """Image ids that stand in more than one row."""
    if not hashes:
        yield "the output has no part"
        return
    values = np.concatenate(hashes)
    values.sort()
    if repeats := int((values[1:] == values[:-1]).sum()):
        yield f"{repeats} image ids stand in more than one row"

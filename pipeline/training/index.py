"""Where every training image lies and what is annotated in it: one Arrow table of a whole shard set.

Read once at the start of a run and kept in its folder. With it a task fetches just the images of its batch,
by byte ranges, in any order.
"""

import hashlib
import io
import json
import posixpath
from collections.abc import Sequence
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.annotations import CLASSES_FILE, Annotation, Classes, parse_annotation
from pipeline.data.shards import Shard, list_shards
from pipeline.data.tar import index_tar
from pipeline.errors import ConfigError, ImageError, ShardError

INDEX = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.dictionary(pa.int32(), pa.string())),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # xyxy, xyxy, ... in pixels of the image as displayed
        ("labels", pa.list_(pa.int64())),  # class numbers 1..K
        ("difficult", pa.list_(pa.bool_())),
        ("crowd", pa.list_(pa.bool_())),
    ]
)
_DIGEST = b"shards"


def training_shards(uri: str, *, flag: str) -> list[Shard]:
    """The tars of a shard set that `jobs/make_shards.py` wrote.

    Raises:
        ConfigError: something else is there, or nothing; the message names the flag.
    """
    try:
        shards = list_shards(uri)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--input", flag)) from error
    for shard in shards:
        if shard.kind != "tar" or not shard.uri.endswith(".tar"):
            raise ConfigError(
                f"{flag} {uri}: {shard.name} is no plain .tar; make annotated shards with jobs/make_shards.py"
            )
    return shards


def check_apart(train: Sequence[Shard], val: Sequence[Shard]) -> None:
    """Refuse to measure on what is learnt.

    Raises:
        ConfigError: a shard is in both sets.
    """
    learnt = {storage.absolute(shard.uri) for shard in train}
    if shared := [shard.uri for shard in val if storage.absolute(shard.uri) in learnt]:
        raise ConfigError(
            f"{shared[0]} is in --train and in --val: keep images apart that are never learnt from "
            "(folders are searched at any depth)"
        )


def shards_digest(shards: Sequence[Shard], classes: Classes) -> str:
    """Changes when a shard or a class does."""
    state = [[shard.uri, shard.num_bytes, shard.etag] for shard in shards]
    return hashlib.sha256(json.dumps([state, classes.ids, classes.names]).encode()).hexdigest()


def index_shards(shards: Sequence[Shard], classes: Classes) -> pa.Table:
    """The rows of some shards, in order.

    Raises:
        ConfigError: an image has no annotation or a damaged one.
        ShardError: a tar is damaged.
        StorageError: a tar can't be read.
    """
    return pa.concat_tables([_index_shard(shard, classes) for shard in shards]).unify_dictionaries()


def _index_shard(shard: Shard, classes: Classes) -> pa.Table:
    rows = []
    with _opened(shard) as file:
        for image in index_tar(file, shard.uri):
            image_id = f"{shard.name}/{image.name}"
            if image.problem:
                raise ShardError(f"{shard.uri}: {image.name}: {image.problem}")
            if image.annotation is None:
                raise ConfigError(
                    f"{shard.uri}: {image.name} has no annotation beside it; "
                    "make annotated shards with jobs/make_shards.py"
                )
            file.seek(image.annotation[0])
            rows.append(_row(image_id, shard.uri, image.place, file.read(image.annotation[1]), classes))
    columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in INDEX}
    return pa.table(columns, schema=INDEX)


def _opened(shard: Shard) -> IO[bytes]:
    if storage.is_local(shard.uri):
        return storage.open_input(shard.uri)
    return io.BytesIO(storage.read_bytes(shard.uri, size=shard.num_bytes))


def _row(image_id: str, uri: str, place: tuple[int, int], text: bytes, classes: Classes) -> dict[str, object]:
    try:
        found = parse_annotation(json.loads(text), classes, image_id=image_id)
    except (ImageError, ValueError) as error:
        raise ConfigError(f"{uri}: {error}; make the shards anew with jobs/make_shards.py") from error
    return {
        "image_id": image_id, "uri": uri, "offset": place[0], "size": place[1],
        "width": found.width, "height": found.height, "boxes": found.boxes.ravel(), "labels": found.labels,
        "difficult": found.difficult, "crowd": found.crowd,
    }  # fmt: skip


def annotation(row: dict) -> Annotation:
    """The annotation of a row of the index (`table.slice(i, 1).to_pylist()[0]`)."""
    return Annotation(
        width=row["width"],
        height=row["height"],
        boxes=np.array(row["boxes"], np.float32).reshape(-1, 4),
        labels=np.array(row["labels"], np.int64),
        difficult=np.array(row["difficult"], bool),
        crowd=np.array(row["crowd"], bool),
    )


def save_index(table: pa.Table, uri: str, digest: str) -> None:
    """Keep an index in the run's folder."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_DIGEST: digest.encode()}), buffer, compression="zstd")
    storage.write_atomic(uri, buffer.getvalue())


def load_index(uri: str, digest: str) -> pa.Table | None:
    """The index that a run has kept; None where it has none.

    Raises:
        ConfigError: the shards have changed since.
    """
    if not storage.exists(uri):
        return None
    # Threads of Arrow (26.0) that still hold a Python file when the interpreter ends abort it.
    table = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri))).read(use_threads=False)
    if (table.schema.metadata or {}).get(_DIGEST) != digest.encode():
        name = posixpath.basename(uri)
        raise ConfigError(
            f"the shards or their {CLASSES_FILE} changed since this run began (see {name} in its folder): "
            "give another --output, or --overwrite"
        )
    return table

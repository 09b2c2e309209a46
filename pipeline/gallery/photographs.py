"""Read photographs of a run back from its input, for pictures."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline import storage
from pipeline.config import InferConfig, flags
from pipeline.data.images import decode_image
from pipeline.data.shards import Shard, list_shards, read_shard
from pipeline.errors import ImageError, ShardError, StorageError

logger = logging.getLogger("shardshot")

COLUMNS = ("image_id", "uri", "shard", "shard_index", "shard_size", "width", "height", "status")


def read_photographs(
    images: pd.DataFrame,
    output_uri: str | Path,
    *,
    input_uri: str = "",
    min_size: tuple[int, int] = (800, 800),
) -> Iterator[tuple[str, np.ndarray]]:
    """Decode images of a run, upright, in the order of their shards, with the flags that the run had.

    Those that can't be read any more are left out with a warning.

    Args:
        images: rows of `images/` with `COLUMNS`.
        output_uri: output folder of the run.
        input_uri: where the input is now; where empty, at the URIs of the run.
        min_size: (width, height); large JPEGs are decoded at a reduced scale, but not below this.

    Yields:
        (image_id, uint8 RGB [H, W, 3]).
    """
    given = _flags_of_run(str(output_uri))
    moved = {shard.name: shard for shard in list_shards(input_uri)} if input_uri else {}
    for name, rows in images.groupby("shard", observed=True, sort=True):
        first = rows.iloc[0]
        try:
            shard = moved.get(str(name)) or _shard_of(str(first["uri"]), str(name))
            yield from _read(shard, rows, given, min_size)
        except (ShardError, StorageError) as error:
            logger.warning("no pictures of shard %s: %s", name, error)


def _flags_of_run(output_uri: str) -> dict[str, Any]:
    """Its flags; the defaults where there is no record of them."""
    record = storage.join(output_uri, "_run", "config.json")
    defaults = flags(InferConfig())
    if not storage.exists(record):
        return defaults
    try:
        return defaults | json.loads(storage.read_bytes(record))["flags"]
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is damaged: photographs are read as without flags", record)
        return defaults


def _read(
    shard: Shard, rows: pd.DataFrame, given: Mapping[str, Any], min_size: tuple[int, int]
) -> Iterator[tuple[str, np.ndarray]]:
    wanted = dict(zip(rows["shard_index"].tolist(), rows["image_id"].tolist(), strict=True))
    others = frozenset(range(max(rows["shard_size"].tolist()))) - wanted.keys()
    raws = read_shard(
        shard,
        image_column=given["image_column"] or None,
        id_column=given["id_column"] or None,
        skip=others,
        max_image_bytes=given["max_image_bytes"],
    )
    for raw in raws:
        if raw.data is None or raw.shard_index not in wanted:
            continue
        try:
            image = decode_image(raw.data, max_pixels=given["max_pixels"], min_size=min_size)
            yield wanted[raw.shard_index], image.pixels
        except ImageError as error:
            logger.warning("no picture of %s: %s", raw.image_id, error)


def _shard_of(uri: str, name: str) -> Shard:
    """The shard of an image, from its URI: `tar://member::shard`, a Parquet file or the image itself."""
    if uri.startswith("tar://"):
        kind, uri = "tar", uri.split("::", 1)[1]
    else:
        kind = "parquet" if uri.endswith(".parquet") else "image"
    found = storage.file_info(uri)
    if found is None:
        raise StorageError(f"{uri} is not there any more; name the input where it is now")
    return Shard(name, uri, kind, found.size, found.etag)

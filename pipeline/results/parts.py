"""The parts of an output folder: which files hold its rows.

An `images/` part is created only if absent and names, in its footer, the `detections/` part written before it
and the older parts whose rows it took over. So one listing and the footers tell what counts:

- a part that another one replaces doesn't count (its writer died before deleting it);
- a `detections/` part that no counting `images/` part names doesn't count.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import ConfigError, DamagedError

FOOTER_THREADS = 16  # a small request each: latency counts, not the processor
FOOTERS_AT_ONCE = 1024  # what waits for a thread takes 1 KB


@dataclass(frozen=True, slots=True)
class Part:
    """A committed `images/` part, as its footer describes it."""

    name: str
    detections: str  # name of its detections/ part
    replaces: tuple[str, ...]
    run: str
    round: int
    fingerprint: str
    model: str  # JSON
    num_images: int
    num_detections: int


def read_parts(output: str, names: Iterable[str] | None = None) -> list[Part]:
    """The parts of `output` that count, sorted by name.

    Raises:
        ConfigError: another schema version.
        DamagedError: a part can't be parsed.
    """
    names = sorted(part_names(output, "images") if names is None else names)
    filesystem, root = storage.arrow_filesystem(output)

    def read(name: str) -> Part:
        with reading(f"{output}/images/{name}"):
            footer = pq.read_metadata(f"{root}/images/{name}", filesystem=filesystem)
        return describe(f"{output}/images/{name}", name, footer.metadata or {}, footer.num_rows)

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        starts = range(0, len(names), FOOTERS_AT_ONCE)
        return counting(part for n in starts for part in pool.map(read, names[n : n + FOOTERS_AT_ONCE]))


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turns what pyarrow raises of a damaged part into a `DamagedError` that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(
            f"{uri} can't be read ({error}). If it is damaged, delete this file and run jobs/infer.py again: "
            "it runs what is missing then (with --retry-failed or --redo-changed, if those wrote it)"
        ) from error


def part_names(output: str, table: str) -> set[str]:
    """Names of the Parquet files of `table` ("images" or "detections")."""
    return {name for name in storage.list_names(storage.join(output, table)) if name.endswith(".parquet")}


def counting(parts: Iterable[Part]) -> list[Part]:
    """Without the parts that others replaced."""
    parts = list(parts)
    replaced = {name for part in parts for name in part.replaces}
    return [part for part in parts if part.name not in replaced]


def describe(uri: str, name: str, metadata: Mapping[bytes, bytes], num_images: int) -> Part:
    """Read the footer's key-value `metadata` of the images part at `uri`."""
    version = metadata.get(schema.META_VERSION, b"none").decode()
    if version != schema.VERSION:
        raise ConfigError(
            f"{uri}: schema version {version}, this release reads {schema.VERSION}; "
            "read it with the release that wrote it"
        )
    return Part(
        name=name,
        detections=metadata[schema.META_DETECTIONS_PART].decode(),
        replaces=tuple(json.loads(metadata.get(schema.META_REPLACES, b"[]"))),
        run=sys.intern(metadata[schema.META_RUN].decode()),
        round=int(metadata.get(schema.META_ROUND, b"0")),
        fingerprint=sys.intern(metadata[schema.META_FINGERPRINT].decode()),
        model=sys.intern(metadata.get(schema.META_MODEL, b"{}").decode()),  # kilobytes, the same in all
        num_images=num_images,
        num_detections=int(metadata.get(schema.META_NUM_DETECTIONS, b"0")),
    )

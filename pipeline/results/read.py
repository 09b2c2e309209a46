"""Read the two tables of an output folder back, as data frames.

Only committed parts are read (see `parts`), and where `--retry-failed` published an image again, its newer
rows. Filters and columns are pushed down to Parquet.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline import schema, storage
from pipeline.errors import ConfigError, StorageError
from pipeline.results.parts import Part, read_parts

Name = Literal["detections", "images"]
SCHEMAS = {"detections": schema.DETECTIONS, "images": schema.IMAGES}


def load_detections(
    uri: str | Path,
    *,
    min_score: float | None = None,
    class_names: str | Sequence[str] | None = None,
    image_ids: str | Sequence[str] | None = None,
    columns: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """The boxes of an output folder, one row a box, in the order of the files.

    Args:
        uri: output folder of `jobs/infer.py`, local or in an object store.
        min_score: keep rows with at least this score.
        class_names: keep rows of this class or these classes.
        image_ids: keep rows of this image or these images; parts of files without any are not read.
        columns: columns to read (default: all of `schema.DETECTIONS`); fewer are faster.

    Returns:
        `image_id` is str, `class_name` a category without unused entries, boxes float32 pixels. A folder
        without boxes gives an empty frame of the same dtypes.

    Raises:
        ConfigError: no output there, another schema version, an unknown column or class name, or an argument
            of another type.
        StorageError: a part can't be read.
    """
    output = open_output(uri)
    rows = _keep_boxes(output, min_score, class_names, image_ids)
    return _to_pandas(_table(output, "detections", columns, rows))


def load_images(
    uri: str | Path,
    *,
    status: Literal["ok", "failed"] | None = None,
    columns: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """The images of an output folder, one row an input image, failed ones and those without boxes too.

    Args:
        uri: output folder of `jobs/infer.py`, local or in an object store.
        status: keep images that went well, or that failed.
        columns: columns to read (default: all of `schema.IMAGES`).

    Raises:
        ConfigError: no output there, another schema version, an unknown column or status.
        StorageError: a part can't be read.
    """
    if status not in (None, "ok", "failed"):
        raise ConfigError(f'status={status!r}: choose "ok" or "failed"')
    rows = None if status is None else ds.field("status").isin([status])
    return _to_pandas(_table(open_output(uri), "images", columns, rows))


def iter_detections(
    uri: str | Path,
    *,
    min_score: float | None = None,
    class_names: str | Sequence[str] | None = None,
    image_ids: str | Sequence[str] | None = None,
    columns: str | Sequence[str] | None = None,
    rows_per_frame: int = 131_072,
) -> Iterator[pd.DataFrame]:
    """`load_detections` in pieces, for tables larger than memory.

    The boxes of one image always come in one frame. Frames have about `rows_per_frame` rows or fewer, and
    are never empty. Raises: as `load_detections`.
    """
    output = open_output(uri)
    rows = _keep_boxes(output, min_score, class_names, image_ids)
    wanted = _checked_columns("detections", columns)
    read = wanted if "image_id" in wanted else [*wanted, "image_id"]
    for table in whole_images(read_batches(output, "detections", read, rows, rows_per_frame)):
        yield _to_pandas(table.select(wanted))


# ---- parts -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """An output folder and its parts that count."""

    uri: str
    parts: list[Part]

    @property
    def model(self) -> dict[str, Any]:
        """The header of the checkpoint that the run used."""
        return json.loads(max(self.parts, key=lambda part: part.round).model)


def open_output(uri: str | Path) -> Output:
    """Find the parts of an output folder. Raises: as `load_detections`."""
    uri = str(uri)
    if storage.is_local(uri) and storage.exists(uri):  # a store's listing of it is empty, a disk's an error
        raise ConfigError(f"no results in {uri}: it is a file; name the --output of a run")
    with _reading(uri):
        parts = read_parts(uri)
    if not parts:
        raise ConfigError(f"no results in {uri}: it has no images/*.parquet; name the --output of a run")
    return Output(uri, parts)


# Column chunks of one row group are fetched together in few, large requests.
_FORMAT = ds.ParquetFileFormat(default_fragment_scan_options=ds.ParquetFragmentScanOptions(pre_buffer=True))


def _dataset(output: Output, name: Name, parts: Iterable[Part]) -> ds.FileSystemDataset:
    filesystem, root = storage.arrow_filesystem(output.uri)
    files = [part.name if name == "images" else part.detections for part in parts]
    fragments = [_FORMAT.make_fragment(f"{root}/{name}/{file}", filesystem) for file in files if file]
    return ds.FileSystemDataset(fragments, SCHEMAS[name], _FORMAT, filesystem)


def _datasets(output: Output, name: Name) -> Iterator[tuple[ds.Dataset, ds.Expression | None]]:
    """The parts by round, oldest first, each with the filter that leaves out what a later round replaced."""
    replaced: pa.Table = schema.IMAGES.empty_table().select(["image_id", "shard"])
    found = []
    for round_ in sorted({part.round for part in output.parts}, reverse=True):
        parts = [part for part in output.parts if part.round == round_]
        found.append((_dataset(output, name, parts), _not_replaced(name, replaced)))
        if round_ > 0:
            newer = _dataset(output, "images", parts).to_table(columns=["image_id", "shard"])
            replaced = pa.concat_tables([replaced, newer])
    yield from reversed(found)


def _not_replaced(name: Name, newer: pa.Table) -> ds.Expression | None:
    """Rows whose image has no newer row; the row of a shard that failed whole goes when its images come."""
    if not newer.num_rows:
        return None
    keep = ~ds.field("image_id").isin(newer["image_id"].unique())
    if name == "detections":
        return keep
    shards = newer["shard"].cast(pa.string()).unique()
    return keep & ~((ds.field("shard_index") == -1) & ds.field("shard").isin(shards))


def _table(
    output: Output, name: Name, columns: str | Sequence[str] | None, rows: ds.Expression | None
) -> pa.Table:
    names = _checked_columns(name, columns)
    with _reading(output.uri):
        tables = [
            dataset.to_table(columns=names, filter=_both(rows, keep))
            for dataset, keep in _datasets(output, name)
        ]
    return pa.concat_tables(tables)


def read_batches(
    output: Output, name: Name, columns: list[str], rows: ds.Expression | None, batch_size: int = 131_072
) -> Iterator[pa.RecordBatch]:
    """Record batches in file order; only a few are read ahead, so memory is bounded by row groups."""
    with _reading(output.uri):
        for dataset, keep in _datasets(output, name):
            yield from dataset.to_batches(
                columns=columns,
                filter=_both(rows, keep),
                batch_size=batch_size,
                batch_readahead=4,
                fragment_readahead=1,
            )


def whole_images(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Regroup batches so that none ends in the middle of an image."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        if not batch.num_rows:
            continue
        ids = batch["image_id"].cast(pa.string())
        start = pc.index(ids, ids[-1]).as_py()
        if start == 0 and held and _last_id(held[-1]) == ids[-1].as_py():
            held.append(batch)
            continue
        head = [*held, batch.slice(0, start)]
        if any(piece.num_rows for piece in head):
            yield pa.Table.from_batches(head)
        held = [batch.slice(start)]
    if held:
        yield pa.Table.from_batches(held)


def _last_id(batch: pa.RecordBatch) -> str:
    return batch["image_id"][-1].as_py()


# ---- filters and types -------------------------------------------------------------------------------


def _keep_boxes(
    output: Output,
    min_score: float | None,
    class_names: str | Sequence[str] | None,
    image_ids: str | Sequence[str] | None,
) -> ds.Expression | None:
    rows = None
    if image_ids is not None:
        rows = ds.field("image_id").isin(pa.array(_texts("image_ids", image_ids), pa.string()))
    if min_score is not None:
        if not isinstance(min_score, Real):
            raise ConfigError(f"min_score={min_score!r}: give a number")
        # As float32: 0.7 in a float32 column is 0.69999999, which is less than the float64 0.7.
        rows = _both(rows, ds.field("score") >= pa.scalar(min_score, pa.float32()))
    if class_names is not None:
        names = _texts("class_names", class_names)
        _check_class_names(output, names)
        rows = _both(rows, ds.field("class_name").isin(pa.array(names, pa.string())))
    return rows


def _texts(argument: str, values: str | Iterable[str]) -> list[str]:
    """The values as a list; one text alone is a list of one."""
    found = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    for value in found:
        if not isinstance(value, str):
            raise ConfigError(f"{argument}: {value!r} is no text; give one text or a list of them")
    return found


def _check_class_names(output: Output, names: list[str]) -> None:
    """Refuse a name that the model doesn't have: a typing error would look like an empty result."""
    known = output.model.get("class_names", [])
    unknown = [name for name in names if name not in known]
    if known and unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:5])}, ..."
        raise ConfigError(f"{output.uri}: the model has no class {unknown[0]!r}; {hint}")


def _checked_columns(name: Name, columns: str | Sequence[str] | None) -> list[str]:
    known = SCHEMAS[name].names
    if columns is None:
        return known
    wanted = _texts("columns", columns)
    if unknown := [column for column in wanted if column not in known]:
        raise ConfigError(f"{name} has no column {', '.join(unknown)}; columns: {', '.join(known)}")
    return wanted


def _both(first: ds.Expression | None, second: ds.Expression | None) -> ds.Expression | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    """Text with few distinct values becomes a category without unused entries, `image_id` a string."""
    if "image_id" in table.column_names:
        index = table.column_names.index("image_id")
        table = table.set_column(index, "image_id", table["image_id"].cast(pa.string()))
    frame = table.to_pandas()
    for name, dtype in frame.dtypes.items():
        if isinstance(dtype, pd.CategoricalDtype):
            frame[name] = frame[name].cat.remove_unused_categories()
    return frame


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"{uri}: a part is gone ({error}); was it rewritten meanwhile? Read it again"
        ) from error
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageError(f"{uri}: a part can't be read ({error}); run jobs/verify.py on it") from error

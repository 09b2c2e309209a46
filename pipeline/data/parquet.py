"""The images in a Parquet file: which column they are in, the ids of the rows, and the rows one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.names import clean_name, unique_names
from pipeline.errors import ImageError, ShardError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "data")
ANNOTATION_COLUMN = "annotation"

_BATCH_BYTES = 32 * 1024 * 1024  # decoded at once, of row groups that may hold the whole file


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """One row: its image bytes, or why there are none, and its annotation."""

    index: int
    data: bytes | ImageError
    annotation: object


def index_parquet(file: pq.ParquetFile, uri: str, *, id_column: str | None) -> list[str]:
    """A unique id for each row: the id column's value, the row number where there is none.

    Raises:
        ShardError: there is no such column.
    """
    if id_column is None:
        return [str(row) for row in range(file.metadata.num_rows)]
    names = file.schema_arrow.names
    if id_column not in names:
        raise ShardError(f"{uri}: no column {id_column} (columns: {', '.join(names)}); check --id-column")
    values = file.read(columns=[id_column])[id_column].to_pylist()
    return unique_names([str(row) if v is None else clean_name(str(v)) for row, v in enumerate(values)])


def image_column(schema: pa.Schema, wanted: str | None, uri: str) -> str:
    """The name of the column with the image bytes: `wanted`, one with a usual name, or the only binary one.

    Raises:
        ShardError: there is none, or several and none has a usual name.
    """
    candidates = [field.name for field in schema if holds_bytes(field.type)]
    usual = [name for name in IMAGE_COLUMNS if name in candidates] or candidates
    if wanted in candidates:
        return str(wanted)
    if wanted is None and (len(candidates) == 1 or usual is not candidates):
        return usual[0]
    sought = f"column {wanted} with image bytes" if wanted else "column that is clearly the image bytes"
    raise ShardError(f"{uri}: no {sought} (columns: {', '.join(schema.names)}); give --image-column")


def read_rows(file: pq.ParquetFile, column: str, *, skip: frozenset[int]) -> Iterator[ParquetRow]:
    """The rows in order without those in `skip`; a row group with no other row is not read."""
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if not skip.issuperset(range(start, end)):
            for index, (data, annotation) in enumerate(_read_group(file, group, column), start):
                if index not in skip:
                    yield ParquetRow(index, data, annotation)
        start = end


def _read_group(file: pq.ParquetFile, group: int, column: str) -> Iterator[tuple[bytes | ImageError, object]]:
    """Image and annotation of each row; errors for the rows that a damaged row group can't give."""
    meta = file.metadata.row_group(group)
    columns = [name for name in (column, ANNOTATION_COLUMN) if name in file.schema_arrow.names]
    rows_at_once = max(1, min(1024, _BATCH_BYTES * meta.num_rows // max(meta.total_byte_size, 1)))
    done = 0
    try:
        for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=columns, use_threads=False):
            images = batch.column(column)
            notes = batch.column(ANNOTATION_COLUMN) if len(columns) == 2 else None
            for row in range(batch.num_rows):
                data = _bytes_of(images[row])
                yield data, None if notes is None else _note(notes[row])
                done += 1
    except (pa.ArrowException, OSError) as error:
        message = f"row group {group} is damaged ({' '.join(str(error).split())})"
        for _ in range(done, meta.num_rows):
            yield ImageError(message, stage="read", kind="DamagedRowGroup"), None


def _note(value: pa.Scalar) -> object:
    """An annotation; None for text that isn't UTF-8, which Arrow only finds here."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _bytes_of(value: pa.Scalar) -> bytes | ImageError:
    """The bytes of a binary value, or of a struct {bytes, path} as Hugging Face writes it."""
    if isinstance(value, pa.StructScalar) and value.is_valid:
        value = value["bytes"]
    data = value.as_py()
    if data is None:
        return ImageError("no image bytes in this row (null)", stage="read", kind="NoBytes")
    return data


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values of this type are bytes, or structs with a field `bytes`."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and holds_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)

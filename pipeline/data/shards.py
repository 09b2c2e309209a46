"""Shards -> raw images: tar files, Parquet files and loose image files, from any store.

A shard is fetched and indexed before its first row is yielded, so every row knows how many there are, and a
shard that is cut short is known at once. Every call yields the same rows in the same order.
"""

import fnmatch
import gzip
import io
import json
import logging
import posixpath
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.names import clean_name, is_hidden, is_image_name
from pipeline.data.parquet import holds_bytes, index_parquet, read_rows
from pipeline.data.parquet import image_column as find_image_column
from pipeline.data.tar import Place, index_tar
from pipeline.errors import ConfigError, ImageError, ShardError

logger = logging.getLogger("shardshot")

Kind = Literal["tar", "parquet", "image"]

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
LIST_COLUMNS = ("uri", "url", "path", "image_uri", "image_url", "file")

MAX_IMAGE_BYTES = 256 * 1024 * 1024
# A usual shard (1,000 photographs, 100 MB) stays in memory; more would weigh on small machines, where each
# reader holds one shard and fetches the next.
MAX_BYTES_IN_MEMORY = 256 * 1024 * 1024
MAX_GZIP_RATIO = 100  # photographs hardly shrink; gzip makes up to 1,000 bytes of one
_TEXT = (pa.string(), pa.large_string())
_NUM_LOOKUPS = 32  # requests at a time for the sizes of listed URIs


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    Attributes:
        name: path relative to the input, posix, unique; the beginning of its images' ids.
        uri: where it is.
        kind: "image" is a loose image file, a shard of one.
        num_bytes: its size; 0 where a list names a file that isn't there.
        etag: changes when the file does.
    """

    name: str
    uri: str
    kind: Kind
    num_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class RawImage:
    """One image before decoding.

    Attributes:
        image_id: shard name + "/" + member name (tar) or row id (Parquet); the shard name for a loose file.
            The second and third member of one name get "#2" and "#3" appended.
        uri: a URL that fsspec opens (tar members: `tar://member::shard`), or the Parquet shard.
        shard: name of the shard.
        shard_index: position among the shard's images, from 0.
        shard_size: number of images in the shard.
        data: the file's bytes; None where `error` is set.
        error: why there are no bytes (stage "read").
        annotation: what lies beside the image as JSON (`<key>.json`, column `annotation`); None where nothing
            does, or where it is no JSON object.
        num_bytes: size of the image file, also where it was refused.
    """

    image_id: str
    uri: str
    shard: str
    shard_index: int
    shard_size: int
    data: bytes | None
    error: ImageError | None
    annotation: dict | None
    num_bytes: int = 0


# ---- listing -----------------------------------------------------------------------------------------


def list_shards(input_uri: str) -> list[Shard]:
    """The shards of an input, sorted by name.

    Args:
        input_uri: a folder (searched at any depth, except for what earlier runs wrote there), one shard or
            image file, a pattern such as `s3://b/train-*.tar`, or a .txt or .parquet file that lists URIs
            (one a line; column `uri`, `url` or `path`; relative ones start at the list's folder).

    Raises:
        ConfigError: there is nothing, or nothing that is a shard.
        StorageError: the store refuses.
    """
    file = storage.file_info(input_uri)
    if file is not None:
        listed = _listed_uris(input_uri)
        found = _from_list(input_uri, listed) if listed is not None else [_shard(_name(input_uri), file)]
    else:
        root, files = _files_below(input_uri)
        found = [
            _shard(file.uri[len(root) :].lstrip("/"), file) for file in files if _is_input(file.uri, root)
        ]
        if not found:
            raise ConfigError(_nothing_found(input_uri, files))
        if ignored := len(files) - len(found):
            logger.info("%s: %d shards, %d other files ignored", input_uri, len(found), ignored)
    for shard in found:
        _check_name(shard.uri)
    # Workers may have another working directory.
    found = [replace(shard, uri=storage.absolute(shard.uri)) for shard in found]
    return sorted(found, key=lambda shard: shard.name)


def _files_below(input_uri: str) -> tuple[str, list[storage.FileInfo]]:
    """The folder or pattern `input_uri`: the root that names start from, and the files."""
    files = storage.list_files(input_uri)
    if files or not re.search(r"[*?\[]", input_uri):
        return storage.join(input_uri), _without_tables(files)
    root = posixpath.dirname(re.split(r"[*?\[]", input_uri)[0])
    files = _without_tables(storage.list_files(root))
    return root, [file for file in files if fnmatch.fnmatchcase(file.uri, input_uri)]


def _without_tables(files: list[storage.FileInfo]) -> list[storage.FileInfo]:
    """Without the Parquet files that runs of `jobs/infer.py` wrote: they are no shards."""
    record = "/_run/config.json"
    outputs = [file.uri.removesuffix(record) for file in files if file.uri.endswith(record)]
    tables = tuple(f"{output}/{table}/" for output in outputs for table in ("images", "detections", "_run"))
    return [file for file in files if not (file.uri.startswith(tables) and file.uri.endswith(".parquet"))]


def _is_input(uri: str, root: str) -> bool:
    path = uri[len(root) :]
    return not is_hidden(path) and (is_image_name(path) or path.lower().endswith((*TAR_ENDINGS, ".parquet")))


def _nothing_found(input_uri: str, files: list[storage.FileInfo]) -> str:
    if not files and input_uri.startswith(("http://", "https://")):  # fsspec tells both in the same way
        return f"--input {input_uri}: no such file, or its host can't be reached"
    if not files:
        return f"--input {input_uri}: nothing there (no such file, or an empty folder); check the path"
    return (
        f"--input {input_uri}: none of its {len(files)} files is a .tar, .parquet or image file "
        f"(the first is {_name(files[0].uri)})"
    )


def _shard(name: str, file: storage.FileInfo) -> Shard:
    lower = file.uri.lower()
    kind: Kind = "parquet" if lower.endswith(".parquet") else "image"
    return Shard(name, file.uri, "tar" if lower.endswith(TAR_ENDINGS) else kind, file.size, file.etag)


def _name(uri: str) -> str:
    return posixpath.basename(uri)


def _check_name(uri: str) -> None:
    """Names go into tables as UTF-8; a local file's name can be any bytes."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--input: the file name {clean_name(uri)} is not UTF-8; rename it") from None


def _listed_uris(input_uri: str) -> list[str] | None:
    """The lines of a list of URIs; None where the file is a shard itself."""
    if input_uri.lower().endswith(".txt"):
        lines = storage.read_bytes(input_uri).decode("utf-8-sig", "surrogateescape").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not input_uri.lower().endswith(".parquet"):
        return None
    with storage.open_input(input_uri) as file:
        try:
            schema = pq.read_schema(file)
            texts = [field.name for field in schema if field.type in _TEXT]
            columns = [name for name in LIST_COLUMNS if name in texts]
            if not columns or any(holds_bytes(field.type) for field in schema):
                return None
            return pq.read_table(file, columns=columns[:1])[0].drop_null().to_pylist()
        except pa.ArrowException:
            return None  # a damaged shard: one failed row, not the end of the run


def _from_list(list_uri: str, listed: list[str]) -> list[Shard]:
    """Shards named by a list; their names are the lines as written, so that a longer list changes no id."""
    if not listed:
        raise ConfigError(f"--input {list_uri}: the list is empty")
    name, count = Counter(listed).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"--input {list_uri}: lists {clean_name(name)} {count} times; list each file once")
    folder = posixpath.dirname(list_uri)

    def look_up(name: str) -> Shard:
        absolute = "://" in name or name.startswith("/")
        uri = name if absolute or not folder else storage.join(folder, name)
        _check_name(uri)
        return _shard(name, storage.file_info(uri) or storage.FileInfo(uri, 0, ""))

    with ThreadPoolExecutor(_NUM_LOOKUPS) as pool:
        return list(pool.map(look_up, listed))


# ---- reading -----------------------------------------------------------------------------------------


def read_shard(
    shard: Shard,
    *,
    image_column: str | None = None,
    id_column: str | None = None,
    skip: frozenset[int] = frozenset(),
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> Iterator[RawImage]:
    """The images of a shard, in order.

    Args:
        shard: one of `list_shards`.
        image_column: Parquet: the column with the image bytes; found by type and name where None.
        id_column: Parquet: a column with ids; row numbers where None.
        skip: indices to leave out.
        max_image_bytes: larger images become errors, unread.

    Raises:
        ShardError: the shard can't be opened or counted.
        StorageError: it can't be fetched.
    """
    if shard.kind == "image":
        if 0 not in skip:
            yield _read_loose(shard, max_image_bytes)
        return
    with _fetched(shard) as file:
        if shard.kind == "tar":
            yield from _read_tar(shard, file, skip, max_image_bytes)
        else:
            yield from _read_parquet(
                shard,
                file,
                image_column=image_column,
                id_column=id_column,
                skip=skip,
                max_image_bytes=max_image_bytes,
            )


def _read_loose(shard: Shard, max_image_bytes: int) -> RawImage:
    data, error = None, _size_error(shard.num_bytes, max_image_bytes)
    if error is None:
        data = storage.read_bytes(shard.uri, size=shard.num_bytes)
    return RawImage(shard.name, shard.uri, shard.name, 0, 1, data, error, None, shard.num_bytes)


def _size_error(num_bytes: int, max_image_bytes: int) -> ImageError | None:
    if num_bytes <= max_image_bytes:
        return None
    message = f"{num_bytes:,} bytes are more than the limit of {max_image_bytes:,}"
    return ImageError(message, stage="read", kind="TooManyBytes")


@contextmanager
def _fetched(shard: Shard) -> Iterator[IO[bytes]]:
    """The whole shard as a local, seekable file: in memory up to MAX_BYTES_IN_MEMORY, else on disk."""
    if storage.is_local(shard.uri):
        with storage.open_input(shard.uri) as file, _unpacked(file, shard) as tar:
            yield tar
    elif shard.num_bytes <= MAX_BYTES_IN_MEMORY:
        data = io.BytesIO(storage.read_bytes(shard.uri, size=shard.num_bytes))
        with _unpacked(data, shard) as tar:
            yield tar
    else:
        with tempfile.NamedTemporaryFile(prefix="shardshot-") as copy:
            storage.download(shard.uri, copy.name, size=shard.num_bytes)
            with open(copy.name, "rb") as file, _unpacked(file, shard) as tar:
                yield tar


@contextmanager
def _unpacked(file: IO[bytes], shard: Shard) -> Iterator[IO[bytes]]:
    """`file`, or what a gzip file holds.

    Raises:
        ShardError: it can't be read; a damaged gzip file, or one that would fill the disk.
    """
    try:
        is_gzip = file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise ShardError(f"{shard.uri}: can't be read ({error})") from error
    limit = max(MAX_BYTES_IN_MEMORY, MAX_GZIP_RATIO * file.seek(0, io.SEEK_END))
    file.seek(0)
    if not is_gzip:
        yield file
        return
    with tempfile.SpooledTemporaryFile(MAX_BYTES_IN_MEMORY) as copy:
        try:
            with gzip.open(file) as packed:
                while block := packed.read(1 << 20):
                    copy.write(block)
                    if copy.tell() > limit:
                        raise ShardError(
                            f"{shard.uri}: its gzip holds over {MAX_GZIP_RATIO} times its size; "
                            "unpack it yourself, if it is no bomb"
                        )
        except (EOFError, OSError, zlib.error) as error:
            raise ShardError(f"{shard.uri}: damaged gzip file ({error})") from error
        copy.seek(0)
        yield cast("IO[bytes]", copy)


# ---- tar and Parquet ---------------------------------------------------------------------------------


def _read_tar(
    shard: Shard, file: IO[bytes], skip: frozenset[int], max_image_bytes: int
) -> Iterator[RawImage]:
    images = index_tar(file, shard.uri)
    for index, image in enumerate(images):
        if index in skip:
            continue
        error = _size_error(image.place[1], max_image_bytes)
        if image.problem:
            error = ImageError(image.problem, stage="read", kind="NotAFile")
        data = annotation = None
        try:
            data = None if error else _read_at(file, image.place)
            annotation = _parse_annotation(_read_at(file, image.annotation)) if image.annotation else None
        except OSError as failure:  # a bad sector costs the images that it holds
            error = ImageError(f"can't be read ({failure})", stage="read", kind=type(failure).__name__)
        yield RawImage(
            image_id=f"{shard.name}/{image.name}",
            uri=f"tar://{image.name}::{shard.uri}",
            shard=shard.name,
            shard_index=index,
            shard_size=len(images),
            data=None if error else data,
            error=error,
            annotation=annotation,
            num_bytes=image.place[1],
        )


def _read_at(file: IO[bytes], place: Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _read_parquet(
    shard: Shard,
    file: IO[bytes],
    *,
    image_column: str | None,
    id_column: str | None,
    skip: frozenset[int],
    max_image_bytes: int,
) -> Iterator[RawImage]:
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        column = find_image_column(parquet.schema_arrow, image_column, shard.uri)
        ids = index_parquet(parquet, shard.uri, id_column=id_column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{shard.uri}: not a readable Parquet file ({error})") from error
    for row in read_rows(parquet, column, skip=skip):
        data, error = (None, row.data) if isinstance(row.data, ImageError) else (row.data, None)
        num_bytes = len(data or b"")
        error = error or _size_error(num_bytes, max_image_bytes)
        yield RawImage(
            image_id=f"{shard.name}/{ids[row.index]}",
            uri=shard.uri,
            shard=shard.name,
            shard_index=row.index,
            shard_size=len(ids),
            data=None if error else data,
            error=error,
            annotation=_parse_annotation(row.annotation),
            num_bytes=num_bytes,
        )


def _parse_annotation(value: object) -> dict | None:
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None

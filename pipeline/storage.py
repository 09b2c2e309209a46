"""Every access to files and object stores: local paths and any fsspec URL, with retries.

The only module that touches fsspec and `pyarrow.fs`. Credentials and endpoints come from each store's usual
environment variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...).
"""

import contextlib
import errno
import io
import os
import posixpath
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar, cast

import fsspec
import pyarrow
import pyarrow.fs
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StorageError

ATTEMPTS = 8  # with the pauses below: gives up after about 30 s of trouble
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
MANY_FILES = 10  # to delete: a request for all and a listing cost less than one each
READ_AHEAD_BYTES = 1 << 20  # of files that are read from end to end
_UNFINISHED = ".tmp"  # ends the names of local files that are being written

# botocore/S3 and HTTP answers that are worth another try.
_TRANSIENT_CODES = {
    "500", "502", "503", "504", "408", "429", "InternalError", "RequestTimeout", "RequestTimeTooSkewed",
    "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
    "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip
_TRANSIENT_ERRNOS = {
    errno.EBUSY, errno.EAGAIN, errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, errno.ESTALE,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip
# Errors of libraries that are loaded only when their kind of URL is used, so they are told by name.
_TRANSIENT_NAMES = {
    "ClientPayloadError", "ConnectionClosedError", "ConnectTimeoutError", "EndpointConnectionError",
    "FlexibleChecksumError", "HTTPClientError", "IncompleteRead", "IncompleteReadError", "ReadTimeoutError",
    "ResponseStreamingError", "ServerDisconnectedError", "ServerTimeoutError", "ClientOSError",
    "ClientConnectorError", "ClientConnectionResetError", "SocketTimeoutError",
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a listing; `etag` is the store's ETag, else the modification time."""

    uri: str
    size: int
    etag: str


class TruncatedError(OSError):
    """A body ended before its announced length."""


# ---- paths -------------------------------------------------------------------------------------------


def split(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri` and the path in it. Raises: StorageError for an unknown protocol."""
    options: dict[str, Any] = {}
    if uri.startswith(("s3://", "s3a://")):
        # Listings change under us (other writers); retries are ours, so that they are counted.
        options = {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    try:
        fs, path = url_to_fs(uri, **options)
        if hasattr(fs, "retries"):
            fs.retries = 1
        return fs, path
    except (ImportError, ValueError) as error:
        raise StorageError(f"{uri}: {error}") from error


def join(uri: str, *parts: str) -> str:
    """`uri` with path segments appended."""
    return posixpath.join(uri.rstrip("/") if len(uri) > 1 else uri, *parts)


def is_local(uri: str) -> bool:
    """Whether `uri` is on a file system of this machine."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def absolute(uri: str) -> str:
    """`uri` for processes with another working directory; URLs stay as they are."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A pyarrow file system and the path in it, for Parquet readers."""
    fs, path = split(uri)
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(_Ranges(fs)), path


class _Ranges(pyarrow.fs.FSSpecHandler):
    """Fetches the ranges that are asked for and no more, and repeats what fails.

    fsspec's read-ahead of 50 MB fetched twice the size of a file to read 23 % of its columns (measured).
    """

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        what = f"looking for {' '.join(paths[:1])}"
        return _retry(what, lambda: pyarrow.fs.FSSpecHandler.get_file_info(self, paths))

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        return pyarrow.PythonFile(_RangeFile(self.fs, path), mode="r")


class _RangeFile(io.RawIOBase):
    """A file of a store whose reads are requests for a range, repeated where they fail."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self._path, self._position = fs, path, 0
        info = _retry(f"looking for {path}", lambda: fs.info(path), absent_ok=True)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "not a file", path)
        self._size = int(info["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._size - self._position, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        start, self._position = self._position, self._position + wanted

        def fetch() -> bytes:
            data = cast("bytes", self._fs.cat_file(self._path, start=start, end=start + wanted))
            if len(data) < wanted:
                raise TruncatedError(f"the body ended after {len(data)} of {wanted} bytes")
            return data

        return _retry(f"reading {self._path}", fetch) if wanted else b""

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


# ---- reading -----------------------------------------------------------------------------------------


def list_files(uri: str) -> list[FileInfo]:
    """All files below `uri` at any depth, sorted by URI; none where nothing is there.

    Raises:
        StorageError: the bucket is missing or access is denied.
    """
    return sorted(_list(uri), key=lambda file: file.uri)


def list_names(uri: str) -> set[str]:
    """The names of the files directly in folder `uri`."""
    fs, path = split(uri)

    def names() -> set[str]:
        fs.invalidate_cache()
        try:
            # Without the folder itself, which an empty object "folder/" of a console stands for.
            return {posixpath.basename(p) for p in fs.ls(path, detail=False)} - {""}
        except FileNotFoundError:
            return set()

    return _retry(f"listing {uri}", names)


def file_info(uri: str) -> FileInfo | None:
    """Size and etag of the file `uri`; None where it is absent or a folder."""
    fs, path = split(uri)

    def info() -> FileInfo | None:
        fs.invalidate_cache()
        try:
            found = fs.info(path)
        except FileNotFoundError:
            return None
        return FileInfo(uri, int(found["size"] or 0), _etag(found)) if found["type"] == "file" else None

    return _retry(f"looking for {uri}", info)


def exists(uri: str) -> bool:
    """Whether the file `uri` exists."""
    return file_info(uri) is not None


def read_bytes(uri: str, *, size: int | None = None) -> bytes:
    """The whole file; `size`, where known, must be its length (a cut body is read again).

    Raises:
        StorageError: it can't be read after the retries.
    """
    fs, path = split(uri)

    def read() -> bytes:
        data = cast("bytes", fs.cat_file(path))
        if size is not None and len(data) < size:
            raise TruncatedError(f"the body ended after {len(data)} of {size} bytes")
        return data

    return _retry(f"reading {uri}", read)


def read_ranges(uri: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """Pieces of a file, each given as (offset, size); stores are asked for all of them at once.

    Raises:
        StorageError: the file can't be read after the retries, or is shorter than that.
    """
    fs, path = split(uri)
    starts = [offset for offset, size in places if size]  # a range of no bytes can't be asked for
    ends = [offset + size for offset, size in places if size]

    def read() -> list[bytes]:
        if is_local(uri):
            with open(path, "rb") as file:
                pieces = [os.pread(file.fileno(), size, offset) for offset, size in places]
        else:
            found = iter(fs.cat_ranges([path] * len(starts), starts, ends, on_error="raise"))
            pieces = [cast("bytes", next(found)) if size else b"" for _, size in places]
        for piece, (offset, size) in zip(pieces, places, strict=True):
            if len(piece) < size:
                raise TruncatedError(f"{size} bytes wanted at {offset:,}, only {len(piece)} are there")
        return pieces

    return _retry(f"reading {uri}", read)


def download(uri: str, path: str, *, size: int | None = None) -> None:
    """Copy the file `uri` to the local `path`, for files too large for memory. Raises: StorageError."""
    fs, source = split(uri)

    def get() -> None:
        fs.get_file(source, path)
        if size is not None and os.path.getsize(path) < size:
            raise TruncatedError(f"the body ended after {os.path.getsize(path)} of {size} bytes")

    _retry(f"downloading {uri}", get)


def open_input(uri: str) -> IO[bytes]:
    """A seekable file to read ranges from. Raises: StorageError."""
    fs, path = split(uri)
    if is_local(uri):
        return cast("IO[bytes]", _retry(f"opening {uri}", lambda: fs.open(path, "rb")))
    try:
        return io.BufferedReader(_RangeFile(fs, path), READ_AHEAD_BYTES)
    except FileNotFoundError as error:
        raise StorageError(f"opening {uri}: {_explain(error)}") from error


# ---- writing -----------------------------------------------------------------------------------------


def write_atomic(uri: str, data: bytes) -> None:
    """Write the file whole or not at all, replacing an older one. Raises: StorageError."""
    fs, path = split(uri)
    if is_local(uri):
        _retry(f"writing {uri}", lambda: _replace_local(path, data))
    else:
        _retry(f"writing {uri}", lambda: fs.pipe_file(path, data))


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write the file only if there is none of this name; False where there is.

    Exact on local disks (hard link) and on stores with conditional writes (S3 `If-None-Match: *`). Stores
    that ignore the condition overwrite: see `honours_exclusive`.
    A retry after a lost answer finds our own file, so the same bytes count as created: let `data` be unique
    to its writer.
    """
    fs, path = split(uri)

    def create() -> bool:
        try:
            if is_local(uri):
                _link_local(path, data)
            else:
                fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return fs.cat_file(path) == data
        return True

    return _retry(f"creating {uri}", create)


def honours_exclusive(folder: str) -> bool:
    """Whether the store of `folder` really refuses to create a file twice (probed with a small file).

    Raises:
        StorageError: files can't be created there, or not be deleted.
    """
    probe = join(folder, f"probe-{uuid.uuid4().hex}")
    create_exclusive(probe, b"1")
    honoured = not create_exclusive(probe, b"2")
    delete([probe])
    return honoured


def delete(uris: Iterable[str]) -> None:
    """Delete files; those already gone are fine. Raises: StorageError."""
    uris = list(uris)
    if not uris:
        return
    what = f"deleting {len(uris):,} files such as {uris[0]}"
    fs, _ = split(uris[0])
    paths = [split(uri)[1] for uri in uris]
    if len(paths) >= MANY_FILES and not isinstance(fs, LocalFileSystem):
        paths = _left_after_bulk(fs, paths, what)

    def remove(path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)

    for path in paths:
        _retry(what, partial(remove, path))


def _left_after_bulk(fs: fsspec.AbstractFileSystem, paths: list[str], what: str) -> list[str]:
    """Delete files of a store in requests for many; those that are still there.

    s3fs (2026.9) says nothing of files that S3 refuses to delete in such a request.
    """

    def remove(batch: list[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(batch)

    def names(folder: str) -> list[str]:
        fs.invalidate_cache()
        try:
            return fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []

    for batch in _batches(paths, 500):
        _retry(what, partial(remove, batch))
    there: set[str] = set()
    for folder in {posixpath.dirname(path) for path in paths}:
        there.update(_retry(what, partial(names, folder)))
    return [path for path in paths if path in there]


def delete_folder(uri: str) -> None:
    """Delete everything below `uri`."""
    delete(file.uri for file in _list(uri))


def delete_unfinished(uri: str) -> None:
    """Delete what killed writers left of files in the folder `uri`; object stores keep nothing of these."""
    if is_local(uri):
        names = list_names(uri)
        delete(join(uri, name) for name in names if name.startswith(".") and name.endswith(_UNFINISHED))


# ---- retries -----------------------------------------------------------------------------------------

_retries = 0
_taken_retries = 0
_retries_lock = threading.Lock()


def num_retries() -> int:
    """Calls repeated in this process so far."""
    return _retries


def take_retries() -> int:
    """Calls repeated that nobody has taken yet: each is counted once, whichever thread asks."""
    global _taken_retries
    with _retries_lock:
        new, _taken_retries = _retries - _taken_retries, _retries
    return new


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: throttling, 5xx, resets, time-outs, cut bodies."""
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError, TruncatedError)):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        return bool({code, status} & _TRANSIENT_CODES)
    if str(getattr(error, "code", "")) in _TRANSIENT_CODES:  # gcsfs.retry.HttpError
        return True
    if {kind.__name__ for kind in type(error).__mro__} & _TRANSIENT_NAMES:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and isinstance(error, OSError) and is_transient(cause)


def _retry(what: str, call: Callable[[], T], *, absent_ok: bool = False) -> T:
    """Call until it works, with jittered exponential pauses; errors become StorageError.

    With `absent_ok` a FileNotFoundError stays one.
    """
    global _retries
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except StorageError:
            raise
        except FileNotFoundError as error:
            if absent_ok:
                raise
            raise StorageError(f"{what}: {_explain(error)}") from error
        except Exception as error:  # stores raise their own classes: sorted by is_transient
            if not is_transient(error) or attempt == ATTEMPTS - 1:
                raise StorageError(f"{what}: {_explain(error)}") from error
            with _retries_lock:
                _retries += 1
            pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
            time.sleep(pause_s * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _explain(error: BaseException) -> str:
    """One line in plain words: what the store said and what to check; never a credential."""
    name = type(error).__name__
    text = " ".join(str(error).split()) or name
    if isinstance(error, FileNotFoundError):
        return f"no such file, folder or bucket ({text}); check the path"
    if isinstance(error, PermissionError) or "Forbidden" in text or "AccessDenied" in text:
        return f"access denied ({text}); check the credentials and the bucket's policy"
    if name in {"NoCredentialsError", "PartialCredentialsError"}:
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role"
    if name in {"EndpointConnectionError", "ClientConnectorError"}:
        return f"can't reach the store ({text}); check AWS_ENDPOINT_URL and the network"
    return f"{name}: {text}"


# ---- local files and listings ------------------------------------------------------------------------


@contextlib.contextmanager
def _temporary_beside(path: str, data: bytes) -> Iterator[str]:
    """The path of a hidden file of `data` in the folder of `path`; gone at the end, unless it was renamed."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the name without the bytes
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _replace_local(path: str, data: bytes) -> None:
    with _temporary_beside(path, data) as temporary:
        os.replace(temporary, path)


def _link_local(path: str, data: bytes) -> None:
    with _temporary_beside(path, data) as temporary:
        os.link(temporary, path)  # fails with FileExistsError; a rename would overwrite


def _list(uri: str) -> Iterator[FileInfo]:
    fs, path = split(uri)
    if is_local(uri):
        yield from _list_local(uri, path)
        return

    def find() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        return cast("dict[str, dict[str, Any]]", fs.find(path, detail=True))

    root = path.rstrip("/")
    for found_path, info in _retry(f"listing {uri}", find).items():
        relative = found_path[len(root) :].lstrip("/")
        if info["type"] == "file" and relative:
            yield FileInfo(join(uri, relative), int(info["size"] or 0), _etag(info))


def _list_local(uri: str, path: str) -> Iterator[FileInfo]:
    """os.scandir is ten times faster than fsspec's generic walk at 100,000 files."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                child = join(uri, entry.name)
                if entry.is_dir():
                    yield from _list_local(child, entry.path)
                elif entry.is_file() and not entry.name.endswith(_UNFINISHED):
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:  # renamed or deleted since
                        continue
                    yield FileInfo(child, stat.st_size, str(stat.st_mtime_ns))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"listing {uri}: {_explain(error)}") from error


def _etag(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "updated"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""Storage: the same behaviour on a local disk and on S3, clear errors, retries that are counted."""

import errno
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import StorageError
from tests import servers


@pytest.fixture(scope="module")
def s3():
    with servers.moto() as environment:
        yield environment


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path, monkeypatch, s3):
    if request.param == "local":
        return str(tmp_path / "folder")
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{abs(hash(request.node.name)):x}"
    fs, _ = storage.split(f"s3://{bucket}")
    fs.mkdir(bucket)
    return f"s3://{bucket}/folder"


def test_what_is_written_is_read_and_listed(folder):
    storage.write_atomic(f"{folder}/a/x.bin", b"one")
    storage.write_atomic(f"{folder}/b.bin", b"")
    storage.write_atomic(f"{folder}/a/x.bin", b"three")
    assert storage.read_bytes(f"{folder}/a/x.bin") == b"three"
    files = storage.list_files(folder)
    assert [(file.uri, file.size) for file in files] == [(f"{folder}/a/x.bin", 5), (f"{folder}/b.bin", 0)]
    assert all(file.etag for file in files)
    assert storage.list_names(folder) == {"a", "b.bin"}
    with storage.open_input(f"{folder}/a/x.bin") as file:
        file.seek(2)
        assert file.read() == b"ree"


def test_an_etag_changes_with_the_content(folder):
    storage.write_atomic(f"{folder}/x", b"one")
    before = storage.file_info(f"{folder}/x")
    storage.write_atomic(f"{folder}/x", b"two")
    assert before is not None
    assert storage.file_info(f"{folder}/x") != before


def test_a_file_is_created_only_if_absent(folder):
    assert storage.create_exclusive(f"{folder}/x", b"first")
    assert not storage.create_exclusive(f"{folder}/x", b"second")
    assert storage.read_bytes(f"{folder}/x") == b"first"
    assert storage.honours_exclusive(folder)
    assert storage.list_names(folder) == {"x"}


def test_of_racing_creators_exactly_one_wins(folder):
    start = threading.Barrier(16)
    won = []

    def create(number):
        start.wait()
        if storage.create_exclusive(f"{folder}/x", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(f"{folder}/x") == str(won[0]).encode()


@pytest.mark.parametrize("write", [storage.write_atomic, storage.create_exclusive])
def test_a_local_file_has_its_bytes_on_the_disk_before_its_name(tmp_path, monkeypatch, write):
    synced = []

    def fsync(number):
        synced.append((os.fstat(number).st_size, (tmp_path / "x").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write(str(tmp_path / "x"), b"12345")
    assert synced == [(5, False)]


@pytest.mark.parametrize("write", [storage.write_atomic, storage.create_exclusive])
def test_a_write_that_fails_leaves_nothing(tmp_path, write):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as a full disk: the rest is refused
    try:
        with pytest.raises(StorageError, match="File too large"):
            write(str(tmp_path / "x"), bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("many", [2, 100])
def test_deleting_what_is_gone_is_fine(folder, monkeypatch, many):
    monkeypatch.setattr(storage, "MANY_FILES", many)
    storage.write_atomic(f"{folder}/x", b"1")
    storage.delete([f"{folder}/gone", f"{folder}/x", f"{folder}/gone too"])
    assert storage.list_files(folder) == []
    storage.delete([])
    storage.delete_folder(folder)


@pytest.mark.parametrize("many", [2, 100])
def test_a_store_that_refuses_to_delete_is_an_error(monkeypatch, s3, many):
    monkeypatch.setattr(storage, "MANY_FILES", many)
    with servers.proxy(s3, deletes=False) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        bucket = f"kept-{many}"
        storage.split(f"s3://{bucket}")[0].mkdir(bucket)
        files = [f"s3://{bucket}/{name}" for name in "ab"]
        for file in files:
            storage.write_atomic(file, b"x")
        with pytest.raises(StorageError, match=r"deleting 2 files such as s3://kept-\d+/a: access denied"):
            storage.delete(files)
        with pytest.raises(StorageError, match=r"deleting 1 files .*access denied"):
            storage.honours_exclusive(f"s3://{bucket}/out")


def test_the_empty_object_of_a_folder_made_in_a_console_is_no_file(monkeypatch, s3):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    fs: Any = storage.split("s3://console")[0]
    fs.mkdir("console")
    fs.call_s3("put_object", Bucket="console", Key="out/", Body=b"")
    assert storage.list_names("s3://console/out") == set()
    assert storage.list_names("s3://console/out/") == set()
    assert storage.list_files("s3://console/out") == []


def test_what_is_absent_is_absent(folder):
    assert not storage.exists(f"{folder}/nothing")
    assert storage.file_info(f"{folder}/nothing") is None
    assert storage.list_files(f"{folder}/nothing") == []
    assert storage.list_names(f"{folder}/nothing") == set()
    with pytest.raises(StorageError, match="nothing: no such file"):
        storage.read_bytes(f"{folder}/nothing")


def test_a_file_that_goes_while_its_folder_is_listed_costs_no_other_one(tmp_path, monkeypatch):
    for name in "abcdef":
        (tmp_path / name).touch()

    @contextmanager
    def racing(path):
        with scandir(path) as entries:
            yield (gone(entry) if number == 2 else entry for number, entry in enumerate(entries))

    def gone(entry):
        os.unlink(entry.path)
        lost.append(entry.name)
        return entry

    scandir, lost = os.scandir, []
    monkeypatch.setattr(os, "scandir", racing)
    found = {file.uri.rpartition("/")[2] for file in storage.list_files(str(tmp_path))}
    assert len(lost) == 1
    assert found == set("abcdef") - set(lost)


def test_pieces_of_a_file_come_in_the_order_asked_for_empty_ones_too(folder):
    storage.write_atomic(f"{folder}/x", b"0123456789")
    wanted = [(4, 3), (2, 0), (0, 2), (10, 0)]
    assert storage.read_ranges(f"{folder}/x", wanted) == [b"456", b"", b"01", b""]
    assert storage.read_ranges(f"{folder}/x", [(0, 0)]) == [b""]


def test_a_missing_bucket_is_named(monkeypatch, s3):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="no-such-bucket"):
        storage.write_atomic("s3://no-such-bucket/x", b"")


def test_an_unknown_protocol_is_named():
    with pytest.raises(StorageError, match="nosuch://"):
        storage.list_files("nosuch://bucket/x")


def test_wrong_credentials_say_what_to_check_and_never_the_secret(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    with servers.rclone(tmp_path) as environment:
        for name, value in {**environment, "AWS_SECRET_ACCESS_KEY": "a-wrong-secret"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StorageError, match="check the credentials") as error:
            storage.list_files("s3://bucket/x")
        assert "a-wrong-secret" not in str(error.value)


class Flaky:
    """A call that fails in given ways before it works."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def __call__(self):
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.0)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        OSError(errno.EBUSY, "Please reduce your request rate"),  # how s3fs says SlowDown
        storage.TruncatedError("cut"),
        type("IncompleteRead", (Exception,), {})("cut"),
        type("HttpError", (Exception,), {"code": 503})("gcsfs"),
        type("ClientError", (Exception,), {"response": {"Error": {"Code": "SlowDown"}}})("botocore"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_transient_errors_are_tried_again_and_counted(error, quick):
    before = storage.num_retries()
    assert storage._retry("reading x", Flaky(error, error)) == "answer"
    assert storage.num_retries() == before + 2


def test_each_retry_is_taken_once_by_whichever_thread_asks(quick):
    storage.take_retries()

    def work(_):
        storage._retry("reading x", Flaky(ConnectionResetError("reset")))
        return storage.take_retries()

    with ThreadPoolExecutor(8) as pool:
        taken = sum(pool.map(work, range(40)))
    assert taken == 40
    assert storage.take_retries() == 0


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError("denied"),
        ValueError("a bug"),
        type("ClientError", (Exception,), {"response": {"Error": {"Code": "NoSuchKey"}}})("botocore"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_final(error, quick):
    before = storage.num_retries()
    with pytest.raises(StorageError, match="reading x"):
        storage._retry("reading x", Flaky(error))
    assert storage.num_retries() == before


def test_retries_end(quick):
    with pytest.raises(StorageError, match="reading x: ConnectionResetError"):
        storage._retry("reading x", Flaky(*[ConnectionResetError("reset")] * 100))


def test_a_body_shorter_than_announced_is_read_again(tmp_path, quick, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    fs, _ = storage.split(str(path))
    bodies = iter([b"1234", b"12345678"])
    monkeypatch.setattr(type(fs), "cat_file", lambda self, p: next(bodies))
    assert storage.read_bytes(str(path), size=8) == b"12345678"


def test_a_parquet_file_of_a_store_is_read_through_cut_bodies_and_throttling(quick, monkeypatch):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"x": list(range(1000)), "y": [str(i) for i in range(1000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_atomic("memory://folder/x.parquet", buffer.getvalue())
    fs, _ = storage.split("memory://folder/x.parquet")
    whole, calls = fs.cat_file, iter(range(1_000_000))

    def flaky(path, start=None, end=None):
        number = next(calls)
        if number % 3 == 0:
            raise OSError(errno.EBUSY, "Please reduce your request rate")
        data = whole(path, start=start, end=end)
        return data[:-1] if number % 3 == 1 else data

    monkeypatch.setattr(fs, "cat_file", flaky)
    filesystem, path = storage.arrow_filesystem("memory://folder/x.parquet")
    before = storage.num_retries()
    assert pq.ParquetFile(path, filesystem=filesystem).read().equals(table)
    assert storage.num_retries() >= before + 2
    with storage.open_input("memory://folder/x.parquet") as file:
        assert file.read() == buffer.getvalue()
        assert file.seek(-4, 2) == len(buffer.getvalue()) - 4
        assert file.read() == b"PAR1"


def test_a_parquet_file_that_is_absent_or_a_folder_is_not_found(folder):
    import pyarrow.parquet as pq

    storage.write_atomic(f"{folder}/sub/x", b"1")
    for name in ("absent.parquet", "sub"):
        filesystem, path = storage.arrow_filesystem(f"{folder}/{name}")
        with pytest.raises(OSError, match=name):
            pq.ParquetFile(path, filesystem=filesystem)
    with pytest.raises(StorageError, match="no such file"):
        storage.open_input(f"{folder}/absent")

"""Listing inputs and reading shards: nothing lost, nothing counted twice, bad shards known at once."""

import errno
import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data import shards
from pipeline.data.shards import Shard, list_shards, read_shard
from pipeline.errors import ConfigError, ShardError, StorageError
from tests.conftest import shared
from tests.makers import make_jpeg, make_parquet_shard, make_tar, make_tar_shard


def shard_of(path: Path, kind: shards.Kind = "tar") -> Shard:
    return Shard(path.name, str(path), kind, path.stat().st_size, "1")


def read_tar(tmp_path, data: bytes, **options) -> list[shards.RawImage]:
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    return list(read_shard(shard_of(path), **options))


def ids(rows) -> list[str]:
    return [row.image_id for row in rows]


# ---- listing -----------------------------------------------------------------------------------------


def test_a_folder_is_searched_at_any_depth_and_sorted_by_name(tmp_path):
    make_tar_shard(tmp_path / "b/s.TAR", 1)
    make_parquet_shard(tmp_path / "a.parquet", 1)
    for name in ("z.jpg", "b/y.PNG", "c/.hidden/x.jpg", "._z.jpg", "notes.txt", "classes.json", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    found = list_shards(str(tmp_path))

    assert [(shard.name, shard.kind) for shard in found] == [
        ("a.parquet", "parquet"), ("b/s.TAR", "tar"), ("b/y.PNG", "image"), ("z.jpg", "image"),
    ]  # fmt: skip
    assert found[2].uri == str(tmp_path / "b/y.PNG")
    assert found[2].num_bytes == 1


def test_names_are_the_same_however_the_folder_is_written(tmp_path, monkeypatch):
    make_tar_shard(tmp_path / "in/x/s.tar", 1)
    monkeypatch.chdir(tmp_path)

    for uri in ("in", "in/", "in//", "./in", str(tmp_path / "in"), f"file://{tmp_path}/in"):
        assert [shard.name for shard in list_shards(uri)] == ["x/s.tar"]


def test_uris_of_shards_hold_in_any_working_directory(tmp_path, monkeypatch):
    path = make_tar_shard(tmp_path / "a[1]/in/s.tar", 1)
    (path.parent / "list.txt").write_text("s.tar\n")
    monkeypatch.chdir(path.parent.parent)
    monkeypatch.setenv("HOME", str(path.parent.parent))
    for uri in ("in", "in/s.tar", "in/*.tar", "in/list.txt", "~/in"):
        assert [shard.uri for shard in list_shards(uri)] == [str(path)]


def test_one_file_is_an_input(tmp_path):
    path = make_tar_shard(tmp_path / "s.tar", 1)

    (shard,) = list_shards(str(path))

    assert (shard.name, shard.uri, shard.kind) == ("s.tar", str(path), "tar")
    assert (shard.num_bytes, bool(shard.etag)) == (path.stat().st_size, True)


def test_a_pattern_selects_shards(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        make_tar_shard(tmp_path / name, 1)

    assert [s.name for s in list_shards(f"{tmp_path}/train-*.tar")] == ["train-0.tar", "train-1.tar"]


def test_the_tables_of_a_run_below_the_input_are_no_shards(tmp_path):
    tables = ("_run/config.json", "_run/shards.parquet", "images/part-0.parquet", "detections/part-0.parquet")
    mine = ("a.tar", "images/part-0.parquet", "out/b.tar", "out/images/mine.jpg")
    for name in (*mine, *(f"out/{table}" for table in tables)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [shard.name for shard in list_shards(str(tmp_path))] == list(mine)
    assert [shard.name for shard in list_shards(f"{tmp_path}/*.parquet")] == ["images/part-0.parquet"]


def test_a_folder_with_brackets_in_its_name_is_no_pattern(tmp_path):
    make_tar_shard(tmp_path / "data[1]/s.tar", 1)

    assert [shard.name for shard in list_shards(str(tmp_path / "data[1]"))] == ["s.tar"]


def test_a_text_file_lists_uris_relative_to_itself(tmp_path):
    make_tar_shard(tmp_path / "x/s.tar", 1)
    (tmp_path / "no_ending").write_bytes(make_jpeg())
    outside = make_parquet_shard(tmp_path / "y/p.parquet", 1)
    (tmp_path / "list.txt").write_text(f"# mine\nx/s.tar\n\n{outside}\nno_ending\ngone.jpg\n")

    found = {shard.name: shard for shard in list_shards(str(tmp_path / "list.txt"))}

    assert {name: shard.kind for name, shard in found.items()} == {
        "x/s.tar": "tar", str(outside): "parquet", "no_ending": "image", "gone.jpg": "image",
    }  # fmt: skip
    assert found["no_ending"].num_bytes > 0
    with pytest.raises(StorageError):  # one failed image, not the end of the run
        list(read_shard(found["gone.jpg"]))


def test_a_parquet_file_lists_uris_where_it_holds_no_bytes(tmp_path):
    make_tar_shard(tmp_path / "s.tar", 1)
    pq.write_table(pa.table({"n": [1, 2], "uri": ["s.tar", None]}), tmp_path / "list.parquet")
    pq.write_table(pa.table({"uri": ["s.tar"], "image": [b"x"]}), tmp_path / "shard.parquet")

    assert [s.name for s in list_shards(str(tmp_path / "list.parquet"))] == ["s.tar"]
    assert [s.kind for s in list_shards(str(tmp_path / "shard.parquet"))] == ["parquet"]


@pytest.mark.parametrize(
    ("files", "input_name", "words"),
    [
        ({}, "missing", "nothing there"),
        ({"in/a.csv": b"x"}, "in", "none of its 1 files is a .tar, .parquet or image file"),
        ({"list.txt": b"\n# nothing\n"}, "list.txt", "the list is empty"),
        ({"list.txt": b"a.jpg\nb.jpg\na.jpg"}, "list.txt", "lists a.jpg 2 times"),
    ],
)
def test_an_input_without_shards_is_refused_in_one_line(tmp_path, files, input_name, words):
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)

    with pytest.raises(ConfigError, match=words) as caught:
        list_shards(str(tmp_path / input_name))
    assert "\n" not in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")

    with pytest.raises(ConfigError, match=r"caf\\xe9.jpg is not UTF-8"):
        list_shards(str(tmp_path))


def test_every_odd_image_is_a_shard():
    assert len(list_shards(str(shared("data/odd_images")))) == 146


# ---- tar ---------------------------------------------------------------------------------------------


def test_tar_rows_carry_ids_sizes_bytes_and_annotations(tmp_path):
    images = {"a/1.jpg": b"one", "a/2.png": b"two", "b.c.jpg": b"three"}
    path = make_tar_shard(tmp_path / "s.tar", images, annotations={"a/1.jpg": {"k": 1}, "b.c.jpg": {"k": 2}})

    rows = list(read_shard(shard_of(path)))

    assert ids(rows) == ["s.tar/a/1.jpg", "s.tar/a/2.png", "s.tar/b.c.jpg"]
    assert [row.data for row in rows] == [b"one", b"two", b"three"]
    assert [(row.shard, row.shard_index, row.shard_size) for row in rows] == [
        ("s.tar", i, 3) for i in range(3)
    ]
    assert [row.annotation for row in rows] == [{"k": 1}, None, {"k": 2}]
    assert [row.num_bytes for row in rows] == [3, 3, 5]


def test_the_uri_of_a_member_can_be_opened(tmp_path):
    path = make_tar_shard(tmp_path / "s.tar", {"a/1.jpg": b"one"})

    fs, member = fsspec.core.url_to_fs(next(read_shard(shard_of(path))).uri)

    assert fs.cat_file(member) == b"one"


def test_two_readings_give_the_same_rows(tmp_path):
    shard = shard_of(make_tar_shard(tmp_path / "s.tar", 5))

    assert list(read_shard(shard)) == list(read_shard(shard))


def test_other_members_are_no_images(tmp_path):
    names = [
        "a.jpg",
        "a.txt",
        "a.cls",
        "a.xml",
        "a.npy",
        "._a.jpg",
        "__MACOSX/._a.jpg",
        "README",
        "a.seg.png",
    ]

    rows = read_tar(tmp_path, make_tar((name, b"x") for name in names))

    assert ids(rows) == ["s.tar/a.jpg", "s.tar/a.seg.png"]


def test_webdataset_keys_find_their_json(tmp_path):
    rows = read_tar(tmp_path, make_tar([("a.left.jpg", b"x"), ("a.json", b'{"k": 1}')]))

    assert rows[0].annotation == {"k": 1}


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_json_that_is_no_object_is_no_annotation(tmp_path, text):
    assert read_tar(tmp_path, make_tar([("a.jpg", b"x"), ("a.json", text)]))[0].annotation is None


def test_repeated_names_get_numbers_and_their_own_annotation(tmp_path):
    members = [("a.jpg", b"1"), ("a.json", b'{"k": 1}'), ("a.jpg#2", b"no image"), ("./a.jpg", b"2"),
               ("a.jpg", b"3"), ("a.json", b'{"k": 3}')]  # fmt: skip

    rows = read_tar(tmp_path, make_tar(members))

    assert ids(rows) == ["s.tar/a.jpg", "s.tar/a.jpg#2", "s.tar/a.jpg#3"]
    assert [row.data for row in rows] == [b"1", b"2", b"3"]
    assert rows[0].annotation == {"k": 1}


def test_hostile_names_are_only_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    latin = os.fsdecode(b"caf\xe9.jpg")
    long = "x" * 5000 + ".jpg"
    names = ["/etc/evil.jpg", "../../up.jpg", "a\nb\tc.jpg", long, "ünï/cödé.jpg", latin]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    before = set(tmp_path.rglob("*"))

    rows = read_tar(tmp_path, buffer.getvalue())

    assert [row.image_id.removeprefix("s.tar/") for row in rows] == [
        "/etc/evil.jpg", "../../up.jpg", r"a\x0ab\x09c.jpg", long, "ünï/cödé.jpg", r"caf\xe9.jpg",
    ]  # fmt: skip
    pa.array([value for row in rows for value in (row.image_id, row.uri)], pa.string())
    assert set(tmp_path.rglob("*")) == before | {tmp_path / "s.tar"}


def test_links_and_devices_keep_their_rows(tmp_path):
    buffer = io.BytesIO(make_tar([("real.jpg", b"data")]))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name, kind, target in [
            ("hard.jpg", tarfile.LNKTYPE, "real.jpg"),
            ("broken.jpg", tarfile.LNKTYPE, "gone.jpg"),
            ("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("device.jpg", tarfile.CHRTYPE, ""),
            ("folder.jpg", tarfile.DIRTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)

    rows = read_tar(tmp_path, buffer.getvalue())

    assert ids(rows) == [f"s.tar/{n}.jpg" for n in ("real", "hard", "broken", "soft", "device")]
    assert [row.data for row in rows] == [b"data", b"data", None, None, None]
    assert [row.error and row.error.kind for row in rows] == [None, None, "NotAFile", "NotAFile", "NotAFile"]
    assert "link to /etc/passwd" in str(rows[3].error)


class BadSector(io.BytesIO):
    """A file that can't be read from `start` to `end`."""

    start, end = 0, 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.tell() - len(data) < self.end and self.tell() > self.start:
            raise OSError(errno.EIO, "Input/output error")
        return data


def test_a_bad_sector_costs_the_image_that_it_holds(tmp_path, monkeypatch):
    path = make_tar_shard(tmp_path / "s.tar", 3)
    whole = list(read_shard(shard_of(path)))
    file = BadSector(path.read_bytes())
    file.start = path.read_bytes().index(whole[1].data or b"")
    file.end = file.start + 1
    monkeypatch.setattr(storage, "open_input", lambda uri: file)
    rows = list(read_shard(shard_of(path)))
    assert [row.data for row in rows] == [whole[0].data, None, whole[2].data]
    assert str(rows[1].error) == "can't be read ([Errno 5] Input/output error)"
    assert rows[1].num_bytes == whole[1].num_bytes


@pytest.mark.parametrize("start", [0, 512])
def test_a_tar_that_can_not_be_read_is_a_shard_error(tmp_path, monkeypatch, start):
    path = make_tar_shard(tmp_path / "s.tar", {"large.jpg": bytes(100_000), "b.jpg": b"b"})
    file = BadSector(path.read_bytes())
    place = file.getvalue().index(b"b.jpg") if start else 0
    file.start, file.end = place, place + 1
    monkeypatch.setattr(storage, "open_input", lambda uri: file)
    with pytest.raises(ShardError, match=r"s\.tar: can't be read \(\[Errno 5\]"):
        list(read_shard(shard_of(path)))


def test_a_member_over_the_limit_is_a_row_with_its_size(tmp_path):
    rows = read_tar(tmp_path, make_tar([("a.jpg", b"x" * 11), ("b.jpg", b"x" * 10)]), max_image_bytes=10)

    assert rows[0].data is None
    assert rows[0].error is not None
    assert (rows[0].error.stage, rows[0].error.kind, rows[0].num_bytes) == ("read", "TooManyBytes", 11)
    assert rows[1].data == b"x" * 10


def test_skipped_images_are_left_out_and_the_others_keep_their_place(tmp_path):
    rows = list(read_shard(shard_of(make_tar_shard(tmp_path / "s.tar", 4)), skip=frozenset({0, 2})))

    assert [(row.image_id, row.shard_index, row.shard_size) for row in rows] == [
        ("s.tar/001.jpg", 1, 4), ("s.tar/003.jpg", 3, 4),
    ]  # fmt: skip


def test_an_empty_tar_has_no_rows(tmp_path):
    assert read_tar(tmp_path, make_tar([])) == []


FIVE = make_tar((f"{i}.jpg", bytes([65 + i]) * 700) for i in range(5))
MEMBER = 512 + 1024


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (FIVE[: 3 * MEMBER], r"tar ends after 3 members \(expected an end marker\)"),
        (FIVE[: 3 * MEMBER + 100], r"tar ends after 3 members \(expected an end marker\)"),
        (FIVE[: 3 * MEMBER + 600], r"tar ends after 3 members \(expected an end marker\)"),
        (FIVE[:-10000], r"tar ends after \d members"),
        (FIVE[:MEMBER] + b"?" * 512 + FIVE[MEMBER + 512 :], "damaged header after 1 members, at byte 1,536"),
        (FIVE + FIVE, "data after the end marker"),
        (b"", "tar ends after 0 members"),
        (b"not a tar" * 100, "tar ends after 0 members|damaged header"),
        (make_tar([("a.txt", b"x"), ("b.txt", b"x")]), "none of its 2 members is an image"),
        (gzip.compress(FIVE)[:-20], "damaged gzip file"),
        (gzip.compress(FIVE[: 3 * MEMBER]), "tar ends after 3 members"),
    ],
)
def test_a_damaged_tar_is_known_before_its_first_row(tmp_path, data, words):
    path = tmp_path / "s.tar"
    path.write_bytes(data)

    with pytest.raises(ShardError, match=words):
        next(read_shard(shard_of(path)))


def test_a_gzip_file_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BYTES_IN_MEMORY", 1 << 20)
    bomb = gzip.compress(bytes(5 << 20))
    assert len(bomb) * shards.MAX_GZIP_RATIO < 5 << 20
    with pytest.raises(ShardError, match=r"s\.tar: its gzip holds over 100 times its size"):
        read_tar(tmp_path, bomb)


def test_a_gzip_tar_reads_like_the_plain_one(tmp_path):
    assert [row.data for row in read_tar(tmp_path, gzip.compress(FIVE))] == [
        bytes([65 + i]) * 700 for i in range(5)
    ]


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, len(FIVE) - 1), value=st.binary(min_size=1, max_size=12))
def test_a_damaged_tar_never_hangs_or_crashes(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(FIVE[:place] + value + FIVE[place + len(value) :])

    try:
        rows = list(read_shard(shard_of(path)))
    except ShardError:
        return
    assert len({row.image_id for row in rows}) == len(rows)


def test_a_negative_member_size_is_refused(tmp_path):
    header = bytearray(FIVE[:512])
    header[124:136] = b"\xff" * 4 + struct.pack(">q", -1536)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)

    with pytest.raises(ShardError):
        read_tar(tmp_path, FIVE[:MEMBER] + bytes(header) + FIVE[MEMBER + 512 :])


# ---- Parquet -----------------------------------------------------------------------------------------


def test_parquet_rows_carry_ids_bytes_and_annotations(tmp_path):
    images = {"x": b"one", "y": None, "z": b"three"}
    path = make_parquet_shard(tmp_path / "p.parquet", images, annotations={"z": {"k": 3}}, row_group_size=2)
    shard = shard_of(path, "parquet")

    by_row, by_id = list(read_shard(shard)), list(read_shard(shard, id_column="image_id"))

    assert ids(by_row) == ["p.parquet/0", "p.parquet/1", "p.parquet/2"]
    assert ids(by_id) == ["p.parquet/x", "p.parquet/y", "p.parquet/z"]
    assert [row.data for row in by_id] == [b"one", None, b"three"]
    assert by_id[1].error is not None
    assert (by_id[1].error.stage, by_id[1].error.kind) == ("read", "NoBytes")
    assert [row.annotation for row in by_id] == [None, None, {"k": 3}]
    assert [(row.shard_index, row.shard_size, row.num_bytes) for row in by_id] == [
        (0, 3, 3),
        (1, 3, 0),
        (2, 3, 5),
    ]


def test_repeated_and_missing_ids_are_still_unique(tmp_path):
    pq.write_table(pa.table({"image": [b"1"] * 4, "id": [7, None, 7, 1]}), tmp_path / "p.parquet")

    rows = list(read_shard(shard_of(tmp_path / "p.parquet", "parquet"), id_column="id"))

    assert ids(rows) == ["p.parquet/7", "p.parquet/1", "p.parquet/7#2", "p.parquet/1#2"]


def not_utf8(*values):
    """Texts in Latin-1, as writers in C++ let them through."""
    return pa.Array.from_buffers(
        pa.string(), len(values), pa.array([v.encode("latin-1") for v in values], pa.binary()).buffers()
    )


def test_ids_that_are_not_utf8_are_an_error_of_the_shard(tmp_path):
    pq.write_table(pa.table({"image": [b"1", b"2"], "id": not_utf8("a", "ü")}), tmp_path / "p.parquet")
    with pytest.raises(ShardError, match=r"p\.parquet: not a readable Parquet file"):
        list(read_shard(shard_of(tmp_path / "p.parquet", "parquet"), id_column="id"))


def test_an_annotation_that_is_not_utf8_is_none_and_its_image_stays(tmp_path):
    notes = not_utf8('{"k": 1}', '{"k": "ü"}', '{"k": 3}')
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "annotation": notes}), tmp_path / "p.parquet")
    rows = list(read_shard(shard_of(tmp_path / "p.parquet", "parquet")))
    assert [(row.data, row.annotation) for row in rows] == [(b"1", {"k": 1}), (b"2", None), (b"3", {"k": 3})]


def test_structs_of_bytes_are_images(tmp_path):
    images = pa.array([{"bytes": b"one", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None])
    pq.write_table(pa.table({"label": [1, 2, 3], "image": images}), tmp_path / "p.parquet")

    rows = list(read_shard(shard_of(tmp_path / "p.parquet", "parquet")))

    assert [row.data for row in rows] == [b"one", None, None]


def test_an_annotation_may_be_a_struct(tmp_path):
    table = pa.table({"image": [b"x"], "annotation": [{"width": 3, "boxes": [[0.0, 1.0, 2.0, 3.0]]}]})
    pq.write_table(table, tmp_path / "p.parquet")

    (row,) = read_shard(shard_of(tmp_path / "p.parquet", "parquet"))

    assert row.annotation == {"width": 3, "boxes": [[0, 1, 2, 3]]}


def test_the_image_column_is_found_by_type_and_name(tmp_path):
    def read(columns: dict, **options) -> list:
        pq.write_table(pa.table(columns), tmp_path / "p.parquet")
        return [row.data for row in read_shard(shard_of(tmp_path / "p.parquet", "parquet"), **options)]

    assert read({"image": ["name.jpg"], "picture": [b"x"]}) == [b"x"]
    assert read({"thumbnail": [b"t"], "jpg": [b"x"]}) == [b"x"]
    assert read({"thumbnail": [b"t"], "jpg": [b"x"]}, image_column="thumbnail") == [b"t"]
    with pytest.raises(ShardError, match="no column that is clearly the image bytes"):
        read({"a": [b"t"], "b": [b"x"]})
    with pytest.raises(ShardError, match="no column z with image bytes"):
        read({"a": [b"t"]}, image_column="z")
    with pytest.raises(ShardError, match="no column z "):
        read({"a": [b"t"]}, id_column="z")


def test_parquet_rows_are_skipped_by_index_across_row_groups(tmp_path):
    path = make_parquet_shard(tmp_path / "p.parquet", 7, row_group_size=3)

    rows = list(read_shard(shard_of(path, "parquet"), skip=frozenset({0, 1, 2, 4})))

    assert [row.shard_index for row in rows] == [3, 5, 6]


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_cut_parquet_file_is_a_shard_error(tmp_path, keep):
    path = make_parquet_shard(tmp_path / "p.parquet", 2)
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(ShardError, match="not a readable Parquet file"):
        next(read_shard(shard_of(path, "parquet")))


def test_a_damaged_row_group_costs_only_its_rows(tmp_path):
    images = {f"{i}": os.urandom(2000) for i in range(6)}
    path = make_parquet_shard(tmp_path / "p.parquet", images, id_column=None, row_group_size=2)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)

    rows = list(read_shard(shard_of(path, "parquet")))

    assert [row.shard_index for row in rows] == list(range(6))
    assert [row.error and row.error.kind for row in rows] == [None] * 2 + ["DamagedRowGroup"] * 2 + [None] * 2


def test_an_empty_parquet_file_has_no_rows(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "p.parquet")

    assert list(read_shard(shard_of(tmp_path / "p.parquet", "parquet"))) == []


# ---- loose files and stores --------------------------------------------------------------------------


def test_a_loose_image_is_a_shard_of_one(tmp_path):
    (tmp_path / "a b.jpg").write_bytes(b"data")
    (shard,) = list_shards(str(tmp_path))

    (row,) = read_shard(shard)

    assert (row.image_id, row.uri, row.shard, row.shard_index, row.shard_size) == (
        "a b.jpg", str(tmp_path / "a b.jpg"), "a b.jpg", 0, 1,
    )  # fmt: skip
    assert row.data == b"data"
    assert list(read_shard(shard, skip=frozenset({0}))) == []


def test_a_loose_image_over_the_limit_is_not_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x" * 11)

    (row,) = read_shard(list_shards(str(tmp_path))[0], max_image_bytes=10)

    assert row.data is None
    assert row.error is not None
    assert (row.error.kind, row.num_bytes) == ("TooManyBytes", 11)


@pytest.mark.parametrize("in_memory", [10, 10**9])
def test_remote_shards_are_fetched_whole_to_memory_or_disk(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(shards, "MAX_BYTES_IN_MEMORY", in_memory)
    memory = fsspec.filesystem("memory")
    memory.pipe("/shards/a.tar", FIVE)
    memory.pipe("/shards/b.tar", gzip.compress(FIVE))
    make_parquet_shard(tmp_path / "c.parquet", 2)
    memory.pipe("/shards/c.parquet", (tmp_path / "c.parquet").read_bytes())
    memory.pipe("/shards/d.jpg", b"loose")
    try:
        found = list_shards("memory://shards")
        rows = [row for shard in found for row in read_shard(shard)]
    finally:
        memory.rm("/shards", recursive=True)

    assert [shard.name for shard in found] == ["a.tar", "b.tar", "c.parquet", "d.jpg"]
    assert len({row.image_id for row in rows}) == len(rows) == 13
    assert all(row.data for row in rows)

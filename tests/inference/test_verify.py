"""What the proof finds in outputs that are not complete."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import StorageError
from pipeline.inference import ledger
from pipeline.inference.lock import Lock
from pipeline.inference.verify import proof_text, verify
from pipeline.results.parts import part_names, read_parts
from tests.inference.test_ledger import publish

NUM_BOXES = 400


@pytest.fixture
def folders(tmp_path):
    """Two shards and a complete output of two parts, one shard each."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("x.tar", "y.tar"):
        (source / name).write_bytes(b"never opened")
    with Lock(str(output)) as lock:
        for name in ("x", "y"):
            rows = [(f"{name}.tar", i, 3, "ok", NUM_BOXES) for i in range(3)]
            publish(str(output), lock, f"part-{name}.parquet", rows)
    return source, output


def problems(folders):
    source, output = folders
    return verify(str(source), str(output)).problems


def images_part(folders, name="x") -> Path:
    return folders[1] / "images" / f"part-{name}.parquet"


def boxes_part(folders, name="x") -> Path:
    (part,) = (part for part in read_parts(str(folders[1])) if part.name == f"part-{name}.parquet")
    return folders[1] / "detections" / part.detections


def test_a_complete_output_is_proved(folders):
    proof = verify(*map(str, folders))
    assert proof.problems == []
    assert (proof.num_shards, proof.num_images, proof.num_detections) == (2, 6, 6 * NUM_BOXES)
    assert proof_text(proof).startswith("complete: 2 shards, 6 images each exactly once")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def flipped(path):
    """One bit of the last value of the first column: the footer is as it was, and all can be decoded."""
    column = pq.read_metadata(path).row_group(0).column(0)
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, emptied, flipped])
@pytest.mark.parametrize("which", [images_part, boxes_part])
def test_a_damaged_part_is_named(folders, which, damage):
    path = which(folders)
    damage(path)
    found = problems(folders)
    named = [line for line in found if str(path) in line]
    assert len(named) == 1
    assert "can't be read" in named[0]
    assert "delete this file" in named[0]
    assert not any("replaced" in line or "no images part names" in line for line in found)


@pytest.mark.parametrize("which", [images_part, boxes_part])
def test_a_damaged_part_that_is_deleted_runs_again(folders, which):
    cut(which(folders))
    which_path = next(line for line in problems(folders) if "can't be read" in line).split(" can't")[0]
    Path(which_path).unlink()
    parts = ledger.sweep(str(folders[1]))
    assert [part.name for part in parts] == ["part-y.parquet"]
    assert ledger.read_ledger(str(folders[1]), parts).finished_shards() == {"y.tar"}


def test_every_damaged_footer_is_named(folders):
    for name in ("x", "y"):
        cut(images_part(folders, name))
    assert sum("can't be read" in line for line in problems(folders)) == 2


def test_a_damaged_record_of_the_shards_is_one_problem_beside_others(folders):
    record = folders[1] / "_run" / "shards.parquet"
    record.write_bytes(b"PAR1")
    boxes_part(folders).unlink()
    found = problems(folders)
    assert len(found) == 2
    assert f"{record} is damaged" in found[1]


def test_an_output_whose_parts_go_meanwhile_is_not_called_incomplete(folders, monkeypatch):
    """As a run does that merges them: they are listed, and gone when they are read."""

    def listed(output, table):
        names = part_names(output, table)
        images_part(folders).unlink(missing_ok=True)
        return names

    monkeypatch.setattr("pipeline.inference.verify.part_names", listed)
    with pytest.raises(StorageError, match="a run is at work there"):
        problems(folders)


def test_readers_of_the_ledger_say_which_part_is_damaged(folders):
    cut(images_part(folders))
    with pytest.raises(StorageError, match=r"part-x.parquet can't be read .*delete this file"):
        read_parts(str(folders[1]))


def test_an_images_part_that_was_copied_repeats_its_images(folders):
    shutil.copy(images_part(folders), images_part(folders, "z"))
    found = problems(folders)
    assert "3 image ids stand in more than one row" in found
    assert "3 rows repeat a position of a shard" in found


def test_a_copied_images_part_is_removed_without_the_boxes_that_it_shares(folders):
    shutil.copy(images_part(folders), images_part(folders, "z"))
    output = str(folders[1])
    assert len(ledger.without_repeats(output, read_parts(output))) == 2
    assert problems(folders) == []


def test_missing_and_unnamed_files_are_found(folders):
    boxes = boxes_part(folders)
    boxes.rename(boxes.with_name("part-other.parquet"))
    found = problems(folders)
    assert f"1 detections parts are missing, such as {boxes.name}" in found
    assert "1 detections parts that no images part names, such as part-other.parquet" in found


def test_shards_without_rows_and_rows_without_shards_are_found(folders):
    source, _ = folders
    (source / "x.tar").rename(source / "new.tar")
    found = problems(folders)
    assert "1 shards have no row, such as new.tar" in found
    assert "1 shards of the output are not in the input, such as x.tar" in found


def test_missing_images_of_a_shard_are_counted(folders):
    images_part(folders).unlink()
    with Lock(str(folders[1])) as lock:
        publish(str(folders[1]), lock, "part-x.parquet", [("x.tar", i, 3, "ok", 2) for i in (0, 2)])
    assert "1 shards miss images, such as x.tar (2 of 3)" in problems(folders)

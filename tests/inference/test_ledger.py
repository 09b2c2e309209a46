"""The `images/` table as a ledger: what is done, what is swept, what compaction keeps."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline import schema, storage
from pipeline.errors import StorageError
from pipeline.inference import compaction, ledger
from pipeline.inference.lock import Lock, LockRef
from pipeline.results import parts as results_parts
from pipeline.results.parts import part_names, read_parts

METADATA = ledger.part_metadata(fingerprint="f", model="{}", run="r0001", round=0)


def images_table(rows):
    """Rows of `images/` from (shard, index, shard size, status, number of boxes)."""
    return pa.Table.from_pylist(
        [
            {
                "image_id": f"{shard}/{index}", "uri": "u", "shard": shard, "shard_index": index,
                "shard_size": size, "width": 10, "height": 10, "num_bytes": 1, "num_detections": boxes,
                "status": status, "error_stage": "", "error_type": "", "error_message": "",
            }
            for shard, index, size, status, boxes in rows
        ],
        schema=schema.IMAGES,
    )  # fmt: skip


def boxes_table(rows):
    """Rows of `detections/` for the same images; the score says which image and rank."""
    return pa.Table.from_pylist(
        [
            {
                "image_id": f"{shard}/{index}", "detection_id": rank, "label": 1, "class_name": "cat",
                "score": index + rank / 10, "xmin": 0, "ymin": 0, "xmax": 1, "ymax": 1,
                "image_width": 10, "image_height": 10,
            }
            for shard, index, _, _, boxes in rows
            for rank in range(boxes)
        ],
        schema=schema.DETECTIONS,
    )  # fmt: skip


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


@pytest.fixture
def lock(output):
    with Lock(output) as held:
        yield held


def publish(output, lock, name, rows, **metadata):
    meta = ledger.part_metadata(
        fingerprint="f", model="{}", run="r0001", round=metadata.pop("round", 0), **metadata
    )
    return ledger.commit(output, name, images_table(rows), boxes_table(rows), meta, lock=lock.ref)


def naive(output, table):
    return pd.read_parquet(f"{output}/{table}")


def test_a_shard_is_finished_when_every_index_has_its_row(output, lock):
    publish(output, lock, "part-a.parquet", [("x.tar", 0, 3, "ok", 2), ("x.tar", 2, 3, "failed", 0)])
    publish(output, lock, "part-b.parquet", [("y.tar", 0, 1, "ok", 0), ("bad.tar", -1, 0, "failed", 0)])
    read = ledger.read_ledger(output, read_parts(output))
    assert read.finished_shards() == {"y.tar", "bad.tar"}
    assert read.done("x.tar").tolist() == [0, 2]
    assert read.done("x.tar", count_failed=False).tolist() == [0]
    assert read.done("bad.tar").tolist() == [-1]
    assert read.done("never seen").tolist() == []
    assert not read.is_finished("never seen")


def test_what_a_later_round_did_well_has_not_failed(output, lock):
    rows = [("x.tar", 0, 3, "failed", 0), ("x.tar", 1, 3, "failed", 0), ("x.tar", 2, 3, "ok", 1)]
    publish(output, lock, "part-0.parquet", rows)
    publish(output, lock, "part-1.parquet", [("x.tar", 0, 3, "ok", 2)], round=1)
    publish(output, lock, "part-2.parquet", [("x.tar", 1, 3, "ok", 2)], round=2)
    publish(output, lock, "part-3.parquet", [("x.tar", 0, 3, "failed", 0)], round=2)
    read = ledger.read_ledger(output, read_parts(output))
    assert read.done("x.tar").tolist() == [0, 1, 2]
    assert read.done("x.tar", count_failed=False).tolist() == [1, 2]


def test_an_image_written_twice_is_seen_as_such(output, lock):
    publish(output, lock, "part-a.parquet", [("x.tar", 0, 2, "ok", 1)])
    publish(output, lock, "part-b.parquet", [("x.tar", 0, 2, "ok", 1)])
    read = ledger.read_ledger(output, read_parts(output))
    assert (read.num_rows, len(read.keys)) == (2, 1)
    assert read.finished_shards() == set()


def test_an_empty_output_has_an_empty_ledger(output, lock):
    read = ledger.read_ledger(output, read_parts(output))
    assert read.finished_shards() == set()
    assert read.num_rows == 0


def test_the_second_writer_of_a_part_stops_and_leaves_nothing(output, lock):
    assert publish(output, lock, "part-a.parquet", [("x.tar", 0, 1, "ok", 3)])
    assert not publish(output, lock, "part-a.parquet", [("x.tar", 0, 1, "ok", 3)])
    assert len(naive(output, "detections")) == 3
    assert len(part_names(output, "detections")) == 1


def test_sweep_removes_detections_that_no_images_part_names(output, lock):
    publish(output, lock, "part-a.parquet", [("x.tar", 0, 1, "ok", 2)])
    rows = [("x.tar", 1, 2, "ok", 5)]
    storage.write_atomic(
        f"{output}/detections/part-dead.parquet", ledger.to_parquet(boxes_table(rows), METADATA)
    )
    assert len(naive(output, "detections")) == 7
    ledger.sweep(output)
    assert len(naive(output, "detections")) == 2


def test_sweep_removes_what_a_killed_writer_had_begun(output, lock):
    for table in ("images", "detections"):
        storage.write_atomic(f"{output}/{table}/.part-a.parquet.0123.tmp", b"PAR1")
    ledger.sweep(output)
    assert storage.list_files(output + "/images") == storage.list_files(output + "/detections") == []
    assert storage.list_names(output + "/images") == storage.list_names(output + "/detections") == set()


def test_a_writer_whose_run_was_taken_over_publishes_nothing(output, lock):
    storage.create_exclusive(f"{output}/_run/lock-{lock.number + 1:06d}", b"{}")
    with pytest.raises(StorageError, match="took this output over"):
        publish(output, lock, "part-a.parquet", [("x.tar", 0, 1, "ok", 2)])
    assert part_names(output, "images") == part_names(output, "detections") == set()


def held_up(output):
    """A lock that is held when asked before publishing and taken over when asked after."""
    answers = iter([True, False])

    class HeldUp(LockRef):
        def is_held(self):
            return next(answers)

    return HeldUp(f"{output}/_run", 1)


@pytest.mark.parametrize("counted", [False, True])
def test_a_part_published_while_the_output_was_taken_over_stays_only_if_the_new_run_counts_on_it(
    output, counted
):
    rows = [("x.tar", 0, 1, "ok", 2)]

    def commit(name, lock):
        return ledger.commit(output, name, images_table(rows), boxes_table(rows), METADATA, lock=lock)

    found = []
    if counted:
        commit("part-r0001.0-000000.parquet", LockRef(f"{output}/_run", 1))
        found = read_parts(output)
        for part in found:  # the same name is published again below
            storage.delete([f"{output}/images/{part.name}", f"{output}/detections/{part.detections}"])
    ledger.record_found(output, found, LockRef(f"{output}/_run", 2))
    with pytest.raises(StorageError, match="took this output over"):
        commit("part-r0001.0-000000.parquet", held_up(output))
    assert len(part_names(output, "images")) == len(part_names(output, "detections")) == int(counted)


def test_a_late_part_stays_where_no_run_has_looked_over_the_output_yet(output, monkeypatch):
    monkeypatch.setattr(ledger, "FOUND_PAUSE_S", 0)
    rows = [("x.tar", 0, 1, "ok", 2)]
    with pytest.raises(StorageError, match="took this output over"):
        ledger.commit(
            output, "part-a.parquet", images_table(rows), boxes_table(rows), METADATA, lock=held_up(output)
        )
    assert len(ledger.sweep(output)) == 1


def test_late_parts_of_other_runs_are_removed_and_own_ones_kept(output, lock):
    publish(output, lock, "part-r0001.0-000000.parquet", [("x.tar", 0, 2, "ok", 2)])
    known = read_parts(output)
    publish(output, lock, "part-r0001.0-000001.parquet", [("x.tar", 1, 2, "ok", 2)])  # a late writer of run 1
    publish(output, lock, "part-r0002.0-000000.parquet", [("x.tar", 1, 2, "ok", 2)])
    parts = ledger.remove_late(output, known, "r0002", lock=lock.ref, over=True)
    assert parts == read_parts(output)
    assert {part.name for part in read_parts(output)} == {
        "part-r0001.0-000000.parquet", "part-r0002.0-000000.parquet",
    }  # fmt: skip
    assert len(naive(output, "detections")) == 4


@pytest.mark.parametrize("over", [False, True])
def test_boxes_of_a_writer_that_died_go_at_the_end_once_no_writer_lives(output, lock, over):
    publish(output, lock, "part-r0002.0-000000.parquet", [("x.tar", 0, 1, "ok", 2)])
    boxes = ledger.to_parquet(boxes_table([("x.tar", 0, 1, "ok", 2)]), METADATA)
    for name in ("part-r0001.0-000003-n.parquet", "part-r0002.0-000000-n.parquet"):
        storage.write_atomic(f"{output}/detections/{name}", boxes)
    ledger.remove_late(output, [], "r0002", lock=lock.ref, over=over)
    assert ("part-r0002.0-000000-n.parquet" in part_names(output, "detections")) != over
    assert "part-r0001.0-000003-n.parquet" not in part_names(output, "detections")


def test_a_run_that_was_overtaken_removes_nothing_at_its_end(output, lock):
    storage.create_exclusive(f"{output}/_run/lock-{lock.number + 1:06d}", b"{}")
    storage.write_atomic(f"{output}/images/part-r0002.0-000000.parquet", b"of the new run")
    with pytest.raises(StorageError, match="took this output over"):
        ledger.remove_late(output, [], "r0001", lock=lock.ref, over=True)
    assert part_names(output, "images") == {"part-r0002.0-000000.parquet"}


def test_an_images_part_whose_boxes_were_swept_before_it_landed_does_not_count(output, lock):
    publish(output, lock, "part-a.parquet", [("x.tar", 0, 1, "ok", 2)])
    publish(output, lock, "part-b.parquet", [("y.tar", 0, 1, "ok", 2)])
    (first, _) = read_parts(output)
    storage.delete([f"{output}/detections/{first.detections}"])
    assert [part.name for part in ledger.sweep(output)] == ["part-b.parquet"]
    assert part_names(output, "images") == {"part-b.parquet"}


def test_of_parts_with_the_same_image_the_newest_stays_and_rounds_may_repeat(output, lock):
    publish(output, lock, "part-r0001.0-000000.parquet", [("x.tar", 0, 4, "ok", 2), ("x.tar", 1, 4, "ok", 1)])
    publish(output, lock, "part-r0001.0-000001.parquet", [("x.tar", 3, 4, "ok", 2)])
    publish(output, lock, "part-r0002.0-000000.parquet", [("x.tar", 1, 4, "ok", 1), ("x.tar", 2, 4, "ok", 2)])
    publish(output, lock, "part-r0003.0-000000.parquet", [("x.tar", 2, 4, "ok", 3)], round=1)
    kept = ledger.without_repeats(output, read_parts(output))
    assert [part.name for part in kept] == [
        "part-r0001.0-000001.parquet", "part-r0002.0-000000.parquet", "part-r0003.0-000000.parquet",
    ]  # fmt: skip
    assert kept == read_parts(output)
    assert len(part_names(output, "detections")) == 3
    assert ledger.without_repeats(output, []) == []


def test_a_part_that_holds_an_image_twice_is_no_repeat_of_itself(output, lock):
    publish(output, lock, "part-a.parquet", [("x.tar", 0, 2, "ok", 1), ("x.tar", 0, 2, "ok", 1)])
    kept = ledger.without_repeats(output, read_parts(output))
    assert [part.name for part in kept] == ["part-a.parquet"]


def test_compaction_keeps_every_row_in_input_order(output, lock):
    rows = [
        (f"s{shard}.tar", index, 5, "ok", (shard + index) % 3) for shard in range(4) for index in range(5)
    ]
    shuffled = np.random.default_rng(0).permutation(len(rows))
    for number, pick in enumerate(np.array_split(shuffled, 6)):
        publish(output, lock, f"part-{number}.parquet", [rows[i] for i in pick])
    parts = compaction.compact(output, read_parts(output), "r0002", superseded=False, lock=lock.ref)
    assert len(parts) == 1
    images, boxes = naive(output, "images"), naive(output, "detections")
    assert images.image_id.tolist() == [f"{shard}/{index}" for shard, index, *_ in rows]
    assert boxes.image_id.tolist() == [f"{s}/{i}" for s, i, _, _, n in rows for _ in range(n)]
    scores = [i + rank / 10 for _, i, _, _, n in rows for rank in range(n)]
    assert boxes.score.tolist() == pytest.approx(scores)


def test_compaction_that_dies_before_deleting_is_finished_by_the_next_sweep(output, lock, monkeypatch):
    for number in range(3):
        publish(output, lock, f"part-{number}.parquet", [("x.tar", number, 3, "ok", 2)])
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "delete_parts", lambda *args: None)
        compaction.compact(output, read_parts(output), "r0002", superseded=False, lock=lock.ref)
    assert len(naive(output, "detections")) == 12  # old and new parts, until the next start
    assert [part.num_images for part in read_parts(output)] == [3]  # our own reader knows already
    ledger.sweep(output)
    assert len(naive(output, "detections")) == 6
    assert len(naive(output, "images")) == 3


def test_compaction_deletes_nothing_where_a_part_has_the_name_of_its_result(output, lock):
    """As after somebody deleted the lock files: runs are numbered from 1 again."""
    publish(output, lock, "part-r0001.c00000.parquet", [("x.tar", 0, 2, "ok", 2)])
    publish(output, lock, "part-r0001.0-000000.parquet", [("x.tar", 1, 2, "ok", 2)])
    before = read_parts(output)
    with pytest.raises(StorageError, match="exists already"):
        compaction.compact(output, before, "r0001", superseded=False, lock=lock.ref)
    assert read_parts(output) == before
    assert (len(naive(output, "images")), len(naive(output, "detections"))) == (2, 4)


def test_rows_of_a_later_round_replace_older_ones(output, lock):
    publish(output, lock, "part-0.parquet", [("x.tar", 0, 2, "ok", 2), ("x.tar", 1, 2, "failed", 0)])
    publish(output, lock, "part-1.parquet", [("x.tar", 1, 2, "ok", 3)], round=1)
    parts = compaction.compact(output, read_parts(output), "r0002", superseded=True, lock=lock.ref)
    images = naive(output, "images")
    assert images.status.tolist() == ["ok", "ok"]
    assert len(naive(output, "detections")) == 5
    assert [part.round for part in parts] == [1]  # a later retry is newer still


@pytest.mark.parametrize("arrived", [2, 1])
def test_the_row_of_a_shard_that_failed_as_a_whole_goes_when_all_of_its_images_came(output, lock, arrived):
    whole = ("x.tar", -1, 0, "failed", 0)
    publish(output, lock, "part-0.parquet", [whole, ("y.tar", 0, 1, "ok", 1)])
    publish(output, lock, "part-1.parquet", [("x.tar", i, 2, "ok", 1) for i in range(arrived)], round=1)
    assert ledger.read_ledger(output, read_parts(output)).is_superseded == (arrived == 2)
    compaction.compact(output, read_parts(output), "r0002", superseded=True, lock=lock.ref)
    rows = naive(output, "images")[["shard", "shard_index"]].astype(object).apply(tuple, axis=1).tolist()
    assert rows == [("x.tar", -1)] * (arrived < 2) + [("x.tar", i) for i in range(arrived)] + [("y.tar", 0)]
    assert len(naive(output, "detections")) == arrived + 1
    assert not ledger.read_ledger(output, read_parts(output)).is_superseded


def test_parts_that_are_full_of_boxes_are_left_alone(output, lock, monkeypatch):
    monkeypatch.setattr(compaction, "COMPACT_DETECTIONS", 10)
    for number in range(6):
        publish(output, lock, f"part-{number}.parquet", [("x.tar", number, 6, "ok", 4)])
    once = compaction.compact(output, read_parts(output), "r0002", superseded=False, lock=lock.ref)
    assert [part.num_detections for part in once] == [8, 8, 8]
    assert compaction.compact(output, once, "r0003", superseded=False, lock=lock.ref) == once


def test_large_parts_are_left_alone_and_groups_stay_below_the_limit(output, lock, monkeypatch):
    monkeypatch.setattr(compaction, "COMPACT_IMAGES", 4)
    publish(output, lock, "part-0.parquet", [("big.tar", i, 4, "ok", 0) for i in range(4)])
    for number in range(1, 8):
        publish(output, lock, f"part-{number}.parquet", [("x.tar", number, 9, "ok", 1)])
    parts = compaction.compact(output, read_parts(output), "r0002", superseded=False, lock=lock.ref)
    assert sorted(part.num_images for part in parts) == [3, 4, 4]
    assert "part-0.parquet" in {part.name for part in parts}


def test_every_part_says_version_fingerprint_and_its_detections(output, lock):
    publish(output, lock, "part-0.parquet", [("x.tar", 0, 1, "ok", 2)])
    (part,) = read_parts(output)
    assert part.fingerprint == "f"
    assert part_names(output, "detections") == {part.detections}
    assert (part.num_images, part.num_detections) == (1, 2)


@pytest.mark.parametrize("at_once", [1, 2, 5, 6])
def test_every_part_is_read_however_many_are_asked_for_at_once(output, lock, monkeypatch, at_once):
    monkeypatch.setattr(results_parts, "FOOTERS_AT_ONCE", at_once)
    names = [f"part-{number}.parquet" for number in range(5)]
    for number, name in enumerate(names):
        publish(output, lock, name, [("x.tar", number, 5, "ok", 1)])
    assert [part.name for part in read_parts(output)] == names


def test_the_parts_of_a_run_share_one_copy_of_its_models_description(output, lock):
    for number in range(2):
        publish(output, lock, f"part-{number}.parquet", [("x.tar", number, 2, "ok", 2)])
    first, second = read_parts(output)
    assert first.model is second.model

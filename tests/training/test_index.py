"""The index of a shard set."""

import json

import pytest

from pipeline import storage
from pipeline.errors import ConfigError, ShardError
from pipeline.training.index import (
    annotation,
    check_apart,
    index_shards,
    load_index,
    save_index,
    shards_digest,
    training_shards,
)
from tests.makers import make_parquet_shard, make_tar_shard
from tests.training.makers import make_set, read_set


def test_byte_ranges_of_the_index_are_the_files_of_the_tar(tmp_path):
    index, _ = read_set(make_set(tmp_path, 5, num_shards=2))
    assert index.num_rows == 5
    for row in index.to_pylist():
        (data,) = storage.read_ranges(row["uri"], [(row["offset"], row["size"])])
        assert data.startswith(b"\x89PNG")
        assert data.endswith(b"IEND\xaeB`\x82")


def test_annotations_come_back_as_class_numbers(tmp_path):
    index, classes = read_set(make_set(tmp_path, 4, empty=1))
    assert classes.ids == (10, 20)
    found = [annotation(row) for row in index.to_pylist()]
    assert found[0].boxes.shape == (0, 4)
    assert all(set(one.labels.tolist()) <= {1, 2} for one in found)
    assert all((one.width, one.height) == (160, 128) for one in found)


def test_a_kept_index_is_used_until_a_shard_changes(tmp_path):
    folder, kept = make_set(tmp_path / "set", 3), str(tmp_path / "index.parquet")
    index, classes = read_set(folder)
    digest = shards_digest(training_shards(str(folder), flag="--train"), classes)
    assert load_index(kept, digest) is None
    save_index(index, kept, digest)
    again = load_index(kept, digest)
    assert again is not None
    assert again.to_pylist() == index.to_pylist()
    make_set(folder, 4)
    changed = shards_digest(training_shards(str(folder), flag="--train"), classes)
    with pytest.raises(ConfigError, match="changed since this run began"):
        load_index(kept, changed)


def test_only_plain_tars_are_taken(tmp_path):
    make_parquet_shard(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"--train .*a.parquet is no plain .tar"):
        training_shards(str(tmp_path), flag="--train")
    with pytest.raises(ConfigError, match=r"--val .*nothing there"):
        training_shards(str(tmp_path / "absent"), flag="--val")


def test_a_shard_that_is_in_both_sets_is_named_however_its_path_is_written(tmp_path, monkeypatch):
    make_set(tmp_path / "data", 1)
    val = training_shards(str(make_set(tmp_path / "data" / "val", 1, seed=1)), flag="--val")
    monkeypatch.chdir(tmp_path)
    train = training_shards("data", flag="--train")
    with pytest.raises(ConfigError, match=r"data/val/shard-00000.tar is in --train and in --val"):
        check_apart(train, val)
    check_apart(train[:1], val)


def test_an_image_without_annotation_is_named(tmp_path):
    folder = make_set(tmp_path, 1)
    _, classes = read_set(folder)
    make_tar_shard(folder / "shard-00000.tar", 1)
    with pytest.raises(ConfigError, match=r"000.jpg has no annotation"):
        index_shards(training_shards(str(folder), flag="--train"), classes)


def test_a_class_that_the_set_does_not_have_is_refused(tmp_path):
    folder = make_set(tmp_path, 1)
    _, classes = read_set(folder)
    wrong = {"width": 160, "height": 128, "boxes": [[0, 0, 9, 9]], "labels": [7]}
    make_tar_shard(folder / "shard-00000.tar", 1, annotations={"000.jpg": wrong})
    with pytest.raises(ConfigError, match=r"000.jpg has an annotation of another form"):
        index_shards(training_shards(str(folder), flag="--train"), classes)


def test_a_cut_shard_is_refused(tmp_path):
    folder = make_set(tmp_path, 2)
    _, classes = read_set(folder)
    path = folder / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(ShardError, match=r"shard-00000.tar"):
        index_shards(training_shards(str(folder), flag="--train"), classes)


def test_a_set_without_classes_is_refused(tmp_path):
    make_set(tmp_path, 1)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": []}))
    with pytest.raises(ConfigError, match="no classes"):
        read_set(tmp_path)

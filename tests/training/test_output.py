"""What a training run finds in its output."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.config import TrainConfig, flags
from pipeline.errors import ConfigError
from pipeline.training import run
from pipeline.training.index import index_shards
from pipeline.training.output import check_output, clear
from pipeline.training.session import Position
from tests.training.makers import make_set


def test_a_damaged_record_is_one_clear_line(tmp_path):
    record = f"{tmp_path}/_run/config.json"
    storage.write_atomic(record, b'{"flags": ')
    with pytest.raises(ConfigError, match=f"{record} is damaged; take another --output"):
        check_output(TrainConfig(train="a", val="b", output=str(tmp_path)))
    with pytest.raises(ConfigError, match="is damaged"):
        clear(str(tmp_path))
    assert storage.exists(record)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Flags of a run on small sets whose output holds a finished one; everything but Ray."""
    monkeypatch.setattr("pipeline.runtime.start_ray", lambda: None)
    monkeypatch.setattr("pipeline.runtime.cluster_resource", lambda name: 0.0)
    monkeypatch.setattr(run, "read_index", index_shards)
    monkeypatch.setattr(run, "fit", lambda prepared, started: Position(step=7))
    make_set(tmp_path / "train", 4)
    make_set(tmp_path / "val", 2, seed=1)
    config = TrainConfig(train=f"{tmp_path}/train", val=f"{tmp_path}/val", output=f"{tmp_path}/out")
    run.train(config)
    storage.write_atomic(f"{config.output}/model.safetensors", b"old")
    return config


def changed(config, **changes):
    given: dict[str, Any] = flags(config) | changes
    return TrainConfig(**given)


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_deleted", [1, 2, 3])
def test_an_overwrite_that_dies_while_it_deletes_can_be_given_again(config, monkeypatch, num_deleted):
    storage.write_atomic(f"{config.output}/checkpoints/c/state", b"old")
    left = num_deleted

    def die(path, real=os.unlink):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm_file", lambda self, path: die(path))
        with pytest.raises(KeyboardInterrupt):
            run.train(changed(config, overwrite=True))
    assert not Path(config.output, "_run/result.json").exists()
    assert not run.train(changed(config, overwrite=True)).was_done
    assert not Path(config.output, "checkpoints/c/state").exists()


def test_what_is_refused_deletes_nothing(config):
    before = content(config.output)
    for wrong in ({"train": "/typo"}, {"init": "/typo.safetensors"}, {"device": "cuda"}):
        with pytest.raises(ConfigError):
            run.train(changed(config, overwrite=True, **wrong))
        assert content(config.output) == before


def test_overwrite_begins_anew_with_other_flags_and_other_images(config, tmp_path):
    make_set(tmp_path / "train", 6)
    with pytest.raises(ConfigError, match="changed since this run began"):
        run.dry_run(config)
    outcome = run.train(changed(config, overwrite=True, lr=0.1))
    assert (outcome.was_done, outcome.position.step) == (False, 7)
    assert not storage.exists(f"{config.output}/model.safetensors")
    assert json.loads(storage.read_bytes(f"{config.output}/_run/config.json"))["flags"]["lr"] == 0.1


def test_a_dry_run_with_overwrite_shows_the_new_plan_and_deletes_nothing(config, tmp_path):
    make_set(tmp_path / "train", 6)
    before = content(config.output)
    assert "6 images to learn from" in run.dry_run(changed(config, overwrite=True, lr=0.1))
    assert content(config.output) == before


def test_overwrite_deletes_no_files_of_others(config, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    for start in (run.train, run.dry_run):
        with pytest.raises(ConfigError, match="files that no run wrote"):
            start(changed(config, output=str(foreign), overwrite=True))

"""The training job's command line: the plan, and one clear line for bad input."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from pipeline.model.architectures import architectures
from pipeline.model.ssd import build_model
from tests.makers import make_tar_shard
from tests.training.makers import make_set

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "jobs/train.py"


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line on standard error of a refused command."""

    def run(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(JOB), *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOB), run_name="__main__")
        err = capsys.readouterr().err
        assert ended.value.code == 2, err
        assert len(err.strip().splitlines()) == 1, err
        return err

    return run


@pytest.fixture
def sets(tmp_path):
    make_set(tmp_path / "train", 1)
    make_set(tmp_path / "val", 1, seed=1)
    return ["--train", f"{tmp_path}/train", "--val", f"{tmp_path}/val", "--output", f"{tmp_path}/out"]


@pytest.mark.ray
def test_dry_run_shows_the_plan_of_a_one_image_set_and_writes_nothing(sets, tmp_path):
    flags = [*sets, "--dry-run", "--epochs", "3", "--batch-size", "2"]
    job = subprocess.run([sys.executable, JOB, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    for part in ("1 images to learn from", "10 disc", "20 square", "2 steps of 2 images = 3 epochs"):
        assert part in job.stdout
    assert not (tmp_path / "out").exists()


def test_weights_of_another_architecture_are_refused(sets, refused):
    line = refused(*sets, "--architecture", "ssd300_vgg16", "--init", "coco_ssdlite300_mobilenet_v2")
    assert "is a ssdlite300_mobilenet_v2, not a ssd300_vgg16" in line


def test_a_folder_with_other_files_is_refused(sets, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert "thesis.txt" in refused(*sets)


def test_shards_without_classes_are_refused(sets, tmp_path, refused):
    make_tar_shard(tmp_path / "plain" / "a.tar", 2)
    assert "make annotated shards" in refused(*sets, "--train", f"{tmp_path}/plain")


def test_shards_that_are_learnt_and_validated_are_refused(sets, tmp_path, refused):
    make_set(tmp_path / "train" / "val", 1, seed=1)
    line = refused(*sets, "--val", f"{tmp_path}/train/val")
    assert f"{tmp_path}/train/val/shard-00000.tar is in --train and in --val" in line


def test_a_batch_that_workers_cannot_share_is_refused(sets, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(JOB), *sets, "--workers", "3"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOB), run_name="__main__")
    assert ended.value.code == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--batch-size 8 can't be divided among --workers 3" in words


def test_the_help_of_accumulate_names_the_networks_whose_batch_norm_it_changes(monkeypatch, capsys):
    found = [
        name
        for name in architectures()
        if any(isinstance(part, nn.BatchNorm2d) for part in build_model(name, num_classes=2).modules())
    ]
    monkeypatch.setattr(sys, "argv", [str(JOB), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(JOB), run_name="__main__")
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"but for networks with batch norm ({', '.join(sorted(found, reverse=True))})" in words


def test_help_explains_the_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(JOB), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(JOB), run_name="__main__")
    text = capsys.readouterr().out
    for flag in ("--train", "--val", "--output", "--init", "--freeze", "--max-minutes", "--hard-negatives"):
        assert flag in text

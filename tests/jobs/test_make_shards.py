"""jobs/make_shards.py as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from pipeline.data.shards import list_shards, read_shard
from tests.conftest import shared
from tests.makers import make_jpeg

JOB = Path(__file__).resolve().parents[2] / "jobs/make_shards.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the job with flags, as `python jobs/make_shards.py` does; returns exit code, stdout and stderr."""

    def run(*flags: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", [str(JOB), *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOB), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def test_a_coco_set_is_packed_and_described(tmp_path, run):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(make_jpeg(64, 48))
    data = {
        "images": [{"id": 3, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 2, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 2, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))

    where = ("--images", tmp_path / "in", "--annotations", tmp_path / "a.json", "--output", tmp_path / "out")
    code, out, err = run("--format", "coco", *where)

    assert (code, err) == (0, "")
    assert "Packed 1 images into 1 shard" in out
    assert "Boxes: 1 of 1 classes: cat 1" in out
    (row,) = read_shard(list_shards(str(tmp_path / "out"))[0])
    assert row.annotation is not None
    assert row.annotation["boxes"] == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "folder", "--images", "/no/such/folder"], "error: --images /no/such/folder: no image"),
        (["--format", "coco", "--images", "in"], "--format coco needs --annotations"),
        (["--format", "folder", "--images", "in", "--split", "train"], "are for --format voc"),
        (["--format", "yolo", "--images", "in"], "invalid choice 'yolo'"),
    ],
)
def test_what_is_refused_ends_with_a_clear_line_and_exit_code_2(tmp_path, run, flags, words):
    code, _, err = run(*flags, "--output", tmp_path / "out")

    assert code == 2
    assert words in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_bccd_is_refused_until_its_bad_boxes_may_be_left_out(tmp_path, run):
    flags = ("--format", "voc", "--images", shared("data/bccd"), "--output", tmp_path / "out")

    refused, _, err = run(*flags)
    done, out, _ = run(*flags, "--skip-bad-boxes")

    assert (refused, done) == (2, 0)
    assert "BloodImage_00338.xml object 13 (RBC 504 337 504 337) has no area" in err
    assert "Boxes: 4,886 of 3 classes: RBC 4,153, WBC 372, Platelets 361" in out

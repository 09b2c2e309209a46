import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.outputs import box, image, write_part

ROOT = Path(__file__).resolve().parents[2]


def evaluate(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/evaluate.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture
def data_set(tmp_path):
    """Two runs on one annotated image with a non-ASCII name: the first finds the dog, the second does not."""
    annotations = {
        "images": [{"id": 1, "file_name": "ünï 猫.jpg"}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 18, "bbox": [10, 5, 40, 40]}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    write_part(tmp_path / "new", "p", [image("s.tar/ünï 猫.jpg", 1)], [box("s.tar/ünï 猫.jpg", "dog", 0.9)])
    write_part(tmp_path / "old", "p", [image("s.tar/ünï 猫.jpg", 1)], [box("s.tar/ünï 猫.jpg", "dog", 0.4)])
    return tmp_path


def test_the_job_prints_the_numbers_and_writes_every_file(data_set):
    done = evaluate(
        "--detections", data_set / "new", "--annotations", data_set / "truth.json", "--baseline",
        data_set / "old", "--output", data_set / "n.json", "--thresholds", data_set / "t.json",
        "--plots", data_set / "plots", "--resamples", 10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "AP     1.0000" in done.stdout
    assert "1 boxes gained, 0 lost" in done.stdout
    numbers = json.loads((data_set / "n.json").read_text())
    keys = [
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR1",
        "AR10",
        "AR100",
        "ARs",
        "ARm",
        "ARl",
        "per_class",
    ]
    assert [key for key in numbers if key in keys] == keys
    assert json.loads((data_set / "t.json").read_text()) == {"dog": pytest.approx(0.9)}
    with Image.open(data_set / "plots/precision_recall.png") as picture:
        assert picture.format == "PNG"


def test_the_voc_metric_gives_map(data_set):
    flags = ("--detections", data_set / "new", "--annotations", data_set / "truth.json", "--metric", "voc07")
    done = evaluate(*flags, "--output", data_set / "n.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((data_set / "n.json").read_text())["mAP"] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--detections", "nowhere", "--annotations", "{}/truth.json"], "no results in nowhere"),
        (["--detections", "{}/new", "--annotations", "{}"], "no COCO .json"),
        (["--detections", "{}/new", "--annotations", "{}/no.json"], "no such file"),
        (["--detections", "{}/new", "--annotations", "x.json", "--output", "n.txt"], "must end in .json"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(data_set, flags, message):
    done = evaluate(*[flag.format(data_set) for flag in flags])
    assert done.returncode == 2
    assert message in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr

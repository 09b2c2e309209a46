"""The lines of docs/query.md run, on a made output and on the demo's where it is there."""

import importlib.util
from pathlib import Path

import pytest

from tests.makers import make_jpeg, make_tar_shard
from tests.outputs import box, failed_image, image, write_part

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/query.md").read_text()
MODEL = {"class_names": ["person", "cup", "dining table", "cat", "horse"]}

pytestmark = pytest.mark.filterwarnings("ignore:OpenCV")  # supervision says that it is not installed


def load_runner():
    """docs/run_query.py as a module."""
    spec = importlib.util.spec_from_file_location("run_query", ROOT / "docs/run_query.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_demo(folder):
    """A small stand-in for the output of `make demo` and of a second run."""
    names = ["coffee.png", "chelsea.png", "horse.png"]
    shard = make_tar_shard(folder / "shards/demo-00000.tar", {name: make_jpeg(100, 50) for name in names})
    ids = [f"demo-00000.tar/{name}" for name in names]
    rows = [
        image(ids[i], 2, uri=f"tar://{name}::{shard}", shard="demo-00000.tar", shard_index=i, shard_size=3)
        for i, name in enumerate(names)
    ]
    rows.append(failed_image("demo-00000.tar/broken.jpg", shard="demo-00000.tar"))
    boxes = [
        box(ids[0], "cup", 0.9),
        box(ids[0], "dining table", 0.6),
        box(ids[1], "cat"),
        box(ids[2], "horse"),
    ]
    write_part(folder / "results", "p", rows, [*boxes, box(ids[1], "person", 0.8)], model=MODEL)
    write_part(folder / "compressed", "p", rows, [*boxes, box(ids[2], "person", 0.4)], model=MODEL)


def test_every_line_of_the_page_runs_and_answers(tmp_path, monkeypatch):
    write_demo(tmp_path / "demo-output")
    monkeypatch.chdir(tmp_path)
    answers = [answer for _, answer in load_runner().run_blocks(PAGE, {})]
    assert len(answers) >= 12
    assert "3 images" not in answers[0]
    assert answers[0].startswith("4 images (1 failed, 0 without a box), 5 detections")
    assert "['demo-00000.tar/coffee.png']" in answers[2]
    assert "UnidentifiedImageError" in answers[6]
    assert "sofa" in answers[7]
    assert (tmp_path / "demo-output/people.jpg").exists()
    assert "gained" in answers[9]
    assert "lost" in answers[9]
    assert answers[-1].strip() == "['cup', 'dining table']"


def test_the_page_shows_an_answer_to_every_block_that_prints(tmp_path, monkeypatch):
    write_demo(tmp_path / "demo-output")
    monkeypatch.chdir(tmp_path)
    runner = load_runner()
    shown = ["```text" in match[0] for match in runner.BLOCK.finditer(PAGE)]
    assert shown == [bool(answer) for _, answer in runner.run_blocks(PAGE, {})]


def test_every_line_runs_on_the_output_of_the_demo(monkeypatch):
    if not (ROOT / "demo-output/compressed/images").exists():
        pytest.skip("needs demo-output/: make demo && python docs/run_query.py")
    monkeypatch.chdir(ROOT)
    assert load_runner().run_blocks(PAGE, {})[0][1].startswith("10 images (1 failed")

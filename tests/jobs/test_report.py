import subprocess
import sys
from pathlib import Path

from tests.makers import make_jpeg, make_tar_shard
from tests.outputs import box, image, write_part

ROOT = Path(__file__).resolve().parents[2]


def report(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/report.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


def write_output(folder, shard, score):
    row = image("ünï.tar/猫.jpg", 1, uri=f"tar://猫.jpg::{shard}", shard="ünï.tar", shard_size=1)
    write_part(folder, "p", [row], [box("ünï.tar/猫.jpg", "dog", score)])


def test_the_job_writes_one_page_with_the_photographs(tmp_path):
    shard = make_tar_shard(tmp_path / "ünï.tar", {"猫.jpg": make_jpeg(100, 50)})
    write_output(tmp_path / "new", shard, 0.9)
    write_output(tmp_path / "old", shard, 0.2)
    html = tmp_path / "report.html"
    done = report("--output", tmp_path / "new", "--html", html, "--baseline", tmp_path / "old")
    assert done.returncode == 0, done.stderr
    assert str(html) in done.stdout
    page = html.read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 2  # in the gallery and among the changes
    assert "1 boxes gained" in page


def test_a_folder_without_results_is_one_line_and_exit_code_2(tmp_path):
    done = report("--output", tmp_path, "--html", tmp_path / "x.html")
    assert done.returncode == 2
    assert "no results in" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.html").exists()

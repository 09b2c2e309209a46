"""`jobs/infer.py` as a stranger runs it: subprocesses, exit codes, messages."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pipeline import storage
from pipeline.config import InferConfig
from pipeline.data.shards import list_shards
from pipeline.inference.lock import Lock
from pipeline.inference.plan import make_plan, read_settings, run_fingerprint, save_shards
from pipeline.model import checkpoint
from pipeline.results import load_detections, load_images
from pipeline.results.parts import part_names
from tests import outputs, servers
from tests.chaos.runs import wait_until
from tests.makers import make_tar_shard

ROOT = Path(__file__).resolve().parents[2]


def job(name, *args, cwd=ROOT, **environment):
    """Run a job; returns exit code, standard output and standard error."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / name), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "TERM": "dumb", **environment},
        timeout=280,
    )
    return done.returncode, done.stdout, servers.clean_text(done.stderr)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run jobs/infer.py in this process; it must exit with code 2 and no traceback. Returns what it said."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["jobs/infer.py", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs" / "infer.py"), run_name="__main__")
        said = servers.clean_text("".join(capsys.readouterr()))
        assert ended.value.code == 2, said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def source(tmp_path):
    make_tar_shard(tmp_path / "in" / "a.tar", 3)
    return tmp_path / "in"


def finish(source, output):
    """Leave in `output` what the next run's plan looks at after a run of `source`."""
    config = InferConfig(input=str(source), output=str(output))
    spec = checkpoint.read_spec(config.weights)
    fingerprint = run_fingerprint(config, spec, checkpoint.weights_sha256(config.weights))
    storage.write_atomic(f"{output}/_run/config.json", json.dumps({"fingerprint": fingerprint}).encode())
    outputs.write_part(output, "part-0", [outputs.image("a.tar/000.jpg", shard_size=1)], [])
    with Lock(str(output)) as lock:
        settings, shards = read_settings(config, spec), list_shards(config.input)
        save_shards(make_plan(config, settings, "f1", shards, lock=lock.ref))


def test_help_teaches():
    code, out, _ = job("infer.py", "--help")
    assert code == 0
    for word in (
        "--input",
        "--output",
        "--weights",
        "--dry-run",
        "--retry-failed",
        "ray job submit",
        "Exit codes",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "{in}/nothing", "--output", "{out}"], "nothing"),
        (["--input", "{empty}", "--output", "{out}"], "empty: nothing there"),
        (["--input", "{in}", "--output", "{out}", "--weights", "no-such"], "no weights 'no-such'"),
        (["--input", "{in}", "--output", "/proc/version/x"], "can't be written"),
        (["--input", "{in}", "--output", "{foreign}"], "holds other files (such as 'thesis.txt')"),
        (["--input", "{in}"], "give both --input and --output"),
        (
            ["--input", "{in}", "--output", "{out}", "--score-threshold", "2"],
            "--score-threshold 2.0 is out of range",
        ),
        (["--input", "{in}", "--output", "{out}", "--score-threshold", "{foreign}/t.json"], "t.json"),
        (["--input", "{in}", "--output", "{out}", "--batch-size", "-1"], "--batch-size -1"),
        (["--input", "nosuch://x/y", "--output", "{out}"], "nosuch"),
        (["--input", "{in}", "--output", "memory://out"], "--output: memory://"),
        (["--input", "{in}", "--output", "{out}", "--max-pixels", "0"], "--max-pixels 0"),
    ],
    ids=[
        "missing",
        "empty",
        "weights",
        "unwritable",
        "foreign",
        "half",
        "threshold",
        "threshold-file",
        "batch",
        "protocol",
        "memory",
        "pixels",
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, source, refused, args, message):
    places = {
        "in": source,
        "out": tmp_path / "out",
        "empty": tmp_path / "empty",
        "foreign": tmp_path / "foreign",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    said = refused(*[arg.format(**places) for arg in args])
    assert message in said
    assert len([line for line in said.splitlines() if line.startswith("error")]) <= 1
    assert not (tmp_path / "out" / "images").exists()


def test_a_mistyped_flag_is_guessed(source, tmp_path, refused):
    said = refused("--input", source, "--output", tmp_path / "out", "--bacth-size", "8")
    assert "--batch-size" in said


def test_a_dry_run_tells_the_plan_and_writes_nothing(source, tmp_path):
    code, out, err = job("infer.py", "--input", source, "--output", tmp_path / "out", "--dry-run")
    assert code == 0, err
    for word in ("1 shards", "writable", "ssdlite300_mobilenet_v2", "3 images", "estimate"):
        assert word in out
    assert storage.list_files(str(tmp_path / "out")) == []


def test_a_dry_run_says_why_an_image_of_its_sample_failed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "torn.jpg").write_bytes(b"\xff\xd8\xff no more")
    code, out, err = job("infer.py", "--input", tmp_path / "in", "--output", tmp_path / "out", "--dry-run")
    assert code == 0, err
    assert "1 failed (torn.jpg: " in out


@pytest.mark.parametrize("refusal", ["changed", "overwrite", "locked"])
def test_a_dry_run_refuses_what_the_run_would(tmp_path, source, refused, refusal):
    output = tmp_path / "out"
    args = ["--input", source, "--output", output, "--dry-run"]
    with contextlib.ExitStack() as stack:
        if refusal == "locked":
            stack.enter_context(Lock(str(output)))
        elif refusal == "overwrite":
            output.mkdir()
            (output / "thesis.txt").touch()
            args.append("--overwrite")
        else:
            finish(source, output)
            with (source / "a.tar").open("ab") as shard:
                shard.write(bytes(1024))
        said = refused(*args)
    messages = {
        "changed": "1 shards changed",
        "overwrite": "no run wrote",
        "locked": "another run is writing",
    }
    assert messages[refusal] in said


@pytest.mark.ray
def test_sigterm_stops_a_run_in_one_line_and_the_same_command_goes_on(tmp_path):
    make_tar_shard(tmp_path / "in" / "a.tar", 130)
    make_tar_shard(tmp_path / "in" / "b.tar", 130)
    command = [sys.executable, str(ROOT / "jobs" / "infer.py")]
    command += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        wait_until(lambda: part_names(f"{tmp_path}/out", "images") or run.poll() is not None)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 143, err
    assert "stopped; the same command goes on from here" in err
    assert "SIGTERM received" not in err
    assert "Traceback" not in err
    assert len(load_images(tmp_path / "out")) < 260
    code, out, err = job("infer.py", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 0, out + err
    assert load_images(tmp_path / "out").image_id.nunique() == 260


@pytest.mark.ray
def test_the_demo_finds_the_cat_the_astronaut_and_the_cup(tmp_path):
    pytest.importorskip("skimage")
    code, out, err = job("infer.py", cwd=tmp_path)
    assert code == 0, out + err
    results = tmp_path / "demo-output" / "results"
    boxes = load_detections(results, min_score=0.5)
    best = boxes.sort_values("score").groupby("image_id").class_name.last()
    found = {Path(image).stem: name for image, name in best.items()}
    assert found["chelsea"] == "cat"
    assert found["astronaut"] == "person"
    assert found["coffee"] == "cup"
    (failed,) = load_images(results, status="failed").to_dict("records")
    assert (failed["error_stage"], failed["error_type"]) == ("decode", "Truncated")
    assert "cut short" in failed["error_message"]
    assert (tmp_path / "demo-output" / "contact-sheet.jpg").stat().st_size > 50_000
    assert "10 images: 9 ok, 1 failed" in out
    assert "load_detections(" in out


@pytest.mark.ray
def test_from_and_to_s3(tmp_path, refused):
    with servers.moto() as environment:
        old = dict(os.environ)
        os.environ.update(environment)
        try:
            fs, _ = storage.split("s3://bucket")
            fs.mkdir("bucket")
            for name in "ab":
                shard = make_tar_shard(tmp_path / f"{name}.tar", 3, seed=ord(name))
                storage.write_atomic(f"s3://bucket/in/{name}.tar", shard.read_bytes())
            flags = ["--input", "s3://bucket/in", "--output", "s3://bucket/out"]
            code, out, err = job("infer.py", *flags)
            assert code == 0, out + err
            assert len(load_images("s3://bucket/out")) == 6
            code, out, err = job("verify.py", *flags)
            assert (code, out.startswith("complete: 2 shards, 6 images")) == (0, True), out + err
            assert "testing-secret" not in out + err
            said = refused("--input", "s3://no-such-bucket/x", "--output", "s3://bucket/out")
            assert "no-such-bucket" in said
        finally:
            os.environ.clear()
            os.environ.update(old)


@pytest.mark.ray
@pytest.mark.slow
def test_detections_do_not_depend_on_batch_size_detectors_or_shards(tmp_path):
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    names = ["astronaut.png", "camera.png", "chelsea.png", "coffee.png", "horse.png", "rocket.jpg"]
    photos = {name: (folder / name).read_bytes() for name in names}
    make_tar_shard(tmp_path / "one" / "x.tar", photos)
    for name, data in photos.items():
        make_tar_shard(tmp_path / "many" / f"{name}.tar", {name: data})
    runs = {
        "a": ("one", "--batch-size", 1, "--max-detectors", 1),
        "b": ("many", "--batch-size", 4, "--min-detectors", 2, "--max-detectors", 2),
    }
    tables = {}
    for name, (source, *flags) in runs.items():
        output = tmp_path / name
        code, out, err = job("infer.py", "--input", tmp_path / source, "--output", output, *flags)
        assert code == 0, out + err
        boxes = load_detections(output)
        boxes["image"] = boxes.image_id.str.rsplit("/", n=1).str[-1]
        clear = boxes.loc[(boxes.score - 0.05).abs() > 1e-4]
        tables[name] = clear.sort_values(by=["image", "detection_id"])
    left, right = tables["a"], tables["b"]
    assert left.image.tolist() == right.image.tolist()
    assert left.label.tolist() == right.label.tolist()
    assert abs(left.score.to_numpy() - right.score.to_numpy()).max() <= 1e-4
    corners = ["xmin", "ymin", "xmax", "ymax"]
    assert abs(left[corners].to_numpy() - right[corners].to_numpy()).max() <= 0.01


@pytest.mark.ray
def test_no_odd_file_is_lost(tmp_path, shared_data):
    odd = shared_data("data/odd_images")
    manifest = pd.read_csv(odd / "manifest.csv", dtype=str, keep_default_na=False)
    files = tmp_path / "in"
    files.mkdir()
    for name in manifest.file:
        (files / name).write_bytes((odd / name).read_bytes())
    code, out, err = job(
        "infer.py", "--input", files, "--output", tmp_path / "out", "--max-failed-fraction", "1"
    )
    assert code == 0, out + err
    images = load_images(tmp_path / "out").set_index("image_id")
    assert len(images) == len(manifest)
    for row in manifest.to_dict("records"):
        image, name = images.loc[row["file"]], row["file"]
        if row["expect"].startswith("ok"):
            size = row["pillow_to_rgb"].split()[-1]
            assert (image["status"], f"{image['width']}x{image['height']}") == ("ok", size), name
        elif row["expect"] == "reject" or (row["expect"] == "limit" and row["pillow_open"] != "ok"):
            assert image["status"] == "failed", name
            assert image["error_message"], name


@pytest.mark.ray
@pytest.mark.slow
def test_the_whole_path_reaches_the_reference_ap(tmp_path, shared_data):
    coco = shared_data("data/coco_val128")
    shards, output = tmp_path / "shards", tmp_path / "out"
    truth = ["--annotations", coco / "annotations.json"]
    steps = [
        ("make_shards.py", "--format", "coco", "--images", coco / "images", *truth, "--output", shards),
        ("infer.py", "--input", shards, "--output", output, "--score-threshold", "0.001"),
        ("verify.py", "--input", shards, "--output", output),
        ("evaluate.py", "--detections", output, *truth, "--output", tmp_path / "ap.json"),
    ]
    for name, *args in steps:
        code, out, err = job(name, *args)
        assert code == 0, out + err
    # 0.381 is the reference run, 0.380 its resize rule rounded to uint8; any other resize gives less.
    assert json.loads((tmp_path / "ap.json").read_text())["AP"] >= 0.379

"""A cluster started with `ray start`, token authentication, and the job submitted to it."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import uuid
import zipfile
from pathlib import Path

import jsonschema
import psutil
import pytest
import ray.autoscaler
import yaml
from ray._private.runtime_env import packaging

from pipeline import runtime
from pipeline.results import load_images
from tests import servers
from tests.makers import make_jpeg, make_tar_shard

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture
def cluster(tmp_path):
    """A head node on the loopback address that wants a token; yields the environment of its clients."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    port, dashboard, agent = (servers.free_port() for _ in range(3))
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--disable-usage-stats",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1",
         # The usual port is taken by this test session's Ray, and an agent without its port takes no jobs.
         f"--dashboard-agent-listen-port={agent}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        servers.wait_for(f"http://127.0.0.1:{dashboard}/api/version", head)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # `ray stop` would end every Ray of this machine
        head.wait(60)


def submit(command, environment, folder):
    """Submit a job and follow it to its end, again while the cluster has no agent for jobs yet."""
    deadline = time.monotonic() + 120
    while True:
        job_id = f"shot-{uuid.uuid4().hex[:8]}"
        flags = ["--submission-id", job_id, "--working-dir", str(ROOT), "--", *command]
        line = [BIN / "ray", "job", "submit", *flags]
        done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, timeout=280)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return job_id, done
        time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_runs_and_its_log_shows_progress(cluster, tmp_path):
    images = {f"{i}.jpg": make_jpeg(320, 240, seed=i) for i in range(150)}
    for name in "abc":
        make_tar_shard(tmp_path / "in" / f"{name}.tar", images)
    command = ["python", "jobs/infer.py", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    job_id, done = submit(command, cluster, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    show = [BIN / "ray", "job", "logs", job_id]
    logs = subprocess.run(show, env=cluster, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r"\d+/~?\d+ \(\d+ %\) images +[\d.]+ images/s +0 failed .*ETA", logs), logs
    assert "450 images: 450 ok, 0 failed" in logs
    assert len(load_images(tmp_path / "out")) == 450
    # Without the token: refused.
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=30)
    assert refused.value.code == 401
    refused.value.close()


@pytest.fixture
def launcher():
    """The cluster launcher's file, parsed."""
    return yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())


@pytest.fixture
def job():
    """What the KubeRay file says of the job, parsed."""
    document = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())
    assert document["kind"] == "RayJob"
    return document["spec"]


def test_the_cluster_files_are_well_formed(launcher, job):
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(launcher, json.loads(schema.read_text()))
    assert launcher["head_node_type"] in launcher["available_node_types"]
    assert (ROOT / job["entrypoint"].split()[1]).exists()


def test_a_gpu_is_there_when_a_job_starts(launcher, job):
    """Jobs look for GPUs at their start only: those of nodes that come later stay idle."""
    detector = launcher["available_node_types"]["detector"]
    assert detector["resources"]["GPU"] * detector["min_workers"] >= 1
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] * group["minReplicas"] >= 1


def test_kuberay_can_submit_its_job_and_see_how_it_ends(job):
    """A container beside the head submits, with the token; the operator asks the head's service how it is."""
    assert job["submissionMode"] == "SidecarMode"
    cluster = job["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{cluster['rayVersion']}-" in dockerfile
    assert "dashboard-host" not in cluster["headGroupSpec"]["rayStartParams"]
    # A token of our own would be another one than that of the operator and of the submitting container.
    assert "RAY_AUTH" not in json.dumps(job)


def test_idle_workers_live_on_every_node_as_long_as_on_a_laptop(launcher, job):
    idle_ms = runtime.LOCAL_CLUSTER_ENVIRONMENT["RAY_idle_worker_killing_time_threshold_ms"]
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for container in (group["template"]["spec"]["containers"][0] for group in groups):
        named = {entry["name"]: entry["value"] for entry in container["env"]}
        assert named["RAY_idle_worker_killing_time_threshold_ms"] == idle_ms
    for when in ("head", "worker"):
        start = launcher[f"{when}_start_ray_commands"][-1]
        assert f"RAY_idle_worker_killing_time_threshold_ms={idle_ms} ray start" in start


def test_the_documented_installations_can_train_and_measure(launcher):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {name_of(line) for line in project["dependencies"] + project["optional-dependencies"]["eval"]}
    (setup,) = launcher["setup_commands"]
    assert {name_of(word) for word in shlex.split(setup)[2:]} == needed
    for place in ("README.md", "cluster/Dockerfile"):
        assert re.findall(r"pip install .*-e (\S+)", (ROOT / place).read_text()) == ["'.[eval]'"], place


def name_of(requirement):
    """The package of a requirement, without extras and versions."""
    return re.split(r"[\[<>=]", requirement)[0]


def test_a_submitted_job_takes_the_code_along_and_leaves_data_and_outputs_here(tmp_path):
    checkout = tmp_path / "checkout"
    files = [path for folder in ("pipeline", "jobs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    code = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    weights = "trained/model.safetensors"
    outputs = {"shards/train/shard-00000.tar", "trained/checkpoints/c/learner.pt", "trained/_run/config.json",
               "detections/images/part-0.parquet", "demo-output/results/images/part-0.parquet",
               "data/1.jpg", "VOC2007/JPEGImages/1.jpg", "BCCD/1.jpg", "photographs/1.jpg"}  # fmt: skip
    for name in code | outputs | {weights}:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout / name)
    package = tmp_path / "package.zip"
    packaging.create_package(str(checkout), package, include_gitignore=True)  # what `ray job submit` calls
    with zipfile.ZipFile(package) as file:
        sent = {name for name in file.namelist() if not name.endswith("/")} - {".gitignore", ".rayignore"}
    assert "pipeline/data/tar.py" in sent
    assert sent == code | {weights}


def test_the_local_cluster_script_explains_itself():
    done = subprocess.run(["bash", ROOT / "cluster" / "local.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cluster/local.sh start" in done.stdout

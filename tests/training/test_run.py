"""Whole runs on Ray: what they leave, that another job can use it, and that kills change nothing."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import safetensors.torch
import torch

from pipeline import storage
from pipeline.config import EvaluateConfig, InferConfig, TrainConfig
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.report import measure_run
from pipeline.inference.run import infer
from pipeline.model.checkpoint import read_spec
from pipeline.training import board
from pipeline.training.feed import make_rows
from pipeline.training.index import index_shards, training_shards
from pipeline.training.loop import Learner
from pipeline.training.order import picks
from pipeline.training.plan import (
    initial_model,
    make_recipe,
    sample_settings,
    shard_classes,
    with_fitted_priors,
)
from pipeline.training.run import choose_device, dry_run, last_position, train
from pipeline.training.samples import load_batch
from tests import servers
from tests.training.makers import make_set, read_set, save_small_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 60  # 12 epochs of 20 images, 4 a step


GIVEN: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 4,
    "augmentation": "light",
    "validations": 2,
    "checkpoint_steps": 10,
    "log_s": 2.0,
    "lr": 2e-3,
}


def flags(folder, output, **changes):
    places: dict[str, Any] = {name: f"{folder}/{name}" for name in ("train", "val")}
    places |= {"output": f"{folder}/{output}", "init": f"{folder}/small.safetensors"}
    return TrainConfig(**(places | GIVEN | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set and weights to begin with."""
    path = tmp_path_factory.mktemp("training")
    make_set(path / "train", 20, num_shards=3)
    make_set(path / "val", 7, seed=1, num_shards=2)
    save_small_model(path / "small.safetensors")
    return path


@pytest.fixture(scope="module")
def whole(folder, ray_cluster):
    """A run that nothing has interrupted."""
    config = flags(folder, "whole")
    with contextlib.chdir(folder):  # a relative path means the caller's folder, not that of a worker
        return config, train(dataclasses.replace(config, output="whole"))


def weights(output):
    return safetensors.torch.load_file(Path(output, "model.safetensors"))


def last_state(output):
    """What the last checkpoint of a run holds."""
    kept = [file.uri for file in storage.list_files(f"{output}/checkpoints")]
    newest = max(uri for uri in kept if uri.endswith("/learner.pt"))
    return torch.load(io.BytesIO(storage.read_bytes(newest)), weights_only=True)


def assert_same_run(output, other):
    """Both have ended with the same weights, after the same number of optimizer steps."""
    mine, theirs = last_state(output), last_state(other)
    assert mine["num_steps"] == theirs["num_steps"] == NUM_STEPS
    for part in ("model", "averaged"):
        assert all(torch.equal(mine[part][name], theirs[part][name]) for name in mine[part])
    steps = {float(state["step"]) for state in mine["optimizer"]["state"].values()}
    assert steps == {float(NUM_STEPS)}


def wait_for_checkpoint(output):
    """Until one is on record: its files alone don't count."""
    deadline = time.monotonic() + 200
    while not last_position(output).step:
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)


def test_a_run_leaves_weights_that_know_their_classes_and_curves(whole):
    config, outcome = whole
    spec = read_spec(f"{config.output}/model.safetensors")
    assert (spec.class_names, spec.label_ids) == (("disc", "square"), (10, 20))
    assert outcome.position.step == NUM_STEPS
    assert outcome.position.best_ap > 0.3
    assert list(Path(config.output, "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads(Path(config.output, "_run", "result.json").read_text())["step"] == NUM_STEPS


def test_validation_is_what_infer_and_evaluate_say(whole, folder):
    config, outcome = whole
    output = str(folder / "detections")
    infer(
        InferConfig(
            input=config.val,
            output=output,
            weights=f"{config.output}/model.safetensors",
            score_threshold=0.001,
        )
    )
    report = measure_run(EvaluateConfig(detections=output, annotations=config.val, resamples=0))
    assert report.numbers["AP"] == pytest.approx(outcome.position.best_ap, abs=2e-3)


def test_a_finished_run_says_so_and_other_flags_are_refused(whole, folder):
    config, outcome = whole
    again = train(config)
    assert again.was_done
    assert again.position == outcome.position
    with pytest.raises(ConfigError, match=r"--lr was 0.002, now 0.1.*--overwrite"):
        train(flags(folder, "whole", lr=0.1))
    with pytest.raises(ConfigError, match="--seed was 0, now 3"):
        dry_run(flags(folder, "whole", seed=3))


def test_a_worker_that_is_killed_costs_no_step_and_no_bit(whole, folder):
    config = flags(folder, "worker-killed")
    victims = []

    def kill():
        wait_for_checkpoint(config.output)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline()):
                victims.append(process.pid)
                process.kill()
                return

    killer = threading.Thread(target=kill)
    killer.start()
    train(config)
    killer.join()
    assert victims
    assert_same_run(config.output, whole[0].output)


def train_command(config):
    command = [sys.executable, str(ROOT / "jobs" / "train.py")]
    for name in ("train", "val", "output", "init", *GIVEN):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return command


def own_cluster():
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def test_ctrl_c_stops_a_run_in_one_line(folder):
    config = flags(folder, "interrupted")
    # What a shell starts in the background ignores SIGINT, these tests perhaps, and so would the job.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        train_command(config), env=own_cluster(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as job:
        signal.signal(signal.SIGINT, before)
        wait_for_checkpoint(config.output)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=120)
    assert job.returncode == 130, err
    assert "stopped; the same command goes on from here" in err
    assert "Traceback" not in err
    assert 0 < last_position(config.output).step < NUM_STEPS


def test_a_driver_that_is_killed_goes_on_with_the_same_command_on_s3(whole, folder, monkeypatch):
    with servers.moto() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fs, _ = storage.split("s3://bucket")
        fs.mkdir("bucket")
        for file in (*folder.glob("train/*"), *folder.glob("val/*")):
            storage.write_atomic(f"s3://bucket/{file.parent.name}/{file.name}", file.read_bytes())
        init = f"{folder}/small.safetensors"
        config = flags("s3://bucket", "output", init=init, checkpoint_steps=25)  # a slow server
        command, own = train_command(config), own_cluster()
        with subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, start_new_session=True) as job:
            wait_for_checkpoint(config.output)
            os.killpg(job.pid, signal.SIGKILL)
        assert 0 < last_position(config.output).step < NUM_STEPS
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
        assert (done.returncode, f"Done: {NUM_STEPS} steps" in done.stdout) == (0, True), (
            done.stdout + done.stderr
        )
        assert "going on after step" in done.stdout + done.stderr
        assert "workers on cpu" in done.stdout + done.stderr
        assert "testing-secret" not in done.stdout + done.stderr
        assert "This run is done already" in train(config).text()
        assert_same_run(config.output, whole[0].output)
        assert read_spec(f"{config.output}/model.safetensors").class_names == ("disc", "square")
        assert storage.list_names(config.output) >= {"model.safetensors", "checkpoints", "tensorboard"}


def steps_without_ray(config, num_steps, *, order_seed=0):
    """What the plain loop makes of the whole global batches."""
    classes = shard_classes(config)
    index = index_shards(training_shards(config.train, flag="--train"), classes)
    model = with_fitted_priors(initial_model(config, classes), index, config)
    learner = Learner(model, make_recipe(config, device="cpu"))
    settings = sample_settings(config, model.spec, num_epochs=config.epochs)
    sizes = {"batch_size": config.batch_size, "num_samples": len(index), "seed": order_seed}
    for step in range(num_steps):
        batch = load_batch(picks(step, rank=0, num_workers=1, **sizes), index, settings)
        learner.step(batch, progress=(step + 1) / num_steps)
    return learner.model.state_dict()


def largest_difference(first, second):
    return max(float((first[name] - value).abs().max()) for name, value in second.items())


def test_two_workers_do_what_the_plain_loop_does_with_both_their_images(folder):
    # Not AdamW: its first steps are the signs of gradients, so rounding of those near zero shows. Nor a high
    # rate: rounding grows with each step (at 1e-3 to 2e-4 in 10 steps, in float64 to 2e-16).
    config = flags(folder, "two", workers=2, optimizer="sgd", lr=2e-4, epochs=2)
    train(config)
    two, alone = last_state(config.output), steps_without_ray(config, 10)
    assert two["num_steps"] == 10
    other = steps_without_ray(config, 10, order_seed=1)  # the same weights to begin with, other batches
    assert largest_difference(two["model"], alone) < 5e-5
    assert largest_difference(other, alone) > 2e-4


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(folder):
    broken = safetensors.torch.load_file(folder / "small.safetensors")
    with safetensors.safe_open(folder / "small.safetensors", "pt") as file:
        header = file.metadata()
    broken["heads.0.boxes.project.bias"] = torch.full_like(broken["heads.0.boxes.project.bias"], np.nan)
    safetensors.torch.save_file(broken, folder / "broken.safetensors", metadata=header)
    with pytest.raises(PipelineError, match=r"step 1: the loss is not finite, in the batch of shard-0000"):
        train(flags(folder, "nan", init=str(folder / "broken.safetensors")))


def damage(folder, number):
    """Overwrite the beginning of an image in its tar; its id."""
    row = read_set(folder)[0].slice(number, 1).to_pylist()[0]
    with Path(row["uri"]).open("r+b") as file:
        file.seek(row["offset"])
        file.write(b"no image")
    return row["image_id"]


def seen(rank, steps):
    """Samples that a worker of two sees in some steps of 4 images out of 20."""
    sizes = {"num_workers": 2, "batch_size": 4, "num_samples": 20, "seed": 0}
    return {pick.sample for step in steps for pick in picks(step, rank=rank, **sizes)}


def test_images_of_any_worker_that_cannot_be_decoded_are_named_once(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(board, "logger", SimpleNamespace(info=lambda form, text: lines.append(text)))
    make_set(tmp_path / "train", 20)
    make_set(tmp_path / "val", 7, seed=1)
    save_small_model(tmp_path / "small.safetensors")
    first, second = range(5), range(5, 10)  # epochs
    numbers = min(seen(1, first) & seen(0, second)), min(seen(1, first) & seen(1, second))
    learnt = {damage(tmp_path / "train", number) for number in numbers}
    validated = damage(tmp_path / "val", 3)
    train(flags(tmp_path, "out", workers=2, epochs=2))
    named = [line.split(": ")[1] for line in lines if "another one stands in" in line]
    assert (len(named), set(named)) == (2, learnt)
    said = [line for line in lines if "--val" in line]
    assert [line.split(": ")[:2] for line in said] == [
        ["1 of 7 images of --val can't be decoded, grey stands in for them", validated]
    ]


def test_bfloat16_without_gpus_is_refused(folder, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.cluster_resource", lambda name: 0.0)
    with pytest.raises(ConfigError, match="bfloat16 needs GPUs"):
        choose_device(flags(folder, "half", precision="bfloat16"))


@pytest.mark.parametrize(
    ("device", "gpus", "chosen"), [("auto", 0.0, "cpu"), ("auto", 4.0, "cuda"), ("cpu", 2.0, "cpu")]
)
def test_auto_trains_on_gpus_where_there_are_any(folder, monkeypatch, device, gpus, chosen):
    monkeypatch.setattr("pipeline.runtime.cluster_resource", lambda name: gpus)
    assert choose_device(flags(folder, "any", device=device, workers=4)) == chosen


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("auto", 2.0, "the cluster has 2 GPUs for 4 workers: --workers 2, or --device cpu"),
        ("cuda", 1.0, "the cluster has 1 GPU for 4 workers: --workers 1, or --device cpu"),
        ("cuda", 0.0, "the cluster has 0 GPUs for 4 workers: --device cpu"),
    ],
)
def test_fewer_gpus_than_workers_are_refused(folder, monkeypatch, device, gpus, message):
    monkeypatch.setattr("pipeline.runtime.cluster_resource", lambda name: gpus)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        choose_device(flags(folder, "few", device=device, workers=4))


def test_data_tasks_leave_the_cores_to_workers():
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"FRESH": "data"}})  # no process of another task
    def niceness():
        before = os.getpriority(os.PRIO_PROCESS, 0)
        for _ in range(2):  # a process that runs several tasks
            assert not list(data_task([]))
        return before, os.getpriority(os.PRIO_PROCESS, 0)

    unused: Any = dict.fromkeys(("rows", "pace", "settings"))
    sizes = {"steps_ahead": 1, "num_workers": 1, "batch_size": 1, "num_samples": 1}
    data_task = partial(make_rows, **unused, **sizes)
    before, after = ray.get(niceness.remote())
    assert after == max(before, 10 if before < 15 else 19)


def test_workers_of_our_own_cluster_have_the_weight_of_its_driver():
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {"FRESH": "worker"}})
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, 0)

    assert ray.get(niceness.remote()) == os.getpriority(os.PRIO_PROCESS, 0)


def test_a_run_of_another_version_is_refused_in_words(whole, folder):
    config, _ = whole
    record = json.loads((folder / "whole/_run/config.json").read_text())
    del record["flags"]["warmup"]
    other = folder / "older"
    (other / "_run").mkdir(parents=True)
    (other / "_run/config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="another version, which differs in the flag --warmup"):
        train(dataclasses.replace(config, output=str(other)))


def test_a_run_whose_defaults_were_others_is_refused_before_it_goes_on(whole, folder):
    config, _ = whole
    record = json.loads((folder / "whole/_run/config.json").read_text())
    record["decided"] |= {"resize rule": "tf_legacy"}
    other = folder / "defaults"
    (other / "_run").mkdir(parents=True)
    (other / "_run/config.json").write_text(json.dumps(record))
    for start in (train, dry_run):
        with pytest.raises(ConfigError, match=r"resize rule was tf_legacy, now bilinear"):
            start(dataclasses.replace(config, output=str(other)))
    assert json.loads((other / "_run/config.json").read_text()) == record

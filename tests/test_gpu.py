"""What needs a CUDA device: detecting and training there come to what they come to on CPUs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch

from pipeline import runtime
from pipeline.config import InferConfig, TrainConfig
from pipeline.inference.run import infer
from pipeline.inference.verify import verify
from pipeline.model import DEFAULT_WEIGHTS, Detector
from pipeline.results import load_detections
from pipeline.training.run import train
from tests.makers import make_tar_shard
from tests.model.test_detector import coarse_images
from tests.training.makers import make_set, save_small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_detects_what_a_cpu_detects():
    images, sizes = coarse_images(8), np.full((8, 2), [640, 480], np.int32)
    cpu = Detector(DEFAULT_WEIGHTS, score_threshold=0.01)(images, sizes)
    gpu = Detector(DEFAULT_WEIGHTS, score_threshold=0.01, device="cuda")(images, sizes)
    clear = gpu.scores > 0.01 + 1e-4, cpu.scores > 0.01 + 1e-4
    np.testing.assert_array_equal(gpu.labels[clear[0]], cpu.labels[clear[1]])
    np.testing.assert_allclose(gpu.scores[clear[0]], cpu.scores[clear[1]], atol=1e-4)
    np.testing.assert_allclose(gpu.boxes[clear[0]], cpu.boxes[clear[1]], atol=0.01)


def test_detections_on_a_gpu_do_not_depend_on_the_batch():
    images, sizes = coarse_images(8), np.full((8, 2), [640, 480], np.int32)
    detector = Detector(DEFAULT_WEIGHTS, score_threshold=0.01, device="cuda")
    whole = detector(images, sizes)
    for index in range(8):
        alone = detector(images[index : index + 1], sizes[index : index + 1])
        here = whole.image_index == index
        np.testing.assert_allclose(alone.scores, whole.scores[here], atol=1e-4)
        np.testing.assert_allclose(alone.boxes, whole.boxes[here], atol=0.01)


@pytest.fixture(scope="module")
def gpu_cluster():
    runtime.start_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("gpu_cluster")
def test_the_job_takes_the_gpu_by_itself_and_writes_what_cpus_write(tmp_path):
    for number in range(3):
        make_tar_shard(tmp_path / "in" / f"{number}.tar", 30)
    tables = {}
    for device in ("auto", "cpu"):
        output = str(tmp_path / device)
        infer(InferConfig(input=str(tmp_path / "in"), output=output, device=device, score_threshold=0.05))
        assert not verify(str(tmp_path / "in"), output).problems
        order = ["image_id", "label", "xmin", "ymin"]
        tables[device] = (
            load_detections(output).sort_values(order, ignore_index=True).drop(columns="detection_id")
        )
    assert ray.cluster_resources()["GPU"] >= 1
    pd.testing.assert_frame_equal(tables["auto"], tables["cpu"], check_exact=False, atol=0.01, rtol=1e-3)


@pytest.mark.ray
@pytest.mark.usefixtures("gpu_cluster")
def test_training_on_a_gpu_learns(tmp_path):
    make_set(tmp_path / "train", 20)
    make_set(tmp_path / "val", 7, seed=1)
    save_small_model(tmp_path / "small.safetensors")
    config = TrainConfig(
        train=str(tmp_path / "train"),
        val=str(tmp_path / "val"),
        output=str(tmp_path / "out"),
        init=str(tmp_path / "small.safetensors"),
        epochs=12,
        batch_size=4,
        augmentation="light",
        validations=2,
        lr=2e-3,
    )
    outcome = train(config)
    assert outcome.position.best_ap > 0.3
    assert Path(config.output, "model.safetensors").exists()

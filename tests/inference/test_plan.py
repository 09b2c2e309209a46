"""How a run's shards become Ray tasks, and images blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import InferConfig
from pipeline.data.shards import Kind, Shard
from pipeline.inference.blocks import Work
from pipeline.inference.plan import (
    MAX_TASKS,
    MIN_TASKS_PER_CORE,
    TASK_BYTES,
    group_tasks,
    read_settings,
)
from pipeline.inference.run import Pool, is_slow
from pipeline.model.ssd import build_model


def shards(count: int, *, num_bytes: int, kind: Kind = "tar") -> list[Work]:
    return [Work(Shard(f"{kind}-{n}", f"s3://b/{n}", kind, num_bytes, "e")) for n in range(count)]


@given(
    packed=st.integers(0, 5_000),
    loose=st.integers(0, 5_000),
    num_bytes=st.integers(0, 2 * TASK_BYTES),
    large=st.integers(0, 20),
    num_cores=st.integers(1, 200),
)
def test_every_shard_is_in_one_task_in_order(packed, loose, num_bytes, large, num_cores):
    work = shards(packed, num_bytes=num_bytes) + shards(large, num_bytes=10 * TASK_BYTES)
    work += shards(loose, num_bytes=9, kind="image")
    packed += large
    tasks = group_tasks(work, num_cores=num_cores)
    assert [item for task in tasks for item in task] == work
    assert all(tasks)
    of_packed = [task for task in tasks if task[0].shard.kind == "tar"]
    assert len(of_packed) <= MAX_TASKS
    assert len(of_packed) >= min(packed, MIN_TASKS_PER_CORE * num_cores, MAX_TASKS / 2)


def test_small_shards_share_a_task_as_long_as_every_core_has_its_share():
    small = shards(1_000, num_bytes=1_000_000)
    assert {len(task) for task in group_tasks(small, num_cores=2)[:-1]} == {62}  # 1,000 / (8 * 2)
    assert {len(task) for task in group_tasks(small, num_cores=100)} == {1}
    large = shards(1_000, num_bytes=200_000_000)
    assert {len(task) for task in group_tasks(large, num_cores=2)[:-1]} == {3}  # about 512 MB


def test_shards_of_nearly_one_size_stay_even():
    work = [item for n in range(64) for item in shards(1, num_bytes=22_000_000 + 10_000 * (n % 7))]
    assert {len(task) for task in group_tasks(work, num_cores=2)} == {4}


def test_a_few_large_shards_among_small_ones_have_a_task_each():
    work = shards(1_980, num_bytes=1_000_000) + shards(20, num_bytes=4_000_000_000)
    tasks = group_tasks(work, num_cores=16)
    assert [len(task) for task in tasks[-20:]] == [1] * 20
    assert {len(task) for task in tasks[:-20]} == {15}  # 2,000 / (8 * 16)


def test_loose_images_come_many_to_a_task():
    assert [len(task) for task in group_tasks(shards(300, num_bytes=9, kind="image"), num_cores=8)] == [
        128,
        128,
        44,
    ]


@pytest.mark.parametrize(
    ("architecture", "batch_size", "expected"),
    [
        ("ssdlite300_mobilenet_v2", 1, 111),  # 30 MB / (300 * 300 * 3)
        ("ssdlite300_mobilenet_v2", 32, 96),  # three whole batches
        ("ssd512_vgg16", 32, 32),  # 38 would fit
        ("ssd512_vgg16", 64, 64),  # a batch is never cut
    ],
)
def test_a_block_holds_as_many_whole_batches_as_fit_or_one(architecture, batch_size, expected):
    spec = build_model(architecture, num_classes=2).spec
    settings = read_settings(InferConfig(input="i", output="o", batch_size=batch_size), spec)
    assert settings.images_per_block == expected


@pytest.mark.parametrize(
    ("architecture", "device", "expected"),
    [
        ("ssd512_vgg16", "cpu", True),
        ("ssd300_vgg16", "cpu", True),
        ("ssdlite300_mobilenet_v2", "cpu", False),
        ("ssd512_vgg16", "cuda", False),
    ],
)
def test_large_models_on_cpus_commit_after_a_few_images(architecture, device, expected):
    pool = Pool(device=device, min_size=1, max_size=1, batch_size=32, threads=1)
    assert is_slow(pool, build_model(architecture, num_classes=2).spec) is expected

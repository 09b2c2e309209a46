"""How a run's shards become Ray tasks, and images blocks."""

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import InferConfig
from pipeline.data.shards import Kind, Shard, list_shards
from pipeline.errors import ConfigError
from pipeline.inference.blocks import Work
from pipeline.inference.lock import Lock
from pipeline.inference.plan import (
    MAX_TASKS,
    SHARES_PER_CORE,
    TASK_BYTES,
    check_clearable,
    check_output,
    group_tasks,
    limited,
    make_plan,
    read_settings,
    recorded_shards,
    run_fingerprint,
    save_shards,
)
from pipeline.inference.run import Pool, images_per_block, still_missing
from pipeline.model.ssd import build_model
from pipeline.results import load_detections, load_images
from tests.outputs import box, failed_image, image, write_part


def shards(count: int, *, num_bytes: int, kind: Kind = "tar") -> list[Work]:
    return [Work(Shard(f"{kind}-{n}", f"s3://b/{n}", kind, num_bytes, "e")) for n in range(count)]


def test_a_limit_counts_a_packed_shard_as_64_images_and_a_loose_one_as_one():
    packed, loose = shards(20, num_bytes=100_000_000), shards(20, num_bytes=100_000, kind="image")
    assert limited(packed, 1000) == packed[:16]
    assert limited(loose, 7) == loose[:7]
    assert limited(packed, 0) == packed


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
    assert len(of_packed) >= min(packed, SHARES_PER_CORE * num_cores, MAX_TASKS / 2)


def num_shards(tasks: list[list[Work]]) -> list[int]:
    return [len(task) for task in tasks]


def test_each_task_takes_its_share_of_the_shards_that_are_left():
    small = shards(64, num_bytes=1_000_000)
    sizes = num_shards(group_tasks(small, num_cores=2))
    assert sizes[:7] == [8, 7, 6, 5, 4, 4, 3]  # 64 // 8, 56 // 8, 49 // 8, ...
    assert sizes[-8:] == [1] * 8  # no core is long at work when the others have ended
    assert set(num_shards(group_tasks(small, num_cores=100))) == {1}


def test_a_task_has_about_512_mb_at_most():
    assert num_shards(group_tasks(shards(1_000, num_bytes=200_000_000), num_cores=2))[:300] == [3] * 300


def test_the_sizes_of_shards_of_nearly_one_size_only_fall():
    work = [item for n in range(64) for item in shards(1, num_bytes=22_000_000 + 10_000 * (n % 7))]
    sizes = num_shards(group_tasks(work, num_cores=2))
    assert sizes == sorted(sizes, reverse=True)


def test_a_few_large_shards_among_small_ones_have_a_task_each():
    work = shards(1_980, num_bytes=1_000_000) + shards(20, num_bytes=4_000_000_000)
    sizes = num_shards(group_tasks(work, num_cores=16))
    assert sizes[-20:] == [1] * 20
    assert sizes[0] == 31  # 2,000 // (4 * 16)


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
        ("ssdlite300_mobilenet_v2", 0, 96),
        ("ssdlite300_mobilenet_v2", 32, 96),  # three whole batches
        ("ssd512_vgg16", 32, 32),  # 38 would fit
        ("ssd512_vgg16", 64, 64),  # a batch is never cut
    ],
)
def test_a_chunk_holds_as_many_whole_batches_as_fit_or_one(architecture, batch_size, expected):
    spec = build_model(architecture, num_classes=2).spec
    settings = read_settings(InferConfig(input="i", output="o", batch_size=batch_size), spec)
    assert settings.images_per_chunk == expected


@pytest.mark.parametrize(
    ("architecture", "device", "expected"),
    [
        ("ssd512_vgg16", "cpu", 16),
        ("ssd300_vgg16", "cpu", 16),
        ("ssdlite300_mobilenet_v2", "cpu", 96),
        ("ssdlite300_mobilenet_v2", "cuda", 288),
        ("ssd512_vgg16", "cuda", 96),
    ],
)
def test_a_block_is_large_on_gpus_and_small_for_large_models_on_cpus(architecture, device, expected):
    pool = Pool(device=device, min_size=1, max_size=1, batch_size=32, threads=1)
    spec = build_model(architecture, num_classes=2).spec
    settings = read_settings(InferConfig(input="i", output="o"), spec)
    assert images_per_block(settings, pool, spec) == expected


# ---- what a run finds in its output ------------------------------------------------------------------


def planned(source, output, **flags):
    settings = read_settings(InferConfig(), build_model("ssdlite300_mobilenet_v2", num_classes=2).spec)
    config = InferConfig(input=str(source), output=str(output), **flags)
    with Lock(str(output)) as lock:
        return make_plan(config, settings, "f1", list_shards(str(source)), lock=lock.ref)


def test_a_changed_shard_is_refused_until_it_is_redone_and_then_only_its_own_rows_go(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    plan = functools.partial(planned, source, output)
    for name in "ab":
        (source / f"{name}.tar").write_bytes(b"first")
    rows = [
        image(f"{name}.tar/{i}.jpg", i + 1, shard=f"{name}.tar", shard_index=i, shard_size=2)
        for name in "ab"
        for i in range(2)
    ]
    boxes = [box(row["image_id"], detection_id=i) for row in rows for i in range(row["num_detections"])]
    write_part(output, "part-0", rows, boxes)
    save_shards(plan())
    (source / "a.tar").write_bytes(b"another content")
    with pytest.raises(ConfigError, match=r"1 shards changed .*a\.tar"):
        plan()
    again = plan(redo_changed=True)
    assert [(work.shard.name, len(work.skip)) for work in again.work] == [("a.tar", 0)]
    assert load_images(output).image_id.tolist() == ["b.tar/0.jpg", "b.tar/1.jpg"]
    assert load_detections(output).image_id.tolist() == ["b.tar/0.jpg", "b.tar/1.jpg", "b.tar/1.jpg"]
    # Killed before or after this, the next run does what is missing.
    assert [work.shard.name for work in plan().work] == ["a.tar"]
    save_shards(again)
    assert [work.shard.name for work in plan().work] == ["a.tar"]


def test_a_shard_that_was_away_for_a_run_and_comes_back_changed_is_refused(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.tar").write_bytes(b"first")
    write_part(output, "part-0", [image("b.tar/0.jpg", shard="b.tar", shard_size=1)], [])
    save_shards(planned(source, output))
    for name in "bc":
        (source / f"{name}.tar").unlink()
    for _ in range(2):
        save_shards(planned(source, output))
    assert sorted(recorded_shards(str(output))) == ["a.tar", "b.tar"]  # c.tar has no row that could be old
    for name in "bc":
        (source / f"{name}.tar").write_bytes(b"another content")
    with pytest.raises(ConfigError, match=r"1 shards changed .*b\.tar"):
        planned(source, output)
    save_shards(planned(source, output, redo_changed=True))
    assert sorted(recorded_shards(str(output))) == ["a.tar", "b.tar", "c.tar"]


def test_what_a_dead_run_writes_meanwhile_is_not_even_opened_to_see_what_is_missing(tmp_path):
    """It may be gone by then: its writer takes it back."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.tar").write_bytes(b"content")
    write_part(output, "part-r0001.0-000000", [image("a.tar/0.jpg", shard="a.tar", shard_size=1)], [])
    plan = planned(source, output)
    write_part(output, "part-r0007.0-000000", [image("b.tar/0.jpg", shard="b.tar", shard_size=1)], [])
    (output / "images" / "part-r0006.0-000000.parquet").write_bytes(b"on its way")
    assert [work.shard.name for work in still_missing(plan, "part-r0007.")] == ["c.tar"]


def test_a_part_of_changed_shards_alone_leaves_an_empty_one(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.tar").write_bytes(b"first")
    write_part(output, "part-0", [image("a.tar/0.jpg", shard="a.tar", shard_size=1)], [])
    save_shards(planned(source, output))
    (source / "a.tar").write_bytes(b"another content")
    plan = planned(source, output, redo_changed=True)
    assert [part.num_images for part in plan.known] == [0]
    assert [work.shard.name for work in plan.work] == ["a.tar"]


def test_thresholds_from_a_file_count_by_their_values(tmp_path):
    spec = build_model("ssdlite300_mobilenet_v2", num_classes=2).spec

    def recorded(value: float, name: str) -> object:
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(spec.class_names, value)))
        return run_fingerprint(InferConfig(score_threshold=str(tmp_path / name)), spec, "w")

    assert recorded(0.4, "a.json") == recorded(0.4, "b.json")
    assert recorded(0.4, "a.json") == run_fingerprint(InferConfig(score_threshold=0.4), spec, "w")
    assert recorded(0.3, "a.json") != recorded(0.4, "a.json")


@pytest.mark.parametrize("failures", [0, 1])
def test_a_retry_leaves_a_shard_alone_whose_images_came_after_it_had_failed_as_a_whole(tmp_path, failures):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.tar").write_bytes(b"content")
    shard = {"shard": "a.tar", "shard_size": 2}
    write_part(output, "part-0", [failed_image("a.tar", shard="a.tar", shard_index=-1, shard_size=0)], [])
    of_images = [failed_image] * failures + [image] * (2 - failures)
    rows = [make(f"a.tar/{i}.jpg", shard_index=i, **shard) for i, make in enumerate(of_images)]
    write_part(output, "part-1", rows, [], round=1)
    plan = planned(source, output, retry_failed=True)
    assert [sorted(work.skip) for work in plan.work] == [[1]] * failures


@pytest.mark.parametrize(
    "name", ["images/mine.jpg", "images/deep/x.parquet", "detections/x.txt", "thesis.txt"]
)
def test_a_folder_with_other_files_is_neither_taken_nor_cleared(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="holds other files"):
        check_output(InferConfig(input="in", output=str(tmp_path)), {})
    with pytest.raises(ConfigError, match="no run wrote"):
        check_clearable(str(tmp_path))


def test_the_output_of_training_is_neither_taken_nor_cleared(tmp_path):
    (tmp_path / "_run").mkdir()
    (tmp_path / "_run" / "config.json").write_text(json.dumps({"flags": {}, "decided": {}}))
    for check in (lambda: check_output(InferConfig(input="in", output=str(tmp_path)), {}),
                  lambda: check_clearable(str(tmp_path))):  # fmt: skip
        with pytest.raises(ConfigError, match="another job's output"):
            check()


def test_a_damaged_record_is_refused_and_may_be_overwritten(tmp_path):
    (tmp_path / "_run").mkdir()
    (tmp_path / "_run" / "config.json").write_text('{"finger')
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        check_output(InferConfig(input="in", output=str(tmp_path)), {})
    check_clearable(str(tmp_path))

"""The whole run on a local Ray: rows in = rows out, resume, retries, refusals."""

import dataclasses
import io
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray

from pipeline import runtime
from pipeline.config import InferConfig
from pipeline.errors import ConfigError, PipelineError
from pipeline.inference import blocks
from pipeline.inference.lock import LockRef
from pipeline.inference.run import Pool, detect_shards, shard_reader
from pipeline.inference.sink import DetectAndPublish, Target
from pipeline.inference.verify import verify
from pipeline.results import load_detections, load_images
from tests import fakes
from tests.inference.test_blocks import SETTINGS
from tests.makers import make_jpeg, make_parquet_shard, make_tar, make_tar_shard

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "in", tmp_path / "out"


class Seen:
    """A detector that writes down the ids it is given, in files of a folder."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder

        class LoggingDetector(fakes.FakeDetector):
            def __init__(self, monitor=None, **settings):
                super().__init__(monitor, **settings)
                self.log = str(folder)

        self.detector = LoggingDetector

    def ids(self):
        return sorted(line for file in self.folder.iterdir() for line in file.read_text().splitlines())


@pytest.fixture
def seen(tmp_path):
    return Seen(tmp_path / "seen")


def run(source, target, detector=fakes.FakeDetector, **settings):
    from pipeline.inference.run import infer

    return infer(InferConfig(input=str(source), output=str(target), **settings), detector=detector)


def tables(target):
    """Both tables as sorted lists of rows."""
    return [
        pd.read_parquet(f"{target}/{table}").astype(object).sort_values(keys).values.tolist()
        for table, keys in (("images", ["image_id"]), ("detections", ["image_id", "detection_id"]))
    ]


def test_the_physical_plan_is_read_detect_and_the_driver_keeps_no_blocks(folders, monkeypatch):
    from ray.data import Dataset

    make_tar_shard(folders[0] / "a.tar", 5)
    plans = []
    consume = Dataset.iter_internal_ref_bundles

    def spy(dataset):
        yield from consume(dataset)
        plans.append(dataset.stats())

    monkeypatch.setattr(Dataset, "iter_internal_ref_bundles", spy)
    run(*folders)
    operators = [line.split(":")[0] for line in plans[0].splitlines() if line.startswith("Operator ")]
    assert operators == ["Operator 1 ReadShards", "Operator 2 MapBatches(DetectAndPublish)"]
    assert "blocks produced" not in plans[0]  # there without runtime.ForgetBlocks


def test_every_image_of_every_kind_of_input_has_one_row(folders):
    source, target = folders
    good = make_jpeg(seed=1)
    make_tar_shard(source / "a.tar", {f"{i}.jpg": make_jpeg(seed=i) for i in range(100)})
    make_tar_shard(
        source / "sub/b.tar", {"x.jpg": good, "broken.jpg": good[: len(good) // 2], "empty.jpg": b""}
    )
    make_parquet_shard(source / "c.parquet", {"p": good, "q": b"not an image"})
    (source / "loose.jpg").write_bytes(good)
    (source / "cut.tar").write_bytes(make_tar([(f"{i}.jpg", good) for i in range(4)])[:-11000])
    report = run(source, target)
    images = load_images(target).set_index("image_id")
    assert len(images) == 100 + 3 + 2 + 1 + 1
    assert images.loc["cut.tar", ["shard_index", "shard_size", "error_stage"]].tolist() == [-1, 0, "read"]
    failed = images[images.status == "failed"]
    assert sorted(failed.index) == ["c.parquet/1", "cut.tar", "sub/b.tar/broken.jpg", "sub/b.tar/empty.jpg"]
    assert (failed.error_message.str.len() > 10).all()
    sizes = (
        images.drop("cut.tar").groupby("shard", observed=True).shard_size.agg(["nunique", "first", "size"])
    )
    assert (sizes["nunique"] == 1).all()
    assert (sizes["first"] == sizes["size"]).all()
    assert images.num_detections.sum() == len(load_detections(target))
    assert (report.num_images, report.num_failed, report.num_failed_shards) == (107, 4, 1)
    assert report.over_budget  # 4 % of the images, but one of four shards
    assert verify(str(source), str(target)).problems == []


def detecting(device: str) -> Any:
    """The operator of Ray Data's plan that holds the detectors."""
    chain = detect_shards(
        [[]],
        settings=SETTINGS,
        detector=fakes.NullDetector,
        detector_args={},
        pool=Pool(device=device, min_size=1, max_size=1, batch_size=16, threads=0),
        target=Target(output="out", run="r0001.0", metadata={}, class_names={}, lock=LockRef("out/_run", 1)),
        monitor=None,
    )
    return chain._logical_plan.dag


def test_a_detector_on_a_gpu_gets_blocks_as_they_are():
    """Ray Data's public `map_batches` would refuse this plan."""
    operator = detecting("cuda")
    assert operator.ray_remote_args["num_gpus"] == 1
    assert operator.batch_size is None


def test_detectors_on_cpus_stay_off_nodes_without_cores(monkeypatch):
    """An actor that asks for no CPU came to such a head in 4 of 8 cases; see also `tests/chaos/held.py`."""
    head, other = {"NodeID": "f00", "Resources": {"memory": 1.0}}, {"NodeID": "ba", "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node | {"Alive": True} for node in (head, other)])
    assert detecting("cpu").ray_remote_args["label_selector"] == {"ray.io/node-id": "!in(f00)"}
    monkeypatch.setattr(ray, "nodes", lambda: [other | {"Alive": True}])
    assert not detecting("cpu").ray_remote_args["label_selector"]


def test_more_detectors_start_where_the_first_is_full(folders, seen):
    class SlowDetector(seen.detector):
        def __call__(self, block):
            time.sleep(0.5)
            return super().__call__(block)

    source, target = folders
    make_tar_shard(source / "a.tar", 2_000)
    run(source, target, SlowDetector, min_detectors=1, max_detectors=2)
    assert len(list(seen.folder.iterdir())) == 2  # a file for each process


@pytest.mark.usefixtures("ray_cluster")
def test_a_waiting_reader_takes_a_free_core_while_the_driver_is_busy(tmp_path, monkeypatch):
    """Three readers on two cores, and a driver that looks away until the third one has begun."""

    def appear(pattern, count=1):
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob(pattern))) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(list(tmp_path.glob(pattern))) == count

    def reader(number):
        def read():
            (tmp_path / f"began-{number}").touch()
            appear("submitted")
            yield pa.table({"number": [number]})

        return read

    def look_away(self, executor):
        num_active = sum(operator.num_active_tasks() for operator in executor._topology)
        if num_active == 3 and not began:
            assert len(list(tmp_path.glob("began-*"))) <= 2  # the cores that there are
            (tmp_path / "submitted").touch()
            began.append(appear("began-*", count=3))

    began = []
    monkeypatch.setattr(runtime.ForgetBlocks, "on_execution_step", look_away)
    runtime.configure_data(block_bytes=1_000)
    dataset = runtime.read_tasks("Numbers", [reader(n) for n in range(3)], num_cpus=1, max_retries=0)
    assert sorted(row["number"] for row in dataset.iter_rows()) == [0, 1, 2]
    assert began == [True]


def test_a_second_run_infers_nothing_and_a_new_shard_only_itself(folders, seen):
    source, target = folders
    make_tar_shard(source / "a.tar", 4)
    run(source, target, seen.detector)
    assert seen.ids() == [f"a.tar/{i:03}.jpg" for i in range(4)]
    before = tables(target)
    run(source, target, seen.detector)
    assert len(seen.ids()) == 4
    assert tables(target) == before
    make_tar_shard(source / "b.tar", 3, seed=9)
    run(source, target, seen.detector)
    assert seen.ids()[4:] == [f"b.tar/{i:03}.jpg" for i in range(3)]
    assert verify(str(source), str(target)).problems == []


def test_an_unfinished_shard_skips_its_finished_images(folders, seen):
    from pipeline.results.parts import part_names, read_parts

    source, target = folders
    make_tar_shard(source / "a.tar", 100)
    run(source, target, batch_size=32)
    whole = tables(target)
    # Take the table back to what a run leaves that was killed after its first part.
    other = target.with_name("other")
    run(source, other, limit=1)
    assert len(part_names(str(other), "images")) == 1
    _keep_first_rows(other, 64)
    assert [part.num_images for part in read_parts(str(other))] == [64]
    run(source, other, seen.detector)
    assert seen.ids() == [f"a.tar/{i:03}.jpg" for i in range(64, 100)]
    assert tables(other) == whole


def _keep_first_rows(target, count):
    """Rewrite the only part of `target` with its first images."""
    import pyarrow.parquet as pq

    from pipeline.inference.compaction import select
    from pipeline.results.parts import read_parts

    (part,) = read_parts(str(target))
    paths = target / "images" / part.name, target / "detections" / part.detections
    images, boxes = (pq.read_table(path) for path in paths)
    for path, table in zip(paths, select(images, boxes, np.arange(count)), strict=True):
        pq.write_table(table.replace_schema_metadata(pq.read_metadata(path).metadata), path)


def test_retrying_failed_images_replaces_their_rows(folders, seen):
    source, target = folders
    small = make_jpeg(8, 8, quality=30)
    broken = b"\xff" * len(small)
    source.mkdir()
    shard = source / "x.tar"
    shard.write_bytes(make_tar([("a.jpg", make_jpeg()), ("b.jpg", broken), ("c.jpg", make_jpeg(seed=2))]))
    assert run(source, target, max_failed_fraction=1).num_failed == 1
    # The image heals where it lies: size and time of change stay, so the shard is the same one.
    stat = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(broken, small))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = run(source, target, seen.detector, retry_failed=True)
    assert seen.ids() == ["x.tar/b.jpg"]
    assert (report.num_images, report.num_failed) == (3, 0)
    assert pd.read_parquet(target / "images").status.tolist() == ["ok"] * 3
    assert verify(str(source), str(target)).problems == []


def test_retrying_keeps_what_fails_again(folders):
    source, target = folders
    make_tar_shard(source / "x.tar", {"a.jpg": make_jpeg(), "b.jpg": b"\xff\xd8 broken"})
    for retry in (False, True, True):
        report = run(source, target, retry_failed=retry, max_failed_fraction=1)
        assert (report.num_images, report.num_failed) == (2, 1)
        assert len(pd.read_parquet(target / "images")) == 2
    assert verify(str(source), str(target)).problems == []


def test_a_changed_shard_is_refused_and_redone_by_flag(folders):
    source, target = folders
    make_tar_shard(source / "x.tar", 3)
    make_tar_shard(source / "y.tar", 2, seed=50)
    run(source, target)
    make_tar_shard(source / "x.tar", 5, seed=80)
    with pytest.raises(ConfigError, match=r"1 shards changed .* x\.tar"):
        run(source, target)
    assert run(source, target, redo_changed=True).num_images == 7
    fresh = target.with_name("fresh")
    run(source, fresh)
    assert tables(target) == tables(fresh)
    assert verify(str(source), str(target)).problems == []


def test_a_changed_shard_with_fewer_or_other_images_leaves_none_of_the_old(folders):
    source, target = folders
    for name in ("fewer", "renamed"):
        make_tar_shard(source / f"{name}.tar", {f"{i}.jpg": make_jpeg(seed=i) for i in range(5)})
    make_tar_shard(source / "same.tar", 2, seed=50)
    run(source, target)
    make_tar_shard(source / "fewer.tar", {"0.jpg": make_jpeg(seed=7)})
    make_tar_shard(source / "renamed.tar", {"x.jpg": make_jpeg(seed=8), "y.jpg": make_jpeg(seed=9)})
    assert run(source, target, redo_changed=True).num_images == 5
    fresh = target.with_name("fresh")
    run(source, fresh)
    assert tables(target) == tables(fresh)
    assert verify(str(source), str(target)).problems == []


def test_a_shard_that_failed_as_a_whole_is_healed_by_a_retry(folders, seen):
    source, target = folders
    path = make_tar_shard(source / "x.tar", 3)
    good, stat = path.read_bytes(), path.stat()
    for content, retry in ((good[:-1024] + bytes(512) + b"?" * 512, False), (good, True), (good, True)):
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # what changed was the right to read it
        report = run(source, target, seen.detector, retry_failed=retry, max_failed_fraction=1)
        assert (report.num_images, report.num_failed) == ((3, 0) if retry else (1, 1))
    assert len(seen.ids()) == 3
    assert len(pd.read_parquet(target / "images")) == 3
    assert verify(str(source), str(target)).problems == []


def test_a_retry_of_many_images_that_fail_again_goes_on_to_its_end(folders):
    source, target = folders
    make_tar_shard(source / "a.tar", {f"{i}.jpg": b"broken" for i in range(1_100)})
    make_tar_shard(source / "b.tar", {f"{i}.jpg": b"broken" for i in range(100)})
    run(source, target, max_failed_fraction=1)
    report = run(source, target, retry_failed=True, max_failed_fraction=0.6)
    assert (report.num_images_this_run, report.stopped_early) == (1_200, False)
    assert report.over_budget  # at the end


def test_paths_may_be_relative_to_the_drivers_folder(folders, monkeypatch):
    source = folders[0]
    make_tar_shard(source / "a.tar", 3)
    monkeypatch.chdir(source.parent)  # not the workers'
    assert run("in", "out").num_failed == 0
    assert verify("in", "out").problems == []


def test_other_settings_are_refused_with_the_difference(folders):
    source, target = folders
    make_tar_shard(source / "x.tar", 3)
    run(source, target)
    with pytest.raises(ConfigError, match=r"score_threshold was 0\.05, now 0\.5"):
        run(source, target, score_threshold=0.5)
    assert run(source, target, score_threshold=0.5, overwrite=True).num_images == 3


@pytest.mark.parametrize("flag", ["overwrite", "redo_changed"])
def test_what_is_refused_for_want_of_a_gpu_deletes_nothing(folders, flag):
    source, target = folders
    make_tar_shard(source / "x.tar", 3)
    run(source, target)
    make_tar_shard(source / "x.tar", 4)
    with pytest.raises(ConfigError, match="the cluster has no GPU"):
        run(source, target, fakes.FakeDetector, device="cuda", **{flag: True})
    assert len(load_images(target)) == 3


def test_a_second_run_at_the_same_time_is_refused(folders):
    from pipeline.inference.lock import Lock

    source, target = folders
    make_tar_shard(source / "x.tar", 3)
    with Lock(str(target)), pytest.raises(ConfigError, match="another run is writing"):
        run(source, target)


def test_foreign_files_in_the_output_are_never_touched(folders):
    source, target = folders
    make_tar_shard(source / "x.tar", 3)
    target.mkdir()
    (target / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"other files|no run wrote"):
            run(source, target, overwrite=overwrite)
    assert (target / "thesis.txt").read_text() == "precious"


def test_too_many_failures_end_the_run_early_and_say_so(folders):
    source, target = folders
    bad = {f"{i}.jpg": b"broken" for i in range(700)}
    for name in "abcdef":
        make_tar_shard(source / f"{name}.tar", bad)
    report = run(source, target)
    assert report.over_budget
    assert report.stopped_early
    assert 1000 <= report.num_images < 4200


def test_too_many_shards_that_can_not_be_read_end_the_run_early(folders):
    """However many images the others hold: a row for a shard is not what its images are."""
    source, target = folders
    make_tar_shard(source / "a.tar", {f"{i}.jpg": b"" for i in range(2)})
    cut = make_tar([(f"{i}.jpg", make_jpeg()) for i in range(4)])[:-11000]
    for number in range(300):
        (source / f"{number:03}.tar").write_bytes(cut)
    report = run(source, target, max_failed_fraction=0.2)
    assert report.stopped_early
    assert 60 < report.num_failed_shards < 300


def test_a_few_failures_are_over_a_small_budget_only_at_the_end(folders):
    source, target = folders
    make_tar_shard(source / "x.tar", {"a.jpg": make_jpeg(), "b.jpg": b"broken"})
    report = run(source, target, max_failed_fraction=0.4)
    assert report.over_budget
    assert not report.stopped_early


def test_an_empty_shard_and_no_boxes_leave_readable_tables(folders):
    source, target = folders
    source.mkdir()
    (source / "empty.tar").write_bytes(make_tar([]))
    make_tar_shard(source / "x.tar", 2)
    run(source, target, fakes.NullDetector, max_failed_fraction=1)
    assert len(load_detections(target)) == 0
    assert pd.read_parquet(target / "detections").columns.tolist()[:2] == ["image_id", "detection_id"]
    assert verify(str(source), str(target)).problems == []


class DyingReader:
    """`read_blocks` that kills its process once, before a given block."""

    def __init__(self, folder, block):
        self.folder, self.block = folder, block

    def __call__(self, work, settings):
        for number, block in enumerate(blocks.read_blocks(work, settings)):
            if number == self.block:
                try:
                    (Path(self.folder) / work[0].shard.name).touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
                except FileExistsError:
                    pass
            yield block


@pytest.mark.parametrize("gives_way", [True, False])
def test_readers_leave_the_cores_to_detectors_on_gpus(gives_way):
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, 0)

    with ThreadPoolExecutor(1) as thread:
        before = thread.submit(niceness).result()
        read = shard_reader([], number=0, settings=SETTINGS, monitor=None, gives_way=gives_way)
        assert not thread.submit(lambda: list(read())).result()
        after = max(before, 10 if before < 15 else 19) if gives_way else before
        assert thread.submit(niceness).result() == after


# Blocks of 96, 96 and 8 images, or as on GPUs of 288 and 112, in chunks of 96.
@pytest.mark.parametrize(("chunks", "images", "block"), [(1, 200, 0), (1, 200, 1), (1, 200, 2), (3, 400, 1)])
def test_a_reader_killed_in_a_shard_loses_and_repeats_nothing(
    folders, tmp_path, monkeypatch, chunks, images, block
):
    from pipeline.inference import run as module

    source, target = folders
    for name in "ab":
        make_tar_shard(source / f"{name}.tar", images, seed=ord(name))
    run(source, target)
    monkeypatch.setitem(module.CHUNKS_PER_BLOCK, "cpu", chunks)
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    monkeypatch.setattr(module, "read_blocks", DyingReader(str(deaths), block))
    killed = target.with_name("killed")
    run(source, killed)
    assert sorted(path.name for path in deaths.iterdir()) == ["a.tar", "b.tar"]
    assert tables(killed) == tables(target)


def test_a_detector_killed_in_a_batch_loses_and_repeats_nothing(folders, tmp_path):
    class DyingDetector(fakes.FakeDetector):
        """Kills its process once."""

        def __call__(self, block):
            try:
                (tmp_path / "died").touch(exist_ok=False)
            except FileExistsError:
                return super().__call__(block)
            os.kill(os.getpid(), signal.SIGKILL)

    source, target = folders
    make_tar_shard(source / "a.tar", 200)
    run(source, target)
    killed = target.with_name("killed")
    run(source, killed, DyingDetector)
    assert (tmp_path / "died").exists()
    assert tables(killed) == tables(target)


@pytest.mark.parametrize("when", ["a detector starts", "a detector works"])
def test_a_monitor_that_is_killed_ends_the_run_in_one_line_and_the_next_one_goes_on(folders, when):
    class KillingDetector(fakes.FakeDetector):
        def __init__(self, monitor: Any = None, **settings):
            super().__init__(monitor, **settings)
            self.monitor = monitor
            if when == "a detector starts":
                ray.kill(monitor)
                ray.get(monitor.weights.remote())

        def __call__(self, block):
            ray.kill(self.monitor)
            return super().__call__(block)

    source, target = folders
    make_tar_shard(source / "a.tar", 100)
    with pytest.raises(PipelineError, match="the same command goes on from there"):
        run(source, target, KillingDetector)
    report = run(source, target)
    assert (report.num_images, report.num_failed) == (100, 0)
    assert verify(str(source), str(target)).problems == []


def test_detectors_that_a_pool_might_have_had_are_not_counted(folders):
    """`--max-detectors` may reach beyond what the cluster has."""
    source, target = folders
    make_tar_shard(source / "x.tar", 10)
    assert run(source, target, max_detectors=4).num_detectors == 1


def test_the_report_says_what_the_tables_say(folders):
    source, target = folders
    make_tar_shard(source / "x.tar", 10)
    report = run(source, target)
    assert report.num_detectors == 2
    assert json.loads((target / "_run/report.json").read_text()) == dataclasses.asdict(report)
    boxes = load_detections(target)
    assert report.num_detections == len(boxes)
    assert report.classes == boxes.class_name.value_counts()[lambda n: n > 0].to_dict()


def test_a_part_that_is_tried_again_after_it_was_reported_counts_once(folders, tmp_path, monkeypatch):
    class PublishesAndDies(DetectAndPublish):
        def __call__(self, block):
            written = super().__call__(block)
            try:
                (tmp_path / "died").touch(exist_ok=False)
            except FileExistsError:
                return written
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("pipeline.inference.run.DetectAndPublish", PublishesAndDies)
    source, target = folders
    make_tar_shard(source / "a.tar", 10)
    report = run(source, target)
    assert (tmp_path / "died").exists()
    assert (report.num_images, report.num_images_this_run) == (10, 10)


def test_an_overtaken_run_says_so_in_one_line(folders, monkeypatch):
    from pipeline.errors import StorageError

    class Overtaken(DetectAndPublish):
        def __call__(self, block):
            raise StorageError("another run took this output over; this one stops")

    monkeypatch.setattr("pipeline.inference.run.DetectAndPublish", Overtaken)
    make_tar_shard(folders[0] / "a.tar", 10)
    with pytest.raises(StorageError) as raised:
        run(*folders)
    assert str(raised.value) == "another run took this output over; this one stops"


def test_files_carry_the_contract_and_two_runs_are_equal_to_the_byte(folders):
    import pyarrow.parquet as pq

    from pipeline import schema

    source, target = folders
    make_tar_shard(source / "x.tar", 100)
    run(source, target)
    other = target.with_name("other")
    run(source, other, batch_size=8)
    assert tables(target) == tables(other)
    for table, columns in (("images", schema.IMAGES), ("detections", schema.DETECTIONS)):
        (path,) = (target / table).iterdir()
        data = path.read_bytes()
        assert pq.read_schema(io.BytesIO(data)).equals(columns)
        assert schema.META_FINGERPRINT in (pq.read_metadata(io.BytesIO(data)).metadata or {})

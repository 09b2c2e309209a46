"""A run against S3 servers: what it asks for after a kill, and what it survives."""

import json
from dataclasses import replace

import pandas as pd
import psutil
import pytest
from s3fs import S3FileSystem

from tests import fakes, servers
from tests.chaos.runs import Setting, check_same, finish, make_input, running, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


NUM_SHARDS = 5
NUM_IMAGES = NUM_SHARDS * 151


@pytest.fixture
def bucket(tmp_path):
    """The folder of a bucket with shards in it."""
    make_input(tmp_path / "store" / "bucket" / "in", shards=NUM_SHARDS, images=150)
    return tmp_path / "store" / "bucket"


def on_s3(bucket, environment, **more):
    return Setting(
        "s3://bucket/in",
        "s3://bucket/out",
        folder=str(bucket / "out"),
        environment={**environment, **more},
    )


def test_a_resumed_run_neither_fetches_finished_shards_nor_infers_finished_images_again(bucket, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with servers.rclone(bucket.parent) as upstream, servers.proxy(upstream) as proxy:
        with running(on_s3(bucket, proxy.environment, **{fakes.LOG: str(first), fakes.SLEEP: "0.5"})) as run:
            wait_until(lambda: len(committed(bucket)) >= NUM_IMAGES / 2 or run.driver.poll() is not None)
            family = [run.driver, *psutil.Process(run.driver.pid).children(recursive=True)]
            for process in family:
                process.kill()
        wait_until(lambda: not proxy.busy)  # a write on its way may still land
        done = committed(bucket)
        rows = done.groupby("shard", observed=True).shard_size.agg(["size", "max"])
        finished = set(rows.index[rows["size"] == rows["max"]])
        assert 0.4 * NUM_IMAGES <= len(done) < NUM_IMAGES
        assert 1 <= len(finished) < NUM_SHARDS
        proxy.requests.clear()
        assert finish(on_s3(bucket, proxy.environment, **{fakes.LOG: str(second)})) == 1
    asked = {path.partition("?")[0] for _, path in proxy.requests}
    fetched = {path.removeprefix("/bucket/in/") for path in asked if path.endswith(".tar")}
    assert fetched == {f"s{number}.tar" for number in range(NUM_SHARDS)} - finished
    inferred = {line for file in second.iterdir() for line in file.read_text().splitlines()}
    assert len(inferred) == NUM_IMAGES - NUM_SHARDS - sum(done.status == "ok")  # a shard has one broken image
    assert not inferred & set(done.image_id)


def committed(bucket):
    """The rows of `images/` so far."""
    columns = ["image_id", "shard", "shard_size", "status"]
    parts = [pd.read_parquet(path, columns=columns) for path in (bucket / "out/images").glob("*.parquet")]
    return pd.concat([pd.DataFrame({column: [] for column in columns}), *parts])


def test_a_fifth_of_all_requests_may_go_wrong(undisturbed, tmp_path, monkeypatch):
    source, _, whole = undisturbed
    with servers.moto() as upstream:
        for name, value in upstream.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        store = S3FileSystem()
        store.mkdir("bucket")
        store.put(f"{source}/", "bucket/in/", recursive=True)
        with servers.proxy(upstream, faults=0.2) as proxy:
            setting = Setting("s3://bucket/in", "s3://bucket/out", environment=proxy.environment)
            assert finish(setting) == 1
        assert proxy.faults.keys() == {"slow down", "reset", "lost answer", "cut"}
        store.get("bucket/out/", f"{tmp_path}/out/", recursive=True)
        check_same(replace(setting, folder=str(tmp_path / "out")), whole)
    report = json.loads((tmp_path / "out/_run/report.json").read_text())
    # The HTTP client repeats some resets by itself, and the last faults come after the report.
    assert report["num_retries"] >= (proxy.faults["slow down"] + proxy.faults["cut"]) / 2
    assert report["num_failed"] == 4  # the broken ones

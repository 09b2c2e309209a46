"""Kill -9 at random moments, resume, compare: `python -m tests.chaos.rounds --rounds 50`.

Each round starts a run, kills one process of it (driver, detector, reader, monitor, the raylet of a
second node, the S3 server), lets it end or starts it again until it is done, and compares the tables
with those of an undisturbed run. Where it had to be started again, a naive reader looks for repeated boxes as
soon as the new run has looked over what it found. Prints a line a round; exit code 1 where anything differs.
"""

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pandas as pd
import psutil
from s3fs import S3FileSystem

from tests import fakes, servers
from tests.chaos.clusters import Cluster, raylet, two_nodes
from tests.chaos.real import check_close, make_photographs
from tests.chaos.runs import (
    FAKE,
    REAL,
    Run,
    Setting,
    check_same,
    finish,
    make_input,
    running,
    tables,
    wait_until,
)

TITLES = {
    "detector": "ray::MapWorker",  # it publishes, too
    "reader": "ray::ReadShards",
    "monitor": "ray::Monitor",
}
TARGETS = ("driver", *TITLES, "raylet", "s3")
BUCKET = "bucket"
OUTAGE_S = (0.5, 4.0)  # of the S3 server
LATEST_S = 4.0  # from the start of the detectors to the kill
LATEST_READER_S = 1.5  # readers are through with the input sooner


def processes(roots: list[int], title: str) -> list[psutil.Process]:
    """Ray's workers with this title, below the processes `roots`."""
    found = []
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(root).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if " ".join(process.cmdline()).startswith(title):
                        found.append(process)
    return found


def kill_at_random(run: Run, kill: Callable[[Run], bool], roots: list[int], later_s: float) -> bool:
    """Wait until the detectors are there, a random time longer, and kill; False where the run was over."""
    wait_until(lambda: processes(roots, TITLES["detector"]) or run.driver.poll() is not None)
    time.sleep(later_s)
    while run.driver.poll() is None:
        if kill(run):
            return True
        time.sleep(0.002)
    return False


def kill_worker(run: Run, target: str, rng: random.Random) -> bool:
    """Kill one process of the run; False where there is none at the moment."""
    if target == "driver":
        run.driver.kill()
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        if found := processes([run.driver.pid], TITLES[target]):
            rng.choice(found).kill()
            return True
    return False


class Store:
    """An S3 server over a folder, to be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = servers.free_port()
        self.environment = self._start()

    def _start(self) -> dict[str, str]:
        self._server = contextlib.ExitStack()
        return self._server.enter_context(servers.rclone(self.folder, self.port))

    def fail(self, seconds: float) -> bool:
        """Kill -9, and a new start after so many seconds."""
        self.close()
        time.sleep(seconds)
        self._start()
        return True

    def close(self) -> None:
        """Kill -9."""
        self._server.close()


@contextlib.contextmanager
def stage(
    setting: Setting, target: str, rng: random.Random
) -> Iterator[tuple[Setting, Callable[[Run], bool], list[int]]]:
    """What a target needs around it: the setting, what kills it, and processes that hold Ray's workers."""
    if target == "raylet":
        with two_nodes(head_env=setting.environment, second_env=setting.environment) as cluster:
            environment = {**setting.environment, **cluster.environment}
            pids = [cluster.head.pid, cluster.second.pid]
            yield replace(setting, environment=environment), lambda _: kill_raylet(cluster), pids
    elif target == "s3":
        bucket = Path(setting.output).parent / "s3" / BUCKET
        shutil.copytree(setting.source, bucket / "in", dirs_exist_ok=True)
        name = Path(setting.output).name
        store = Store(bucket.parent)
        remote = Setting(
            source=f"s3://{BUCKET}/in",
            output=f"s3://{BUCKET}/{name}",
            folder=str(bucket / name),
            command=setting.command,
            environment={**setting.environment, **store.environment},
        )
        S3FileSystem.clear_instance_cache()
        with contextlib.closing(store), mock.patch.dict(os.environ, store.environment):
            yield remote, lambda _: store.fail(rng.uniform(*OUTAGE_S)), []
    else:
        yield setting, lambda run: kill_worker(run, target, rng), []


def kill_raylet(cluster: Cluster) -> bool:
    raylet(cluster.second).kill()
    return True


def one_round(
    number: int,
    source: str,
    whole: dict[str, pd.DataFrame],
    folder: Path,
    target: str,
    *,
    real: bool = False,
) -> str:
    """One kill and what came of it.

    Raises:
        AssertionError: a row was lost, repeated or changed.
    """
    rng = random.Random(number)
    setting = Setting(
        source,
        str(folder / f"round-{number}"),
        command=REAL if real else FAKE,
        environment={} if real else {fakes.SLEEP: "0.3"},
    )
    with stage(setting, target, rng) as (setting, kill, pids):
        with running(setting) as run:
            latest = LATEST_READER_S if target == "reader" else LATEST_S
            killed = kill_at_random(run, kill, [run.driver.pid, *pids], rng.uniform(0, latest))
            code = run.wait()
        starts = 1 if code == 0 else 1 + finish(setting)
        (check_close if real else check_same)(setting, whole)
    said = "killed" if killed else "was over before the kill"
    return f"{said}, done after {starts} start{'s' * (starts > 1)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first round: its seed")
    parser.add_argument("--target", choices=TARGETS, help="kill only these")
    parser.add_argument("--real", action="store_true", help="with the bundled model and photographs")
    args = parser.parse_args()
    bad = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = str(folder / "in")
        (make_photographs if args.real else make_input)(folder / "in")
        undisturbed = Setting(source, str(folder / "whole"), command=REAL if args.real else FAKE)
        finish(undisturbed)
        whole = tables(undisturbed)
        for number in range(args.first, args.first + args.rounds):
            target = args.target or TARGETS[number % len(TARGETS)]
            start = time.monotonic()
            try:
                said = one_round(number, source, whole, folder, target, real=args.real)
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
                bad[target] += 1
                said = f"WRONG: {error}"
            print(f"round {number:3}  {target:<9} {time.monotonic() - start:5.0f} s  {said}", flush=True)
    print(f"{args.rounds} rounds, {bad.total()} wrong {dict(bad) or ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

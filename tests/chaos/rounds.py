"""Kill -9 at random moments, resume, compare: `python -m tests.chaos.rounds --rounds 50`.

Each round starts a run, kills one process of it (driver, detector, reader, writer, monitor), lets it end or
starts it again until it is done, and compares the tables with those of an undisturbed run. Prints a line a
round and a summary; exit code 1 where anything differs.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil

from pipeline.inference.verify import verify
from tests import fakes
from tests.makers import make_jpeg, make_tar_shard

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("driver", "detector", "reader", "writer", "monitor")
TITLES = {
    "detector": "ray::MapWorker",
    "reader": "ray::ReadShards",
    "writer": "ray::Write",
    "monitor": "ray::Monitor",
}
LONGEST_RUN_S = 240
ATTEMPTS = 6


def make_input(folder: Path, shards: int = 6, images: int = 150) -> None:
    """Shards of small JPEGs, one damaged image in each."""
    for number in range(shards):
        members = {f"{i:03}.jpg": make_jpeg(96, 64, seed=1000 * number + i) for i in range(images)}
        members["broken.jpg"] = members["000.jpg"][:200]
        make_tar_shard(folder / f"s{number}.tar", members)


def tables(output: str) -> dict[str, pd.DataFrame]:
    """Both tables as pandas reads them, sorted by their keys."""
    keys = {"images": ["image_id"], "detections": ["image_id", "detection_id"]}
    frames = {name: pd.read_parquet(f"{output}/{name}") for name in keys}
    return {
        name: frame.astype({c: str for c in frame if frame[c].dtype == "category"})
        .sort_values(keys[name])
        .reset_index(drop=True)
        for name, frame in frames.items()
    }


@contextlib.contextmanager
def running(source: str, output: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A driver with a local Ray of its own; everything that it started is gone afterwards."""
    with tempfile.TemporaryFile() as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.driver", source, output],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        family: set[psutil.Process] = set()
        try:
            yield driver
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family |= set(psutil.Process(driver.pid).children(recursive=True))
            driver.kill()
            driver.wait()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if driver.returncode not in (0, -9):
                log.seek(0)
                print(log.read().decode(errors="replace")[-3000:])


def finish(source: str, output: str, **environment: str) -> int:
    """Start the same command until it is done; returns how many starts that took."""
    for attempt in range(1, ATTEMPTS + 1):
        with running(source, output, **environment) as driver:
            if driver.wait(LONGEST_RUN_S) == 0:
                return attempt
    raise AssertionError(f"not done after {ATTEMPTS} starts")


def victims(driver: subprocess.Popen, target: str) -> list[psutil.Process]:
    """The processes of the run that `target` names."""
    if target == "driver":
        return [psutil.Process(driver.pid)]
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(TITLES[target]):
                found.append(process)
    return found


def kill_one(driver: subprocess.Popen, target: str, rng: random.Random, deadline_s: float = 60) -> bool:
    """Wait until the target is there, a random moment longer, and kill one of them."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline and driver.poll() is None:
        if victims(driver, "detector"):
            break
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 4))
    while time.monotonic() < deadline and driver.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if found := victims(driver, target):
                rng.choice(found).kill()
                return True
        time.sleep(0.002)
    return False


def one_round(number: int, source: str, whole: dict[str, pd.DataFrame], folder: Path, target: str) -> str:
    """One kill and what came of it; raises AssertionError where a row was lost, repeated or changed."""
    rng = random.Random(number)
    output = str(folder / f"round-{number}")
    environment = {fakes.SLEEP: "0.3"}
    with running(source, output, **environment) as driver:
        killed = kill_one(driver, target, rng)
        code = driver.wait(LONGEST_RUN_S)
    starts = 1
    if code != 0:
        starts += finish(source, output, **environment)
    after = tables(output)
    for name, frame in whole.items():
        pd.testing.assert_frame_equal(after[name], frame)
    problems = verify(source, output).problems
    assert problems == [], problems
    return (
        f"{'killed' if killed else 'was over before the kill'}, done after {starts} start{'s' * (starts > 1)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first round: its seed")
    parser.add_argument("--target", choices=TARGETS, help="kill only these")
    args = parser.parse_args()
    bad = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = str(folder / "in")
        make_input(folder / "in")
        finish(source, str(folder / "whole"))
        whole = tables(str(folder / "whole"))
        for number in range(args.first, args.first + args.rounds):
            target = args.target or TARGETS[number % len(TARGETS)]
            start = time.monotonic()
            try:
                said = one_round(number, source, whole, folder, target)
            except AssertionError as error:
                bad[target] += 1
                said = f"WRONG: {error}"
            print(f"round {number:3}  {target:<9} {time.monotonic() - start:5.0f} s  {said}", flush=True)
    print(f"{args.rounds} rounds, {bad.total()} wrong {dict(bad) or ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

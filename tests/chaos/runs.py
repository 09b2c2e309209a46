"""Runs as the chaos tests start them: a driver process of its own, resumed until it is done."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil

from pipeline.inference.verify import verify
from tests.makers import make_jpeg, make_tar_shard

ROOT = Path(__file__).resolve().parents[2]
HOOKS = f"{Path(__file__).with_name('hooks')}{os.pathsep}{ROOT}"  # for PYTHONPATH
FAKE = (sys.executable, "-m", "tests.chaos.driver", "{source}", "{output}")
REAL = (sys.executable, "jobs/infer.py", "--input", "{source}", "--output", "{output}")
LONGEST_RUN_S = 240
ATTEMPTS = 6
KEYS = {"images": ["image_id"], "detections": ["image_id", "detection_id"]}


@dataclass(frozen=True)
class Setting:
    """What to run, and where."""

    source: str
    output: str
    command: tuple[str, ...] = FAKE
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    """The output as a local folder, where `output` is a URL."""

    @property
    def local(self) -> str:
        """The output as pandas reads it."""
        return self.folder or self.output


@dataclass(frozen=True)
class Run:
    """A driver that was started."""

    driver: subprocess.Popen
    log: Path

    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit code."""
        return self.driver.wait(LONGEST_RUN_S)


def make_input(folder: Path, shards: int = 6, images: int = 150) -> None:
    """Shards of small JPEGs, one damaged image in each."""
    for number in range(shards):
        members = {f"{i:03}.jpg": make_jpeg(96, 64, seed=1000 * number + i) for i in range(images)}
        members["broken.jpg"] = members["000.jpg"][:200]
        make_tar_shard(folder / f"s{number}.tar", members)


@contextlib.contextmanager
def running(setting: Setting) -> Iterator[Run]:
    """A driver, with a local Ray of its own unless the environment names one; it is gone afterwards."""
    command = [part.format(source=setting.source, output=setting.output) for part in setting.command]
    with tempfile.TemporaryDirectory() as name:
        log = Path(name, "log")
        with log.open("w") as file:
            driver = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **setting.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Run(driver, log)
        finally:
            kill_family(driver.pid)
            driver.wait()
            if driver.returncode not in (0, -9):
                print(errors(log.read_text(errors="replace")))


def errors(text: str) -> str:
    """The lines of a driver's log that say why it ended."""
    return "\n".join(line[:300] for line in text.splitlines() if re.match(r"\S*(Error|error)\b", line))


def kill_family(pid: int) -> None:
    """Kill -9 of a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def finish(setting: Setting) -> int:
    """Start the same command until it is done; returns how many starts that took.

    A naive reader looks at the boxes as soon as each start has looked over what it found.
    """
    for attempt in range(1, ATTEMPTS + 1):
        with running(setting) as run:
            wait_until(lambda run=run: "finished before" in run.text() or run.driver.poll() is not None)
            check_no_repeats(setting)
            if run.wait() == 0:
                check_no_repeats(setting)
                return attempt
    raise AssertionError(f"not done after {ATTEMPTS} starts")


def wait_until(condition: Callable[[], object], seconds: float = LONGEST_RUN_S) -> None:
    """Until `condition()` is true. Raises: TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.02)


def check_no_repeats(setting: Setting) -> None:
    """What a reader finds who knows nothing of parts: no box twice."""
    boxes = read_naively(setting, "detections")
    repeated = 0 if boxes is None else int(boxes.duplicated(KEYS["detections"]).sum())
    assert repeated == 0, f"a naive reader finds {repeated} boxes twice"


def read_naively(setting: Setting, table: str) -> pd.DataFrame | None:
    """The whole folder as pandas reads it; None where it is empty."""
    folder = Path(setting.local, table)
    files = sorted(folder.glob("[!.]*.parquet"))
    if (
        setting.folder and files
    ):  # a killed server leaves its own unfinished files there, which it doesn't list
        return pd.concat([pd.read_parquet(file) for file in files])
    return pd.read_parquet(folder) if files else None


def tables(setting: Setting) -> dict[str, pd.DataFrame]:
    """Both tables as pandas reads them, sorted by their keys."""
    found = {}
    for name, keys in KEYS.items():
        frame = read_naively(setting, name)
        assert frame is not None, f"{name}/ is empty"
        categories = {c: str for c in frame if frame[c].dtype == "category"}
        found[name] = frame.astype(categories).sort_values(keys).reset_index(drop=True)
    return found


def check_same(setting: Setting, whole: Mapping[str, pd.DataFrame]) -> None:
    """The tables are those of the undisturbed run, and the proof holds."""
    after = tables(setting)
    for name, frame in whole.items():
        drop = [column for column in ("uri",) if column in frame]  # another place, another URI
        pd.testing.assert_frame_equal(after[name].drop(columns=drop), frame.drop(columns=drop))
    problems = verify(setting.source, setting.output).problems
    assert problems == [], problems

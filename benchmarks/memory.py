"""Peak memory of a run: does it stay flat as the input grows, and what do hostile images cost?

    python benchmarks/memory.py flat [--small 10000] [--large 1000000] [--json FILE]
    python benchmarks/memory.py compare --plain FOLDER --other FOLDER [--pairs 5] [--json FILE]

`flat` runs the null detector on tiny images, few and many; `compare` runs the bundled model on two folders,
in turn, and takes medians: whether both detectors have their peaks at once is chance.
Read 20 times a second: the anonymous memory of the driver and of the largest worker, so neither the object
store's pages, which belong to all, nor those of libraries, which the kernel drops and reads again as it
likes (a driver of 290 MiB of them had 450 in the last instant before its end, seen in some runs and missed
in others); and four times a second the proportional set sizes (shared pages count once) of all processes
together.
"""

import argparse
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

PER_SHARD = 1_000
MIB = 2**20
FLAT = """
import sys
from feeding import NullDetector
from pipeline.config import InferConfig
from pipeline.inference.run import infer
infer(InferConfig(input=sys.argv[1], output=sys.argv[2]), detector=NullDetector)
"""


def make_tiny(folder: Path, count: int) -> None:
    """Tars of 16x16 PNGs, all of the same content."""
    file = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(file, "PNG")
    folder.mkdir()
    for start in range(0, count, PER_SHARD):
        with tarfile.open(folder / f"{start // PER_SHARD:05d}.tar", "w") as tar:
            for number in range(min(PER_SHARD, count - start)):
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(file.getvalue())
                tar.addfile(member, io.BytesIO(file.getvalue()))


def peaks(command: list[str]) -> dict[str, float]:
    """Run `command`; the largest memory seen, MiB: of the driver, of one worker, of all together."""
    here = Path(__file__).parent
    path = f"{here}:{here.parent}"
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)
    most = {"driver": 0.0, "worker": 0.0, "all": 0.0}
    for number in itertools.count():
        time.sleep(0.05)
        if driver.poll() is not None:
            break
        family = _family(driver.pid)
        own = {process.pid: _anonymous(process) for process in family}
        most["driver"] = max(most["driver"], own.pop(driver.pid, 0.0))
        most["worker"] = max(most["worker"], *own.values(), 0.0)
        if number % 5 == 0:  # milliseconds for each process
            most["all"] = max(most["all"], sum(map(_share, family)))
    if driver.returncode:
        raise SystemExit(f"the run ended with exit code {driver.returncode}")
    return most


def _family(pid: int) -> list[psutil.Process]:
    try:
        driver = psutil.Process(pid)
        return [driver, *driver.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _anonymous(process: psutil.Process) -> float:
    """Resident and neither shared nor part of a file, in MiB."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0  # a process that has just ended has none


def _share(process: psutil.Process) -> float:
    """Proportional set size in MiB."""
    try:
        return process.memory_full_info().pss / MIB
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=["flat", "compare"])
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.question == "flat":
            sides = {f"{count:,} images": Path(name) / f"in-{count}" for count in (args.small, args.large)}
            for count, source in zip((args.small, args.large), sides.values(), strict=True):
                make_tiny(source, count)
            start = [sys.executable, "-c", FLAT]
            flags = []
        else:
            sides = {"plain": args.plain, "other": args.other}
            start = [sys.executable, str(Path(__file__).parents[1] / "jobs" / "infer.py")]
            flags = ["--max-failed-fraction", "1"]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number, side in itertools.product(range(1 if args.question == "flat" else args.pairs), sides):
            output = f"{name}/{side}-{number}"
            places = [str(sides[side]), output]
            if flags:
                places = ["--input", places[0], "--output", output]
            runs[side].append(peaks([*start, *places, *flags]))
            print(side, {who: f"{size:,.0f} MiB" for who, size in runs[side][-1].items()}, flush=True)
    result = {
        side: {who: statistics.median(run[who] for run in done) for who in done[0]}
        for side, done in runs.items()
    }
    first, second = result.values()
    for who in first:
        print(f"{who}: {second[who] - first[who]:+,.0f} MiB, ratio {second[who] / first[who]:.2f}")
    if args.json:
        args.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

"""How good does the default recipe get on BCCD in some minutes, over several seeds?

    python benchmarks/training_bccd.py --data BCCD [--minutes 5] [--seeds 0 1 2] [--json FILE] [-- FLAGS]

BCCD (364 blood cell images, VOC layout) is split by its own lists: train to learn, val to choose, test to
measure. Each seed runs the three jobs as a user would: train.py with a budget, infer.py with the checkpoint,
evaluate.py on the Parquet that it wrote. Prints one table: AP, AP50 and AP by class, median and spread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_job(name: str, *flags: object) -> str:
    """Run a job to its end and return what it printed."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, flags)]
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    job = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if job.returncode:
        sys.exit(f"{' '.join(command)} ended with {job.returncode}:\n{job.stdout}")
    return job.stdout


def make_shards(data: Path, folder: Path) -> None:
    for split in ("train", "val", "test"):
        flags = ("--format", "voc", "--images", data, "--split", split, "--output", folder / split)
        run_job("make_shards", *flags, "--skip-bad-boxes")


def one_seed(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train, detect, measure."""
    out, started = folder / f"run-{seed}", time.time()
    flags = ["--train", folder / "train", "--val", folder / "val", "--output", out, "--seed", seed]
    log = run_job("train", *flags, "--max-minutes", args.minutes, *args.flags)
    minutes = (time.time() - started) / 60
    print("\n".join(line for line in log.splitlines() if "validation" in line or "images/s" in line)[-2000:])
    found = folder / f"detections-{seed}"
    weights = out / "model.safetensors"
    test = folder / "test"
    threshold = ("--score-threshold", 0.001)
    run_job("infer", "--input", test, "--output", found, "--weights", weights, *threshold)
    numbers = folder / f"numbers-{seed}.json"
    resamples = ("--resamples", 0)
    run_job("evaluate", "--detections", found, "--annotations", test, "--output", numbers, *resamples)
    measured = json.loads(numbers.read_text())
    position = json.loads((out / "_run" / "result.json").read_text())
    return {
        "seed": seed,
        "minutes": minutes,
        "steps": position["step"],
        "AP": measured["AP"],
        "AP50": measured["AP50"],
        **{name: row["AP"] for name, row in measured["per_class"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="further flags of jobs/train.py, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_shards(args.data, Path(folder))
        rows = [one_seed(Path(folder), seed, args) for seed in args.seeds]
    names = list(rows[0])
    print("  ".join(f"{name:>9}" for name in names))
    for row in rows:
        print("  ".join(f"{row[name]:>9.3f}" if name != "seed" else f"{row[name]:>9}" for name in names))
    for title, number in (("median", statistics.median), ("spread", lambda v: max(v) - min(v))):
        values = [number([row[name] for row in rows]) for name in names[1:]]
        print("  ".join([f"{title:>9}", *(f"{value:>9.3f}" for value in values)]))
    if args.json:
        args.json.write_text(
            json.dumps({"minutes": args.minutes, "flags": args.flags, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()

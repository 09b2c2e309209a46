"""Planning at scale: 100,000 shards listed and grouped, 10 million image rows subtracted.

    python benchmarks/planning.py [--rows 10000000] [--shards 100000] [--json FILE]

Prints one table. The input is synthetic: empty files for the listing, a ledger of `--rows` images in parts of
250,000 for the anti-join. Each step runs in a process of its own, whose peak memory is given.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.inference import ledger
from pipeline.inference.lock import Lock


def write_ledger(output: str, rows: int, shards: int) -> None:
    """Parts as compaction leaves them: `shards` shards, all but the last one of each hundred finished."""
    size = rows // shards
    per_part = 250_000
    with Lock(output) as lock:
        for start in range(0, rows, per_part):
            index = np.arange(start, min(start + per_part, rows))
            shard, position = index // size, index % size
            names, codes = np.unique(shard, return_inverse=True)
            dictionary = pa.array([f"shard-{n:06d}.tar" for n in names])
            empty = pa.array([""] * len(index))
            ids = [f"shard-{s:06d}.tar/{p:06d}.jpg" for s, p in zip(shard, position, strict=True)]
            table = pa.table(
                {
                    "image_id": pa.array(ids),
                    "uri": pa.array(["u"] * len(index)),
                    "shard": pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), dictionary),
                    "shard_index": pa.array(position.astype(np.int32)),
                    "shard_size": pa.array((size + (shard % 100 == 99)).astype(np.int32)),
                    "width": pa.array(np.full(len(index), 640, np.int32)),
                    "height": pa.array(np.full(len(index), 480, np.int32)),
                    "num_bytes": pa.array(np.full(len(index), 100_000, np.int64)),
                    "num_detections": pa.array(np.zeros(len(index), np.int32)),
                    "status": pa.array(["ok"] * len(index)),
                    "error_stage": empty,
                    "error_type": empty,
                    "error_message": empty,
                }
            ).cast(schema.IMAGES)
            metadata = ledger.part_metadata(fingerprint="f", model="{}", run="r0001", round=0)
            name = f"part-r0001.0-{start // per_part:06d}.parquet"
            ledger.commit(output, name, table, schema.DETECTIONS.empty_table(), metadata, lock=lock.ref)


def measure(step: str, folder: str) -> dict[str, float]:
    """Run one step in a child process: seconds of the step, peak MB of the child."""
    command = [sys.executable, __file__, "--step", step, "--folder", folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def plan_shards(folder: str) -> None:
    """List all shards and make the read tasks of a first run."""
    from pipeline.config import InferConfig
    from pipeline.data.shards import list_shards
    from pipeline.inference.plan import group_tasks, plan_work

    config = InferConfig(input=f"{folder}/shards", output=f"{folder}/none")
    start = time.perf_counter()
    work = plan_work(config, list_shards(config.input), ledger.Ledger())
    _print(start, shards=len(work), tasks=len(group_tasks(work, num_cores=2)))


def anti_join(folder: str) -> None:
    """Read the ledger and subtract it from the shards."""
    from pipeline.results.parts import read_parts

    start = time.perf_counter()
    read = ledger.read_ledger(f"{folder}/output", read_parts(f"{folder}/output"))
    finished = read.finished_shards()
    left = [read.done(name) for name in read.codes if name not in finished]
    _print(start, rows=read.num_rows, finished=len(finished), unfinished=len(left))


def _print(start: float, **counts: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": round(time.perf_counter() - start, 2), "peak_MB": round(peak), **counts}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"plan_shards": plan_shards, "anti_join": anti_join}[args.step](args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        shards.mkdir()
        for number in range(args.shards):
            (shards / f"shard-{number:06d}.tar").touch()
        write_ledger(f"{folder}/output", args.rows, args.shards)
        results = {step: measure(step, folder) for step in ("plan_shards", "anti_join")}
    for step, result in results.items():
        print(f"{step:<12} " + "  ".join(f"{name} {value:,}" for name, value in result.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

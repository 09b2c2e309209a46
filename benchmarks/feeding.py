"""How fast images reach a detector: the pipeline with none, a torch DataLoader, plain processes.

    python benchmarks/feeding.py --images FOLDER [--workers 2] [--shards 64] [--pairs 5]

The JPEGs of FOLDER, made 640x480, are packed into tar shards (repeated until they are enough); each side
reads, decodes and resizes all of them to 300x300 with the same code and the same settings of the allocator,
in --workers processes (the cores of the machine).
Steady rates: from the moment when a quarter of a side's images has arrived to its last one, so that nobody's
start counts (Ray starts writers when the first images are there). The pipeline's blocks are as large as for
GPUs, and one detector takes them, as one process takes the DataLoader's. The sides take turns; the table
shows the median of the ratios. `--corrupt` compares the pipeline with itself where one image in a hundred is
cut short, and ends with an error unless exactly these are failed rows.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline import runtime
from pipeline.config import InferConfig
from pipeline.data.images import decode_image, resize_image
from pipeline.data.shards import Shard, list_shards, read_shard
from pipeline.inference.blocks import with_detections
from pipeline.inference.run import CHUNKS_PER_BLOCK, infer
from pipeline.results import load_images

WORKERS = 2
BATCH = 64
SIZE = 300
CORRUPT_EVERY = 100  # of a shard
# A process that is forked from a driver of Ray has its connections, too: after some of them Ray (2.60) freed
# no blocks any more in one run of two, filled its object store and wrote blocks to disk, at half the speed.
NEW_PROCESSES = "spawn"


def make_shards(
    images: Path, folder: Path, *, num_shards: int, size: int, corrupt_every: int | None = None
) -> None:
    """Tars of `size` JPEGs each; one in `corrupt_every` lacks its second half."""
    files = itertools.cycle([_as_640x480(path) for path in sorted(images.glob("*.jpg"))])
    folder.mkdir(parents=True)
    for number in range(num_shards):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for position in range(size):
                data = next(files)
                if corrupt_every and position % corrupt_every == 0:
                    data = data[: len(data) // 2]
                member = tarfile.TarInfo(f"{position:05d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _as_640x480(path: Path) -> bytes:
    file = io.BytesIO()
    Image.open(path).convert("RGB").resize((640, 480)).save(file, "JPEG", quality=90)
    return file.getvalue()


def resized(shards: list[Shard]) -> Iterator:
    """Every image of `shards` as uint8 [SIZE, SIZE, 3]."""
    for shard in shards:
        for raw in read_shard(shard):
            pixels = decode_image(raw.data or b"").pixels
            yield resize_image(pixels, height=SIZE, width=SIZE, rule="tf_legacy")


class NullDetector:
    """No boxes and no work: what is left is the rest of the pipeline."""

    def __init__(self, **_: object) -> None: ...

    def __call__(self, block: pa.Table) -> pa.Table:
        """The block without its images."""
        return with_detections(block, [], 0.0, np.zeros(0, np.int64))


def pipeline_rate(
    source: str,
    output: str,
    *,
    detector: type = NullDetector,
    detectors: int = 0,
    weights: str = InferConfig().weights,
) -> float:
    """Read -> detector -> Parquet on the CPUs that Ray was given, by the arrivals at the detectors."""
    log = Path(f"{output}-arrivals")
    log.mkdir()

    class Logging(detector):
        def __call__(self, block: pa.Table) -> pa.Table:
            with (log / str(os.getpid())).open("a") as file:
                print(time.perf_counter(), len(block), file=file)
            return super().__call__(block)

    config = InferConfig(
        input=source,
        output=output,
        weights=weights,
        reduced_decode=False,
        min_detectors=detectors,
        max_detectors=detectors,
    )
    infer(config, detector=Logging)
    lines = [line.split() for file in log.iterdir() for line in file.read_text().splitlines()]
    return _steady(sorted((float(moment), int(count)) for moment, count in lines))


class Images(IterableDataset[torch.Tensor]):
    """What `resized` yields, each worker its share of the shards."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        shards = list_shards(self.source)[info.id :: info.num_workers] if info else []
        return (torch.from_numpy(pixels) for pixels in resized(shards))


def loader_rate(source: str, *, workers: int = WORKERS) -> float:
    """A DataLoader of `workers` processes, batches of uint8 tensors."""
    loader = DataLoader(
        Images(source), batch_size=BATCH, num_workers=workers, multiprocessing_context=NEW_PROCESSES
    )
    arrivals = [(time.perf_counter(), len(batch)) for batch in loader]
    return _steady(arrivals)


def plain_rate(source: str, *, workers: int = WORKERS) -> float:
    """`workers` processes that read, decode and resize, and keep nothing."""
    spawn = multiprocessing.get_context(NEW_PROCESSES)
    queue = spawn.Queue()
    shards = list_shards(source)
    processes = [spawn.Process(target=_plain, args=(shards[n::workers], queue)) for n in range(workers)]
    for process in processes:
        process.start()
    arrivals = sorted(itertools.chain.from_iterable(queue.get() for _ in processes))
    for process in processes:
        process.join()
    return _steady(arrivals)


def _plain(shards: list[Shard], queue: multiprocessing.Queue) -> None:
    arrivals, count = [], 0
    for _ in resized(shards):
        count += 1
        if count == BATCH:
            arrivals.append((time.perf_counter(), count))
            count = 0
    queue.put(arrivals)


def check_failed(output: str, *, num_shards: int, size: int) -> None:
    """Fail unless exactly the images that `make_shards` has cut in two are failed rows."""
    images = load_images(output, columns=["image_id", "status"])
    broken = {f"{n:04d}.tar/{i:05d}.jpg" for n in range(num_shards) for i in range(0, size, CORRUPT_EVERY)}
    failed = images[images.status == "failed"].image_id
    if sorted(failed) != sorted(broken) or len(images) != num_shards * size:
        sys.exit(f"{output}: {len(failed)} of {len(images):,} images failed, {len(broken)} are corrupt")
    print(f"{len(images):,} images, the {len(failed)} corrupt ones and no other failed")


def _steady(arrivals: list[tuple[float, int]]) -> float:
    """Images per second from the first quarter of the images to the last; `arrivals` in the order of time."""
    seen = np.cumsum([count for _, count in arrivals])
    quarter = int(np.searchsorted(seen, seen[-1] / 4))
    return float(seen[-1] - seen[quarter]) / (arrivals[-1][0] - arrivals[quarter][0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs, best of 640x480")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--images-per-shard", type=int, default=250)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--corrupt", action="store_true", help="the cost of 1 %% corrupt images")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runtime.start_ray(num_cpus=args.workers)
    CHUNKS_PER_BLOCK["cpu"] = CHUNKS_PER_BLOCK["cuda"]
    packing = {"num_shards": args.shards, "size": args.images_per_shard}
    with tempfile.TemporaryDirectory() as name:
        source, corrupt = f"{name}/shards", f"{name}/corrupt"
        make_shards(args.images, Path(source), **packing)
        sides = {
            "plain processes": lambda n: plain_rate(source, workers=args.workers),
            "DataLoader": lambda n: loader_rate(source, workers=args.workers),
        }
        if args.corrupt:
            make_shards(args.images, Path(corrupt), **packing, corrupt_every=CORRUPT_EVERY)
            sides = {"1 % corrupt": lambda n: pipeline_rate(corrupt, f"{name}/corrupt-{n}", detectors=1)}
        sides["pipeline"] = lambda n: pipeline_rate(source, f"{name}/out-{n}", detectors=1)
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(args.pairs):
            for side in list(sides) if number % 2 else reversed(sides):
                rates[side].append(sides[side](number))
            print("   ".join(f"{side} {values[-1]:.0f}" for side, values in rates.items()), flush=True)
        for number in range(args.pairs if args.corrupt else 0):
            check_failed(f"{name}/corrupt-{number}", **packing)
    ours = rates.pop("pipeline")
    for side, values in rates.items():
        ratios = [a / b for a, b in zip(ours, values, strict=True)]
        print(f"pipeline / {side}: {statistics.median(ratios):.3f} (median of {len(ratios)})")
    if args.json:
        args.json.write_text(json.dumps({"pipeline": ours, **rates}))


if __name__ == "__main__":
    runtime.take_worker_environment()
    main()

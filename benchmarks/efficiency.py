"""The whole run with the real model against its parts: reading alone and detecting alone, on all cores.

    python benchmarks/efficiency.py --images FOLDER [--weights W] [--pairs 5]

With readers and detectors on the same cores the best that a run can do is 1 / (1/detect + 1/read) images per
second. The three sides take turns; the table shows the median of pipeline / best.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from feeding import BATCH, SIZE, WORKERS, make_shards, pipeline_rate, plain_rate, resized

from pipeline import runtime
from pipeline.config import InferConfig
from pipeline.data.shards import list_shards
from pipeline.inference.plan import BATCH_SIZE
from pipeline.inference.run import LoadedDetector


def model_rate(source: str, weights: str) -> float:
    """Detectors alone, one a core, on images that are in memory already; as the run uses them."""
    spawn = multiprocessing.get_context("spawn")
    queue, ready = spawn.Queue(), spawn.Barrier(WORKERS)
    workers = [spawn.Process(target=_detect, args=(source, weights, queue, ready)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    rate = sum(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    return rate


def _detect(source: str, weights: str, queue: multiprocessing.Queue, ready: object) -> None:
    import torch

    from pipeline.model.detector import Detector

    torch.set_num_threads(1)
    shard = list_shards(source)[0]
    images = np.stack([pixels for pixels, _ in zip(resized([shard]), range(BATCH), strict=False)])
    detector = Detector(weights, score_threshold=0.05)
    sizes_N2 = np.full((len(images), 2), [640, 480], np.int32)

    def once() -> None:
        for first in range(0, len(images), BATCH_SIZE):
            detector(images[first : first + BATCH_SIZE], sizes_N2[first : first + BATCH_SIZE])

    once()
    ready.wait()  # type: ignore[attr-defined]
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 15:
        once()
        count += len(images)
    queue.put(count / (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs, best of 640x480")
    parser.add_argument("--weights", default=InferConfig().weights, help=f"a model of {SIZE}x{SIZE} pixels")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--images-per-shard", type=int, default=250)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runtime.start_ray(num_cpus=WORKERS)
    ratios, rows = [], []
    with tempfile.TemporaryDirectory() as name:
        source = f"{name}/shards"
        make_shards(args.images, Path(source), num_shards=args.shards, size=args.images_per_shard)
        for number in range(args.pairs):
            read = plain_rate(source)
            whole = pipeline_rate(
                source, f"{name}/out-{number}", detector=LoadedDetector, weights=args.weights
            )
            model = model_rate(source, args.weights)
            best = 1 / (1 / model + 1 / read)
            ratios.append(whole / best)
            rows.append({"pipeline": whole, "model": model, "read": read, "best": best})
            print("   ".join(f"{k} {v:.1f}" for k, v in rows[-1].items()), f"  {ratios[-1]:.3f}", flush=True)
    print(f"pipeline / best: {statistics.median(ratios):.3f} (median of {len(ratios)})")
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    runtime.take_worker_environment()
    main()

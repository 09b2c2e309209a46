"""`--dry-run`: open one shard, load the model, check the output, and say what a run would do."""

import time
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from pipeline import runtime
from pipeline.config import InferConfig
from pipeline.data.shards import list_shards
from pipeline.inference.blocks import DetectImages, ReadSettings, Work, read_blocks
from pipeline.inference.ledger import read_ledger
from pipeline.inference.lock import check_free
from pipeline.inference.plan import (
    BATCH_SIZE,
    changed_shards,
    check_clearable,
    check_output,
    limited,
    plan_work,
    portable_weights,
    read_settings,
    run_fingerprint,
    thresholds_by_label,
)
from pipeline.inference.run import check_writable, choose_pool
from pipeline.model import checkpoint
from pipeline.model.spec import ModelSpec
from pipeline.results.parts import read_parts
from pipeline.runlog import duration

SAMPLE_IMAGES = 64


def dry_run(config: InferConfig) -> str:
    """Check everything that a run needs; returns the plan as text. Ray starts for `--device cuda` alone.

    Raises:
        ConfigError: what a run would refuse.
    """
    weights = portable_weights(config.weights)
    spec = checkpoint.read_spec(config.weights)
    settings = read_settings(config, spec)
    fingerprint = run_fingerprint(config, spec, checkpoint.weights_sha256(config.weights))
    shards = list_shards(config.input)
    check_writable(config.output)
    check_free(config.output)
    if config.overwrite:
        check_clearable(config.output)
    else:
        check_output(config, fingerprint)
    if config.device == "cuda":
        runtime.start_ray()
        choose_pool(config)  # the cluster has GPUs
    parts = [] if config.overwrite else read_parts(config.output)
    ledger = read_ledger(config.output, parts)
    redone = set() if config.overwrite else changed_shards(config, shards, ledger)
    work = limited(plan_work(config, shards, ledger, redone), config.limit)
    size = f"{spec.input_width}x{spec.input_height}"
    lines = [
        f"input     {config.input}: {len(shards):,} shards, {sum(s.num_bytes for s in shards) / 1e9:,.2f} GB",
        f"output    {config.output}: writable; {len(ledger.keys):,} images done before",
        f"model     {spec.architecture}, {spec.num_classes - 1} classes, input {size}",
        f"to do     {len(work):,} shards",
    ]
    if work:
        lines.append(_sample(config, weights, spec, settings, work))
    return "\n".join(lines)


def _sample(
    config: InferConfig, weights: bytes, spec: ModelSpec, settings: ReadSettings, work: list[Work]
) -> str:
    """Read and detect some images of the first shards; estimate the whole."""
    start = time.perf_counter()
    few = work[:SAMPLE_IMAGES]
    block = next(read_blocks(few, replace(settings, images_per_block=SAMPLE_IMAGES)))
    read_s = time.perf_counter() - start
    detector = DetectImages(weights, "cpu", thresholds_by_label(config, spec), BATCH_SIZE, threads=0)
    start = time.perf_counter()
    detected = detector(block)
    detect_s = time.perf_counter() - start
    sizes = {row["shard"]: row["shard_size"] for row in block.select(["shard", "shard_size"]).to_pylist()}
    total = round(len(work) * float(np.mean(list(sizes.values())))) if sizes else 0
    failed = block.filter(pc.equal(block["status"], "failed"))  # type: ignore[attr-defined]
    example = [f"{row['image_id']}: {row['error_message']}" for row in failed.slice(0, 1).to_pylist()]
    boxes = sum(detected["num_detections"].to_pylist())
    read_ms, detect_ms = 1000 * read_s / len(block), 1000 * detect_s / len(block)
    whole = duration(total * (read_ms + detect_ms) / 1000)
    return (
        f"sample    {len(block)} images of {len(sizes)} shards: {len(failed)} failed"
        f"{''.join(f' ({text})' for text in example)}, {boxes} detections; "
        f"{read_ms:.0f} ms an image to read, {detect_ms:.0f} ms to detect on this CPU\n"
        f"estimate  about {total:,} images: {whole} on this machine alone"
    )

"""The inference run: plan, the chain read -> detect and publish, finish check, compaction, report."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions
from ray.data import ActorPoolStrategy, Dataset

from pipeline import runtime, storage
from pipeline.config import InferConfig, flags
from pipeline.data.shards import list_shards
from pipeline.errors import BudgetError, ConfigError, PipelineError, own_error
from pipeline.inference.blocks import DetectImages, ReadSettings, Work, read_blocks
from pipeline.inference.compaction import compact
from pipeline.inference.ledger import (
    Ledger,
    part_metadata,
    read_ledger,
    record_found,
    remove_late,
    without_repeats,
)
from pipeline.inference.lock import Lock
from pipeline.inference.monitor import monitoring, progress_of
from pipeline.inference.plan import (
    BATCH_SIZE,
    Plan,
    check_clearable,
    check_output,
    digest,
    group_tasks,
    make_plan,
    portable_weights,
    read_settings,
    run_fingerprint,
    save_shards,
    thresholds_by_label,
)
from pipeline.inference.report import Report, finish_report
from pipeline.inference.sink import DetectAndPublish, Target
from pipeline.model import checkpoint
from pipeline.model.spec import ModelSpec
from pipeline.results.parts import part_names, read_parts
from pipeline.runlog import Progress, logger

MAX_PASSES = 5  # the run itself, and again for what is missing or was in flight when a process died
# A block is one commit. It costs tens of milliseconds of CPU in driver and detector, which limits how many
# images a second one driver can feed to GPUs. On CPUs, where a chunk is seconds of a detector's work, small
# blocks are shared more evenly.
CHUNKS_PER_BLOCK = {"cuda": 3, "cpu": 1}
SLOW_IMAGES_PER_BLOCK = 16
WHOLE_CHUNK = 4096  # more images than any chunk has
# At a detector: waiting, worked on and being published. Ray Data (2.60) looks ten times a second for what is
# done, and a part waits tenths of a second for the store. A detector that sleeps 31 ms a block was busy for
# .90 to .95 of the time with 8, 12 or 16 where parts went to the local disk; where each file took 0.1 s
# longer, for .64 with 8, .89 with 12, .93 with 16 and .90 with 24. That was with blocks of one chunk.
BLOCKS_AT_ONCE = {"cuda": 16, "cpu": 4}

# Logical: detectors and readers share the cores. Whole numbers: from fractions Ray Data (2.60) makes budgets
# that are short of the last reader (0.89 for 0.9), and half the cores stood idle.
DETECTOR_CPUS = 0
READER_CPUS = 1
RETRIES = 3  # Ray's default is for ever, and so is a poison image


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The detector actors."""

    device: str
    min_size: int
    max_size: int
    batch_size: int
    threads: int


def infer(config: InferConfig, *, detector: type | None = None) -> Report:
    """Detect objects in every image of `config.input` and write the two tables to `config.output`.

    Resumes what an earlier run left unfinished. Returns the report that is also in `_run/report.json`.
    `detector` is a callable class with the contract of `LoadedDetector`, for tests and benchmarks.

    Raises:
        ConfigError: refused: see the message.
        PipelineError: images are still missing after `MAX_PASSES`.
    """
    # Workers may have another working directory.
    config = replace(config, output=storage.absolute(config.output))
    retries = storage.num_retries()
    weights = portable_weights(config.weights)
    spec = checkpoint.read_spec(config.weights)
    fingerprint = run_fingerprint(config, spec, checkpoint.weights_sha256(config.weights))
    settings = read_settings(config, spec)
    shards = list_shards(config.input)
    check_writable(config.output)
    if config.overwrite or config.redo_changed:
        runtime.start_ray()
        choose_pool(config)  # whatever is refused is refused before something is deleted
    if config.overwrite:
        with Lock(config.output):
            clear(config.output)
    check_output(config, fingerprint)
    with Lock(config.output) as lock:
        record = {"flags": flags(config), "fingerprint": fingerprint}
        storage.write_atomic(
            storage.join(config.output, "_run", "config.json"), json.dumps(record, indent=2).encode()
        )
        plan = make_plan(config, settings, digest(fingerprint), shards, lock=lock.ref)
        record_found(config.output, plan.known, lock.ref)
        save_shards(plan)
        logger.info(
            "%s: %s shards, %s of them finished before",
            config.input,
            f"{len(plan.shards):,}",
            f"{plan.num_finished_shards:,}",
        )
        done = (
            run_plan(plan, spec, weights, config, lock, detector or LoadedDetector)
            if plan.work
            else Outcome(progress_of(plan), num_detectors=0, num_at_once=0, over_budget=False)
        )
        run = lock.ref.run
        parts = remove_late(config.output, plan.known, run, lock=lock.ref, over=not done.over_budget)
        superseded = plan.round > 0 or plan.ledger.is_superseded
        parts = compact(config.output, parts, run, superseded=superseded, lock=lock.ref)
        return finish_report(
            config,
            plan,
            parts,
            done.progress,
            done.num_detectors,
            num_at_once=done.num_at_once,
            num_retries=storage.num_retries() - retries,
            stopped=done.over_budget,
        )


@dataclass(frozen=True)
class Outcome:
    """What `run_plan` did."""

    progress: Progress
    num_detectors: int
    num_at_once: int
    over_budget: bool


def run_plan(
    plan: Plan, spec: ModelSpec, weights: bytes, config: InferConfig, lock: Lock, detector: type
) -> Outcome:
    """Start Ray and run the plan until every image has its row or the error budget is spent."""
    runtime.start_ray()
    pool = choose_pool(config)
    count = images_per_block(plan.settings, pool, spec)
    plan = replace(plan, settings=replace(plan.settings, images_per_block=count))
    logger.info("%s: starting %d detectors on %s ...", spec.architecture, pool.min_size, pool.device)
    with monitoring(progress_of(plan), config, weights, num_shards=len(plan.shards)) as monitor:
        try:
            run_passes(plan, spec, pool, config, lock, monitor, detector)
            over_budget = False
        except BudgetError:
            over_budget = True
        progress: Progress = ray.get(monitor.progress.remote())
    # Of a pool that may grow, those that took part; those of a later pass stand for those of the one before.
    num_detectors = min(max(pool.min_size, len(progress.counts.detectors)), pool.max_size)
    return Outcome(progress, num_detectors, num_detectors * BLOCKS_AT_ONCE[pool.device], over_budget)


# ---- the chain ---------------------------------------------------------------------------------------


def detect_shards(
    tasks: list[list[Work]],
    *,
    settings: ReadSettings,
    detector: type,
    detector_args: Mapping[str, object],
    pool: Pool,
    target: Target,
    monitor: Any,
) -> Dataset:
    """Read, decode and resize (tasks on CPUs), then detect and publish (an actor pool).

    Its rows are counts of images. Not with a Ray `Datasink`, nor with tasks that publish: see CONTRIBUTING.
    """
    images = runtime.read_tasks(
        "Shards",
        [
            shard_reader(
                work, number=number, settings=settings, monitor=monitor, gives_way=pool.device == "cuda"
            )
            for number, work in enumerate(tasks)
        ],
        num_cpus=READER_CPUS,
        max_retries=RETRIES,
    )
    return runtime.map_blocks(
        images,
        DetectAndPublish,
        fn_constructor_kwargs={
            "detector": detector,
            "detector_args": dict(detector_args),
            "target": target,
            "monitor": monitor,
        },
        compute=ActorPoolStrategy(
            min_size=pool.min_size,
            max_size=pool.max_size,
            max_tasks_in_flight_per_actor=BLOCKS_AT_ONCE[pool.device],
            max_concurrent_calls_per_actor=BLOCKS_AT_ONCE[pool.device],
            enable_true_multi_threading=True,
        ),
        num_cpus=DETECTOR_CPUS,
        num_gpus=1 if pool.device == "cuda" else 0,
        label_selector=runtime.where_cores_are() if pool.device == "cpu" else {},
        max_restarts=RETRIES,
        max_task_retries=RETRIES,
    )


def shard_reader(
    work: list[Work], *, number: int, settings: ReadSettings, monitor: Any, gives_way: bool
) -> Callable[[], Iterator[pa.Table]]:
    """A reading task: the blocks of some shards. Where it gives way, detectors have the cores first.

    Without, a GPU waits for its host's work; with it, detectors on CPUs were slower (CONTRIBUTING).
    """

    def read() -> Iterator[pa.Table]:
        if gives_way:
            runtime.give_way()
        if monitor is not None:
            monitor.reading.remote(number)
        yield from read_blocks(work, settings)
        if monitor is not None:
            monitor.read.remote(number)

    return read


class LoadedDetector(DetectImages):
    """`DetectImages` with weights that the monitor keeps: no other node needs the file.

    Not from the object store: an actor that is restarted may find its arguments gone there.
    """

    def __init__(self, monitor: Any, **settings: Any) -> None:
        super().__init__(ray.get(monitor.weights.remote()), **settings)


# ---- passes ------------------------------------------------------------------------------------------


def run_passes(
    plan: Plan,
    spec: ModelSpec,
    pool: Pool,
    config: InferConfig,
    lock: Lock,
    monitor: Any,
    detector: type,
) -> None:
    """Run the chain until every image of the plan has its row.

    A process that dies again and again (an image that kills its decoder) ends a pass; then the shards that
    were in flight go image by image in child processes, where the killer becomes a failed row.
    """
    work, settings = plan.work, plan.settings
    for number in range(MAX_PASSES):
        if not work:
            return
        tasks = group_tasks(work, num_cores=runtime.expected_cores())
        runtime.configure_data(block_bytes=settings.images_per_block * settings.image_bytes)
        target = Target(
            output=plan.output,
            run=f"{lock.ref.run}.{number}",
            metadata=part_metadata(
                fingerprint=plan.fingerprint, model=spec.to_json(), run=lock.ref.run, round=plan.round
            ),
            class_names=dict(zip(spec.label_ids, spec.class_names, strict=True)),
            lock=lock.ref,
        )
        parts = detect_shards(
            tasks,
            settings=settings,
            detector=detector,
            detector_args={
                "monitor": monitor,
                "device": pool.device,
                "thresholds": thresholds_by_label(config, spec),
                "batch_size": pool.batch_size,
                "threads": pool.threads,
            },
            pool=pool,
            target=target,
            monitor=monitor,
        )
        ray.get(monitor.begin.remote())
        suspects: set[str] = set()
        try:
            for _ in parts.iter_internal_ref_bundles():
                pass
        except (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.ActorDiedError,
            ray.exceptions.NodeDiedError,
        ) as error:
            if "creation task" in str(error):  # not a crash: its constructor raised
                raise PipelineError(f"a detector can't start: {_last_line(error)}") from None
            in_flight: list[int] = ray.get(monitor.unfinished.remote())
            suspects = {item.shard.name for number in in_flight for item in tasks[number]}
            logger.warning("a worker died %d times; going on with its shards image by image", RETRIES + 1)
        except ray.exceptions.RayTaskError as error:
            if ours := own_error(error):
                raise ours from None
            raise
        missing = still_missing(plan, f"part-{lock.ref.run}.")
        isolated = [item for item in missing if item.shard.name in suspects]
        work = isolated or missing
        settings = replace(plan.settings, isolated=bool(isolated))
        if work and not isolated:
            logger.warning("%d shards miss images; running them again", len(work))
    if work:
        raise PipelineError(
            f"{len(work)} shards such as {work[0].shard.name} still miss images after {MAX_PASSES} passes; "
            "run the same command again, and jobs/verify.py to see what is missing"
        )


def _last_line(error: BaseException) -> str:
    """What a remote traceback ends with: the error itself."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))


def still_missing(plan: Plan, own: str) -> list[Work]:
    """What of the plan has no row yet; parts of dead writers of other runs don't count."""
    before = set() if plan.round else {part.name for part in plan.known}
    names = part_names(plan.output, "images")
    parts = read_parts(plan.output, {name for name in names if name in before or name.startswith(own)})
    ledger = read_ledger(plan.output, parts)
    if ledger.num_rows > len(ledger.keys):  # a writer of a pass that was broken off came late
        ledger = read_ledger(plan.output, without_repeats(plan.output, parts))
    return [item for work in plan.work if (item := _left(work, ledger, retried=bool(plan.round)))]


def _left(work: Work, ledger: Ledger, *, retried: bool) -> Work | None:
    """What of `work` is not in `ledger`.

    A retry's ledger holds only the rows of the new round: the images that it skipped are done, too.
    """
    name = work.shard.name
    if name not in ledger.codes:
        return work
    done = ledger.done(name)
    if len(done) and done[0] == -1:
        return None
    wanted = int(ledger.sizes[ledger.codes[name]])
    finished = frozenset(done.tolist()) | work.skip if retried else frozenset(done.tolist())
    return None if len(finished) >= wanted else Work(work.shard, finished)


# ---- pool, output ------------------------------------------------------------------------------------


def choose_pool(config: InferConfig) -> Pool:
    """As many detectors as the cluster has GPUs, or CPU cores with one thread each.

    Raises:
        ConfigError: `--device cuda` on a cluster without GPUs.
    """
    gpus, cpus = int(runtime.cluster_resource("GPU")), int(runtime.cluster_resource("CPU"))
    device = ("cuda" if gpus else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and not gpus:
        raise ConfigError("--device cuda: the cluster has no GPU; use --device cpu, or check `ray status`")
    most = config.max_detectors or max(config.min_detectors, gpus if device == "cuda" else cpus, 1)
    return Pool(
        device=device,
        min_size=config.min_detectors or (1 if config.max_detectors else most),
        max_size=most,
        batch_size=config.batch_size or (WHOLE_CHUNK if device == "cuda" else BATCH_SIZE),
        threads=0 if device == "cuda" else max(1, cpus // most),
    )


def images_per_block(settings: ReadSettings, pool: Pool, spec: ModelSpec) -> int:
    """Some chunks, or fewer images where that would be minutes of a detector's work, which a kill would cost.

    On one core `ssd512_vgg16` takes 2.6 s an image and `ssdlite300_mobilenet_v2` 0.1 s.
    """
    if pool.device == "cpu" and not spec.architecture.startswith("ssdlite"):
        return SLOW_IMAGES_PER_BLOCK
    return CHUNKS_PER_BLOCK[pool.device] * settings.images_per_chunk


def check_writable(output: str) -> None:
    """Write and delete a probe. Raises: ConfigError; warns where exclusive creation isn't honoured."""
    try:
        if not storage.honours_exclusive(storage.join(output, "_run")):
            logger.warning(
                "this store ignores conditional writes, so locking is best effort: start one run at a time"
            )
    except (OSError, PipelineError) as error:
        raise ConfigError(f"--output {output} can't be written: {error}") from error


def clear(output: str) -> None:
    """Delete what is in the output, except the lock. Raises: ConfigError where the files aren't ours."""
    check_clearable(output)
    for table in ("images", "detections"):
        storage.delete_folder(storage.join(output, table))
    run = storage.join(output, "_run")
    storage.delete(
        storage.join(run, name) for name in storage.list_names(run) if not name.startswith("lock-")
    )

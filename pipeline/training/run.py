"""Training on Ray: data tasks make the batches (`feed`), Ray Train's workers take the steps (`worker`)."""

import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not os.environ.get("RAY_ADDRESS"):  # no cloud takes this machine away with a warning
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import pyarrow as pa
import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.data import Dataset

from pipeline import runtime, storage
from pipeline.config import TrainConfig, flags
from pipeline.data.annotations import Classes
from pipeline.data.shards import Shard
from pipeline.errors import ConfigError, own_error
from pipeline.inference.lock import Lock
from pipeline.model.checkpoint import save_checkpoint
from pipeline.model.ssd import SSD
from pipeline.runlog import duration, logger
from pipeline.training.board import failure_on, showing
from pipeline.training.feed import BLOCK_BYTES, DATA_CPUS, Pace, batches, data_config
from pipeline.training.index import (
    check_apart,
    index_shards,
    load_index,
    save_index,
    shards_digest,
    training_shards,
)
from pipeline.training.output import CHECKPOINTS, MODEL, check_decided, check_output, clear, read_json, record
from pipeline.training.plan import (
    Plan,
    initial_model,
    make_plan,
    num_frozen,
    shard_classes,
    usable_rows,
    with_fitted_priors,
)
from pipeline.training.samples import load_images
from pipeline.training.session import Position, Schedule
from pipeline.training.validation import check_measurable
from pipeline.training.worker import Job, work

SHARDS_PER_TASK = 8
IMAGES_PER_TASK = 256
MAX_FAILURES = 3
WORKER_CPUS = 0.1  # logical: data tasks must get a core, on a machine with one, too


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    config: TrainConfig
    position: Position
    was_done: bool = False

    def text(self) -> str:
        """A few lines for a person."""
        p = self.position
        done = "This run is done already" if self.was_done else "Done"
        return "\n".join(
            [
                f"{done}: {p.step:,} steps in {duration(p.elapsed_s)}; "
                f"best AP {p.best_ap:.3f} on --val, after step {p.best_step:,}",
                f"Weights: {storage.join(self.config.output, MODEL)}",
                f"Next: python jobs/infer.py --weights {storage.join(self.config.output, MODEL)} --input ... "
                "--output ...",
            ]
        )


def train(config: TrainConfig) -> Outcome:
    """Train as `config` says, or go on where an earlier run of the same flags has stopped.

    Raises:
        ConfigError: refused: see the message.
        PipelineError: the training can't go on, such as after a loss that is not finite.
    """
    started = time.time()
    # Ray Train's workers have working directories of their own.
    config = replace(config, output=storage.absolute(config.output))
    check_output(config)
    finished = None if config.overwrite else read_json(record(config, "result.json"))
    if finished is not None:
        return Outcome(config, Position(**finished), was_done=True)
    prepared = prepare(config)
    check_decided(prepared.plan, config)
    logger.info("%s", prepared.plan.text())
    with Lock(config.output):
        if config.overwrite:
            clear(config.output)  # not before: what is refused deletes nothing
        classes = dict(enumerate(prepared.plan.classes.names, start=1))
        facts = {"flags": flags(config), "decided": prepared.plan.decided(), "classes": classes}
        storage.write_atomic(record(config, "config.json"), json.dumps(facts, indent=2).encode())
        for name, (table, digest) in prepared.tables.items():
            save_index(table, record(config, f"index-{name}.parquet"), digest)
        position = fit(prepared, started=started)
        storage.write_atomic(record(config, "result.json"), json.dumps(position.to_dict(), indent=2).encode())
    return Outcome(config, position)


def dry_run(config: TrainConfig) -> str:
    """The plan, after all checks; nothing is written."""
    check_output(config)
    plan = prepare(config).plan
    check_decided(plan, config)
    return plan.text()


# ---- before the first step ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A checked run, ready to start."""

    plan: Plan
    model: SSD
    tables: dict[str, tuple[pa.Table, str]]
    """Index and digest of "train" and "val"."""


def prepare(config: TrainConfig) -> Prepared:
    """Read the index, make the model, check it all. Starts Ray."""
    check_measurable()
    classes = shard_classes(config)
    shards = {
        "train": training_shards(config.train, flag="--train"),
        "val": training_shards(config.val, flag="--val"),
    }
    check_apart(shards["train"], shards["val"])
    model = initial_model(config, classes)
    runtime.start_ray()
    device = choose_device(config)
    tables = {}
    for name, some in shards.items():
        digest = shards_digest(some, classes)
        kept = None if config.overwrite else load_index(record(config, f"index-{name}.parquet"), digest)
        tables[name] = (read_index(some, classes) if kept is None else kept, digest)
    train_rows = usable_rows(tables["train"][0], config)
    model = with_fitted_priors(model, train_rows, config)
    plan = make_plan(config, classes, model, device=device, train=train_rows, val=tables["val"][0])
    return Prepared(plan, model, tables)


def choose_device(config: TrainConfig) -> str:
    """Where workers train. Raises: ConfigError: too few GPUs in the cluster, or bfloat16 without any."""
    gpus = int(runtime.cluster_resource("GPU"))
    device = ("cuda" if gpus else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and gpus < config.workers:
        found = f"the cluster has {gpus} GPU{'s' * (gpus != 1)} for {config.workers} workers"
        raise ConfigError(f"{found}: {f'--workers {gpus}, or ' if gpus else ''}--device cpu")
    if device == "cpu" and config.precision == "bfloat16":
        # Of two equal steps one had gradients that were finite but absurd, the other sound ones (torch 2.15).
        raise ConfigError("--precision bfloat16 needs GPUs: on CPUs its gradients are not reliable")
    return device


def read_index(shards: list[Shard], classes: Classes) -> pa.Table:
    """The index of a shard set, read side by side on the cluster."""
    task = ray.remote(num_cpus=DATA_CPUS, max_retries=MAX_FAILURES)(index_shards)
    groups = [shards[start : start + SHARDS_PER_TASK] for start in range(0, len(shards), SHARDS_PER_TASK)]
    try:
        tables = ray.get([task.remote(group, classes) for group in groups])
    except ray.exceptions.RayTaskError as error:
        if ours := own_error(error):
            raise ours from None
        raise
    return pa.concat_tables(tables).unify_dictionaries()


def read_validation_images(table: pa.Table, plan: Plan) -> list[tuple[Any, Any]]:
    """References to what `load_images` gives for parts of the validation set; decoded once, on any node."""
    remote: Any = ray.remote(num_cpus=DATA_CPUS, max_retries=MAX_FAILURES, num_returns=2)
    task = remote(load_images)
    shared, spec = ray.put(table), plan.spec
    size = max(1, min(IMAGES_PER_TASK, -(-len(table) // plan.config.workers)))
    return [
        task.remote(
            shared,
            range(start, min(start + size, len(table))),
            height=spec.input_height,
            width=spec.input_width,
            rule=spec.resize_rule,
        )
        for start in range(0, len(table), size)
    ]


# ---- the run -----------------------------------------------------------------------------------------


def fit(prepared: Prepared, *, started: float) -> Position:
    """Run Ray Train to the end of the schedule and return where it has ended."""
    plan, config = prepared.plan, prepared.plan.config
    runtime.configure_data(block_bytes=BLOCK_BYTES)
    before = last_position(config.output)
    if before.step >= plan.num_steps or before.validated_progress >= 1:
        return before  # stopped after its last checkpoint
    if before.step:
        logger.info("going on after step %d of %d", before.step, plan.num_steps)
    logger.info("starting %d workers on %s ...", config.workers, plan.device)
    rows = ray.put(usable_rows(prepared.tables["train"][0], config))
    val = prepared.tables["val"][0]
    parts = read_validation_images(val, plan)
    pace: Any = Pace.remote()
    with showing() as board:
        job = Job(
            config=config,
            device=plan.device,
            schedule=Schedule(
                num_steps=plan.num_steps,
                steps_per_epoch=plan.num_images / config.batch_size,
                num_val_images=plan.num_val_images,
                num_validations=config.validations,
                checkpoint_steps=config.checkpoint_steps,
                budget_s=60 * config.max_minutes,
                log_s=config.log_s,
            ),
            weights=_to_bytes(prepared.model),
            num_frozen=num_frozen(config),
            classes=plan.classes,
            val_index=ray.put(val),
            val_images=[images for images, _ in parts],
            val_failures=[failures for _, failures in parts],
            started=started,
            elapsed_before_s=before.elapsed_s,
            board=board,
            pace=pace,
        )
        trainer = Trainer(
            work,
            train_loop_config={"job": job},
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if job.device == "cuda" else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers,
                use_gpu=job.device == "cuda",
                resources_per_worker={"CPU": WORKER_CPUS} | ({"GPU": 1} if job.device == "cuda" else {}),
            ),
            run_config=run_config(config.output),
            datasets={"train": partial(_batches, rows, plan, pace)},
            dataset_config=data_config(),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            if failure := failure_on(board) or own_error(error):
                raise failure from None
            raise
        if failure := failure_on(board):
            raise failure
    return last_position(config.output)


def _batches(rows: Any, plan: Plan, pace: Any) -> Dataset:
    """Ray Train calls this whenever it starts the workers: after a failure the data go on where they do."""
    first = min(last_position(plan.config.output).step, plan.num_steps - 1)  # Ray Data can't read nothing
    return batches(rows, plan, first=first, pace=pace)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's trainer (2.60) without two of its habits."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C stops the job as any other: Ray's handler ends it with exit code 1 and no word."""

    def _create_default_callbacks(self) -> list[Any]:
        """Without the actor that outlives a dead controller, on a cluster of this process's own.

        It looks for the controller in the latest of all clusters on this machine, and where that is another
        one, takes it for dead and removes the workers. Our own cluster ends with this process anyway.
        """
        callbacks = super()._create_default_callbacks()
        if os.environ.get("RAY_ADDRESS"):
            return callbacks
        return [one for one in callbacks if type(one).__name__ != "PlacementGroupCleanerCallback"]


def run_config(output: str) -> ray.train.RunConfig:
    """Where checkpoints go and how many failures are survived."""
    filesystem, path = storage.arrow_filesystem(output)
    return ray.train.RunConfig(
        name=CHECKPOINTS,
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        logging_config=ray.train.LoggingConfig(log_level="ERROR"),
    )


def last_position(output: str) -> Position:
    """Where the last checkpoint of a run is; the beginning where it has none."""
    folder = storage.join(output, CHECKPOINTS)
    if not storage.exists(storage.join(folder, "checkpoint_manager_snapshot.json")):
        return Position()
    filesystem, path = storage.arrow_filesystem(folder)
    result = ray.train.Result.from_path(path, storage_filesystem=filesystem)
    if result.checkpoint is None:
        return Position()
    with result.checkpoint.as_directory() as local:
        return Position(**json.loads(Path(local, "position.json").read_text()))


def _to_bytes(model: SSD) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, MODEL)
        save_checkpoint(model, path)
        return path.read_bytes()

"""Training on Ray: data tasks make the batches (`feed`), Ray Train's workers take the steps (`session`)."""

import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
if not os.environ.get("RAY_ADDRESS"):  # no cloud takes this machine away with a warning
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import pyarrow as pa
import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.data import Dataset
from ray.train.v2._internal.execution import context as ray_train_context

from pipeline import runtime, storage
from pipeline.config import TrainConfig, flags
from pipeline.data.annotations import Classes
from pipeline.data.shards import Shard
from pipeline.errors import ConfigError, own_error
from pipeline.inference.lock import Lock
from pipeline.model.checkpoint import load_checkpoint, save_checkpoint
from pipeline.model.ssd import SSD
from pipeline.runlog import duration, logger
from pipeline.training.board import failure_on, showing
from pipeline.training.feed import BLOCK_BYTES, DATA_CPUS, Pace, batches, data_config, own_batches
from pipeline.training.index import (
    index_shards,
    load_index,
    save_index,
    shards_digest,
    training_shards,
)
from pipeline.training.loop import Learner
from pipeline.training.optimise import freeze
from pipeline.training.plan import (
    Plan,
    initial_model,
    make_plan,
    make_recipe,
    num_frozen,
    shard_classes,
    unchanging_flags,
    usable_rows,
)
from pipeline.training.samples import load_images
from pipeline.training.session import Outlets, Position, Schedule, run_steps
from pipeline.training.validation import check_measurable, ground_truth, validate

MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"
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
    if config.overwrite:
        with Lock(config.output):
            clear(config.output)
    check_output(config)
    if (finished := _read_json(_record(config, "result.json"))) is not None:
        return Outcome(config, Position(**finished), was_done=True)
    prepared = prepare(config)
    check_decided(prepared.plan, config)
    logger.info("%s", prepared.plan.text())
    with Lock(config.output):
        classes = dict(enumerate(prepared.plan.classes.names, start=1))
        record = {"flags": flags(config), "decided": prepared.plan.decided(), "classes": classes}
        storage.write_atomic(_record(config, "config.json"), json.dumps(record, indent=2).encode())
        for name, (table, digest) in prepared.tables.items():
            save_index(table, _record(config, f"index-{name}.parquet"), digest)
        position = fit(prepared, started=started)
        storage.write_atomic(
            _record(config, "result.json"), json.dumps(position.to_dict(), indent=2).encode()
        )
    return Outcome(config, position)


def dry_run(config: TrainConfig) -> str:
    """The plan, after all checks; nothing is written."""
    check_output(config)
    plan = prepare(config).plan
    check_decided(plan, config)
    return plan.text()


# ---- output ------------------------------------------------------------------------------------------


def check_output(config: TrainConfig) -> None:
    """Refuse a folder with something else than a run of the same flags.

    Raises:
        ConfigError: foreign files, or another run; the difference is shown.
    """
    before = _read_json(_record(config, "config.json"))
    if before is None:
        if foreign := storage.list_names(config.output) - {"_run"}:
            raise ConfigError(
                f"--output {config.output} holds other files (such as {min(foreign)!r}); take an empty folder"
            )
        return
    if "train" not in before.get("flags", {}):
        raise ConfigError(f"--output {config.output} holds another job's output; take another folder")
    old, new = unchanging_flags(before["flags"]), unchanging_flags(flags(config))
    if unknown := old.keys() ^ new.keys():
        raise ConfigError(
            f"--output {config.output} holds a run of another version, which differs in the flag "
            f"--{min(unknown).replace('_', '-')}; take another --output, or --overwrite"
        )
    changed = [
        f"--{name.replace('_', '-')} was {old[name]}, now {new[name]}"
        for name in sorted(new)
        if old[name] != new[name]
    ]
    if changed:
        raise ConfigError(
            f"--output {config.output} holds a run with other flags: {'; '.join(changed)}. "
            "Give the same flags, another --output, or --overwrite"
        )


def check_decided(plan: Plan, config: TrainConfig) -> None:
    """Refuse to go on with a run of the same flags whose defaults came to something else.

    Raises:
        ConfigError: another version began it, or it had other images; the difference is shown.
    """
    before = _read_json(_record(config, "config.json"))
    if before is None:
        return
    old = before.get("decided", {})
    changed = [
        f"{name} was {old.get(name, 'not recorded')}, now {new}"
        for name, new in plan.decided().items()
        if old.get(name) != new
    ]
    if changed:
        raise ConfigError(
            f"--output {config.output} holds a run of another version or of other images: "
            f"{'; '.join(changed)}. Take another --output, or --overwrite"
        )


def clear(output: str) -> None:
    """Delete what a training run has left. Raises: ConfigError where the files aren't ours."""
    before = _read_json(storage.join(output, "_run", "config.json"))
    if before is None and storage.list_names(output) - {"_run"}:
        raise ConfigError(f"--overwrite: {output} holds files that no run wrote; delete them by hand")
    if before is not None and "train" not in before.get("flags", {}):
        raise ConfigError(f"--overwrite: {output} holds another job's output; delete it by hand")
    for folder in (CHECKPOINTS, "tensorboard"):
        storage.delete_folder(storage.join(output, folder))
    run = storage.join(output, "_run")
    names = [storage.join(run, n) for n in storage.list_names(run) if not n.startswith("lock-")]
    storage.delete([*names, storage.join(output, MODEL)])


def _record(config: TrainConfig, name: str) -> str:
    return storage.join(config.output, "_run", name)


def _read_json(uri: str) -> dict[str, Any] | None:
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


# ---- before the first step ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A checked run, ready to start."""

    plan: Plan
    model: SSD
    device: str
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
    model = initial_model(config, classes)
    runtime.start_ray()
    device = choose_device(config)
    tables = {}
    for name, some in shards.items():
        digest = shards_digest(some, classes)
        kept = load_index(_record(config, f"index-{name}.parquet"), digest)
        tables[name] = (read_index(some, classes) if kept is None else kept, digest)
    train_rows = usable_rows(tables["train"][0], config)
    plan = make_plan(config, classes, model, train=train_rows, val=tables["val"][0])
    return Prepared(plan, model, device, tables)


def choose_device(config: TrainConfig) -> str:
    """Where workers train. Raises: ConfigError: too few GPUs in the cluster, or bfloat16 without any."""
    gpus = int(runtime.cluster_resource("GPU"))
    device = ("cuda" if gpus >= config.workers else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and gpus < config.workers:
        raise ConfigError(
            f"--device cuda: {config.workers} workers need as many GPUs; the cluster has {gpus}"
        )
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


def read_validation_images(table: pa.Table, plan: Plan) -> list[Any]:
    """References to the decoded validation images; decoded once, on any node."""
    remote: Any = ray.remote(num_cpus=DATA_CPUS, max_retries=MAX_FAILURES)
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know."""

    config: TrainConfig
    device: str
    schedule: Schedule
    weights: bytes
    num_frozen: int
    classes: Classes
    val_index: Any
    val_images: list[Any]
    started: float
    elapsed_before_s: float
    board: Any
    pace: Any


def fit(prepared: Prepared, *, started: float) -> Position:
    """Run Ray Train to the end of the schedule and return where it has ended."""
    plan, config = prepared.plan, prepared.plan.config
    runtime.configure_data(block_bytes=BLOCK_BYTES)
    before = last_position(config.output)
    if before.step >= plan.num_steps:
        return before  # stopped after its last checkpoint
    if before.step:
        logger.info("going on after step %d of %d", before.step, plan.num_steps)
    rows = ray.put(usable_rows(prepared.tables["train"][0], config))
    val = prepared.tables["val"][0]
    pace: Any = Pace.remote()
    with showing() as board:
        job = Job(
            config=config,
            device=prepared.device,
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
            val_images=read_validation_images(val, plan),
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
            datasets={"train": partial(_batches, rows, plan, pace, prepared.device)},
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


def _batches(rows: Any, plan: Plan, pace: Any, device: str) -> Dataset:
    """Ray Train calls this whenever it starts the workers: after a failure the data go on where they do."""
    first = last_position(plan.config.output).step
    return batches(rows, plan, first=first, pace=pace, device=device)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's trainer; on a cluster of this process's own without the actor that outlives a dead controller.

    That actor (2.60) looks for the controller in the latest of all clusters on this machine, and where that
    is another one, takes it for dead and removes the workers. Our own cluster ends with this process anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
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


# ---- a worker ----------------------------------------------------------------------------------------


def work(arguments: dict[str, Any]) -> None:
    """What each of Ray Train's workers does."""
    job: Job = arguments["job"]
    for name in ("ray.train", ray_train_context.__file__):  # a line for each checkpoint
        logging.getLogger(name).setLevel(logging.ERROR)
    if failure_on(job.board):
        return  # Ray Train tries again, but this error would come again
    try:
        _work(job)
    except Exception as error:  # the top of this process
        if ours := own_error(error):
            ray.get(job.board.fail.remote(ours))
        raise


def _work(job: Job) -> None:
    context = ray.train.get_context()
    rank, spec_of = context.get_world_rank(), job.config
    if job.device == "cpu":
        torch.set_num_threads(max(1, num_cores() // context.get_local_world_size()))
    device = ray.train.torch.get_device() if job.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, MODEL)
        path.write_bytes(job.weights)
        model = load_checkpoint(path)
    freeze(model, job.num_frozen)
    learner = Learner(model, make_recipe(spec_of, device=job.device), device=device)
    position = _resume(learner)
    writer = Charts(job.config.output) if rank == 0 else None
    truth = ground_truth(ray.get(job.val_index), job.classes)
    mine = job.val_images[rank :: job.config.workers]
    outlets = Outlets(
        validate=lambda model: validate(
            model, (ray.get(ref) for ref in mine), truth, device=str(learner.device)
        ),
        save=partial(_save, output=job.config.output, writer=writer),
        log=lambda text: job.board.line.remote(text) if rank == 0 else None,
        chart=writer.add if writer else lambda numbers, step: None,
    )
    own = own_batches(
        position.step,
        rank=rank,
        height=model.spec.input_height,
        width=model.spec.input_width,
        pace=job.pace,
    )
    run_steps(
        learner,
        own,
        schedule=job.schedule,
        position=position,
        outlets=outlets,
        clock=lambda: job.elapsed_before_s + time.time() - job.started,
    )


def num_cores() -> int:
    """Cores that this process may use: fewer than the machine's under taskset or in some containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resume(learner: Learner) -> Position:
    """Bring the learner to the last checkpoint."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position()
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder, "learner.pt"), map_location="cpu", weights_only=True)
        learner.load_state_dict(state)
        return Position(**json.loads(Path(folder, "position.json").read_text()))


def _save(
    learner: Learner, position: Position, is_best: bool, *, output: str, writer: "Charts | None"
) -> None:
    """Report a checkpoint; the best model also goes where `infer` finds it."""
    numbers = {"step": position.step, "AP": position.numbers.get("AP", -1.0)}
    if writer is None:
        ray.train.report(numbers)
        return
    if is_best:
        save_checkpoint(learner.averaged, storage.join(output, MODEL))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(learner.state_dict(), Path(folder, "learner.pt"))
        save_checkpoint(learner.averaged, Path(folder, MODEL))
        Path(folder, "position.json").write_text(json.dumps(position.to_dict()))
        ray.train.report(numbers, checkpoint=ray.train.Checkpoint.from_directory(folder))
    writer.publish()


class Charts:
    """Numbers over steps as TensorBoard reads them, in `<output>/tensorboard`."""

    def __init__(self, output: str) -> None:
        from tensorboardX import SummaryWriter  # comes with Ray Train

        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name)
        self._target = storage.join(output, "tensorboard")

    def add(self, numbers: dict[str, float], step: int) -> None:
        """Add a point to each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name.replace(" ", "_"), value, step)

    def publish(self) -> None:
        """Copy what there is to the output."""
        self._writer.flush()
        for path in Path(self._folder.name).iterdir():
            storage.write_atomic(storage.join(self._target, path.name), path.read_bytes())

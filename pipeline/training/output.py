"""What a run leaves in its output, and when the next one may go on with it."""

import json
from typing import Any

from pipeline import storage
from pipeline.config import TrainConfig, flags
from pipeline.errors import ConfigError
from pipeline.training.plan import Plan, unchanging_flags

MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"


def check_output(config: TrainConfig) -> None:
    """Refuse a folder with something else than a run of the same flags, or, with `--overwrite`, than any run.

    Raises:
        ConfigError: foreign files, or another run; the difference is shown.
    """
    if config.overwrite:
        check_clearable(config.output)
        return
    before = read_json(record(config, "config.json"))
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
    before = None if config.overwrite else read_json(record(config, "config.json"))
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


def check_clearable(output: str) -> None:
    """Whether `--overwrite` may delete what is in the output. Raises: ConfigError where it isn't ours."""
    before = read_json(storage.join(output, "_run", "config.json"))
    if before is None and storage.list_names(output) - {"_run"}:
        raise ConfigError(f"--overwrite: {output} holds files that no run wrote; delete them by hand")
    if before is not None and "train" not in before.get("flags", {}):
        raise ConfigError(f"--overwrite: {output} holds another job's output; delete it by hand")


def clear(output: str) -> None:
    """Delete what a training run has left. Raises: ConfigError where the files aren't ours."""
    check_clearable(output)
    run = storage.join(output, "_run")
    # What says that it is done goes first; its flags, which say whose files these are, are replaced later.
    kept = {name for name in storage.list_names(run) if name == "config.json" or name.startswith("lock-")}
    names = ["result.json", *sorted(storage.list_names(run) - kept - {"result.json"})]
    storage.delete([storage.join(run, name) for name in names] + [storage.join(output, MODEL)])
    for folder in (CHECKPOINTS, "tensorboard"):
        storage.delete_folder(storage.join(output, folder))


def record(config: TrainConfig, name: str) -> str:
    """Where a run keeps what it knows of itself."""
    return storage.join(config.output, "_run", name)


def read_json(uri: str) -> dict[str, Any] | None:
    """A record; None where there is none. Raises: ConfigError: it is damaged."""
    if not storage.exists(uri):
        return None
    try:
        return json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise ConfigError(f"{uri} is damaged; take another --output, or delete this one by hand") from error

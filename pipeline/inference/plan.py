"""What a run has to do: the shards of the input minus what the output already holds.

Everything that can be refused is refused here, before a detector is loaded.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.config import InferConfig
from pipeline.data.shards import Shard
from pipeline.errors import ConfigError, DamagedError
from pipeline.inference.blocks import ReadSettings, Work
from pipeline.inference.compaction import forget
from pipeline.inference.ledger import Ledger, read_ledger, sweep, without_repeats
from pipeline.inference.lock import LockRef
from pipeline.model import checkpoint
from pipeline.model.spec import ModelSpec
from pipeline.results.parts import Part

# A Ray task reads some shards, one after the other, and opens the next one meanwhile; nobody opens the first
# one of a task ahead. So tasks are large, and smaller towards the end, where a core would work alone: each
# takes its share of what is left. A task for each of 20,000 shards took 33 s to plan, some thousand tasks
# for 100,000 shards 6 s.
TASK_BYTES = 512_000_000
SHARES_PER_CORE = 4
MAX_TASKS = 2_000
MIN_IMAGES_PER_TASK = 128  # loose image files, a shard each
GUESSED_SHARD_IMAGES = 64  # for --limit

# A block's images lie in chunks, each of as many whole batches as fit, or one: beyond 32 MB glibc takes
# memory from the system anew, which zeroes every page of it (128 images: a third of the readers' time).
CHUNK_BYTES = 30_000_000
BATCH_SIZE = 32  # images; on GPUs a whole chunk

DEFAULT_THRESHOLD = 0.05  # of classes that a file of thresholds doesn't name

SHARDS = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("kind", pa.dictionary(pa.int8(), pa.string())),
        pa.field("num_bytes", pa.int64()),
        pa.field("etag", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Work for one run on one output."""

    output: str
    shards: list[Shard]
    ledger: Ledger
    known: list[Part]
    """The parts that counted when the run began."""
    work: list[Work]
    num_finished_shards: int
    """Those in which nothing is left to do; `--limit` leaves out others."""
    round: int
    """0, or higher where this run's rows replace older ones of the same image."""
    settings: ReadSettings
    fingerprint: str

    @property
    def num_finished_images(self) -> int:
        """Images that already have their row."""
        return len(self.ledger.keys)


def portable_weights(source: str) -> bytes:
    """The weights as bytes that a detector on any node can load.

    Raises:
        CheckpointError: no such weights.
    """
    if not source.startswith("torchvision:"):
        return checkpoint.read_weights(source)
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        checkpoint.save_checkpoint(checkpoint.load_checkpoint(source), file.name)
        return Path(file.name).read_bytes()


def read_settings(config: InferConfig, spec: ModelSpec) -> ReadSettings:
    """How readers prepare images for the model; what a block holds also depends on the detectors."""
    images_per_chunk = _images_per_chunk(config, spec)
    return ReadSettings(
        height=spec.input_height,
        width=spec.input_width,
        resize_rule=spec.resize_rule,
        images_per_block=images_per_chunk,
        images_per_chunk=images_per_chunk,
        max_pixels=config.max_pixels,
        max_image_bytes=config.max_image_bytes,
        max_decode_s=config.max_decode_s,
        reduced_decode=config.reduced_decode,
        image_column=config.image_column or None,
        id_column=config.id_column or None,
    )


def _images_per_chunk(config: InferConfig, spec: ModelSpec) -> int:
    fitting = CHUNK_BYTES // (spec.input_height * spec.input_width * 3)
    batch_size = config.batch_size or BATCH_SIZE
    return max(1, fitting // batch_size) * batch_size


def score_thresholds(config: InferConfig, spec: ModelSpec) -> dict[str, float]:
    """The score threshold of each class by name, from a number or from a JSON file.

    Raises:
        ConfigError: no such file, or one that doesn't fit the model's classes.
    """
    given = config.score_threshold
    if not isinstance(given, str):
        return dict.fromkeys(spec.class_names, float(given))
    try:
        by_name = {str(name): float(value) for name, value in json.loads(storage.read_bytes(given)).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--score-threshold {given}: not a JSON object of class names and scores"
        ) from error
    if unknown := sorted(by_name.keys() - set(spec.class_names)):
        raise ConfigError(f"--score-threshold {given}: the model has no class {unknown[0]!r}")
    if wrong := [name for name, value in by_name.items() if not 0 <= value <= 1]:
        raise ConfigError(f"--score-threshold {given}: {wrong[0]} {by_name[wrong[0]]} is not between 0 and 1")
    return {**dict.fromkeys(spec.class_names, DEFAULT_THRESHOLD), **by_name}


def thresholds_by_label(config: InferConfig, spec: ModelSpec) -> dict[int, float]:
    """`score_thresholds` by the classes' data-set ids."""
    by_name = score_thresholds(config, spec)
    return {label: by_name[name] for label, name in zip(spec.label_ids, spec.class_names, strict=True)}


def run_fingerprint(config: InferConfig, spec: ModelSpec, weights_sha256: str) -> dict[str, object]:
    """Everything that changes a row of the output, by name. Batch size, pool and device don't."""
    model = json.loads(spec.to_json())
    thresholds = score_thresholds(config, spec)
    values = set(thresholds.values())
    model.pop("score_threshold", None)  # the run's own threshold counts
    return {
        "schema_version": schema.VERSION,
        "weights_sha256": weights_sha256,
        "model": model,
        "score_threshold": values.pop() if len(values) == 1 else thresholds,
        "max_pixels": config.max_pixels,
        "max_image_bytes": config.max_image_bytes,
        "reduced_decode": config.reduced_decode,
        "image_column": config.image_column,
        "id_column": config.id_column,
    }


def digest(fingerprint: dict[str, object]) -> str:
    """The fingerprint as 16 hexadecimal digits, for the files' metadata."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def check_output(config: InferConfig, fingerprint: dict[str, object]) -> None:
    """Refuse an output that holds something else than an earlier run with the same fingerprint.

    Raises:
        ConfigError: foreign files, or another model, threshold or setting (the difference is shown).
    """
    record = storage.join(config.output, "_run", "config.json")
    if not storage.exists(record):
        if foreign := foreign_files(config.output):
            raise ConfigError(
                f"--output {config.output} holds other files (such as {min(foreign)!r}); take an empty folder"
            )
        return
    before = _recorded_fingerprint(config.output)
    if before is None:
        raise ConfigError(f"{record} is damaged: give another --output, or --overwrite")
    if before != json.loads(json.dumps(fingerprint)):
        raise ConfigError(
            f"--output {config.output} was made with other settings: "
            f"{'; '.join(_differences(before, fingerprint))}. "
            "Give the same settings, another --output, or --overwrite"
        )


def check_clearable(output: str) -> None:
    """Whether `--overwrite` may delete what is in the output.

    Raises:
        ConfigError: files that no run wrote, or another job's.
    """
    if storage.exists(storage.join(output, "_run", "config.json")):
        _recorded_fingerprint(output)
    elif foreign_files(output):
        raise ConfigError(f"--overwrite: {output} holds files that no run wrote; delete them by hand")


def _recorded_fingerprint(output: str) -> dict[str, object] | None:
    """That of the run that wrote the output; None where its record is damaged.

    Raises:
        ConfigError: another job's output.
    """
    try:
        record = json.loads(storage.read_bytes(storage.join(output, "_run", "config.json")))
    except ValueError:
        return None
    if not isinstance(record, dict) or "fingerprint" not in record:
        raise ConfigError(f"--output {output} is another job's output (of training?); take another folder")
    return record["fingerprint"]


def foreign_files(output: str) -> set[str]:
    """Names in a folder without a run's record that are not what a run leaves before its first part."""
    names = storage.list_names(output) - {"_run"}
    tables = ("images", "detections")
    return {n for n in names if n not in tables or storage.list_names(storage.join(output, n))}


def _differences(before: dict[str, object], now: dict[str, object], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), json.loads(json.dumps(now.get(key)))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} was {_short(old)}, now {_short(new)}")
    return lines


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def make_plan(
    config: InferConfig, settings: ReadSettings, fingerprint: str, shards: list[Shard], *, lock: LockRef
) -> Plan:
    """Sweep the output and subtract what it holds from `shards`. The lock must be held.

    Rows of shards that changed are dropped first: they are of images that no longer exist.

    Raises:
        ConfigError: shards changed since they were run.
    """
    known = sweep(config.output)
    ledger = read_ledger(config.output, known)
    if ledger.num_rows > len(ledger.keys):
        known = without_repeats(config.output, known)
        ledger = read_ledger(config.output, known)
    if changed := changed_shards(config, shards, ledger):
        known = forget(config.output, known, changed, lock=lock)
        ledger = read_ledger(config.output, known)
    left = plan_work(config, shards, ledger)
    return Plan(
        output=config.output,
        shards=shards,
        ledger=ledger,
        known=known,
        work=limited(left, config.limit),
        num_finished_shards=len(shards) - len(left),
        round=max(part.round for part in known) + 1 if config.retry_failed and known else 0,
        settings=settings,
        fingerprint=fingerprint,
    )


def plan_work(
    config: InferConfig, shards: Sequence[Shard], ledger: Ledger, redone: Collection[str] = ()
) -> list[Work]:
    """The anti-join: what of `shards` is not in `ledger`; of the `redone` everything."""
    return [
        work
        for shard in shards
        if (
            work := Work(shard)
            if shard.name in redone
            else _remaining(shard, ledger, retry_failed=config.retry_failed)
        )
    ]


def _remaining(shard: Shard, ledger: Ledger, *, retry_failed: bool) -> Work | None:
    """What is left to do of `shard`; None where nothing is."""
    if shard.name not in ledger.codes:
        return Work(shard)
    done = ledger.done(shard.name, count_failed=not retry_failed)
    images = frozenset(done[done >= 0].tolist())
    if ledger.is_finished(shard.name) and len(done) == len(ledger.done(shard.name)):
        return None
    if 0 < len(images) == ledger.sizes[ledger.codes[shard.name]]:  # beside its failure as a whole
        return None
    return Work(shard, images)


def changed_shards(config: InferConfig, shards: Iterable[Shard], ledger: Ledger) -> set[str]:
    """Names of the shards with rows in the output whose size or etag is another one now.

    Raises:
        ConfigError: there are some, without `--redo-changed`.
    """
    before = recorded_shards(config.output)
    changed = {
        shard.name
        for shard in shards
        if shard.name in ledger.codes
        and before.get(shard.name, (shard.num_bytes, shard.etag)) != (shard.num_bytes, shard.etag)
    }
    if changed and not config.redo_changed:
        raise ConfigError(
            f"{len(changed)} shards changed since they were run, such as {min(changed)}: "
            f"--redo-changed{' beside --retry-failed' if config.retry_failed else ''} runs them again, "
            "--overwrite starts anew"
        )
    return changed


def recorded_shards(output: str) -> dict[str, tuple[int, str]]:
    """Size and etag of the shards by name when they were run; empty before the first run.

    Raises:
        DamagedError: the record can't be parsed.
    """
    rows = _shard_record(output).select(["name", "num_bytes", "etag"]).to_pylist()
    return {row["name"]: (row["num_bytes"], row["etag"]) for row in rows}


def _shard_record(output: str) -> pa.Table:
    record = storage.join(output, "_run", "shards.parquet")
    if not storage.exists(record):
        return SHARDS.empty_table()
    try:
        # Arrow's threads (26.0) may still hold a Python file when the interpreter ends, which aborts it.
        return pq.ParquetFile(io.BytesIO(storage.read_bytes(record))).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(
            f"{record} is damaged ({error}). Delete this file, if no shard has changed since it was run"
        ) from error


def limited(work: list[Work], limit: int) -> list[Work]:
    """The first shards, enough for about `limit` images; nobody knows yet how many a packed one has."""
    if not limit:
        return work
    kept, images = [], 0
    for item in work:
        if images >= limit:
            break
        kept.append(item)
        images += 1 if item.shard.kind == "image" else GUESSED_SHARD_IMAGES
    return kept


def save_shards(plan: Plan) -> None:
    """Record the input's shards with size and etag in `_run/shards.parquet`.

    Shards with rows in the output that the input lacks now keep their record: they may come back changed.
    """
    columns = {name: [getattr(shard, name) for shard in plan.shards] for name in SHARDS.names}
    away = plan.ledger.codes.keys() - set(columns["name"])
    before = _shard_record(plan.output) if away else SHARDS.empty_table()
    kept = before.filter(pa.array([name in away for name in before["name"].to_pylist()], pa.bool_()))
    buffer = io.BytesIO()
    pq.write_table(
        pa.concat_tables([pa.table(columns, schema=SHARDS), kept.cast(SHARDS)]), buffer, compression="zstd"
    )
    storage.write_atomic(storage.join(plan.output, "_run", "shards.parquet"), buffer.getvalue())


def group_tasks(work: Sequence[Work], *, num_cores: int) -> list[list[Work]]:
    """Split the work into Ray tasks, the last ones small: `MAX_TASKS` of shards and of images at most."""
    loose = [item for item in work if item.shard.kind == "image"]
    packed = [item for item in work if item.shard.kind != "image"]
    size = max(MIN_IMAGES_PER_TASK, -(-len(loose) // MAX_TASKS))
    return [
        *_shares(packed, SHARES_PER_CORE * max(num_cores, 1)),
        *(loose[start : start + size] for start in range(0, len(loose), size)),
    ]


def _shares(items: Sequence[Work], num_shares: int) -> Iterator[list[Work]]:
    """`items` in order, in each task so many of those left, by count and by bytes, within the limits."""
    least = -(-len(items) // MAX_TASKS)
    left_bytes = sum(item.shard.num_bytes for item in items)
    start = 0
    while start < len(items):
        most = max(least, (len(items) - start) // num_shares)
        room = min(TASK_BYTES, left_bytes / num_shares)
        end, held = start, 0
        # Half: shards of nearly one size stay even.
        while end < len(items) and (
            end - start < least or (end - start < most and held + items[end].shard.num_bytes / 2 <= room)
        ):
            held += items[end].shard.num_bytes
            end += 1
        yield list(items[start:end])
        start, left_bytes = end, left_bytes - held

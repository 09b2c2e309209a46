"""The flags of every job: one frozen dataclass per job, checked where it is made.

`run_job` turns a dataclass into a command line: field docstrings are the help texts, and a `ConfigError`
is one line with exit code 2.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from pipeline.errors import ConfigError, PipelineError

Config = TypeVar("Config")

REFUSED = 2  # exit code: bad flags, or a request that is refused


def run_job(main: Callable[[Config], int], config: type[Config], description: str | None) -> int:
    """Parse the command line into `config` and run `main` with it.

    Returns:
        The exit code: what `main` returns, or 2 where flags or input are refused (one line, no traceback).
    """
    import tyro  # only jobs need it

    try:
        return main(tyro.cli(config, description=description))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def flags(config: object) -> dict[str, object]:
    """The values of a config by name, for records."""
    return {field.name: getattr(config, field.name) for field in fields(config)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Flags of `jobs/infer.py`."""

    input: str = ""
    """Where the images are: a folder of .tar or .parquet shards or of image files, one such file, or a .txt/.parquet list of URIs. Local path or any fsspec URL (s3://, gs://, ...). Without it the built-in demo runs."""  # noqa: E501
    output: str = ""
    """Folder for the two tables: detections/ and images/. An unfinished run in it is resumed."""
    weights: str = "coco_ssdlite300_mobilenet_v2"
    """A bundled name, torchvision:<name>, or path or URI of a checkpoint or of a public release's file."""
    score_threshold: float = 0.05
    """Detections below this score are not written."""
    batch_size: int = 32
    """Images per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where detectors run; auto asks the cluster, not this machine, for GPUs."""
    min_detectors: int = 0
    """Smallest number of detector actors; 0 chooses by the cluster."""
    max_detectors: int = 0
    """Largest number of detector actors; 0 chooses by the cluster."""
    limit: int = 0
    """Stop after about this many images (whole shards are kept); 0 means all."""
    image_column: str = ""
    """Parquet shards: the column with the image bytes; found by name where empty."""
    id_column: str = ""
    """Parquet shards: a column with unique ids; else row numbers are used."""
    max_pixels: int = 100_000_000
    """Images with more pixels are refused from their header, before they are decoded."""
    max_image_bytes: int = 256 * 1024 * 1024
    """Image files larger than this are refused."""
    reduced_decode: bool = True
    """Decode JPEGs much larger than the detector's input at a reduced scale (never below twice the input)."""
    max_failed_fraction: float = 0.10
    """Error budget: a larger share of failed images ends the run with exit code 3."""
    retry_failed: bool = False
    """Run only the images that failed before; their rows are replaced."""
    redo_changed: bool = False
    """Run shards again whose size or etag changed since they were finished (refused otherwise)."""
    overwrite: bool = False
    """Delete what is in the output folder and start anew."""
    dry_run: bool = False
    """Check input, weights and output, print the plan and an estimate, and stop."""

    def __post_init__(self) -> None:
        if bool(self.input) != bool(self.output):
            raise ConfigError("give both --input and --output (or neither, for the built-in demo)")
        _check(0 <= self.score_threshold < 1, "--score-threshold", self.score_threshold, "0 <= value < 1")
        _check(1 <= self.batch_size <= 4096, "--batch-size", self.batch_size, "1 to 4096")
        _check(
            0 <= self.max_failed_fraction <= 1, "--max-failed-fraction", self.max_failed_fraction, "0 to 1"
        )
        for name in ("min_detectors", "max_detectors", "limit"):
            _check(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "0 or more")
        if self.max_detectors and self.min_detectors > self.max_detectors:
            raise ConfigError(
                f"--min-detectors {self.min_detectors} is more than --max-detectors {self.max_detectors}"
            )
        if self.overwrite and self.retry_failed:
            raise ConfigError("--overwrite deletes what --retry-failed would retry: give one of them")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Flags of `jobs/verify.py`."""

    input: str
    """The input that was given to jobs/infer.py."""
    output: str
    """The output folder to prove."""


def _check(holds: bool, flag: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{flag} {value} is out of range: {wanted}")

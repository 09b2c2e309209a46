"""The flags of every job: one frozen dataclass per job, checked where it is made.

`run_job` turns a dataclass into a command line: field docstrings are the help texts, and a `PipelineError`
is one line with exit code 2.
"""

import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from pipeline.errors import ConfigError, PipelineError

Config = TypeVar("Config")

REFUSED = 2  # exit code: bad flags, a request that is refused, a run that can't go on
# Of an image, for all jobs: 300 MB of RGB and more than the sensors of most cameras and telephones.
MAX_PIXELS = 100_000_000


def run_job(
    main: Callable[[Config], int], config: type[Config], description: str | None, *, resumes: bool = False
) -> int:
    """Parse the command line into `config` and run `main` with it.

    `resumes` says that the same command goes on where an earlier one stopped (without `--overwrite`).

    Returns:
        The exit code: what `main` returns, 2 where flags or input are refused or the run can't go on (one
        line, no traceback), 130 or 143 where Ctrl-C or SIGTERM stopped it.
    """
    stopped_by = signal.SIGINT
    given: Config | None = None

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped_by
        stopped_by = signal.Signals(number)
        raise KeyboardInterrupt  # Ray makes exit code 1 of a SystemExit; parts are atomic: just stop

    signal.signal(signal.SIGTERM, stop)
    try:
        given = _parsed(config, description)
        return main(given)
    except KeyboardInterrupt:
        print(f"stopped{_going_on(given)}" if resumes else "stopped", file=sys.stderr)
        return 128 + stopped_by
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def _parsed(config: type[Config], description: str | None) -> Config:
    """The command line as `config`.

    Raises:
        ConfigError: a flag or a value is wrong: what tyro prints in a frame, as one line.
        SystemExit: after --help.
    """
    import tyro  # only jobs need it

    frame = io.StringIO()
    try:
        with contextlib.redirect_stderr(frame):
            return tyro.cli(config, description=description)
    except SystemExit as end:
        if end.code != REFUSED:
            raise
        raise ConfigError(f"{_in_one_line(frame.getvalue())} (--help explains all flags)") from None


def _in_one_line(frame: str) -> str:
    """Tyro's sentences and the flags that it lists, without the help texts between them."""
    said = ""
    for line in re.sub(r"\x1b\[[\d;]*m", "", frame).splitlines()[1:-1]:
        text = line[1:-1].rstrip()
        indent = len(text) - len(text.lstrip())
        if text.lstrip().startswith(("Argument helptext", "For full helptext")):
            break
        if set(text) <= set(" ─-"):  # a rule between paragraphs
            said += ";"
        elif indent == 1:
            said += text
        elif indent == 5:  # a flag; its help text is indented by 9
            said += f" {text.split()[0].rstrip(',')}"
    return said.strip(" ;")


def _going_on(config: object) -> str:
    """How a stopped job goes on."""
    if getattr(config, "overwrite", False):
        return "; if it had begun to write, the same command without --overwrite goes on from here"
    return "; the same command goes on from here"


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
    score_threshold: float | str = 0.05
    """Detections below this score are not written. A number, or a JSON file {"class name": score, ...} as
    jobs/evaluate.py writes it; classes that it doesn't name keep 0.05."""
    batch_size: int = 0
    """Images per forward pass. 0: 32 on CPUs; on GPUs as many as fit into 30 MB, 96 of 300x300."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where detectors run; auto asks the cluster, not this machine, for GPUs."""
    min_detectors: int = 0
    """Smallest number of detector actors; 0 chooses by the cluster."""
    max_detectors: int = 0
    """Largest number of detector actors; 0 chooses by the cluster."""
    limit: int = 0
    """Run only the first unfinished shards, whole ones. A packed one (.tar, .parquet) counts as 64 images, as
    nobody knows yet how many it has: --limit 1000 runs 16 of them, be it 16,000 images. 0: all."""
    image_column: str = ""
    """Parquet shards: the column with the image bytes; found by name where empty."""
    id_column: str = ""
    """Parquet shards: a column with unique ids; else row numbers are used."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are refused from their header, before they are decoded."""
    max_image_bytes: int = 256 * 1024 * 1024
    """Image files larger than this are refused."""
    max_decode_s: float = 60
    """An image whose decoding takes longer fails; its reader is run again."""
    reduced_decode: bool = True
    """Decode JPEGs much larger than the detector's input at a reduced scale (never below twice the input)."""
    max_failed_fraction: float = 0.10
    """Error budget: a larger share of failed images, or of shards that can't be read, ends the run with exit
    code 3."""
    retry_failed: bool = False
    """Run only the images that failed before; their rows are replaced. After repairs in a shard give
    --redo-changed, too."""
    redo_changed: bool = False
    """Run shards again whose size or etag changed since they were finished (refused otherwise). Their old
    rows are dropped first, also of those that --limit leaves for later."""
    overwrite: bool = False
    """Delete what is in the output folder and start anew."""
    dry_run: bool = False
    """Check input, weights and output, print the plan and an estimate, and stop."""

    def __post_init__(self) -> None:
        if bool(self.input) != bool(self.output):
            raise ConfigError("give both --input and --output (or neither, for the built-in demo)")
        if not isinstance(self.score_threshold, str):
            _check(0 <= self.score_threshold < 1, "--score-threshold", self.score_threshold, "0 <= value < 1")
        elif not self.score_threshold.endswith(".json"):
            raise ConfigError(f"--score-threshold {self.score_threshold}: give a number or a .json file")
        _check(0 <= self.batch_size <= 4096, "--batch-size", self.batch_size, "0 to 4096")
        _check(
            0 <= self.max_failed_fraction <= 1, "--max-failed-fraction", self.max_failed_fraction, "0 to 1"
        )
        for name in ("min_detectors", "max_detectors", "limit"):
            _check(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "0 or more")
        for name in ("max_pixels", "max_image_bytes"):
            _check(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "1 or more")
        for name in ("input", "output"):
            if getattr(self, name).startswith("memory://"):
                raise ConfigError(
                    f"--{name}: memory:// is another memory in each process; use a shared store"
                )
        _check(0 < self.max_decode_s <= 86_400, "--max-decode-s", self.max_decode_s, "over 0, up to 86400")
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


@dataclass(frozen=True, kw_only=True)
class MakeShardsConfig:
    """Flags of `jobs/make_shards.py`."""

    format: Literal["coco", "voc", "folder"]
    """coco: an instances JSON file; voc: a PASCAL VOC folder, an XML file an image; folder: images alone."""
    images: str
    """Folder of images, searched at any depth; for voc also the one with JPEGImages/ in it."""
    output: str
    """Folder for shard-00000.tar, ... and, with annotations, classes.json. Local path or any fsspec URL."""
    annotations: str = ""
    """coco: the JSON file. voc: the folder of XML files; Annotations/ beside the images where not given."""
    split: str = ""
    """voc: only the images listed in ImageSets/Main/<split>.txt; all with an XML file where not given."""
    classes: tuple[str, ...] = ()
    """voc: class names in the order of their ids; those in all XML files, sorted, where not given."""
    images_per_shard: int = 1000
    """Images in a shard; one of large images ends at 256 MB."""
    skip_bad_boxes: bool = False
    """Leave out and count boxes without area, outside their image or of an unknown class; else refused."""
    overwrite: bool = False
    """Replace an older shard set in the output folder."""

    def __post_init__(self) -> None:
        _check(self.images_per_shard >= 1, "--images-per-shard", self.images_per_shard, "1 or more")
        if self.format == "coco" and not self.annotations:
            raise ConfigError("--format coco needs --annotations, the JSON file")
        if self.format == "folder" and self.annotations:
            raise ConfigError("--format folder takes no --annotations: give --format coco or voc")
        if self.format != "voc" and (self.split or self.classes):
            raise ConfigError("--split and --classes are for --format voc")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags of `jobs/train.py`."""

    train: str
    """Folder of annotated shards to learn from, made by jobs/make_shards.py. Local path or any fsspec URL."""
    val: str
    """Annotated shards of the same classes to choose the best weights by; never learnt from."""
    output: str
    """Folder for model.safetensors, checkpoints and metrics. An unfinished run in it is resumed."""
    architecture: str = "ssdlite300_mobilenet_v2"
    """The network; a wrong name lists them all."""
    init: str = "auto"
    """Weights to begin with: what jobs/infer.py --weights takes, a file of VGG16 layers (torchvision's with
    its classifier, or vgg16_reducedfc), or none for random ones. auto: the bundled weights, for the network
    that has them."""
    priors: Literal["auto", "coco", "voc", "fitted"] = "auto"
    """Default boxes. coco (smaller ones) and voc: where --init doesn't bring its own; SSDLite: coco alone.
    fitted: these or its own, moved to the sizes of the objects in --train. auto: fitted for MobileNetV2 with
    trained weights, else coco."""
    epochs: int = 0
    """Times that every image is seen, unless --max-minutes ends the run before. 0: 48, or 12 with less than
    15 minutes, and more of a set so small that it would be under 300 steps."""
    max_minutes: float = 0.0
    """Budget of the whole job, from its start to the last validation; the learning rate falls to its end
    within the budget. 0: no limit. Minutes of earlier, interrupted jobs of the run count."""
    batch_size: int = 8
    """Images in a step, of all workers together."""
    accumulate: int = 1
    """Forward and backward passes per step: more of them need less memory. The result is the same, but for
    networks with batch norm (ssdlite320_mobilenet_v3_large, ssd300_resnet50): it sees a pass at a time."""
    workers: int = 1
    """Training processes; each takes its share of the batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers train; auto asks the cluster, not this machine, for GPUs."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward passes; auto: bfloat16 on GPUs. Loss and L2Norm are always float32."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: momentum 0.9, biases at twice the rate and without decay, as in the paper's code."""
    lr: float = 5e-4
    """The highest learning rate."""
    weight_decay: float = 5e-4
    """Of the weights of convolutions; biases and norms have none."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """How the learning rate falls: to 0 along a cosine, or to a tenth at each of --milestones."""
    milestones: tuple[float, ...] = (0.667, 0.833)
    """multistep: shares of the run."""
    warmup: float = 0.1
    """Share of the run in which the learning rate rises from 0."""
    ema: float = 0.9998
    """Decay of the averaged weights, which are what is validated and kept; 0: no averaging."""
    clip: float = 10.0
    """Longest gradient; 0: no limit."""
    freeze: int = -1
    """Stages of the backbone, from the image on, that stay as they are: VGG16 has 15, MobileNetV2 19,
    MobileNetV3 18, ResNet-50 4. -1: 5 of MobileNetV2 with trained weights, else none."""
    augmentation: Literal["auto", "ssd", "crops", "light", "none"] = "auto"
    """ssd: distort, expand, crop and flip as in the paper; crops: large crops, distort and flip; light:
    distort and flip; none: resize only. auto: ssd, but for MobileNetV2 with trained weights light in runs
    of up to 18 epochs and crops in longer ones, which would learn a small set by heart."""
    flip: Literal["horizontal", "both", "none"] = "horizontal"
    """How every second image is mirrored. both: top and bottom, too, for pictures without an up (through a
    microscope, from the air); none: for those that mean something else in a mirror (text, signs)."""
    difficult: bool = True
    """Learn objects marked as difficult (VOC), as the paper does."""
    empty_images: bool = True
    """Learn from images without objects. Softmax models take nothing from them without --hard-negatives."""
    balance: Literal["auto", "matches", "objects"] = "auto"
    """What weighs the same in the loss: each match of a default box (the paper), so that objects with many
    weigh more, or each object. auto: objects for MobileNetV2 with trained weights, else matches."""
    hard_negatives: int = 0
    """Softmax models: default boxes of an image without objects that learn to say background. Plain 3:1
    mining takes none; 3 is a good value for a set with many such images."""
    validations: int = 10
    """Validations in the run, evenly spread, the last one at its end."""
    checkpoint_steps: int = 0
    """Checkpoints every so many steps, besides those at validations and at epoch ends a minute apart."""
    log_s: float = 10.0
    """Seconds between progress lines."""
    seed: int = 0
    """Of the order, the augmentation and new layers."""
    overwrite: bool = False
    """Delete what an earlier run has left in the output folder and start anew."""
    dry_run: bool = False
    """Check everything, print the plan, and stop."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "workers", "validations"):
            _check(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "1 or more")
        for name in (
            "epochs",
            "max_minutes",
            "weight_decay",
            "clip",
            "checkpoint_steps",
            "hard_negatives",
            "seed",
        ):
            _check(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "0 or more")
        _check(self.lr > 0, "--lr", self.lr, "above 0")
        _check(self.log_s > 0, "--log-s", self.log_s, "above 0")
        _check(0 <= self.warmup < 1, "--warmup", self.warmup, "0 <= value < 1")
        _check(0 <= self.ema < 1, "--ema", self.ema, "0 <= value < 1")
        _check(self.freeze >= -1, "--freeze", self.freeze, "-1 or more")
        _check(all(0 < m < 1 for m in self.milestones), "--milestones", self.milestones, "between 0 and 1")
        if self.batch_size % self.workers:
            raise ConfigError(
                f"--batch-size {self.batch_size} can't be divided among --workers {self.workers}"
            )
        if self.train.rstrip("/") == self.val.rstrip("/"):
            raise ConfigError("--train and --val are the same: keep images apart that are never learnt from")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Flags of `jobs/evaluate.py`."""

    detections: str
    """Output folder of jobs/infer.py, or a COCO results file (.json, .json.gz)."""
    annotations: str
    """A COCO instances .json, a VOC folder (with JPEGImages/ and Annotations/) or annotated shards."""
    metric: Literal["coco", "voc", "voc07"] = "coco"
    """coco: the 12 numbers; voc: area under the curve at IoU 0.5; voc07: 11 points, as in VOC2007."""
    split: str = ""
    """VOC: measure only the images of ImageSets/Main/<split>.txt."""
    score_threshold: float = 0.5
    """The threshold in use, for precision, recall, confusion and comparison; AP takes all scores."""
    output: str = ""
    """Write all numbers to this JSON file."""
    plots: str = ""
    """Write pictures (precision-recall, calibration, confusion) to this folder."""
    thresholds: str = ""
    """Write the score threshold of the highest F1 of each class to this JSON file."""
    baseline: str = ""
    """Compare with these detections: another output folder or COCO results file."""
    resamples: int = 200
    """Resamples of the images for 95 % confidence intervals; 0 leaves them out."""
    seed: int = 0
    """Of the resamples."""
    partial: bool = False
    """Measure only the annotated images that are in the run; refused otherwise where some are not."""
    distributed: bool = False
    """Measure groups of classes side by side on the Ray cluster, for sets too large for one machine."""

    def __post_init__(self) -> None:
        _check(0 <= self.score_threshold <= 1, "--score-threshold", self.score_threshold, "0 to 1")
        _check(0 <= self.resamples <= 100_000, "--resamples", self.resamples, "0 to 100,000")
        for flag in ("output", "thresholds"):
            if getattr(self, flag) and not getattr(self, flag).endswith(".json"):
                raise ConfigError(f"--{flag} {getattr(self, flag)} must end in .json")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Flags of `jobs/report.py`."""

    output: str
    """Output folder of jobs/infer.py."""
    html: str
    """File to write: one page with everything in it."""
    input: str = ""
    """The input of the run, where it has moved since; its photographs are read again."""
    baseline: str = ""
    """Output folder of another run on the same images: the page shows what changed against it."""
    min_score: float = 0.3
    """Boxes below this score are not in the gallery; the counts take all."""
    max_images: int = 60
    """Photographs in the gallery."""

    def __post_init__(self) -> None:
        _check(0 <= self.min_score <= 1, "--min-score", self.min_score, "0 to 1")
        _check(0 <= self.max_images <= 1000, "--max-images", self.max_images, "0 to 1,000")


def _check(holds: bool, flag: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{flag} {value} is out of range: {wanted}")

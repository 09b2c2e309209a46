"""The end of a run: `_run/report.json`, the summary for people, and what limited the speed."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pipeline import storage
from pipeline.config import InferConfig
from pipeline.inference.plan import Plan
from pipeline.results import iter_detections, summarise
from pipeline.results.parts import Part
from pipeline.runlog import Progress, duration

CONFIDENT = 0.5  # score from which the summary counts a detection as meant
CLASSES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did and what the output holds now."""

    input: str
    output: str
    num_shards: int
    num_images: int
    """In the output, of all runs."""
    num_failed: int
    num_failed_shards: int
    """Shards that could not be read: of each, `num_failed` counts one row."""
    num_detections: int
    num_images_this_run: int
    num_failed_this_run: int
    seconds: float
    """From the start of the pipeline to the last part."""
    images_per_second: float
    steady_images_per_second: float
    """Of the last three quarters of this run's images, so without its start."""
    num_detectors: int
    """That took part."""
    steady_images_per_second_per_detector: float
    read_s: float
    """Seconds summed over all tasks: waiting for the store, decoding and resizing, detecting, publishing."""
    decode_s: float
    detect_s: float
    write_s: float
    wait_s: float
    """Seconds, summed over the detectors, in which they had nothing to do after the first part."""
    detectors_busy: float
    """Share of the detectors' time."""
    num_retries: int
    """Storage calls that were repeated."""
    num_empty_boxes: int
    """Boxes without area (outside the image) that were dropped."""
    errors: dict[str, int]
    """Failed images of this run by "stage: type"."""
    classes: dict[str, int]
    """Detections in the output by class name, most frequent first."""
    confident_classes: dict[str, int]
    """The same, of the detections with a score of at least 0.5."""
    limited_by: str
    num_parts: int
    over_budget: bool
    stopped_early: bool


def finish_report(
    config: InferConfig,
    plan: Plan,
    parts: Sequence[Part],
    progress: Progress,
    num_detectors: int,
    *,
    num_at_once: int,
    num_retries: int,
    stopped: bool,
) -> Report:
    """Count the output, write `_run/report.json` and return it.

    `num_at_once` blocks at most were being published; `num_retries` are the driver's own.
    """
    summary = summarise(config.output)
    confident = Counter[str]()
    for frame in iter_detections(config.output, min_score=CONFIDENT, columns=["class_name"]):
        confident.update(frame.class_name.tolist())
    counts, seconds = progress.counts, progress.seconds
    busy = counts.detect_s / max(progress.steady_seconds * num_detectors, 1e-9)
    publishing = counts.write_s / max(progress.steady_seconds * num_at_once, 1e-9)
    allowed = config.max_failed_fraction
    too_many = summary.num_failed > allowed * summary.num_images
    too_many_shards = summary.num_failed_shards > allowed * len(plan.shards)
    report = Report(
        input=config.input,
        output=config.output,
        num_shards=len(plan.shards),
        num_images=summary.num_images,
        num_failed=summary.num_failed,
        num_failed_shards=summary.num_failed_shards,
        num_detections=summary.num_detections,
        num_images_this_run=counts.images,
        num_failed_this_run=counts.failed,
        seconds=round(seconds, 2),
        images_per_second=round(counts.images / max(seconds, 1e-9), 2) if counts.images else 0.0,
        steady_images_per_second=round(progress.steady_rate, 2),
        num_detectors=num_detectors,
        steady_images_per_second_per_detector=round(progress.steady_rate / max(num_detectors, 1), 2),
        read_s=round(counts.read_s, 2),
        decode_s=round(counts.decode_s, 2),
        detect_s=round(counts.detect_s, 2),
        write_s=round(counts.write_s, 2),
        wait_s=round(max(progress.steady_seconds * num_detectors - counts.detect_s, 0.0), 2),
        detectors_busy=round(min(busy, 1.0), 3),
        num_retries=int(counts.num_retries) + num_retries,
        num_empty_boxes=int(counts.num_empty_boxes),
        errors=dict(counts.errors),
        classes=dict(zip(summary.classes.class_name, map(int, summary.classes.num_detections), strict=True)),
        confident_classes=dict(confident.most_common()),
        limited_by=limited_by(progress, busy, publishing),
        num_parts=len(parts),
        over_budget=stopped or too_many or too_many_shards,
        stopped_early=stopped,
    )
    storage.write_atomic(
        storage.join(config.output, "_run", "report.json"), json.dumps(asdict(report), indent=2).encode()
    )
    return report


def limited_by(progress: Progress, busy: float, publishing: float) -> str:
    """One sentence that names what the run waited for.

    Args:
        progress: what was counted.
        busy: share of the time in which detectors worked.
        publishing: share of the blocks that may be at detectors at once that were being published.
    """
    counts = progress.counts
    if counts.images == 0:
        return "Nothing was left to do."
    if progress.steady_seconds < 0.5 * progress.seconds:
        return "Start-up took most of the time: too few images to tell what limits the speed."
    if busy >= 0.8:
        return f"The detectors were busy {100 * min(busy, 1):.0f} % of the time: more of them make it faster."
    if publishing >= 0.8:
        return (
            f"The detectors were busy only {100 * busy:.0f} %, and waited for {counts.write_s:.0f} s of "
            "writing: the output's store limits."
        )
    if counts.read_s > counts.decode_s:
        return (
            f"The detectors were busy only {100 * busy:.0f} %, and reading took {counts.read_s:.0f} s "
            f"against {counts.decode_s:.0f} s of decoding: the store or the network limits."
        )
    return f"Detectors were busy only {100 * busy:.0f} %: decoding limits, more CPU cores make it faster."


def over_budget_text(report: Report, config: InferConfig) -> str:
    """One line: what there was too much of."""
    allowed = config.max_failed_fraction
    if report.num_failed_shards > allowed * report.num_shards:
        what = f"too many shards can't be read: {report.num_failed_shards:,} of {report.num_shards:,}"
    elif report.stopped_early and not config.retry_failed:  # measured by its own images
        what = (
            f"too many images failed: {report.num_failed_this_run:,} of the "
            f"{report.num_images_this_run:,} of this run"
        )
    else:
        what = f"too many images failed: {report.num_failed:,} of {report.num_images:,}"
    early = "; stopped early" if report.stopped_early else ""
    return f"{what}, --max-failed-fraction allows {allowed:.1%}{early} (exit code 3)"


def summary_text(report: Report) -> str:
    """The summary that a person reads at the end of a run."""
    done = report.num_images - report.num_failed
    lines = [
        "",
        f"{report.num_images:,} images: {done:,} ok, {report.num_failed:,} failed; "
        f"{report.num_detections:,} detections",
    ]
    if report.num_images_this_run:
        lines.append(
            f"this run: {report.num_images_this_run:,} images in {duration(report.seconds)}, "
            f"{report.images_per_second:,.1f} images/s "
            f"({report.steady_images_per_second:,.1f} after start-up)"
        )
        lines.append(
            f"  task seconds: read {report.read_s:,.0f}, decode {report.decode_s:,.0f}, "
            f"detect {report.detect_s:,.0f} (waited {report.wait_s:,.0f}), write {report.write_s:,.0f}"
        )
    if report.num_failed_shards:
        lines.append(f"  {report.num_failed_shards:,} of {report.num_shards:,} shards could not be read")
    for error, number in report.errors.items():
        lines.append(f"  failed: {error:<22} {number:>14,}")
    if report.num_retries:
        lines.append(f"  {report.num_retries:,} storage calls were repeated")
    names = sorted(report.classes, key=lambda name: -report.confident_classes.get(name, 0))
    if names:
        lines.append(f"  {'detections':<30} {f'score >= {CONFIDENT}':>14} {'all':>10}")
    for name in names[:CLASSES_SHOWN]:
        lines.append(f"  {name:<30} {report.confident_classes.get(name, 0):>14,} {report.classes[name]:>10,}")
    if len(names) > CLASSES_SHOWN:
        lines.append(f"  ... and {len(names) - CLASSES_SHOWN} more classes")
    lines += [report.limited_by, "", "Go on with pandas:", ""]
    lines += [
        "  from pipeline.results import load_detections, load_images",
        f'  boxes = load_detections("{report.output}", min_score=0.5)',
        "  boxes.class_name.value_counts()",
        f'  failed = load_images("{report.output}", status="failed")',
        '  failed[["image_id", "error_stage", "error_type", "error_message"]]',
        "",
    ]
    return "\n".join(lines)

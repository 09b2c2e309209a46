"""What `jobs/evaluate.py` says: all numbers, and the text for people."""

from dataclasses import dataclass
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.evaluation.coco import NAMES
from pipeline.evaluation.compare import compare
from pipeline.evaluation.detections import open_detections
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.evaluation.numbers import numbers
from pipeline.evaluation.run import Evaluation, measure

NUM_CLASSES = 30
NUM_CONFUSIONS = 5


@dataclass(frozen=True)
class Report:
    """One run, measured."""

    evaluation: Evaluation
    numbers: dict[str, Any]
    """For JSON."""

    def text(self) -> str:
        """The numbers that people ask for first."""
        first = [self._headline(), self._in_use(), self._classes()]
        return "\n\n".join(
            block for block in [*first, self._confusions(), self._change(), self._notes()] if block
        )

    def _headline(self) -> str:
        names = NAMES if self.evaluation.metric == "coco" else ("mAP",)
        intervals = self.numbers.get("confidence_intervals", {})
        lines = []
        for name in names:
            low, high = intervals.get(name, (None, None))
            ends = "" if low is None else f"   95 % interval {low:.4f} to {high:.4f}"
            lines.append(f"{name:<6} {_number(self.numbers[name])}{ends}")
        found = self.numbers
        counts = (
            f"{found['num_images']:,} images ({found['num_failed_images']:,} failed), "
            f"{found['num_annotated']:,} annotated boxes, {found['num_detections']:,} detections"
        )
        return "\n".join([counts, *lines])

    def _in_use(self) -> str:
        use, name = self.numbers["at_threshold"], self.evaluation.main_name
        return (
            f"At score {use['score_threshold']:g} and IoU 0.5: precision {use['precision']:.3f}, "
            f"recall {use['recall']:.3f}, F1 {use['f1']:.3f}; {name} {_number(use[name])}"
        )

    def _classes(self) -> str:
        rows = [(name, row) for name, row in self.numbers["per_class"].items() if row["num_annotated"]]
        rows.sort(key=lambda item: -item[1]["num_annotated"])
        width = max((len(name) for name, _ in rows[:NUM_CLASSES]), default=0)
        lines = [f"{'class':<{width}}      AP  annotated  detections  best F1  at score"]
        for name, row in rows[:NUM_CLASSES]:
            best = f"{row['best_f1']:8.3f}{row['best_threshold']:10.3f}" if "best_f1" in row else ""
            counts = f"{row['num_annotated']:11,}{row['num_detections']:12,}"
            lines.append(f"{name:<{width}}  {_number(row['AP'])}{counts} {best}")
        if len(rows) > NUM_CLASSES:
            lines.append(f"and {len(rows) - NUM_CLASSES} more classes; --output writes all to a JSON file")
        return "\n".join(lines) if rows else ""

    def _confusions(self) -> str:
        pairs = self.numbers["confusions"][:NUM_CONFUSIONS]
        found = ", ".join(f"{p['annotated']} taken for {p['detected']} ({p['count']})" for p in pairs)
        return f"Most confused: {found}" if found else ""

    def _change(self) -> str:
        change = self.numbers.get("comparison")
        if not change:
            return ""
        name = self.evaluation.main_name
        ends = change.get("difference_interval", {}).get(name)
        interval = f" (95 % interval {ends[0]:+.4f} to {ends[1]:+.4f})" if ends else ""
        return (
            f"Against the baseline: {name} {change['difference'].get(name, 0.0):+.4f}{interval}; "
            f"{change['gained']:,} boxes gained, {change['lost']:,} lost"
        )

    def _notes(self) -> str:
        strange = self.numbers["not_annotated_classes"]
        if not strange:
            return ""
        few = ", ".join(list(strange)[:5])
        return (
            f"Left out: {sum(strange.values()):,} detections of classes that are not annotated, such as {few}"
        )


def measure_run(config: EvaluateConfig) -> Report:
    """Measure the detections of `config`, and the baseline where there is one.

    Raises:
        ConfigError: one of the files is not there or not readable, or they don't belong together.
    """
    truth = read_ground_truth(config.annotations, split=config.split)
    uris = [uri for uri in (config.detections, config.baseline) if uri]
    for uri in uris:
        _, truth = open_detections(uri, truth, partial=config.partial)
    runs = [
        measure(
            truth,
            open_detections(uri, truth, partial=config.partial)[0],
            metric=config.metric,
            score_threshold=config.score_threshold,
            distributed=config.distributed,
        )
        for uri in uris
    ]
    found = numbers(runs[0], num_resamples=config.resamples, seed=config.seed)
    if config.baseline:
        found["comparison"] = compare(*runs, num_resamples=config.resamples, seed=config.seed)
    return Report(runs[0], found)


def _number(value: float) -> str:
    return "     -" if value < 0 else f"{value:.4f}"

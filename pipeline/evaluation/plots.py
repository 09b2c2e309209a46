"""Pictures of what was measured: precision and recall, calibration, confusion between classes."""

import csv
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.evaluation.average_precision import precision_recall
from pipeline.evaluation.matching import Matches
from pipeline.evaluation.run import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CURVES = 12  # more lines than this can't be told apart
MAX_CONFUSED = 25
RECALLS = np.linspace(0, 1, 101)


def write_plots(evaluation: Evaluation, folder: str) -> list[str]:
    """Write `precision_recall.png`, `calibration.png`, `confusion.png` and `confusion.csv`.

    Returns:
        Their URIs.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'shardshot[eval]'") from error

    files = {"confusion.csv": _confusion_csv(evaluation)}
    drawings = {
        "precision_recall": _draw_curves,
        "calibration": _draw_calibration,
        "confusion": _draw_confusion,
    }
    for name, draw in drawings.items():
        figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
        draw(evaluation, figure)
        files[f"{name}.png"] = _png(figure)
    for name, data in files.items():
        storage.write_atomic(storage.join(folder, name), data)
    return [storage.join(folder, name) for name in files]


def _draw_curves(evaluation: Evaluation, figure: "Figure") -> None:
    """Best precision at each recall, IoU 0.5: the mean and the classes with most annotated boxes."""
    axes = figure.subplots()
    measured = {label: one for label, one in evaluation.matches.items() if one.num_positives}
    curves = {label: _best_precision(one) for label, one in measured.items()}
    shown = sorted(measured, key=lambda label: -measured[label].num_positives)[:MAX_CURVES]
    colors = _colors(len(shown))
    for label, color in zip(shown, colors, strict=True):
        name = f"{_text(evaluation.truth.class_names[label])}  {curves[label].mean():.2f}"
        axes.plot(RECALLS, curves[label], color=color, linewidth=1.2, label=name)
    if curves:
        mean = np.mean(list(curves.values()), axis=0)
        name = f"mean of {len(curves)}  {mean.mean():.2f}"
        axes.plot(RECALLS, mean, color="black", linewidth=2.5, label=name)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="area")
    _square(axes, "recall", "precision", "Precision and recall at IoU 0.5")


def _draw_calibration(evaluation: Evaluation, figure: "Figure") -> None:
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    measured = evaluation.calibration
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="score = share that is right")
    axes.plot(measured.mean_score, measured.precision, color="#1f6feb", marker="o", label="measured")
    axes.legend(frameon=False)
    _square(axes, "", "share that is right", f"Calibration, expected error {measured.error:.3f}")
    below.bar(np.arange(10) / 10 + 0.05, np.maximum(measured.num_detections, 0), width=0.09, color="#1f6feb")
    below.set_yscale("symlog", linthresh=1)
    below.set(xlabel="score", ylabel="detections", xlim=(0, 1))


def _draw_confusion(evaluation: Evaluation, figure: "Figure") -> None:
    """Shares of each annotated class; of many classes those most often taken for another."""
    axes = figure.subplots()
    table, names = evaluation.confusion, [*evaluation.class_names, "(nothing)"]
    off = table - np.diag(np.diag(table))
    errors = off[:, :-1].sum(axis=1)[:-1] + off[:-1].sum(axis=0)[:-1]
    classes = np.sort(np.argsort(-errors, kind="stable")[:MAX_CONFUSED])
    shown = np.append(classes, len(names) - 1)
    part = table[np.ix_(shown, shown)].astype(float)
    shares = part / np.maximum(table[shown].sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [_text(names[i]) for i in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    for row, column in np.argwhere(part > 0):
        color = "white" if shares[row, column] > 0.5 else "black"
        count = f"{int(part[row, column])}"
        axes.text(column, row, count, ha="center", va="center", fontsize=6, color=color)
    title = f"Confusion at score {evaluation.score_threshold:g}, IoU 0.5"
    axes.set(xlabel="detected", ylabel="annotated", title=title)


def _confusion_csv(evaluation: Evaluation) -> bytes:
    text = io.StringIO()
    names = [*evaluation.class_names, "(nothing)"]
    writer = csv.writer(text)
    writer.writerow(["annotated \\ detected", *names])
    writer.writerows([name, *row] for name, row in zip(names, evaluation.confusion.tolist(), strict=True))
    return text.getvalue().encode()


def _best_precision(matches: Matches) -> np.ndarray:
    """The highest precision at each of 101 recalls or above."""
    precision, recall = precision_recall(matches)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(recall, RECALLS)]


def _colors(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps["turbo"](x) for x in np.linspace(0.05, 0.95, count)]


def _square(axes: "object", xlabel: str, ylabel: str, title: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xlim=(0, 1), ylim=(0, 1.02))  # type: ignore[attr-defined]
    axes.grid(color="0.9")  # type: ignore[attr-defined]


def _text(name: str) -> str:
    """A class name as plain text: matplotlib reads formulas between dollar signs."""
    return name.replace("$", r"\$")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font doesn't have are drawn as boxes
        figure.savefig(buffer, format="png")
    return buffer.getvalue()

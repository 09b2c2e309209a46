"""The counts of a run as pieces of HTML."""

import html
import math
from collections.abc import Iterable

from pipeline.gallery.draw import Color, class_color
from pipeline.results import Summary, load_images

CLASSES_SHOWN = 20
EXAMPLES_PER_FAILURE = 3


def model(summary: Summary) -> str:
    """One line about the detector."""
    spec = summary.model
    size = f"{spec['input_width']}x{spec['input_height']}" if "input_width" in spec else ""
    parts = [spec.get("architecture", ""), size, f"{len(spec.get('class_names', []))} classes"]
    return html.escape(" · ".join(part for part in parts if part))


def tiles(summary: Summary) -> str:
    """The counts at the top of the page."""
    with_box = summary.num_images - summary.num_failed - summary.num_empty
    counts = [
        (f"{summary.num_images:,}", "images"),
        (f"{summary.num_detections:,}", "detections"),
        (f"{len(summary.classes):,}", "classes found"),
        (f"{with_box:,}", "with a box"),
        (f"{summary.num_empty:,}", "without a box"),
        (f"{summary.num_failed:,}", "failed"),
    ]
    return "".join(
        f'<div class="card"><b>{value}</b><span class="soft">{name}</span></div>' for value, name in counts
    )


def scores(summary: Summary) -> str:
    """Bars on a logarithmic scale: most detections have low scores."""
    counts = summary.score_histogram
    highest = math.log10(1 + counts.max(initial=0)) or 1.0
    bars = "".join(
        f'<div style="height:{100 * math.log10(1 + count) / highest:.1f}%" '
        f'title="{i / 20:.2f} to {(i + 1) / 20:.2f}: {count:,} detections"></div>'
        for i, count in enumerate(counts.tolist())
    )
    axis = "".join(f"<span>{i / 4:.2f}</span>" for i in range(5))
    label = f"{summary.num_detections:,} detections by score"
    return (
        f'<div class="bars" role="img" aria-label="{label}">{bars}</div><div class="axis">{axis}</div>'
        f'<p class="soft">Detections by score, logarithmic; the highest bar is {counts.max(initial=0):,}.</p>'
    )


def failures(summary: Summary, output: str) -> str:
    """Failed images by cause, with a few examples each."""
    if not summary.num_failed:
        return '<p class="soft">None.</p>'
    columns = ["image_id", "error_stage", "error_type", "error_message"]
    failed = load_images(output, status="failed", columns=columns)
    examples = failed.groupby(["error_stage", "error_type"], observed=True).head(EXAMPLES_PER_FAILURE)
    rows = []
    for stage, kind, count in summary.failures.itertuples(index=False):
        some = examples.loc[(examples["error_stage"] == stage) & (examples["error_type"] == kind)]
        shown = "".join(
            f"<li><code>{html.escape(image_id)}</code> {html.escape(message)}</li>"
            for image_id, message in zip(some["image_id"], some["error_message"], strict=True)
        )
        rows.append(row(f"<b>{html.escape(kind)}</b> ({html.escape(stage)})<ul>{shown}</ul>", f"{count:,}"))
    return table(("cause, with examples", "images"), rows)


def classes(summary: Summary) -> str:
    """Detections by class, the rare classes folded away."""
    most = max(summary.classes["num_detections"], default=1)
    rows = []
    for name, count, images, score in summary.classes.itertuples(index=False):
        color = css(class_color(name))
        bar = f'<i style="width:{100 * count / most:.1f}%;background:{color}"></i>'
        cells = (f"{count:,}", f"{images:,}", f"{score:.2f}")
        rows.append(row(f'{html.escape(name)}</td><td class="share">{bar}', *cells))
    head = ("class", "", "detections", "images", "mean score")
    more = ""
    if len(rows) > CLASSES_SHOWN:
        rare = table(head, rows[CLASSES_SHOWN:])
        more = f"<details><summary>{len(rows) - CLASSES_SHOWN:,} more classes</summary>{rare}</details>"
    return table(head, rows[:CLASSES_SHOWN]) + more if rows else '<p class="soft">No detections.</p>'


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """The first column is text, the others numbers."""
    first, *others = head
    cells = f"<th>{first}</th>" + "".join(
        f'<th class="{"number" if name else "share"}">{name}</th>' for name in others
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def row(first: str, *numbers: str) -> str:
    """A row of such a table; the cells are HTML already."""
    return (
        f"<tr><td>{first}</td>" + "".join(f'<td class="number">{value}</td>' for value in numbers) + "</tr>"
    )


def css(color: Color) -> str:
    """A colour in CSS."""
    return f"rgb({color[0]} {color[1]} {color[2]})"

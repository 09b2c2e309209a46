"""The report: one HTML page with everything in it, for a browser without network."""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.gallery import tables
from pipeline.gallery.draw import class_color, readable_on
from pipeline.gallery.photographs import COLUMNS, read_photographs
from pipeline.gallery.sheet import spread
from pipeline.results import compare_runs, load_detections, load_images, summarise

BOXES_PER_IMAGE = 100
CHANGED_IMAGES = 24
PHOTOGRAPH_SIZE = 800  # pixels of the longer side; 60 of them make a page of about 6 MB


def report_page(
    output: str, *, input_uri: str = "", baseline: str = "", min_score: float = 0.3, max_images: int = 60
) -> str:
    """Make the report of a run.

    Args:
        output: output folder of `jobs/infer.py`.
        input_uri: its input, where that has moved since.
        baseline: output folder of another run on the same images, to show what changed.
        min_score: boxes below it are not in the gallery.
        max_images: photographs in the gallery.

    Returns:
        The page as text, to be written as UTF-8.

    Raises:
        ConfigError: no output there.
    """
    summary = summarise(output)
    names = summary.classes["class_name"].tolist()
    chosen = _choose_images(output, min_score, max_images)
    boxes = load_detections(output, min_score=min_score, image_ids=chosen["image_id"].tolist())
    images = _images(output, chosen, boxes, names, input_uri)
    changes = compare_runs(output, baseline, min_score=max(min_score, 0.5)) if baseline else None
    if changes is not None:
        names += sorted(set(changes["class_name"]) - set(names))
    data = {
        "classes": [_class(name) for name in names],
        "images": images,
        "changes": [] if changes is None else _changed_images(output, changes, names, input_uri),
    }
    script = _resource("page.js")
    return _fill(
        _resource("page.html"),
        {
            "title": html.escape(output),
            "model": tables.model(summary),
            "tiles": tables.tiles(summary),
            "scores": tables.scores(summary),
            "failures": tables.failures(summary, output),
            "classes": tables.classes(summary),
            "changes": "" if changes is None else _changes(changes, baseline),
            "min_score": f"{min_score:g}",
            "gallery_note": _gallery_note(len(images), len(chosen), min_score),
            "data": _json(data),
            "script": script,
            "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        },
    )


def _resource(name: str) -> str:
    return files("pipeline.gallery").joinpath(name).read_text("utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Replace {{name}} in one pass, so that nothing in a value is taken for a name."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _json(data: object) -> str:
    """JSON that can't end its script element."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


# ---- photographs -------------------------------------------------------------------------------------


def _choose_images(output: str, min_score: float, max_images: int) -> pd.DataFrame:
    """Half of them for the classes, each with its best box; the rest spread over all images with a box."""
    found = load_detections(output, min_score=min_score, columns=["image_id", "class_name", "score"])
    images = load_images(output, status="ok", columns=COLUMNS)
    order = found["class_name"].value_counts().index
    best = found.sort_values("score", kind="stable").drop_duplicates("class_name", keep="last")
    best_ids = best.set_index("class_name")["image_id"].reindex(order).drop_duplicates()
    first = images.loc[images["image_id"].isin(best_ids.head(math.ceil(max_images / 2)))]
    others = images.drop(index=first.index)
    if len(found):
        others = others.loc[others["image_id"].isin(found["image_id"])]
    return pd.concat([first, spread(others, max_images - len(first))]).sort_index()


def _images(
    output: str, chosen: pd.DataFrame, boxes: pd.DataFrame, names: list[str], input_uri: str
) -> list[dict[str, Any]]:
    labels = {name: i for i, name in enumerate(names)}
    found = []
    for image_id, pixels in read_photographs(chosen, output, input_uri=input_uri):
        height, width = pixels.shape[:2]
        rows = _boxes(boxes.loc[boxes["image_id"] == image_id], labels)
        source = _data_url(pixels)
        found.append({"id": image_id, "src": source, "width": width, "height": height, "boxes": rows})
    return found


def _boxes(rows: pd.DataFrame, labels: Mapping[str, int]) -> list[list[Any]]:
    """[class, score, left, top, width, height in % of the image, change], the best first."""
    rows = rows.sort_values("score", ascending=False, kind="stable").head(BOXES_PER_IMAGE)
    width, height = rows["image_width"].to_numpy(), rows["image_height"].to_numpy()
    left, top = rows["xmin"] / width * 100, rows["ymin"] / height * 100
    columns = [
        rows["class_name"].map(labels.__getitem__).tolist(),
        rows["score"].round(4).tolist(),
        left.round(2).tolist(),
        top.round(2).tolist(),
        (rows["xmax"] / width * 100 - left).round(2).tolist(),
        (rows["ymax"] / height * 100 - top).round(2).tolist(),
        rows["change"].tolist() if "change" in rows else [""] * len(rows),
    ]
    return [list(values) for values in zip(*columns, strict=True)]


def _data_url(pixels_HW3: np.ndarray) -> str:
    picture = Image.fromarray(pixels_HW3)
    picture.thumbnail((PHOTOGRAPH_SIZE, PHOTOGRAPH_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _class(name: str) -> dict[str, str]:
    color = class_color(name)
    return {"name": name, "color": tables.css(color), "ink": tables.css(readable_on(color))}


def _gallery_note(num_read: int, num_chosen: int, min_score: float) -> str:
    if num_read < num_chosen:
        return (
            f"{num_chosen - num_read} of {num_chosen} photographs could not be read again: "
            "name the input where it is now with --input."
        )
    return (
        f"Photographs chosen to show every class; boxes with a score of {min_score:g} or more."
        if num_read
        else ""
    )


# ---- what changed ------------------------------------------------------------------------------------


def _changed_images(
    output: str, changes: pd.DataFrame, names: list[str], input_uri: str
) -> list[dict[str, Any]]:
    """The photographs with the most gained and lost boxes."""
    most = changes["image_id"].value_counts().head(CHANGED_IMAGES).index
    images = load_images(output, status="ok", columns=COLUMNS)
    chosen = images.loc[images["image_id"].isin(most.to_series())]
    boxes = changes.loc[changes["image_id"].isin(most.to_series())]
    found = _images(output, chosen, boxes, names, input_uri)
    return sorted(found, key=lambda image: -len(image["boxes"]))


def _changes(changes: pd.DataFrame, baseline: str) -> str:
    gained, lost = (changes["change"].tolist().count(change) for change in ("gained", "lost"))
    counts = pd.crosstab(changes["class_name"], changes["change"]).reindex(
        columns=["gained", "lost"], fill_value=0
    )
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    rows = [
        tables.row(html.escape(str(name)), _signed(more, "+", "good"), _signed(less, "−", "bad"))
        for name, more, less in zip(counts.index, counts["gained"], counts["lost"], strict=True)
    ]
    return (
        f"<section><h2>Changes</h2><p>Against <code>{html.escape(baseline)}</code>: "
        f'<b class="good">{gained:,} boxes gained</b>, <b class="bad">{lost:,} lost</b> (dashed).</p>'
        f"{tables.table(('class', 'gained', 'lost'), rows)}"
        '<h2>Largest changes</h2><div id="changes" class="gallery"></div></section>'
    )


def _signed(count: int, sign: str, css: str) -> str:
    return f'<span class="{css}">{sign}{count:,}</span>' if count else '<span class="soft">0</span>'

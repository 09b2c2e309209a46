"""A picture of a run: some of its photographs with their boxes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.gallery.draw import contact_sheet
from pipeline.gallery.photographs import COLUMNS, read_photographs
from pipeline.results import load_detections, load_images


def sheet_of_run(
    output_uri: str | Path,
    input_uri: str = "",
    *,
    min_score: float = 0.5,
    class_names: str | Sequence[str] | None = None,
    max_images: int = 24,
) -> Image.Image:
    """Photographs of a run with their boxes in one picture, spread evenly over the images with a box.

    Args:
        output_uri: output folder of `jobs/infer.py`.
        input_uri: its input, if that has moved since.
        min_score: boxes with at least this score are drawn.
        class_names: only images with boxes of these classes, and only these boxes.
        max_images: photographs in the sheet at most.

    Raises:
        ConfigError: no output there.
    """
    found = load_detections(output_uri, min_score=min_score, class_names=class_names, columns=["image_id"])
    images = load_images(output_uri, status="ok", columns=COLUMNS)
    with_box = images.loc[images["image_id"].isin(found["image_id"])]
    chosen = spread(with_box if len(with_box) or class_names else images, max_images)
    ids = chosen["image_id"].tolist()
    boxes = load_detections(output_uri, min_score=min_score, class_names=class_names, image_ids=ids)
    photographs = read_photographs(chosen, output_uri, input_uri=input_uri)
    return contact_sheet(
        [(image_id, pixels, boxes.loc[boxes["image_id"] == image_id]) for image_id, pixels in photographs]
    )


def spread(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most `count` rows, spread evenly over the frame."""
    if len(frame) <= count:
        return frame
    return frame.iloc[np.linspace(0, len(frame) - 1, count).round().astype(int)]

"""Detections in the forms of other tools: COCO results, YOLO labels, supervision."""

import json
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.results.read import iter_detections, load_images
from pipeline.results.summary import summarise

if TYPE_CHECKING:
    import supervision

CORNERS = ["xmin", "ymin", "xmax", "ymax"]
WRITERS = 16  # small files at a time: hides the latency of object stores


def export_coco(
    output: str | Path,
    json_uri: str | Path,
    *,
    image_ids: Mapping[str, int] | None = None,
    min_score: float | None = None,
) -> dict[str, int]:
    """Write a COCO results file: `[{"image_id", "category_id", "bbox": [x, y, w, h], "score"}, ...]`.

    It is built in memory, about 120 bytes a detection.

    Args:
        output: output folder of `jobs/infer.py`.
        json_uri: the file to write.
        image_ids: COCO's number of each image. By default the number that is its file name, as in COCO
            (`000000000139.jpg` is 139); where not all are such numbers, 1, 2, ... in the order of the images.
        min_score: leave out detections below it.

    Returns:
        The number of each image.
    """
    numbers = dict(image_ids or _coco_numbers(load_images(output, columns=["image_id"])["image_id"].tolist()))
    columns = ["image_id", "label", "score", *CORNERS]
    pieces = []
    for frame in iter_detections(output, min_score=min_score, columns=columns):
        corners = frame[CORNERS].to_numpy(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3)
        rows = zip(frame["image_id"], frame["label"].tolist(), boxes.tolist(), frame["score"], strict=True)
        pieces += [
            json.dumps(
                {"image_id": numbers[image_id], "category_id": label, "bbox": box, "score": round(score, 6)}
            )
            for image_id, label, box, score in rows
            if image_id in numbers
        ]
    storage.write_atomic(str(json_uri), f"[{','.join(pieces)}]".encode())
    return numbers


def export_yolo(
    output: str | Path, folder: str | Path, *, min_score: float = 0.5, with_scores: bool = False
) -> int:
    """Write YOLO labels: a text file for each image, with `class x y w h` relative to it, and `data.yaml`.

    Classes are numbered from 0 in the model's order. Images without a box get an empty file, failed ones
    none.

    Args:
        output: output folder of `jobs/infer.py`.
        folder: where to write `<image_id without its ending>.txt`, in the folders of the image ids; ids that
            are absolute paths, lead upwards or are URIs get folders below it, too (see `_label_file`).
        min_score: leave out detections below it.
        with_scores: add the score to each line, as Ultralytics' `save_conf`; some readers refuse it.

    Returns:
        The number of label files.

    Raises:
        ConfigError: two images would share a file.
    """
    names = _class_names(output)
    numbers = {name: i for i, name in enumerate(names)}
    images = load_images(output, status="ok", columns=["image_id"])["image_id"].tolist()
    files = _label_files(output, images)

    def write(item: tuple[str, str]) -> None:
        storage.write_atomic(storage.join(str(folder), files[item[0]]), item[1].encode())

    empty = set(images)
    columns = ["image_id", "class_name", "score", *CORNERS, "image_width", "image_height"]
    with ThreadPoolExecutor(WRITERS) as pool:
        for frame in iter_detections(output, min_score=min_score, columns=columns):
            by_image = frame.groupby("image_id", sort=False)
            texts = {str(image_id): _yolo_lines(rows, numbers, with_scores) for image_id, rows in by_image}
            empty -= texts.keys()
            list(pool.map(write, texts.items()))
        list(pool.map(write, [(image_id, "") for image_id in sorted(empty)]))
    lines = ["names:", *(f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(names))]
    storage.write_atomic(storage.join(str(folder), "data.yaml"), ("\n".join(lines) + "\n").encode())
    return len(images)


def to_supervision(detections: pd.DataFrame) -> "supervision.Detections":
    """The rows of one image as `supervision.Detections`, for its annotators, trackers and metrics.

    `class_id` is the data set's label; the name is in `data["class_name"]`.

    Raises:
        ConfigError: supervision is not installed, or columns are missing.
    """
    needed = [*CORNERS, "score", "label", "class_name"]
    if missing := [name for name in needed if name not in detections]:
        raise ConfigError(f"to_supervision needs the columns {', '.join(missing)}, too: load them")
    try:
        import supervision
    except ImportError as error:
        raise ConfigError("this needs supervision: pip install supervision") from error

    return supervision.Detections(
        xyxy=detections[CORNERS].to_numpy(np.float32).reshape(-1, 4),
        confidence=detections["score"].to_numpy(np.float32),
        class_id=detections["label"].to_numpy(int),
        data={"class_name": detections["class_name"].astype(str).to_numpy(dtype=np.str_)},
    )


def _coco_numbers(image_ids: list[str]) -> dict[str, int]:
    stems = [posixpath.splitext(posixpath.basename(image_id))[0] for image_id in image_ids]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return dict(zip(image_ids, numbers, strict=True))
    return {image_id: i for i, image_id in enumerate(image_ids, start=1)}


def _class_names(output: str | Path) -> list[str]:
    summary = summarise(output)
    return list(summary.model.get("class_names") or sorted(summary.classes["class_name"].tolist()))


def _label_files(output: str | Path, image_ids: list[str]) -> dict[str, str]:
    """The label file of each image, relative to the folder of labels."""
    owners: dict[str, str] = {}
    for image_id in image_ids:
        file = _label_file(image_id)
        if owners.setdefault(file, image_id) != image_id:
            raise ConfigError(f"{output}: {owners[file]} and {image_id} would share a label file, {file}")
    return {image_id: file for file, image_id in owners.items()}


def _label_file(image_id: str) -> str:
    """A relative path that stays in its folder, whatever the id.

    `/a/b.jpg` is `a/b.txt`, `s3://a/b.jpg` is `s3/a/b.txt`, `../b.jpg` is `_/b.txt`. `::` would chain two
    file systems, so it becomes `__`.
    """
    parts = image_id.replace("://", "/").replace("::", "__").split("/")
    path = "/".join("_" if part == ".." else part for part in parts if part not in ("", "."))
    return posixpath.splitext(path)[0] + ".txt"


def _yolo_lines(rows: pd.DataFrame, numbers: Mapping[str, int], with_scores: bool) -> str:
    sizes = rows[["image_width", "image_height"]].to_numpy(np.float64)
    corners = rows[CORNERS].to_numpy(np.float64)
    low, high = corners[:, :2] / sizes, corners[:, 2:] / sizes
    values = np.concatenate([(low + high) / 2, high - low], axis=1)
    if with_scores:
        values = np.concatenate([values, rows[["score"]].to_numpy(np.float64)], axis=1)
    classes = [numbers[name] for name in rows["class_name"]]
    lines = zip(classes, values.tolist(), strict=True)
    return "".join(f"{number} {' '.join(f'{v:.6f}' for v in line)}\n" for number, line in lines)

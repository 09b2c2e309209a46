"""Read annotations: a COCO instances file, a PASCAL VOC folder, or annotated shards."""

import json
import math
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.annotations import CLASSES_FILE, parse_annotation, read_classes
from pipeline.data.coco import coco_entries, refuse_repeated
from pipeline.data.shards import list_shards, read_shard
from pipeline.data.sources import four_numbers
from pipeline.data.voc import read_voc
from pipeline.errors import ConfigError, ImageError
from pipeline.evaluation.boxsets import GroundTruth


def read_ground_truth(uri: str, *, split: str = "") -> GroundTruth:
    """Read the annotated boxes of a data set.

    Args:
        uri: a COCO instances `.json`; a VOC folder (with `JPEGImages/` and `Annotations/`); or the folder of
            annotated shards that `jobs/make_shards.py` wrote.
        split: VOC: only the images that `ImageSets/Main/<split>.txt` lists.

    Raises:
        ConfigError: nothing there, not of one of these forms, damaged, or a split of something else than VOC.
    """
    if uri.endswith(".json"):
        _refuse_split(split, uri, "a COCO file")
        return _from_coco(uri)
    root = posixpath.dirname(uri.rstrip("/")) if uri.rstrip("/").endswith("/Annotations") else uri
    names = storage.list_names(root)
    if "JPEGImages" in names:
        return _from_voc(root, split)
    if CLASSES_FILE in names:
        _refuse_split(split, uri, "a folder of shards")
        return _from_shards(uri)
    raise ConfigError(
        f"--annotations {uri} is no COCO .json, no VOC folder (with JPEGImages/) "
        f"and no annotated shards (with {CLASSES_FILE})"
    )


def _refuse_split(split: str, uri: str, what: str) -> None:
    if split:
        raise ConfigError(f"--split {split} is for VOC folders, and --annotations {uri} is {what}")


@dataclass(frozen=True)
class _Row:
    """One annotated box."""

    image: int
    label: int
    xywh: tuple[float, float, float, float]
    area: float
    crowd: bool
    difficult: bool


def _ground_truth(
    image_ids: list[str], class_names: dict[int, str], rows: list[_Row], coco_ids: list[int] | None
) -> GroundTruth:
    return GroundTruth(
        image_ids=tuple(image_ids),
        class_names=class_names,
        image_index=np.array([row.image for row in rows], np.int32),
        boxes_xywh=np.array([row.xywh for row in rows], np.float64).reshape(-1, 4),
        labels=np.array([row.label for row in rows], np.int32),
        areas=np.array([row.area for row in rows], np.float64),
        crowd=np.array([row.crowd for row in rows], bool),
        difficult=np.array([row.difficult for row in rows], bool),
        coco_ids=None if coco_ids is None else np.array(coco_ids, np.int64),
    )


# ---- COCO --------------------------------------------------------------------------------------------


def _from_coco(uri: str) -> GroundTruth:
    try:
        data = json.loads(storage.read_bytes(uri))
        images = sorted(coco_entries(data, "images", ("id", "file_name"), uri), key=lambda image: image["id"])
        categories = coco_entries(data, "categories", ("id", "name"), uri)
        boxes = coco_entries(data, "annotations", ("image_id", "category_id", "bbox"), uri)
        ids, names = [image["id"] for image in images], [str(image["file_name"]) for image in images]
        refuse_repeated(ids, uri)
        refuse_repeated(names, uri)
        class_names = {int(category["id"]): str(category["name"]) for category in categories}
        index = {image_id: i for i, image_id in enumerate(ids)}
        return _ground_truth(
            names, class_names, [_coco_row(box, index, class_names, uri) for box in boxes], ids
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{uri} is no COCO instances file: {type(error).__name__} {error}") from error


def _coco_row(
    box: dict[str, Any], index: Mapping[object, int], class_names: Mapping[int, str], uri: str
) -> _Row:
    """An annotation, checked.

    Boxes without area or outside their image count as annotated, as in pycocotools, so that numbers are those
    of others: public files have them (annotations 918 and 2206849 of COCO's train2017 have no height), and
    mmdetection (datasets/coco.py) trains without them, but measures with them.
    """
    label, xywh, area = box["category_id"], four_numbers(box["bbox"]), box.get("area")
    where = f"{uri} annotation {box.get('id', '?')} of image {box['image_id']}"
    if box["image_id"] not in index:
        raise ConfigError(f"{where}: that image is not in the file's list of images")
    if label not in class_names:
        raise ConfigError(f"{where} is of the unknown category {label!r}")
    if xywh is None:
        raise ConfigError(f"{where} ({class_names[label]}, bbox {box['bbox']}) is not four numbers")
    area = xywh[2] * xywh[3] if area is None else float(area)
    if not math.isfinite(area):
        raise ConfigError(f"{where} ({class_names[label]}, area {area}) is not finite")
    crowd, difficult = bool(box.get("iscrowd")), bool(box.get("difficult"))
    return _Row(index[box["image_id"]], label, xywh, area, crowd, difficult)


# ---- VOC ---------------------------------------------------------------------------------------------


def _from_voc(root: str, split: str) -> GroundTruth:
    """Also boxes of one pixel (xmin = xmax), which the devkit counts and training leaves out."""
    source = read_voc(root, split=split)
    assert source.classes is not None  # it has XML files
    class_names = dict(zip(source.classes.ids, source.classes.names, strict=True))
    labels = {name: label for label, name in class_names.items()}
    rows = []
    for i, image in enumerate(source.images):
        for box in image.boxes or ():
            if box.xyxy is None or box.class_name not in labels:
                raise ConfigError(f"{box.where}: no class name or not four numbers; correct the file")
            xywh = _xywh(*box.xyxy)
            rows.append(_Row(i, labels[box.class_name], xywh, xywh[2] * xywh[3], box.crowd, box.difficult))
    return _ground_truth([image.name for image in source.images], class_names, rows, None)


def _xywh(xmin: float, ymin: float, xmax: float, ymax: float) -> tuple[float, float, float, float]:
    return xmin, ymin, xmax - xmin, ymax - ymin


# ---- shards ------------------------------------------------------------------------------------------


def _from_shards(uri: str) -> GroundTruth:
    classes = read_classes(uri)
    image_ids: list[str] = []
    coco_ids: list[int | None] = []
    rows: list[_Row] = []
    for shard in list_shards(uri):
        for raw in read_shard(shard):
            try:
                found = parse_annotation(raw.annotation, classes, image_id=raw.image_id)
            except ImageError as error:
                raise ConfigError(f"{shard.uri}: {error}") from error
            numbers = zip(found.labels, found.boxes.tolist(), found.crowd, found.difficult, strict=True)
            for number, box, crowd, difficult in numbers:
                xywh = _xywh(*box)
                label = classes.ids[number - 1]
                area = xywh[2] * xywh[3]
                rows.append(_Row(len(image_ids), label, xywh, area, bool(crowd), bool(difficult)))
            image_ids.append(raw.image_id)
            coco_ids.append(found.image_id)
    known = [number for number in coco_ids if number is not None]
    usable = len(set(known)) == len(image_ids) and all(isinstance(number, int) for number in known)
    class_names = dict(zip(classes.ids, classes.names, strict=True))
    return _ground_truth(image_ids, class_names, rows, known if usable else None)

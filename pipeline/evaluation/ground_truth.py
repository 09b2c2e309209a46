"""Read annotations: a COCO instances file, a VOC folder, or annotated shards."""

import json
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.evaluation.boxsets import GroundTruth


def read_ground_truth(uri: str) -> GroundTruth:
    """Read the annotated boxes of a data set.

    Args:
        uri: a COCO instances `.json`; a VOC folder (with `Annotations/`) or image list
            (`ImageSets/Main/test.txt`); or the folder of annotated shards that `jobs/make_shards.py` wrote.

    Raises:
        ConfigError: nothing there, or not of one of these forms.
    """
    if uri.endswith(".json"):
        return _from_coco(uri)
    raise ConfigError(uri)


def _from_coco(uri: str) -> GroundTruth:
    try:
        data = json.loads(storage.read_bytes(uri))
        images = sorted(data["images"], key=lambda image: image["id"])
        index = {image["id"]: i for i, image in enumerate(images)}
        boxes = [box for box in data["annotations"] if "bbox" in box]
        return GroundTruth(
            image_ids=tuple(image["file_name"] for image in images),
            class_names={category["id"]: category["name"] for category in data["categories"]},
            image_index=np.array([index[box["image_id"]] for box in boxes], np.int32),
            boxes_xywh=np.array([box["bbox"] for box in boxes], np.float64).reshape(-1, 4),
            labels=np.array([box["category_id"] for box in boxes], np.int32),
            areas=np.array([_area(box) for box in boxes], np.float64),
            crowd=np.array([bool(box.get("iscrowd", 0)) for box in boxes], bool),
            difficult=np.array([bool(box.get("difficult", 0)) for box in boxes], bool),
            coco_ids=np.array([image["id"] for image in images], np.int64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{uri} is no COCO instances file: {type(error).__name__} {error}") from error


def _area(box: dict[str, Any]) -> float:
    return box["area"] if "area" in box else box["bbox"][2] * box["bbox"][3]

"""Annotated boxes of one image as they travel in shards, and the classes of a shard set.

In a tar the annotation of `<key>.jpg` is `<key>.json`; in Parquet it is the column `annotation`:

    {"width": 640, "height": 480, "boxes": [[xmin, ymin, xmax, ymax], ...], "labels": [18, ...],
     "class_names": ["dog", ...], "difficult": [0, ...], "crowd": [0, ...], "image_id": 139}

Boxes are 0-based continuous pixels of the image as displayed, labels are the data set's own ids, and
`image_id` (of COCO) is optional. `classes.json` at the root of a shard set names all classes:

    {"classes": [{"id": 18, "name": "dog"}, ...]}

G boxes, K classes.
"""

import json
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.errors import ConfigError, ImageError, StorageError

CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set; class number k of 1..K has `ids[k - 1]` and `names[k - 1]`."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ConfigError("the data set has no classes")
        for values in (self.ids, self.names):
            if len(set(values)) != len(values):
                raise ConfigError(f"classes must differ: {', '.join(map(str, values))}")
        if min(self.ids) < 1:
            raise ConfigError(f"class ids start at 1, not {min(self.ids)} (0 is the background)")

    def to_json(self) -> bytes:
        """The content of `classes.json`."""
        entries = [{"id": id_, "name": name} for id_, name in zip(self.ids, self.names, strict=True)]
        return json.dumps({"classes": entries}, indent=1, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Annotation:
    """The annotated boxes of one image.

    Attributes:
        width: pixels of the image as displayed.
        height: as `width`.
        boxes: float32 [G, 4] xyxy pixels, 0-based and continuous: 0 <= xmin < xmax <= width.
        labels: int64 [G], class numbers 1..K.
        difficult: bool [G], not counted by the VOC metrics.
        crowd: bool [G], a region of many objects (COCO).
        image_id: COCO's number of the image.
    """

    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    image_id: int | None = None


def read_classes(shards_uri: str) -> Classes:
    """The classes of the shard set in folder `shards_uri`.

    Raises:
        ConfigError: it has no `classes.json`, or a damaged one.
    """
    uri = storage.join(shards_uri, CLASSES_FILE)
    try:
        entries = json.loads(storage.read_bytes(uri))["classes"]
        return Classes(
            tuple(int(entry["id"]) for entry in entries), tuple(entry["name"] for entry in entries)
        )
    except StorageError as error:
        raise ConfigError(
            f"{uri} is missing: make annotated shards with jobs/make_shards.py ({error})"
        ) from error
    except (ConfigError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{uri} is no list of classes: {error}") from error


def parse_annotation(value: dict | None, classes: Classes, *, image_id: str) -> Annotation:
    """The annotation that came with an image.

    Args:
        value: `RawImage.annotation`.
        classes: of the shard set; labels are looked up here.
        image_id: for the message.

    Raises:
        ImageError: there is none, or it isn't of the form above (stage "annotation").
    """
    if value is None:
        raise _error(image_id, "has no annotation (or its JSON is damaged)")
    try:
        boxes = np.array(value["boxes"], np.float32).reshape(-1, 4)
        numbers = {id_: number for number, id_ in enumerate(classes.ids, start=1)}
        labels = np.array([numbers[label] for label in value["labels"]], np.int64)
        found = Annotation(
            width=int(value["width"]),
            height=int(value["height"]),
            boxes=boxes,
            labels=labels,
            difficult=_flags(value, "difficult", len(boxes)),
            crowd=_flags(value, "crowd", len(boxes)),
            image_id=value.get("image_id"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _error(
            image_id, f"has an annotation of another form: {type(error).__name__} {error}"
        ) from error
    if not len(found.boxes) == len(found.labels) == len(found.difficult) == len(found.crowd):
        raise _error(image_id, "has an annotation whose lists differ in length")
    if not (np.isfinite(boxes).all() and (boxes[:, :2] < boxes[:, 2:]).all()):
        raise _error(image_id, "has a box without area")
    return found


def _flags(value: dict, name: str, length: int) -> np.ndarray:
    return np.array(value.get(name) or [0] * length, bool)


def _error(image_id: str, what: str) -> ImageError:
    return ImageError(f"{image_id} {what}", stage="annotation", kind="BadAnnotation")

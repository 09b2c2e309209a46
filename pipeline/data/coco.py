"""A COCO instances file: boxes are (left, top, width, height), continuous and 0-based already."""

import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.data.annotations import Classes
from pipeline.data.sources import Source, SourceBox, SourceImage, four_numbers, image_files, missing_images
from pipeline.errors import ConfigError


def read_coco(images_uri: str, annotations_uri: str) -> Source:
    """The images and boxes of a COCO instances file.

    Category ids are kept. Where they start at 0 they become 1, 2, ..., because 0 is the background.

    Raises:
        ConfigError: not such a file, no categories, or it names images that aren't there.
    """
    files = image_files(images_uri)
    where = f"--annotations {annotations_uri}"
    try:
        data = json.loads(storage.read_bytes(annotations_uri))
        categories = coco_entries(data, "categories", ("id", "name"), where)
        entries = coco_entries(data, "images", ("id", "file_name"), where)
        refuse_repeated([entry["id"] for entry in entries], where)
        names = {int(category["id"]): str(category["name"]) for category in categories}
        boxes: dict[int, list[SourceBox]] = {entry["id"]: [] for entry in entries}
        for entry in coco_entries(data, "annotations", ("image_id", "category_id"), where):
            boxes.setdefault(entry["image_id"], []).append(_coco_box(entry, names, annotations_uri))
        names_of = [entry["file_name"].replace("\\", "/") for entry in entries]
        sizes = [(int(entry.get("width") or 0), int(entry.get("height") or 0)) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where} is no COCO instances file: {type(error).__name__} {error}") from error
    _refuse_strangers(boxes.keys() - {entry["id"] for entry in entries}, annotations_uri)
    found = _find_images(files, names_of, images_uri)
    images = [
        SourceImage(name, files[name], width, height, tuple(boxes[entry["id"]]), entry["id"])
        for name, (width, height), entry in zip(found, sizes, entries, strict=True)
    ]
    shift = 1 if 0 in names else 0
    return Source(
        tuple(sorted(images, key=lambda image: image.name)),
        Classes(tuple(id_ + shift for id_ in sorted(names)), tuple(names[id_] for id_ in sorted(names))),
        len(files) - len(images),
        ("category ids start at 0 in the file; in the shards they are one higher",) if shift else (),
    )


def coco_entries(data: Mapping[str, Any], kind: str, keys: Sequence[str], where: str) -> list[dict[str, Any]]:
    """One list of a COCO file, whose entries all have these keys.

    Raises:
        ConfigError: one lacks a key; `where` names the file.
        KeyError: no such list.
    """
    for n, entry in enumerate(data[kind]):
        if missing := [key for key in keys if key not in entry]:
            which = f"{kind}[{n}] (id {entry['id']})" if "id" in entry else f"{kind}[{n}]"
            raise ConfigError(f"{where} is no COCO instances file: {which} has no {missing[0]}")
    return data[kind]


def refuse_repeated(images: Sequence[object], where: str) -> None:
    """Raises: ConfigError: an image (an id or a name) is listed more than once."""
    for image, count in Counter(images).most_common(1):
        if count > 1:
            raise ConfigError(f"{where} lists image {image} {count} times; each image may be listed once")


def _coco_box(entry: Mapping[str, Any], names: Mapping[int, str], uri: str) -> SourceBox:
    where = f"{posixpath.basename(uri)} annotation {entry.get('id', '?')} of image {entry['image_id']}"
    class_name = names.get(entry["category_id"], f"category {entry['category_id']}")
    difficult, crowd = bool(entry.get("difficult", 0)), bool(entry.get("iscrowd", 0))
    values = four_numbers(entry.get("bbox"))
    if values is None:
        where = f"{where} ({class_name}, bbox {entry.get('bbox')})"
        return SourceBox(class_name, None, True, difficult, crowd, where)
    x, y, w, h = values
    where = f"{where} ({class_name}, bbox {x:g} {y:g} {w:g} {h:g})"
    return SourceBox(class_name, (x, y, x + w, y + h), w <= 0 or h <= 0, difficult, crowd, where)


def _refuse_strangers(image_ids: Collection[object], uri: str) -> None:
    if image_ids:
        raise ConfigError(
            f"--annotations {uri}: {len(image_ids)} image ids of annotations are not in its list of images, "
            f"such as {next(iter(image_ids))}"
        )


def _find_images(files: Mapping[str, str], names: Sequence[str], images_uri: str) -> list[str]:
    """The file for each annotated name: the same relative path, else the only file with that base name."""
    by_base: dict[str, list[str]] = defaultdict(list)
    for name in files:
        by_base[posixpath.basename(name)].append(name)
    found, missing = [], []
    for name in names:
        same_base = by_base.get(posixpath.basename(name), [])
        if name in files:
            found.append(name)
        elif len(same_base) == 1:
            found.append(same_base[0])
        else:
            missing.append(name)
    if missing:
        raise missing_images(missing, images_uri)
    name, count = Counter(found).most_common(1)[0] if found else ("", 0)
    if count > 1:
        raise ConfigError(f"the annotations name {name} {count} times; each image may be listed once")
    return found

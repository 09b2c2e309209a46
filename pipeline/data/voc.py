"""A PASCAL VOC folder: one XML file an image, lists of images in `ImageSets/Main/`.

VOC counts pixels from 1 and includes the last one, so pixel i covers i-1..i on a continuous axis and the box
that covers pixels xmin..xmax is (xmin - 1, ymin - 1, xmax, ymax). Its width is xmax - xmin + 1, as in the
VOC development kit.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from xml.etree import ElementTree

from pipeline import storage
from pipeline.data.annotations import Classes
from pipeline.data.names import is_hidden
from pipeline.data.sources import Source, SourceBox, SourceImage, four_numbers, image_files, missing_images
from pipeline.errors import ConfigError

_NUM_READERS = 16  # small files at a time: hides the latency of object stores


def read_voc(
    images_uri: str, annotations_uri: str = "", *, split: str = "", class_names: Sequence[str] = ()
) -> Source:
    """The images and boxes of a PASCAL VOC folder.

    An XML file belongs to the image of the same name; its `path` element is a place on its author's computer
    and is ignored. Classes are the names found in all XML files, sorted (for VOC: the official order).

    Args:
        images_uri: the folder of images, or the one that has `JPEGImages/` in it.
        annotations_uri: the folder of XML files; `Annotations/` beside the images where empty.
        split: take the images that `ImageSets/Main/<split>.txt` lists; all with an XML file where empty.
        class_names: the classes in this order, instead of those found.

    Raises:
        ConfigError: missing folders, split, images or XML files, or a file that is no VOC annotation.
    """
    if "JPEGImages" in storage.list_names(images_uri):
        annotations_uri = annotations_uri or storage.join(images_uri, "Annotations")
        images_uri = storage.join(images_uri, "JPEGImages")
    annotations_uri = annotations_uri or storage.join(_parent(images_uri), "Annotations")
    files = image_files(images_uri)
    uris = _xml_files(annotations_uri)
    keys = _split_keys(annotations_uri, split, uris) if split else sorted(uris)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        read = keys if class_names else sorted(uris)
        parsed = dict(zip(read, pool.map(lambda key: _parse_xml(uris[key]), read), strict=True))
    names = class_names or sorted({box.class_name for xml in parsed.values() for box in xml.boxes} - {""})
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in sorted(files):
        by_key[posixpath.splitext(name)[0]].append(name)
    images = [_voc_image(parsed[key], by_key.get(key, []), files) for key in keys]
    missing = [key for key, image in zip(keys, images, strict=True) if image is None]
    if missing:
        raise missing_images(missing, images_uri)
    return Source(
        tuple(sorted((image for image in images if image), key=lambda image: image.name)),
        Classes(tuple(range(1, len(names) + 1)), tuple(names)),
        0 if split else len(files) - len(images),
    )


def _parent(uri: str) -> str:
    return posixpath.dirname(uri.rstrip("/")) or "."


def _xml_files(annotations_uri: str) -> dict[str, str]:
    """URI by relative path without ending."""
    found = {}
    for file in storage.list_files(annotations_uri):
        path = file.uri[len(annotations_uri) :].lstrip("/")
        if path.lower().endswith(".xml") and not is_hidden(path):
            found[path[: -len(".xml")]] = file.uri
    if not found:
        raise ConfigError(f"--annotations {annotations_uri}: no XML files there; check the path")
    return found


def _split_keys(annotations_uri: str, split: str, uris: Mapping[str, str]) -> list[str]:
    """The names in a split list; the second column of class lists such as `cat_train.txt` is ignored."""
    folder = storage.join(_parent(annotations_uri), "ImageSets", "Main")
    uri = storage.join(folder, f"{split}.txt")
    if not storage.exists(uri):
        known = sorted(posixpath.splitext(name)[0] for name in storage.list_names(folder))
        raise ConfigError(f"--split {split}: no {uri} (there are: {', '.join(known) or 'none'})")
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--split {split}: {uri} is no UTF-8 text ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    keys = [name if name in uris else re.sub(r"\s+-?[01]$", "", name) for name in names]
    missing = [key for key in keys if key not in uris]
    if missing:
        raise ConfigError(
            f"--split {split}: {len(missing)} have no XML file, such as {', '.join(missing[:3])}"
        )
    if not keys:
        raise ConfigError(f"--split {split}: {uri} is empty")
    return list(dict.fromkeys(keys))


@dataclass(frozen=True, slots=True)
class _Xml:
    """One VOC annotation file."""

    filename: str
    width: int
    height: int
    boxes: tuple[SourceBox, ...]


def _parse_xml(uri: str) -> _Xml:
    try:
        root = ElementTree.fromstring(storage.read_bytes(uri))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter: encodings
        raise ConfigError(f"{uri}: no XML ({error})") from error
    if root.tag != "annotation":
        raise ConfigError(f"{uri}: no VOC annotation (the root element is {root.tag})")
    width, height = (_whole(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    boxes = tuple(_voc_box(item, n, uri) for n, item in enumerate(root.findall("object"), start=1))
    return _Xml(root.findtext("filename", "").strip(), width, height, boxes)


def _whole(text: str) -> int:
    """A size in pixels; 0 where it is something else."""
    return int(float(text)) if re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", text) else 0


def _voc_box(item: ElementTree.Element, number: int, uri: str) -> SourceBox:
    class_name = item.findtext("name", "").strip()
    texts = [item.findtext(f"bndbox/{side}", "?").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
    where = f"{posixpath.basename(uri)} object {number} ({class_name} {' '.join(texts)})"
    difficult = item.findtext("difficult", "0").strip() == "1"
    values = four_numbers(texts)
    if values is None:
        return SourceBox(class_name, None, True, difficult, False, where)
    xmin, ymin, xmax, ymax = values
    empty = xmax <= xmin or ymax <= ymin
    return SourceBox(class_name, (xmin - 1, ymin - 1, xmax, ymax), empty, difficult, False, where)


def _voc_image(found: _Xml, same_name: list[str], files: Mapping[str, str]) -> SourceImage | None:
    """The image of an XML file: of the same name, whatever its ending; else the one that the file names."""
    name = found.filename if found.filename in same_name or not same_name else same_name[0]
    if name not in files:
        return None
    return SourceImage(name, files[name], found.width, found.height, found.boxes)

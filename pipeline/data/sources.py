"""Data sets as people have them, before any check: their images and where the boxes are.

`coco` and `voc` read the two common forms; a folder of images alone is read here.
"""

import math
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.annotations import Classes
from pipeline.data.names import is_image_name
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SourceBox:
    """One annotated box before any check.

    Attributes:
        class_name: as written.
        xyxy: 0-based continuous pixels; None where it is not four numbers.
        empty: no area, as written.
        difficult: VOC's flag.
        crowd: COCO's flag.
        where: file and object, for messages.
    """

    class_name: str
    xyxy: tuple[float, float, float, float] | None
    empty: bool
    difficult: bool
    crowd: bool
    where: str


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a data set.

    Attributes:
        name: path relative to the folder of images.
        uri: where it is.
        width: as annotated; 0 where not said.
        height: as `width`.
        boxes: None in a data set without annotations.
        image_id: COCO's number.
    """

    name: str
    uri: str
    width: int = 0
    height: int = 0
    boxes: tuple[SourceBox, ...] | None = None
    image_id: int | None = None


@dataclass(frozen=True)
class Source:
    """A data set as it was found.

    Attributes:
        images: sorted by name.
        classes: None in a data set without annotations.
        num_left_out: image files in the folder that the annotations don't name.
        notes: what a user should know about the reading.
    """

    images: tuple[SourceImage, ...]
    classes: Classes | None
    num_left_out: int = 0
    notes: tuple[str, ...] = ()


def read_folder(images_uri: str) -> Source:
    """All images of a folder, without annotations. Raises: ConfigError where there are none."""
    files = image_files(images_uri)
    return Source(tuple(SourceImage(name, uri) for name, uri in sorted(files.items())), None)


def image_files(images_uri: str) -> dict[str, str]:
    """URI by relative path."""
    files = {file.uri[len(images_uri) :].lstrip("/"): file.uri for file in storage.list_files(images_uri)}
    images = {name: uri for name, uri in files.items() if is_image_name(name)}
    if not images:
        raise ConfigError(f"--images {images_uri}: no image files there; check the path")
    return images


def four_numbers(values: object) -> tuple[float, float, float, float] | None:
    """`values` as four finite floats; None where they are something else."""
    try:
        a, b, c, d = (float(value) for value in values)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    return (a, b, c, d) if all(map(math.isfinite, (a, b, c, d))) else None


def missing_images(names: list[str], images_uri: str) -> ConfigError:
    """What to say where annotated images are not there."""
    examples = ", ".join(names[:3])
    return ConfigError(
        f"--images {images_uri}: {len(names)} annotated images are not there, such as {examples}"
    )

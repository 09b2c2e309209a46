"""Which annotated boxes can be trained on: those that can't are named, with file and object."""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.data.annotations import Classes
from pipeline.data.sources import SourceBox, SourceImage

Corners = tuple[float, float, float, float]

# Files round coordinates, so a box may end a little outside its image; more than this is worth telling.
_ROUNDING = 0.5  # pixels


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """The boxes of one image that are fit for training.

    Attributes:
        boxes: with their corners, clipped to the image.
        problems: what is wrong with the others.
        usable: False where the image itself doesn't fit its annotation.
        num_clipped: boxes that reached out of the image.
        num_duplicates: boxes left out because the same one was there already.
    """

    boxes: tuple[tuple[SourceBox, Corners], ...]
    problems: tuple[str, ...]
    usable: bool = True
    num_clipped: int = 0
    num_duplicates: int = 0


def check_image(image: SourceImage, classes: Classes, *, width: int, height: int) -> CheckedImage:
    """Clip boxes to the image, leave out repeated ones, name those without area or of an unknown class.

    Args:
        image: the image as annotated.
        classes: the known ones.
        width: of the image as displayed; 0 where not known.
        height: as `width`.
    """
    if image.width and (width, height) != (image.width, image.height):
        annotated, shown = f"{image.width}x{image.height}", f"{width}x{height}"
        problem = f"{image.name} is annotated as {annotated}, but displayed as {shown} (EXIF orientation?)"
        return CheckedImage((), (problem,), usable=False)
    kept: dict[tuple[str, Corners], SourceBox] = {}
    problems: list[str] = []
    num_clipped = num_duplicates = 0
    for box in image.boxes or ():
        corners = _clip(box, width or math.inf, height or math.inf)
        if problem := _problem(box, corners, classes):
            problems.append(f"{box.where} {problem}")
        elif (box.class_name, corners) in kept:
            num_duplicates += 1
        else:
            kept[box.class_name, corners] = box
            num_clipped += _moved(box, corners)
    boxes = tuple((box, corners) for (_, corners), box in kept.items())
    return CheckedImage(boxes, tuple(problems), True, num_clipped, num_duplicates)


def _clip(box: SourceBox, width: float, height: float) -> Corners:
    """Corners inside the image; all zero where the box has none."""
    x1, y1, x2, y2 = box.xyxy or (0.0, 0.0, 0.0, 0.0)
    return max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)


def _problem(box: SourceBox, corners: Corners, classes: Classes) -> str:
    if box.xyxy is None:
        return "is not four numbers"
    if box.empty:
        return "has no area"
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        return "lies outside the image"
    if _is_empty(corners):
        return "has no area in float32"
    if box.class_name not in classes.names:
        return f"is of the unknown class {box.class_name!r}"
    return ""


def _is_empty(corners: Corners) -> bool:
    """Whether readers of the shard, who keep float32, would see a box without area, or one without end."""
    with np.errstate(over="ignore"):
        x1, y1, x2, y2 = np.array(corners, np.float32)
    return not (x1 < x2 < math.inf and y1 < y2 < math.inf)


def _moved(box: SourceBox, corners: Corners) -> bool:
    """Whether clipping changed the box by more than rounding."""
    return any(abs(a - b) > _ROUNDING for a, b in zip(box.xyxy or corners, corners, strict=True))

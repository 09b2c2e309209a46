"""Pictures of detections: boxes and labels on an image, and sheets of many images."""

import colorsys
import hashlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

PAPER: Color = (246, 246, 244)
INK: Color = (32, 33, 36)
LUMA = np.array([0.299, 0.587, 0.114])  # how bright red, green and blue look (ITU-R BT.601)
GAP = 12
ROW_HEIGHT = 300
# A panorama or a column of pixels gets a tile of this shape at most, with space around it.
WIDEST, NARROWEST = 3.0, 0.5


def class_color(class_name: str) -> Color:
    """A strong RGB colour that depends on the name only, so it is the same in every picture."""
    digest = hashlib.blake2b(class_name.encode(errors="replace"), digest_size=4).digest()
    hue = int.from_bytes(digest[:2], "big") / 65536
    lightness = (0.42, 0.52, 0.62)[digest[2] % 3]
    color = np.array(colorsys.hls_to_rgb(hue, lightness, 0.85)) * 255
    too_dark = max(100 - float(color @ LUMA), 0.0)  # blue is: it would not be seen in shadows
    red, green, blue = (color + (255 - color) * too_dark / 255).round().astype(int).tolist()
    return red, green, blue


def readable_on(color: Color) -> Color:
    """Black or white, whichever can be read on `color`."""
    return (0, 0, 0) if np.array(color) @ LUMA > 140 else (255, 255, 255)


def draw_boxes(pixels_HW3: np.ndarray, detections: pd.DataFrame) -> Image.Image:
    """Draw boxes with class name and score on an image, the best on top.

    In a crowd, a label that would cover a better one is left out; its box stays.

    Args:
        pixels_HW3: uint8 RGB, upright; may be smaller than the original, boxes are scaled to it.
        detections: rows of `detections/` of this image (`class_name`, `score`, `xmin` ... `ymax`,
            `image_width`, `image_height`).

    Returns:
        A new image of the size of `pixels_HW3`.
    """
    picture = Image.fromarray(pixels_HW3).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    size = min(max(round(min(picture.size) / 22), 11), 48)
    line = max(round(size / 6), 2)
    boxes = _scaled_boxes(detections, picture.size)
    best_last = np.argsort(detections["score"].to_numpy(), kind="stable")
    names, scores = detections["class_name"].tolist(), detections["score"].tolist()
    for i in best_last:
        canvas.rectangle(boxes[i], outline=class_color(names[i]), width=line)
    taken: list[Box] = []
    for i in best_last[::-1]:
        text = f"{names[i]} {scores[i]:.2f}"
        tag = _label_place(_label_size(text, size), boxes[i], picture.size, taken)
        if tag is not None:
            _draw_label(canvas, tag, text, class_color(names[i]), size)
            taken.append(tag)
    return picture


def contact_sheet(
    images: Sequence[tuple[str, np.ndarray, pd.DataFrame]], *, width: int = 1600, row_height: int = ROW_HEIGHT
) -> Image.Image:
    """Many images with their boxes in one picture, in rows of equal height.

    Args:
        images: (title, uint8 RGB [H, W, 3], rows of `detections/` of this image) each.
        width: of the sheet, in pixels.
        row_height: of a row of images, in pixels; full rows are stretched to the width.

    Returns:
        The sheet; a small one that says so where there is no image.
    """
    font_size = 15
    title_height = font_size + 10
    rows = _layout([pixels.shape[1] / pixels.shape[0] for _, pixels, _ in images], width, row_height)
    height = sum(row_height_ + title_height + GAP for row_height_, _ in rows) + GAP
    sheet = Image.new("RGB", (width, max(height, 4 * GAP)), PAPER)
    canvas = ImageDraw.Draw(sheet)
    if not images:
        canvas.text((GAP, GAP), "No images", fill=INK, font=_font("No images", font_size))
    top = GAP
    for tile_height, tiles in rows:
        left = GAP
        for index, tile_width in tiles:
            title, pixels, detections = images[index]
            tile = draw_boxes(_fit(pixels, tile_width, tile_height), detections)
            sheet.paste(tile, (left + (tile_width - tile.width) // 2, top + (tile_height - tile.height) // 2))
            text = _shortened(title, tile_width, font_size)
            canvas.text((left, top + tile_height + 4), text, fill=INK, font=_font(text, font_size))
            left += tile_width + GAP
        top += tile_height + title_height + GAP
    return sheet


# ---- one image ---------------------------------------------------------------------------------------


def _scaled_boxes(detections: pd.DataFrame, size: tuple[int, int]) -> list[Box]:
    """Boxes in pixels of a picture of `size` (width, height), inside it and at least one pixel large."""
    columns = ["xmin", "ymin", "xmax", "ymax", "image_width", "image_height"]
    xmin, ymin, xmax, ymax, width, height = (detections[name].to_numpy(np.float64) for name in columns)
    left, right = xmin * size[0] / width, xmax * size[0] / width
    top, bottom = ymin * size[1] / height, ymax * size[1] / height
    left, top = np.clip(left, 0, size[0] - 1), np.clip(top, 0, size[1] - 1)
    right, bottom = np.clip(right - 1, left, size[0] - 1), np.clip(bottom - 1, top, size[1] - 1)
    corners = np.stack([left, top, right, bottom], axis=1).round().astype(int)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.tolist()]


def _label_size(text: str, font_size: int) -> tuple[int, int]:
    _, _, width, height = _font(text, font_size).getbbox(text)
    return int(width) + 2 * _pad(font_size), int(height) + 2 * _pad(font_size)


def _pad(font_size: int) -> int:
    return max(font_size // 5, 2)


def _label_place(label: tuple[int, int], box: Box, size: tuple[int, int], taken: list[Box]) -> Box | None:
    """Above the box, inside it at the top, or below: the first place in the picture that is free."""
    width, height = label
    left = max(min(box[0], size[0] - width), 0)
    inside = min(box[1], max(size[1] - height, 0))
    for top in (box[1] - height, inside, box[3]):
        place = (left, top, left + width, top + height)
        fits = (top >= 0 and place[3] <= size[1]) or top == inside
        if fits and not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_label(canvas: ImageDraw.ImageDraw, place: Box, text: str, color: Color, font_size: int) -> None:
    canvas.rectangle(place, fill=color)
    corner = (place[0] + _pad(font_size), place[1] + _pad(font_size))
    canvas.text(corner, text, fill=readable_on(color), font=_font(text, font_size))


# ---- sheets ------------------------------------------------------------------------------------------


def _layout(aspects: list[float], width: int, row_height: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Rows of (height, [(image index, tile width)]): each full row is scaled to the width of the sheet."""
    rows: list[tuple[int, list[tuple[int, int]]]] = []
    row: list[int] = []
    shapes = [min(max(aspect, NARROWEST), WIDEST) for aspect in aspects]
    for index in range(len(shapes)):
        row.append(index)
        room = width - GAP * (len(row) + 1)
        total = sum(shapes[i] for i in row)
        if total * row_height >= room or index == len(shapes) - 1:
            height = min(room / total, row_height)
            rows.append((round(height), [(i, int(shapes[i] * height)) for i in row]))
            row = []
    return rows


def _fit(pixels_HW3: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale an image to fit into a tile, keeping its shape."""
    picture = Image.fromarray(pixels_HW3)
    scale = min(width / picture.width, height / picture.height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def _shortened(title: str, width: int, font_size: int) -> str:
    """The end of the title that fits: file names differ at their end."""
    title = "".join(char if char.isprintable() else "?" for char in title)
    if _font(title, font_size).getlength(title) <= width:
        return title
    while title and _font(title, font_size).getlength("..." + title) > width:
        title = title[1:]
    return "..." + title


# ---- fonts -------------------------------------------------------------------------------------------


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has all letters of `text`: Pillow's own, DejaVu (with matplotlib), the system's."""
    fonts = _fonts(size)
    for font in fonts:
        if all(_has_glyph(font, char) for char in set(text)):
            return font
    return fonts[-1]


@lru_cache(maxsize=64)
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    own = ImageFont.load_default(size)
    matplotlib = importlib.util.find_spec("matplotlib")
    folder = (
        Path(matplotlib.origin).parent / "mpl-data/fonts/ttf" if matplotlib and matplotlib.origin else Path()
    )
    found = [own] if isinstance(own, ImageFont.FreeTypeFont) else []
    for name in (
        "NotoSansCJK-Regular.ttc",
        "wqy-zenhei.ttc",
        "DejaVuSans.ttf",
        str(folder / "DejaVuSans.ttf"),
    ):
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue  # not on this machine
    return tuple(found)


@lru_cache(maxsize=100_000)
def _has_glyph(font: ImageFont.FreeTypeFont, char: str) -> bool:
    """Whether the font draws `char` as something else than its sign for unknown letters."""
    return char.isspace() or _glyph(font, char) != _glyph(font, "\U0010fffd")


def _glyph(font: ImageFont.FreeTypeFont, char: str) -> bytes:
    picture = Image.new("L", (64, 64))
    ImageDraw.Draw(picture).text((0, 0), char, fill=255, font=font)
    return picture.tobytes()

"""A generated set of coloured shapes on noisy pictures, as COCO files: what `make train-demo` learns.

Run as `python -m pipeline.training.demo FOLDER`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NAMES = ("disc", "square", "triangle")
SPLITS = {"train": 160, "val": 40, "test": 60}
SIZE = (400, 300)


def write_set(folder: Path, *, seed: int = 0) -> None:
    """Write `train`, `val` and `test`: a folder of JPEGs and a COCO instances file each."""
    for split_seed, (split, count) in enumerate(SPLITS.items()):
        rng = np.random.default_rng([seed, split_seed])
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for image_id in range(1, count + 1):
            picture, objects = draw(rng)
            name = f"{image_id:04}.jpg"
            picture.save(folder / split / name, quality=90)
            images.append({"id": image_id, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            annotations += [
                {"id": len(annotations) + i, "image_id": image_id, "category_id": label, "bbox": box}
                for i, (label, box) in enumerate(objects, start=1)
            ]
        categories = [{"id": label, "name": name} for label, name in enumerate(NAMES, start=1)]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(data))


def draw(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """One picture of 2 to 6 shapes, with (label, [x, y, width, height]) of each; later ones lie on top."""
    coarse = rng.integers(60, 200, (6, 8, 3), dtype=np.uint8)
    background = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC))
    noise = rng.normal(0, 12, background.shape)
    picture = Image.fromarray(np.clip(background + noise, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    cells = rng.permutation(12)[: int(rng.integers(2, 7))]  # of a 4x3 grid
    objects = []
    for cell in cells.tolist():
        side = int(rng.integers(36, 96))
        x = cell % 4 * 100 + int(rng.integers(0, 100 - side))
        y = cell // 4 * 100 + int(rng.integers(0, 100 - side))
        label = int(rng.integers(1, len(NAMES) + 1))
        red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
        _shape(pen, label, x, y, side, (red, green, blue))
        objects.append((label, [x, y, side, side]))
    return picture, objects


def _shape(
    pen: ImageDraw.ImageDraw, label: int, x: int, y: int, side: int, colour: tuple[int, int, int]
) -> None:
    right, bottom = x + side - 1, y + side - 1
    if label == 1:
        pen.ellipse((x, y, right, bottom), fill=colour)
    elif label == 2:
        pen.rectangle((x, y, right, bottom), fill=colour)
    else:
        pen.polygon([(x, bottom), (right, bottom), (x + side // 2, y)], fill=colour)


if __name__ == "__main__":
    write_set(Path(sys.argv[1]))

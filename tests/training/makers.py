"""A network for small images, and data sets of coloured shapes, for training tests of seconds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.annotations import read_classes
from pipeline.model.anchors import PriorMap, PriorSet
from pipeline.model.checkpoint import load_checkpoint, save_checkpoint
from pipeline.model.ssd import SSD
from pipeline.training.index import index_shards, training_shards
from pipeline.training.samples import SampleSettings
from tests.makers import encode, make_tar_shard

SIDE = 128  # of the network's input
NAMES = ("disc", "square")


def small_model() -> SSD:
    """The bundled detector of 80 classes for images of 128x128: a sixth of the work."""
    model = load_checkpoint("coco_ssdlite300_mobilenet_v2")
    grids = (8, 4, 2, 1, 1, 1)
    maps = tuple(
        PriorMap(grid, 1 / grid, old.sizes_wh)
        for grid, old in zip(grids, model.spec.priors.maps, strict=True)
    )
    spec = dataclasses.replace(
        model.spec, input_height=SIDE, input_width=SIDE, priors=PriorSet("small", maps)
    )
    small = SSD(spec)
    small.load_state_dict(model.state_dict())
    return small.eval()


def save_small_model(path: Path) -> Path:
    """The same as a checkpoint for `--init`."""
    save_checkpoint(small_model(), path)
    return path


def make_picture(rng: np.random.Generator, num_objects: int) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """A grey picture of 160x128 with discs and squares; their boxes and labels."""
    pixels = np.full((128, 160, 3), 120, np.uint8) + rng.integers(0, 20, (128, 160, 3), dtype=np.uint8)
    boxes, labels = [], []
    for place in rng.permutation(6)[:num_objects]:  # of a 3x2 grid, so that shapes never touch
        side = int(rng.integers(28, 44))
        left = int(place % 3) * 53 + int(rng.integers(0, 53 - side))
        top = int(place // 3) * 64 + int(rng.integers(0, 64 - side))
        label = int(rng.integers(1, 3))
        y, x = np.ogrid[:side, :side]
        radius = side / 2
        inside = (
            (x - radius + 0.5) ** 2 + (y - radius + 0.5) ** 2 <= radius**2 if label == 1 else (x + y >= 0)
        )
        pixels[top : top + side, left : left + side][inside] = (200, 40, 40) if label == 1 else (30, 60, 200)
        boxes.append([left, top, left + side, top + side])
        labels.append(label)
    return pixels, boxes, labels


def make_set(folder: Path, num_images: int, *, seed: int = 0, num_shards: int = 1, empty: int = 0) -> Path:
    """Annotated shards of pictures; the first `empty` ones have no objects."""
    rng = np.random.default_rng(seed)
    images: list[dict[str, bytes]] = [{} for _ in range(num_shards)]
    annotations: dict[str, dict] = {}
    for i in range(num_images):
        pixels, boxes, labels = make_picture(rng, 0 if i < empty else int(rng.integers(1, 4)))
        name = f"{seed}-{i:03}.png"
        images[i % num_shards][name] = encode(pixels, "PNG")
        annotations[name] = {"width": 160, "height": 128, "boxes": boxes, "labels": [10 * k for k in labels]}
    for number, members in enumerate(images):
        make_tar_shard(folder / f"shard-{number:05}.tar", members, annotations=annotations)
    classes = [{"id": 10 * k, "name": name} for k, name in enumerate(NAMES, start=1)]
    (folder / "classes.json").write_text(json.dumps({"classes": classes}))
    return folder


def read_set(folder: Path):
    """Index and classes of `make_set`."""
    classes = read_classes(str(folder))
    return index_shards(training_shards(str(folder), flag="--train"), classes), classes


def settings(augmentation="none", **changes) -> SampleSettings:
    """How pictures become samples of the small model."""
    given: dict[str, Any] = {
        "height": SIDE,
        "width": SIDE,
        "resize_rule": "tf_legacy",
        "fill": (128, 128, 128),
        "augmentation": augmentation,
        "flip": "horizontal",
        "train_difficult": True,
        "seed": 0,
    }
    return SampleSettings(**(given | changes))

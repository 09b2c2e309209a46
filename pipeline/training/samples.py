"""Images and boxes of a batch, or images to validate on: fetch by byte range, decode, augment; without Ray.

Shapes: N images of the batch, H W pixels of the network's input, G objects of an image.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.annotations import Annotation
from pipeline.data.augment import Flip, Sample, augment, augment_lightly, sample_rng, whole_image
from pipeline.data.images import ResizeRule, decode_image, resize_image
from pipeline.errors import ImageError
from pipeline.training.index import annotation
from pipeline.training.order import Pick

Augmentation = Literal["ssd", "crops", "light", "none"]

BATCHES = pa.schema(
    [
        ("step", pa.int64()),  # of the first batch
        ("rank", pa.int64()),
        ("pixels", pa.large_binary()),  # uint8 [S, N, H, W, 3] of S batches
        ("boxes", pa.list_(pa.binary())),  # float32 [G, 4] of each of S * N images
        ("labels", pa.list_(pa.binary())),  # int64 [G] of each image
        ("image_ids", pa.list_(pa.string())),
        ("failures", pa.list_(pa.list_(pa.string()))),  # of each batch
    ]
)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How images become samples.

    Attributes:
        height: rows of the network's input.
        width: columns of the network's input.
        resize_rule: of images that are not augmented, as in inference.
        fill: RGB around an image that `expand` makes smaller.
        augmentation: "ssd" is that of the paper, "crops" distorts, crops to large parts and flips, "light"
            only distorts and flips, "none" only resizes.
        flip: which ways images are mirrored; with "none" of `augmentation` they aren't.
        train_difficult: whether difficult objects are learnt.
        seed: of the run.
    """

    height: int
    width: int
    resize_rule: ResizeRule
    fill: tuple[int, int, int]
    augmentation: Augmentation
    flip: Flip
    train_difficult: bool
    seed: int


@dataclass(frozen=True)
class Batch:
    """What one worker learns from in one step.

    Attributes:
        images_NHW3: uint8 RGB.
        boxes: float32 [G, 4] xyxy in pixels of the input, of each image.
        labels: int64 [G] class numbers, of each image.
        image_ids: of the images.
        failures: images that can't be read or decoded, with the reason; another image is in their place.
    """

    images_NHW3: np.ndarray  # noqa: N815
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    image_ids: list[str]
    failures: tuple[str, ...] = ()

    def split(self, parts: int) -> list["Batch"]:
        """Micro-batches of nearly equal size, none of them empty."""
        edges = np.linspace(0, len(self.image_ids), min(parts, len(self.image_ids)) + 1).astype(int)
        return [self._slice(slice(start, end)) for start, end in pairwise(edges)]

    def _slice(self, part: slice) -> "Batch":
        return replace(
            self,
            images_NHW3=self.images_NHW3[part],
            boxes=self.boxes[part],
            labels=self.labels[part],
            image_ids=self.image_ids[part],
        )


def load_batch(picks: Sequence[Pick], index: pa.Table, settings: SampleSettings, *, tries: int = 16) -> Batch:
    """Fetch, decode and augment the images of a batch.

    An image that can't be decoded is named in `failures`, and the next good one of the batch stands in. Where
    none is good (a batch may be one image), the rows after them in the index do, up to `tries` times.

    Raises:
        ImageError: none of all these can be decoded.
        StorageError: a shard can't be read.
    """
    rows = index.take([pick.sample for pick in picks]).to_pylist()
    samples: list[Sample | None] = []
    failures = []
    for pick, row, data in zip(picks, rows, fetch(rows), strict=True):
        try:
            rng = sample_rng(settings.seed, epoch=pick.epoch, image_id=row["image_id"])
            samples.append(make_sample(data, annotation(row), settings, rng))
        except ImageError as error:
            failures.append(f"{row['image_id']}: {error}")
            samples.append(None)
    good = [i for i, sample in enumerate(samples) if sample is not None]
    if not good and tries:
        after = [Pick(pick.epoch, (pick.sample + 1) % len(index)) for pick in picks]
        batch = load_batch(after, index, settings, tries=tries - 1)
        return replace(batch, failures=(*failures, *batch.failures))
    if not good:
        raise ImageError(f"no image of a whole batch can be decoded: {'; '.join(failures[:3])}")
    chosen = [i if samples[i] is not None else min(good, key=lambda g: (g < i, g)) for i in range(len(rows))]
    found = [sample for i in chosen if (sample := samples[i]) is not None]
    return Batch(
        images_NHW3=np.stack([sample.pixels for sample in found]),
        boxes=[sample.boxes for sample in found],
        labels=[sample.labels for sample in found],
        image_ids=[rows[i]["image_id"] for i in chosen],
        failures=tuple(failures),
    )


@dataclass(frozen=True)
class ValidationImages:
    """Some images of the validation set, ready for the detector.

    Attributes:
        numbers: int64 [N], row in the index.
        images_NHW3: uint8 RGB of the input size.
        sizes_N2: int32, width and height of the originals.
    """

    numbers: np.ndarray
    images_NHW3: np.ndarray  # noqa: N815
    sizes_N2: np.ndarray  # noqa: N815


def load_images(
    index: pa.Table, numbers: Sequence[int], *, height: int, width: int, rule: ResizeRule
) -> tuple[ValidationImages, tuple[str, ...]]:
    """Decode and resize some rows of the index as inference does.

    Returns:
        The images, and those that can't be decoded, with the reason; the detector sees grey in their place.
    """
    rows = index.take(list(numbers)).to_pylist()
    images = np.full((len(rows), height, width, 3), 128, np.uint8)
    sizes = np.array([[row["width"], row["height"]] for row in rows], np.int32).reshape(-1, 2)
    failures = []
    for i, (row, data) in enumerate(zip(rows, fetch(rows), strict=True)):
        try:
            decoded = decode_image(data, min_size=(2 * width, 2 * height))
            images[i] = resize_image(decoded.pixels, height=height, width=width, rule=rule)
            sizes[i] = decoded.width, decoded.height
        except ImageError as error:
            failures.append(f"{row['image_id']}: {error}")
    return ValidationImages(np.array(numbers, np.int64), images, sizes), tuple(failures)


def failures_text(failures: Sequence[str], num_images: int) -> str:
    """How many of the validation images can't be decoded, and the first of them."""
    more = "; ..." if len(failures) > 3 else ""
    return (
        f"{len(failures):,} of {num_images:,} images of --val can't be decoded, grey stands in for them: "
        f"{'; '.join(failures[:3])}{more}"
    )


def fetch(rows: Sequence[dict]) -> list[bytes]:
    """The files of some rows of the index, by byte range, one request per shard and run."""
    by_uri: defaultdict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_uri[row["uri"]].append(i)
    data = [b""] * len(rows)
    for uri, members in by_uri.items():
        places = [(rows[i]["offset"], rows[i]["size"]) for i in members]
        for i, piece in zip(members, storage.read_ranges(uri, places), strict=True):
            data[i] = piece
    return data


def make_sample(data: bytes, found: Annotation, settings: SampleSettings, rng: np.random.Generator) -> Sample:
    """Decode and augment one image; its pixels are uint8 [H, W, 3], boxes in pixels of them."""
    pixels = decode_image(data).pixels
    learnt = ~found.crowd & (settings.train_difficult | ~found.difficult)
    scale = np.array([pixels.shape[1] / found.width, pixels.shape[0] / found.height] * 2, np.float32)
    boxes = found.boxes[learnt] * scale
    return with_area(_augment(whole_image(pixels, boxes, found.labels[learnt]), settings, rng))


def with_area(sample: Sample) -> Sample:
    """The sample without objects of which the crop has left less than a tenth of a pixel."""
    sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
    kept = (sides > 0.1).all(axis=1)
    return replace(sample, boxes=sample.boxes[kept], labels=sample.labels[kept])


def _augment(sample: Sample, settings: SampleSettings, rng: np.random.Generator) -> Sample:
    size = {"height": settings.height, "width": settings.width}
    if settings.augmentation == "ssd":
        return augment(sample, rng, **size, fill=settings.fill, flips=settings.flip)
    if settings.augmentation in ("crops", "light"):
        crops = settings.augmentation == "crops"
        return augment_lightly(sample, rng, **size, crops=crops, flips=settings.flip)
    pixels = resize_image(sample.pixels, **size, rule=settings.resize_rule)
    shape = sample.pixels.shape
    factors = np.array([settings.width / shape[1], settings.height / shape[0]] * 2, np.float32)
    return whole_image(pixels, sample.boxes * factors, sample.labels)


def to_row(batches: Sequence[Batch], *, step: int, rank: int) -> pa.Table:
    """Batches of one size as one row, which no operator of Ray Data can cut; `step` is that of the first."""
    pixels = np.concatenate([batch.images_NHW3 for batch in batches])
    offsets = pa.py_buffer(np.array([0, pixels.nbytes], np.int64))
    images = [image for batch in batches for image in zip(batch.boxes, batch.labels, strict=True)]
    columns = {
        "step": [step],
        "rank": [rank],
        # Around the pixels' own memory: one copy less of what may be 50 MB.
        "pixels": pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels)]),
        "boxes": [[boxes.astype(np.float32).tobytes() for boxes, _ in images]],
        "labels": [[labels.astype(np.int64).tobytes() for _, labels in images]],
        "image_ids": [[image_id for batch in batches for image_id in batch.image_ids]],
        "failures": [[batch.failures for batch in batches]],
    }
    return pa.table(columns, schema=BATCHES)


def from_row(row: pa.Table, *, height: int, width: int) -> Iterator[Batch]:
    """The batches of `to_row`."""
    failures, image_ids = row["failures"][0].as_py(), row["image_ids"][0].as_py()
    pixels = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8).reshape(-1, height, width, 3)
    boxes = [np.frombuffer(boxes, np.float32).reshape(-1, 4) for boxes in row["boxes"][0].as_py()]
    labels = [np.frombuffer(labels, np.int64) for labels in row["labels"][0].as_py()]
    size = len(image_ids) // len(failures)
    for number, failed in enumerate(failures):
        part = slice(number * size, (number + 1) * size)
        yield Batch(
            images_NHW3=pixels[part].copy(),  # the object store is read-only, which PyTorch warns of
            boxes=boxes[part],
            labels=labels[part],
            image_ids=image_ids[part],
            failures=tuple(failed),
        )

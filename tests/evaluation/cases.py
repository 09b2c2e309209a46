"""Small data sets written by hand, for the tests of all measures."""

from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.boxsets import Detected, GroundTruth

Box = tuple[float, float, float, float]


def truth(
    *boxes: tuple[int, int, Box],
    num_images: int = 0,
    crowd: Sequence[int] = (),
    difficult: Sequence[int] = (),
    class_names: dict[int, str] | None = None,
) -> GroundTruth:
    """Annotated boxes (image, label, xywh); `crowd` and `difficult` are positions in the list."""
    images = [image for image, _, _ in boxes]
    labels = np.array([label for _, label, _ in boxes], np.int32)
    boxes_xywh = np.array([box for _, _, box in boxes], np.float64).reshape(-1, 4)
    num_images = num_images or max(images, default=-1) + 1
    index = np.arange(len(boxes))
    return GroundTruth(
        image_ids=tuple(f"{i}.jpg" for i in range(num_images)),
        class_names=class_names or {int(label): f"class {label}" for label in sorted(set(labels.tolist()))},
        image_index=np.array(images, np.int32),
        boxes_xywh=boxes_xywh,
        labels=labels,
        areas=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        crowd=np.isin(index, crowd),
        difficult=np.isin(index, difficult),
        coco_ids=np.arange(num_images),
    )


def detected(*boxes: tuple[int, int, Box, float]) -> Detected:
    """Detections (image, label, xywh, score)."""
    return Detected(
        image_index=np.array([image for image, _, _, _ in boxes], np.int32),
        boxes_xywh=np.array([box for _, _, box, _ in boxes], np.float64).reshape(-1, 4),
        labels=np.array([label for _, label, _, _ in boxes], np.int32),
        scores=np.array([score for _, _, _, score in boxes], np.float64),
    )


def random_case(
    rng: np.random.Generator, *, num_images: int = 12, num_classes: int = 3
) -> tuple[GroundTruth, Detected]:
    """Crowded images with crowd regions, near misses, wrong classes and equal scores."""
    annotated, found = [], []
    for image in range(num_images):
        for _ in range(rng.integers(0, 6)):
            label = int(rng.integers(1, num_classes + 1))
            x, y, w, h = (int(v) for v in rng.integers((0, 0, 4, 4), (150, 150, 120, 120)))
            annotated.append((image, label, (x, y, w, h)))
            for _ in range(rng.integers(0, 4)):
                shift = rng.integers(-6, 7, 4)
                moved = (x + shift[0], y + shift[1], max(w + shift[2], 1), max(h + shift[3], 1))
                other = label if rng.random() < 0.8 else int(rng.integers(1, num_classes + 1))
                found.append((image, other, moved, float(rng.integers(1, 20) / 20)))
    crowd = [i for i in range(len(annotated)) if rng.random() < 0.15]
    names = {label: f"class {label}" for label in range(1, num_classes + 1)}
    return truth(*annotated, num_images=num_images, crowd=crowd, class_names=names), detected(*found)

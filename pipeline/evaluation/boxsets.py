"""Annotated and detected boxes of a whole data set as columns, the form that all measures work on.

N images, G annotated boxes, D detections. Boxes are xywh (left, top, width, height) in float64, as COCO files
have them: converting to corners and back moves the last digit, which can flip a match at IoU 0.5 exactly.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroundTruth:
    """The annotated boxes of a data set."""

    image_ids: tuple[str, ...]
    """N names: the file name (COCO, VOC) or the id that the shard reader gives."""
    class_names: dict[int, str]
    """By label, the data set's own id."""
    image_index: np.ndarray
    """int32 [G]: which image."""
    boxes_xywh: np.ndarray
    """float64 [G, 4]."""
    labels: np.ndarray
    """int32 [G]."""
    areas: np.ndarray
    """float64 [G], for AP by size: the mask's area in COCO files, else the box's."""
    crowd: np.ndarray
    """bool [G]: a region of many objects, never counted (COCO)."""
    difficult: np.ndarray
    """bool [G]: not counted by the VOC metrics."""
    coco_ids: np.ndarray | None = None
    """int64 [N]: `image_id` of COCO results."""

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.image_ids)

    @property
    def num_counted(self) -> int:
        """Annotated boxes that are no crowd region."""
        return int((~self.crowd).sum())

    def of_images(self, keep_N: np.ndarray) -> "GroundTruth":
        """The part of the images where the mask `keep_N` is true."""
        new_index_N = np.cumsum(keep_N) - 1
        kept_G = keep_N[self.image_index]
        return GroundTruth(
            image_ids=tuple(image_id for image_id, keep in zip(self.image_ids, keep_N, strict=True) if keep),
            class_names=self.class_names,
            image_index=new_index_N[self.image_index[kept_G]].astype(np.int32),
            boxes_xywh=self.boxes_xywh[kept_G],
            labels=self.labels[kept_G],
            areas=self.areas[kept_G],
            crowd=self.crowd[kept_G],
            difficult=self.difficult[kept_G],
            coco_ids=None if self.coco_ids is None else self.coco_ids[keep_N],
        )


@dataclass(frozen=True)
class Detected:
    """The detections of a data set; labels and image numbers are those of its `GroundTruth`."""

    image_index: np.ndarray
    """int32 [D]."""
    boxes_xywh: np.ndarray
    """float64 [D, 4]."""
    labels: np.ndarray
    """int32 [D]."""
    scores: np.ndarray
    """float64 [D]."""

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, mask_D: np.ndarray) -> "Detected":
        """The detections where `mask_D` is true."""
        return Detected(
            self.image_index[mask_D],
            self.boxes_xywh[mask_D],
            self.labels[mask_D],
            self.scores[mask_D],
        )

"""Which detections are right: the matching rules of COCO and of the PASCAL VOC devkit, one class at a time.

D detections, G annotated boxes, T IoU thresholds. Both rules look at the detections from the best score down.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.boxsets import Detected, GroundTruth

COCO_IOUS = np.linspace(0.5, 0.95, 10)
COCO_MAX_DETECTIONS = 100  # per image and class


@dataclass(frozen=True)
class Matches:
    """The detections of one class from the best score down, and which of them are right."""

    scores: np.ndarray
    """float64 [D]."""
    image_index: np.ndarray
    """int32 [D]."""
    correct: np.ndarray
    """bool [T, D]: found an annotated box, the first to do so."""
    ignored: np.ndarray
    """bool [T, D]: neither right nor wrong: on a crowd region, or on a difficult box (VOC)."""
    truth_row: np.ndarray
    """int64 [D]: row of the annotated box that was found at the first IoU threshold, -1 where none."""
    positives: np.ndarray
    """int32 [P]: the image of each annotated box that counts."""

    @property
    def num_positives(self) -> int:
        """Annotated boxes that count."""
        return len(self.positives)


def match_coco(
    truth: GroundTruth, detected: Detected, label: int, *, ious_T: np.ndarray = COCO_IOUS
) -> Matches:
    """Match one class as pycocotools does (`COCOeval.evaluateImg`, all areas, 100 detections an image).

    A detection takes the free annotated box with the highest IoU at or above the threshold; crowd regions
    come second and can be taken many times, and their IoU is the share of the detection inside.
    """
    of_class_G = truth.labels == label
    columns = _of_class(detected, label)
    correct_TD = np.zeros((len(ious_T), len(columns.scores)), bool)
    ignored_TD = np.zeros_like(correct_TD)
    truth_row_D = np.full(len(columns.scores), -1)
    keep_D = np.ones(len(columns.scores), bool)
    thresholds_T = np.minimum(ious_T, 1 - 1e-10)
    for rows, truths in _images(columns.image_index, truth.image_index, of_class_G):
        keep_D[rows[COCO_MAX_DETECTIONS:]] = False
        rows = rows[:COCO_MAX_DETECTIONS]
        if not len(truths):
            continue
        crowd_g = truth.crowd[truths]
        ious_dg = _coco_ious(columns.boxes_xywh[rows], truth.boxes_xywh[truths], crowd_g)
        taken_Td, ignored_TD[:, rows] = _take_coco(ious_dg, crowd_g, thresholds_T)
        correct_TD[:, rows] = taken_Td >= 0
        truth_row_D[rows] = np.where(taken_Td[0] >= 0, truths[taken_Td[0]], -1)
    return Matches(
        scores=columns.scores[keep_D],
        image_index=columns.image_index[keep_D],
        correct=correct_TD[:, keep_D],
        ignored=ignored_TD[:, keep_D],
        truth_row=truth_row_D[keep_D],
        positives=truth.image_index[of_class_G & ~truth.crowd],
    )


def match_voc(truth: GroundTruth, detected: Detected, label: int, *, iou: float = 0.5) -> Matches:
    """Match one class as the VOC devkit does (`VOCevaldet.m`).

    A detection looks only at the annotated box with the highest IoU: at or above the threshold it is right
    if it is the first one there, wrong if not, ignored if that box is difficult; below the threshold it is
    wrong. The devkit counts whole pixels, both ends included, so a box is xmax - xmin + 1 wide; here boxes
    are continuous (pixel 1 is 0..1, see `data.voc`), and the same width is xmax - xmin.
    """
    of_class_G = truth.labels == label
    columns = _of_class(detected, label)
    correct_D = np.zeros(len(columns.scores), bool)
    ignored_D = np.zeros_like(correct_D)
    truth_row_D = np.full(len(correct_D), -1)
    counts_G = ~(truth.difficult | truth.crowd)
    for rows, truths in _images(columns.image_index, truth.image_index, of_class_G):
        if not len(truths):
            continue
        ious_dg = box_ious(columns.boxes_xywh[rows], truth.boxes_xywh[truths])
        best_d, found = ious_dg.argmax(axis=1), set()
        for row, best, overlap in zip(rows, best_d, ious_dg.max(axis=1), strict=True):
            if overlap < iou:
                continue
            ignored_D[row] = not counts_G[truths[best]]
            correct_D[row] = not ignored_D[row] and best not in found
            truth_row_D[row] = truths[best] if correct_D[row] else -1
            found.add(best)
    return Matches(
        scores=columns.scores,
        image_index=columns.image_index,
        correct=correct_D[None],
        ignored=ignored_D[None],
        truth_row=truth_row_D,
        positives=truth.image_index[of_class_G & counts_G],
    )


def box_ious(boxes_xywh_D4: np.ndarray, boxes_xywh_G4: np.ndarray) -> np.ndarray:
    """IoU of each pair, float64 [D, G]; 0 where both are empty."""
    crowd_G = np.zeros(len(boxes_xywh_G4), bool)
    return _coco_ious(boxes_xywh_D4, boxes_xywh_G4, crowd_G)


# ---- one image ---------------------------------------------------------------------------------------


def _take_coco(
    ious_dg: np.ndarray, crowd_g: np.ndarray, thresholds_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The annotated box that each detection takes, -1 for none, and whether it is ignored, both [T, d].

    Detections are sorted by score.
    """
    taken_Td = np.full((len(thresholds_T), len(ious_dg)), -1)
    ignored_Td = np.zeros(taken_Td.shape, bool)
    free_Tg = np.repeat(~crowd_g[None], len(thresholds_T), axis=0)
    last = len(crowd_g) - 1
    for d, ious_g in enumerate(ious_dg):
        if ious_g.max() < thresholds_T[0]:
            continue
        reached_Tg = ious_g >= thresholds_T[:, None]
        candidates_Tg = np.where(free_Tg & reached_Tg, ious_g, -1.0)
        best_T = last - candidates_Tg[:, ::-1].argmax(axis=1)  # of equal ones the last, as pycocotools
        takes_T = candidates_Tg.max(axis=1) >= 0
        taken_Td[:, d] = np.where(takes_T, best_T, -1)
        ignored_Td[:, d] = ~takes_T & (reached_Tg & crowd_g).any(axis=1)
        free_Tg[takes_T, best_T[takes_T]] = False
    return taken_Td, ignored_Td


def _coco_ious(boxes_d4: np.ndarray, boxes_g4: np.ndarray, crowd_g: np.ndarray) -> np.ndarray:
    overlap_dg = _overlap(boxes_d4, boxes_g4)
    areas_d = (boxes_d4[:, 2] * boxes_d4[:, 3])[:, None]
    areas_g = boxes_g4[:, 2] * boxes_g4[:, 3]
    union_dg = np.where(crowd_g, areas_d, areas_d + areas_g - overlap_dg)
    return np.divide(overlap_dg, union_dg, out=np.zeros_like(overlap_dg), where=union_dg > 0)


def _overlap(boxes_d4: np.ndarray, boxes_g4: np.ndarray) -> np.ndarray:
    starts = np.maximum(boxes_d4[:, None, :2], boxes_g4[None, :, :2])
    ends = np.minimum((boxes_d4[:, :2] + boxes_d4[:, 2:])[:, None], (boxes_g4[:, :2] + boxes_g4[:, 2:])[None])
    return np.clip(ends - starts, 0, None).prod(axis=2)


# ---- columns -----------------------------------------------------------------------------------------


def _of_class(detected: Detected, label: int) -> Detected:
    """The detections of a class, the best first; equal scores by image, then as they came."""
    of_class = detected.select(detected.labels == label)
    order = np.lexsort((of_class.image_index, -of_class.scores))
    return of_class.select(order)


def _images(
    image_index_D: np.ndarray, image_index_G: np.ndarray, of_class_G: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each image with detections: their rows (the order is kept) and the annotated boxes of the class."""
    rows_of_class = np.flatnonzero(of_class_G)
    order_G = rows_of_class[np.argsort(image_index_G[rows_of_class], kind="stable")]
    order_D = np.argsort(image_index_D, kind="stable")
    if not len(order_D):
        return
    images, starts = np.unique(image_index_D[order_D], return_index=True)
    first = np.searchsorted(image_index_G[order_G], images, side="left")
    after = np.searchsorted(image_index_G[order_G], images, side="right")
    for rows, a, b in zip(np.split(order_D, starts[1:]), first, after, strict=True):
        yield rows, order_G[a:b]

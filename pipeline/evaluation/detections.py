"""Read detections, from an output folder or a COCO results file, for the images of a data set."""

import gzip
import json
import posixpath
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.evaluation.boxsets import Detected, GroundTruth
from pipeline.results import iter_detections, load_images, summarise

COLUMNS = ("image_id", "class_name", "score", "xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class ResultsFile:
    """The detections of a COCO results file, in memory."""

    detected: Detected
    counts: dict[int, int]
    """Detections by label."""
    not_annotated: dict[str, int]
    """Detections by class that the data set doesn't have."""
    num_failed: int = 0

    def read(
        self, truth: GroundTruth, labels: Sequence[int] | None = None, min_score: float = 0.0
    ) -> Detected:
        """The detections of these classes (all where None) with at least this score."""
        wanted = self.detected.scores >= min_score
        if labels is not None:
            wanted &= np.isin(self.detected.labels, labels)
        return self.detected.select(wanted)


@dataclass(frozen=True)
class OutputFolder:
    """The detections of a run, read class by class."""

    uri: str
    images: "ImageMatch"
    counts: dict[int, int]
    """Detections by label, also of images that are not annotated."""
    not_annotated: dict[str, int]
    """Detections by class that the data set doesn't have."""

    @property
    def num_failed(self) -> int:
        """Annotated images that the run could not read."""
        return self.images.num_failed

    def read(
        self, truth: GroundTruth, labels: Sequence[int] | None = None, min_score: float = 0.0
    ) -> Detected:
        """The detections of these classes (all where None) with at least this score, in annotated images.

        Classes are told by name.
        """
        wanted = self.counts if labels is None else [label for label in labels if label in self.counts]
        names = {truth.class_names[label]: label for label in wanted}
        pieces = [Detected(np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0))]
        for frame in iter_detections(self.uri, class_names=list(names), min_score=min_score, columns=COLUMNS):
            index = frame.image_id.map(self.images.index).to_numpy(np.float64)
            kept = np.flatnonzero(~np.isnan(index))
            pieces.append(_columns(frame.iloc[kept], index[kept], names))
        return Detected(
            image_index=np.concatenate([piece.image_index for piece in pieces]),
            boxes_xywh=np.concatenate([piece.boxes_xywh for piece in pieces]),
            labels=np.concatenate([piece.labels for piece in pieces]),
            scores=np.concatenate([piece.scores for piece in pieces]),
        )


def open_detections(
    uri: str, truth: GroundTruth, *, partial: bool = False
) -> tuple[ResultsFile | OutputFolder, GroundTruth]:
    """Open an output folder or a COCO results file (`.json`, `.json.gz`).

    Args:
        uri: where it is.
        truth: the annotations.
        partial: measure only the annotated images that are in the run, where not all are.

    Returns:
        The detections, and the annotations that they are measured on.

    Raises:
        ConfigError: nothing there, of another data set, or only a part of it and `partial` is not set.
    """
    if uri.endswith((".json", ".json.gz")):
        return _open_results(uri, truth, partial=partial), truth
    images = match_images(uri, truth)
    num_missing = int((~images.processed).sum())
    if num_missing and not partial:
        raise ConfigError(
            f"{num_missing:,} of {truth.num_images:,} annotated images are not in {uri}, "
            f"such as {truth.image_ids[int(images.processed.argmin())]}; "
            "run them too, or give --partial to measure only those that are"
        )
    if num_missing:
        truth = truth.of_images(images.processed)
        images = match_images(uri, truth)
    counts = summarise(uri).classes.set_index("class_name").num_detections.to_dict()
    labels = {name: label for label, name in truth.class_names.items()}
    if counts and not counts.keys() & labels.keys():
        raise ConfigError(
            f"{uri} and the annotations have no class in common: "
            f"compare {', '.join(list(counts)[:3])} with {', '.join(list(labels)[:3])}"
        )
    known = {labels[name]: count for name, count in counts.items() if name in labels}
    unknown = {name: count for name, count in counts.items() if name not in labels}
    return OutputFolder(uri, images, known, unknown), truth


def _open_results(uri: str, truth: GroundTruth, *, partial: bool) -> ResultsFile:
    """Read `[{image_id, category_id, bbox, score}, ...]`; `partial`: those of other images are left out."""
    if truth.coco_ids is None:
        raise ConfigError(f"{uri} names images by COCO ids, so --annotations must be a COCO file too")
    data = storage.read_bytes(uri)
    try:
        rows = json.loads(gzip.decompress(data) if uri.endswith(".gz") else data)
        coco_ids = np.array([row["image_id"] for row in rows], np.int64)
        labels = np.array([row["category_id"] for row in rows], np.int32)
        boxes_xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
        scores = np.array([row["score"] for row in rows], np.float64)
    except (KeyError, TypeError, ValueError, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{uri} is no COCO results file: {type(error).__name__} {error}") from error
    known = np.isin(coco_ids, truth.coco_ids)
    if not known.all() and not (partial and known.any()):
        strange = coco_ids[~known][0]
        raise ConfigError(f"{uri}: image {strange} is not in the annotations; are they of the same data set?")
    coco_ids, labels, boxes_xywh, scores = (rows[known] for rows in (coco_ids, labels, boxes_xywh, scores))
    annotated = np.isin(labels, list(truth.class_names))
    order = np.argsort(truth.coco_ids)
    index = order[np.searchsorted(truth.coco_ids[order], coco_ids)].astype(np.int32)
    return ResultsFile(
        detected=Detected(index, boxes_xywh, labels, scores).select(annotated),
        counts=dict(Counter(labels[annotated].tolist())),
        not_annotated=dict(Counter(f"category {label}" for label in labels[~annotated].tolist())),
    )


@dataclass(frozen=True)
class ImageMatch:
    """Which row of the images table is which annotated image."""

    index: dict[str, int]
    """Number of the annotated image by `image_id`."""
    processed: np.ndarray
    """bool [N]: the annotated image is in the run, whether it failed or not."""
    num_failed: int
    """Annotated images that the run could not read."""


def match_images(uri: str, truth: GroundTruth) -> ImageMatch:
    """Find the annotated images among those of an output folder.

    Names are compared without folder and extension; where two images of one side share a name, with as many
    folders as it takes to tell them apart. So `val-0003.tar/0042.jpg` is the annotated `0042.jpg`.

    Raises:
        ConfigError: no image in common.
    """
    images = load_images(uri, columns=["image_id", "status"])
    index = match_names(images.image_id.tolist(), truth.image_ids)
    if truth.num_images and not index:
        raise ConfigError(
            f"none of the {len(images):,} images of {uri} is annotated: "
            f"compare its {_example(images.image_id)} with the annotated {_example(truth.image_ids)}"
        )
    processed = np.zeros(truth.num_images, bool)
    processed[list(index.values())] = True
    failed = images.image_id[images.status == "failed"]
    return ImageMatch(index, processed, int(failed.isin(list(index)).sum()))


def match_names(image_ids: Sequence[str], annotated: Sequence[str]) -> dict[str, int]:
    """Position in `annotated` by image id, where the two certainly are the same image."""
    exact = {name: i for i, name in enumerate(annotated)}
    found = {image_id: exact[image_id] for image_id in image_ids if image_id in exact}
    for depth in range(1, 6):
        taken = set(found.values())
        left = _unique_tails((name for i, name in enumerate(annotated) if i not in taken), depth)
        mine = _unique_tails((image_id for image_id in image_ids if image_id not in found), depth)
        found |= {mine[tail]: exact[left[tail]] for tail in mine.keys() & left.keys()}
    return found


def _columns(frame: pd.DataFrame, index: np.ndarray, labels: dict[str, int]) -> Detected:
    corners = frame[["xmin", "ymin", "xmax", "ymax"]].to_numpy(np.float64)
    return Detected(
        image_index=index.astype(np.int32),
        boxes_xywh=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        labels=frame["class_name"].map(labels.get).to_numpy(np.int32),
        scores=frame["score"].to_numpy(np.float64),
    )


def _unique_tails(names: Iterable[str], depth: int) -> dict[str, str]:
    """The last `depth` parts of each path, without extension, where only one name has them."""
    by_tail: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        stem = posixpath.splitext(name)[0]
        by_tail["/".join(stem.split("/")[-depth:])].append(name)
    return {tail: found[0] for tail, found in by_tail.items() if len(found) == 1}


def _example(names: Iterable[str]) -> str:
    return next(iter(names), "(nothing)")

"""Two runs on the same images: which detections came and which went."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.errors import ConfigError
from pipeline.results.read import load_detections, load_images

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def compare_runs(
    new: str | Path, old: str | Path, *, min_score: float = 0.5, iou: float = 0.5
) -> pd.DataFrame:
    """The detections that only one of two runs has, in images that both processed.

    Detections of one class in one image are the same where their boxes overlap by `iou` or more, each with at
    most one of the other run, the best overlaps first.

    Args:
        new: output folder of the run to look at.
        old: output folder of the run to compare with.
        min_score: detections below it are not there.
        iou: smallest overlap of the same detection.

    Returns:
        Rows of `detections/` by image, with a first column `change`: "gained" (only in the new run) or
        "lost".

    Raises:
        ConfigError: no output there, no image in common, or `iou` not above 0 and up to 1.
    """
    if not 0 < iou <= 1:
        raise ConfigError(f"iou={iou}: give a number above 0 and up to 1")
    shared = _shared_images(new, old)
    ours, theirs = (_boxes_of(uri, shared, min_score) for uri in (new, old))
    same_ours, same_theirs = _same(ours, theirs, iou)
    gained = ours.drop(index=same_ours).assign(change="gained")
    lost = theirs.drop(index=same_theirs).assign(change="lost")
    changes = pd.concat([gained, lost]).sort_values(["image_id", "change"], kind="stable", ignore_index=True)
    return changes.loc[:, ["change", *(name for name in changes.columns if name != "change")]]


def _shared_images(new: str | Path, old: str | Path) -> pd.Series:
    ours, theirs = (load_images(uri, status="ok", columns=["image_id"])["image_id"] for uri in (new, old))
    shared = ours.loc[ours.isin(theirs)]
    if len(ours) and not len(shared):
        other = theirs.iloc[0] if len(theirs) else "nothing"
        raise ConfigError(f"{new} and {old} have no image in common: compare {ours.iloc[0]} with {other}")
    return shared


def _boxes_of(uri: str | Path, images: pd.Series, min_score: float) -> pd.DataFrame:
    found = load_detections(uri, min_score=min_score)
    found = found.loc[found["image_id"].isin(images)].reset_index(drop=True)
    return found.assign(class_name=found["class_name"].astype(str))


def _same(ours: pd.DataFrame, theirs: pd.DataFrame, iou: float) -> tuple[list[int], list[int]]:
    """Row numbers of the detections that both runs have."""
    columns = ["image_id", "class_name", *CORNERS]
    pairs = (
        ours[columns]
        .reset_index()
        .merge(theirs[columns].reset_index(), on=["image_id", "class_name"], suffixes=("", "_old"))
    )
    pairs = pairs.assign(iou=_ious(pairs))
    pairs = pairs.loc[pairs["iou"] >= iou].sort_values("iou", ascending=False, kind="stable")
    taken_ours: set[int] = set()
    taken_theirs: set[int] = set()
    for mine, other in zip(pairs["index"].tolist(), pairs["index_old"].tolist(), strict=True):
        if mine not in taken_ours and other not in taken_theirs:
            taken_ours.add(mine)
            taken_theirs.add(other)
    return sorted(taken_ours), sorted(taken_theirs)


def _ious(pairs: pd.DataFrame) -> np.ndarray:
    xmin, ymin, xmax, ymax = (pairs[name].to_numpy(np.float64) for name in CORNERS)
    old_xmin, old_ymin, old_xmax, old_ymax = (pairs[f"{name}_old"].to_numpy(np.float64) for name in CORNERS)
    width = np.clip(np.minimum(xmax, old_xmax) - np.maximum(xmin, old_xmin), 0, None)
    height = np.clip(np.minimum(ymax, old_ymax) - np.maximum(ymin, old_ymin), 0, None)
    overlap = width * height
    union = (xmax - xmin) * (ymax - ymin) + (old_xmax - old_xmin) * (old_ymax - old_ymin) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)

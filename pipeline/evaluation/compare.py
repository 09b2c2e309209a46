"""Two runs on the same annotations: what the new one gains and loses against the baseline."""

from collections import Counter
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.evaluation.numbers import numbers, resampled_aps
from pipeline.evaluation.quality import interval
from pipeline.evaluation.run import Evaluation

NUM_IMAGES = 20


def compare(
    new: Evaluation, baseline: Evaluation, *, num_resamples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The difference of two runs as plain values for JSON.

    An annotated box is gained where only the new run finds it, with a score of at least its threshold in use
    and IoU 0.5, and lost where only the baseline does. With `num_resamples`, the difference of AP gets a
    95 % confidence interval from images drawn alike for both runs.

    Raises:
        ConfigError: the two were not measured on the same images.
    """
    if new.truth.image_ids != baseline.truth.image_ids:
        raise ConfigError("the two runs don't hold the same annotated images, so they can't be compared")
    name = new.main_name
    ours, theirs = numbers(new), numbers(baseline)
    gained, lost = changed_boxes(new, baseline)
    found: dict[str, Any] = {
        "baseline": {key: value for key, value in theirs.items() if isinstance(value, float)},
        "difference": {
            key: value - theirs[key]
            for key, value in ours.items()
            if isinstance(value, float) and value >= 0 and theirs[key] >= 0
        },
        "gained": len(gained),
        "lost": len(lost),
        "per_class": _by_class(new, gained, lost, ours["per_class"], theirs["per_class"]),
        "most_changed_images": _by_image(new, gained, lost),
    }
    if num_resamples:
        ours_S = resampled_aps(new, num_resamples, seed).mean(axis=1)
        theirs_S = resampled_aps(baseline, num_resamples, seed).mean(axis=1)
        found["difference_interval"] = {
            "level": 0.95,
            name: list(interval(ours_S - theirs_S, ours[name] - theirs[name])),
        }
    return found


def changed_boxes(new: Evaluation, baseline: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the annotated boxes that only the new run finds, and of those that only the baseline finds."""
    ours, theirs = _found(new), _found(baseline)
    return np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)


def _found(evaluation: Evaluation) -> np.ndarray:
    rows = [
        one.truth_row[(one.scores >= evaluation.score_threshold) & (one.truth_row >= 0)]
        for one in evaluation.matches.values()
    ]
    return np.concatenate([np.zeros(0, np.int64), *rows])


def _by_class(
    new: Evaluation,
    gained: np.ndarray,
    lost: np.ndarray,
    ours: dict[str, dict[str, Any]],
    theirs: dict[str, dict[str, Any]],
) -> dict[str, dict[str, float]]:
    counts = [Counter(new.truth.labels[rows].tolist()) for rows in (gained, lost)]
    return {
        name: {
            "difference": ours[name]["AP"] - theirs[name]["AP"],
            "gained": counts[0][label],
            "lost": counts[1][label],
        }
        for label, name in sorted(new.truth.class_names.items())
        if ours[name]["num_annotated"]
    }


def _by_image(new: Evaluation, gained: np.ndarray, lost: np.ndarray) -> list[dict[str, Any]]:
    counts = [
        np.bincount(new.truth.image_index[rows], minlength=new.truth.num_images) for rows in (gained, lost)
    ]
    changes = counts[0] + counts[1]
    order = np.argsort(-changes, kind="stable")[:NUM_IMAGES]
    return [
        {"image_id": new.truth.image_ids[i], "gained": int(counts[0][i]), "lost": int(counts[1][i])}
        for i in order
        if changes[i]
    ]

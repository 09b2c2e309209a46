"""The real model in the chaos rounds: photographs, and tables that agree up to rounding."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.config import InferConfig
from pipeline.inference.verify import verify
from tests.chaos.runs import Setting, tables
from tests.conftest import SHARED
from tests.makers import make_jpeg, make_tar_shard

BOX_PIXELS, SCORE = 0.01, 1e-4
THRESHOLD = float(InferConfig(input="in", output="out").score_threshold)
BOX = ["xmin", "ymin", "xmax", "ymax"]


def make_photographs(folder: Path, shards: int = 8, images: int = 32) -> None:
    """Shards of photographs; of made pictures where there are none."""
    photographs = [path.read_bytes() for path in sorted((SHARED / "data/coco_val128/images").glob("*.jpg"))]
    photographs = photographs or [make_jpeg(640, 480, seed=seed) for seed in range(64)]
    for number in range(shards):
        members = {
            f"{i:03}.jpg": photographs[(number * images + i) % len(photographs)] for i in range(images)
        }
        make_tar_shard(folder / f"s{number}.tar", members)


def check_close(setting: Setting, whole: Mapping[str, pd.DataFrame]) -> None:
    """Boxes to 0.01 pixel and scores to 1e-4, apart from scores that close to the threshold."""
    after = tables(setting)
    other = ["uri", "num_detections"]
    pd.testing.assert_frame_equal(after["images"].drop(columns=other), whole["images"].drop(columns=other))
    for one, other in ((after, whole), (whole, after)):
        lost = unmatched(one["detections"], other["detections"])
        lost = lost[(lost.score - THRESHOLD).abs() > SCORE]
        assert lost.empty, f"{len(lost)} boxes without a counterpart:\n{lost.head()}"
    problems = verify(setting.source, setting.output).problems
    assert problems == [], problems


def unmatched(boxes: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The rows of `boxes` that no row of `others` equals up to rounding."""
    numbered = boxes.reset_index(names="row")
    pairs = numbered.merge(others, on=["image_id", "label"], suffixes=("", "_other"))
    difference = np.abs(pairs[BOX].to_numpy() - pairs[[f"{name}_other" for name in BOX]].to_numpy())
    close = (difference <= BOX_PIXELS).all(axis=1) & ((pairs.score - pairs.score_other).abs() <= SCORE)
    return numbered.loc[~numbered.row.isin(pairs.row[close])]

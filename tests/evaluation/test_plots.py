import csv
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.detections import ResultsFile
from pipeline.evaluation.plots import write_plots
from pipeline.evaluation.run import measure
from tests.evaluation.cases import detected, random_case, truth


def evaluation(there, found):
    return measure(there, ResultsFile(found, {int(k): 1 for k in found.labels}, {}), metric="coco")


def test_the_pictures_are_written_and_the_table_adds_up(tmp_path):
    there, found = random_case(np.random.default_rng(0), num_images=30)
    there.class_names.update({1: "猫 $x_1$", 2: 'naïve, "quoted"'})
    written = write_plots(evaluation(there, found), str(tmp_path / "plots"))
    assert [uri.rsplit("/", 1)[1] for uri in written] == [
        "confusion.csv", "precision_recall.png", "calibration.png", "confusion.png",
    ]  # fmt: skip
    for uri in written[1:]:
        with Image.open(uri) as picture:
            assert picture.size == (1200, 900)
    rows = list(csv.reader(io.StringIO((tmp_path / "plots/confusion.csv").read_text())))
    assert rows[0][1:] == ["猫 $x_1$", 'naïve, "quoted"', "class 3", "(nothing)"]
    counted = sum(int(value) for row in rows[1:-1] for value in row[1:])
    assert counted == there.num_counted


@pytest.mark.parametrize("num_classes", [1, 40])
def test_few_and_many_classes_and_nothing_at_all_can_be_drawn(tmp_path, num_classes):
    names = {k: f"class {k}" for k in range(1, num_classes + 1)}
    write_plots(evaluation(truth(num_images=1, class_names=names), detected()), str(tmp_path))
    there = truth(*[(0, k, (k, 0, 9, 9)) for k in names], class_names=names)
    write_plots(evaluation(there, detected(*[(0, k, (k, 0, 9, 9), 0.5) for k in names])), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 4

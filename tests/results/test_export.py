import json

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.results import export_coco, export_yolo, load_detections, to_supervision
from tests.outputs import MODEL, box, failed_image, image, write_part


@pytest.fixture
def output(tmp_path):
    """Image 139 with a dog and a person, image 285 without a box, image 7 failed."""
    boxes = [box("s.tar/000139.jpg", "dog", 0.9), box("s.tar/000139.jpg", "person", 0.3, label=1, xmin=0.5)]
    images = [image("s.tar/000139.jpg", 2), image("s.tar/000285.jpg"), failed_image("s.tar/000007.jpg")]
    write_part(tmp_path / "out", "p", images, boxes)
    return tmp_path / "out"


def test_pycocotools_reads_the_coco_results(output, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    numbers = export_coco(output, tmp_path / "r.json")
    assert numbers == {"s.tar/000139.jpg": 139, "s.tar/000285.jpg": 285, "s.tar/000007.jpg": 7}
    truth = coco.COCO()
    truth.dataset = {"images": [{"id": i} for i in (7, 139, 285)], "annotations": [], "categories": []}
    truth.createIndex()
    found = truth.loadRes(str(tmp_path / "r.json"))
    rows = found.loadAnns(found.getAnnIds(imgIds=[139]))
    assert [(row["category_id"], row["bbox"]) for row in rows] == [
        (18, [10, 5, 40, 40]),
        (1, [0.5, 5, 49.5, 40]),
    ]
    assert [row["score"] for row in rows] == pytest.approx([0.9, 0.3])
    assert found.getAnnIds(imgIds=[285]) == []


def test_images_whose_names_are_no_numbers_are_counted(tmp_path):
    write_part(tmp_path / "out", "p", [image("b/ü.jpg", 1), image("a/5.jpg")], [box("b/ü.jpg")])
    assert export_coco(tmp_path / "out", tmp_path / "r.json") == {"b/ü.jpg": 1, "a/5.jpg": 2}
    assert [row["image_id"] for row in json.loads((tmp_path / "r.json").read_text())] == [1]
    chosen = {"b/ü.jpg": 77}
    assert export_coco(tmp_path / "out", tmp_path / "r.json", image_ids=chosen, min_score=0.99) == chosen
    assert json.loads((tmp_path / "r.json").read_text()) == []


def test_supervision_reads_the_yolo_labels(output, tmp_path):
    supervision = pytest.importorskip("supervision")
    assert export_yolo(output, tmp_path / "labels", min_score=0.2) == 2
    for name in ("000139", "000285"):
        Image.new("RGB", (100, 50)).save(tmp_path / f"{name}.jpg")
    data = supervision.DetectionDataset.from_yolo(
        images_directory_path=str(tmp_path),
        annotations_directory_path=str(tmp_path / "labels/s.tar"),
        data_yaml_path=str(tmp_path / "labels/data.yaml"),
    )
    assert data.classes == MODEL["class_names"]
    read = {path.rsplit("/", 1)[1]: detections for path, _, detections in data}
    assert len(read["000285.jpg"]) == 0
    assert read["000139.jpg"].class_id.tolist() == [1, 0]
    expected = np.array([[10, 5, 50, 45], [0.5, 5, 50, 45]])
    np.testing.assert_allclose(read["000139.jpg"].xyxy, expected, atol=1e-3)


def test_scores_are_a_sixth_yolo_column_on_request(output, tmp_path):
    export_yolo(output, tmp_path / "labels", min_score=0.5, with_scores=True)
    assert (
        tmp_path / "labels/s.tar/000139.txt"
    ).read_text() == "1 0.300000 0.500000 0.400000 0.800000 0.900000\n"
    assert (tmp_path / "labels/s.tar/000285.txt").read_text() == ""


def test_images_that_would_share_a_label_file_are_refused(tmp_path):
    write_part(tmp_path / "out", "p", [image("a.jpg"), image("a.png")], [])
    with pytest.raises(ConfigError, match="share a label file"):
        export_yolo(tmp_path / "out", tmp_path / "labels")


def test_label_files_stay_in_their_folder_whatever_the_image_ids(tmp_path):
    """Ids of a list are its lines as written, members of a tar are named by whoever packed it."""
    photographs = tmp_path / "in"
    ids = {
        f"{photographs}/a.jpg": f"{photographs}/a.txt"[1:],
        f"{photographs}/s0.tar/000.jpg": f"{photographs}/s0.tar/000.txt"[1:],
        "s3://bucket/b.jpg": "s3/bucket/b.txt",
        f"file://{photographs}/c.jpg": f"file{photographs}/c.txt",
        "../in/d.jpg": "_/in/d.txt",
        "s.tar/../../in/../e.jpg": "s.tar/_/_/in/_/e.txt",
        f"s.tar/x::file://{photographs}/f.jpg": f"s.tar/x__file{photographs}/f.txt",
        "./g/..": "g/_.txt",
        "s.parquet//": "s.txt",
        "~/h.jpg": "~/h.txt",
    }
    write_part(tmp_path / "out", "p", [image(id_) for id_ in ids], [box(id_) for id_ in ids])
    before = set(tmp_path.rglob("*"))
    assert export_yolo(tmp_path / "out", tmp_path / "labels") == len(ids)
    labels = tmp_path / "labels"
    assert {str(p.relative_to(labels)) for p in labels.rglob("*.txt")} == set(ids.values())
    assert {p for p in tmp_path.rglob("*") if labels not in p.parents} == before | {labels}


def test_ids_that_become_one_path_are_refused_by_name(tmp_path):
    write_part(tmp_path / "out", "p", [image("/in/a.jpg"), image("in/a.jpg")], [])
    with pytest.raises(ConfigError, match=r"/in/a\.jpg and in/a\.jpg would share a label file, in/a\.txt"):
        export_yolo(tmp_path / "out", tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_supervision_draws_and_filters_our_detections(output):
    supervision = pytest.importorskip("supervision")
    found = to_supervision(load_detections(output))
    assert np.asarray(found.class_id).tolist() == [18, 1]
    assert np.asarray(found["class_name"]).tolist() == ["dog", "person"]
    assert np.asarray(found.confidence).tolist() == pytest.approx([0.9, 0.3])
    drawn = supervision.BoxAnnotator().annotate(np.zeros((50, 100, 3), np.uint8), found)
    assert drawn.any()
    assert len(to_supervision(load_detections(output, min_score=0.95))) == 0


def test_supervision_refuses_rows_without_the_columns_it_needs(output):
    rows = load_detections(output, columns=["image_id", "class_name", "score", "xmin", "ymin"])
    with pytest.raises(ConfigError, match="needs the columns xmax, ymax, label, too"):
        to_supervision(rows)


def test_an_output_without_boxes_is_exported(tmp_path):
    write_part(tmp_path / "out", "p", [], [])
    assert export_coco(tmp_path / "out", tmp_path / "r.json") == {}
    assert (tmp_path / "r.json").read_text() == "[]"
    assert export_yolo(tmp_path / "out", tmp_path / "labels") == 0

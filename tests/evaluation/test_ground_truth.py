import json
import re

import numpy as np
import pytest
from PIL import Image

from pipeline.data.annotations import Classes
from pipeline.errors import ConfigError
from pipeline.evaluation.boxsets import Detected
from pipeline.evaluation.detections import ResultsFile
from pipeline.evaluation.ground_truth import read_ground_truth
from pipeline.evaluation.matching import match_voc
from pipeline.evaluation.numbers import numbers
from pipeline.evaluation.run import measure
from tests.evaluation.cases import detected
from tests.makers import make_parquet_shard, make_tar_shard


def write_voc(root, objects_by_image):
    """A VOC folder; objects are (class, xmin, ymin, xmax, ymax, difficult), pixels counted from 1."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, objects in objects_by_image.items():
        Image.new("RGB", (100, 80)).save(root / f"JPEGImages/{name}.jpg")
        boxes = "".join(
            f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
            f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for kind, x1, y1, x2, y2, difficult in objects
        )
        size = "<size><width>100</width><height>80</height><depth>3</depth></size>"
        xml = f"<annotation><filename>{name}.jpg</filename>{size}{boxes}</annotation>"
        (root / f"Annotations/{name}.xml").write_text(xml)
    return root


def test_a_voc_box_covers_its_last_pixel_so_the_devkits_extra_pixel_counts(tmp_path):
    """Pixels 1..20 and 1..10: 10 / 20 = 0.5 in the devkit, but 9 / 19 < 0.5 where the + 1 is forgotten."""
    root = write_voc(tmp_path / "voc", {"a": [("dog", 1, 1, 20, 10, 0)]})
    annotated = read_ground_truth(str(root))
    assert annotated.boxes_xywh.tolist() == [[0, 0, 20, 10]]
    assert match_voc(annotated, detected((0, 1, (0, 0, 10, 10), 0.9)), 1).correct.tolist() == [[True]]
    assert match_voc(annotated, detected((0, 1, (0, 0, 9.99, 10), 0.9)), 1).correct.tolist() == [[False]]


def test_a_voc_folder_gives_images_classes_and_difficult_boxes(tmp_path):
    root = write_voc(tmp_path / "voc", {"b": [("猫", 1, 1, 5, 5, 1), ("dog", 2, 2, 9, 9, 0)], "a": []})
    (root / "ImageSets/Main/test.txt").write_text("b\n")
    annotated = read_ground_truth(str(root / "Annotations"))
    assert annotated.image_ids == ("a.jpg", "b.jpg")
    assert annotated.class_names == {1: "dog", 2: "猫"}
    assert annotated.labels.tolist() == [2, 1]
    assert annotated.image_index.tolist() == [1, 1]
    assert annotated.difficult.tolist() == [True, False]
    assert read_ground_truth(str(root), split="test").image_ids == ("b.jpg",)


def test_a_box_of_one_pixel_counts_as_in_the_devkit(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [("cell", 7, 7, 7, 7, 0)]})
    assert read_ground_truth(str(root)).boxes_xywh.tolist() == [[6, 6, 1, 1]]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_annotated_shards_give_their_boxes_under_the_ids_of_a_run(tmp_path, kind):
    annotation = {"width": 64, "height": 48, "boxes": [[1, 2, 11, 22.5]], "labels": [18], "image_id": 7}
    annotation |= {"class_names": ["dog"], "difficult": [0], "crowd": [1]}
    empty = {"width": 64, "height": 48, "boxes": [], "labels": [], "class_names": [], "image_id": 5}
    annotations = {"000.jpg": annotation, "001.jpg": empty}
    (tmp_path / "classes.json").write_bytes(Classes((1, 18), ("person", "dog")).to_json())
    make = make_tar_shard if kind == "tar" else make_parquet_shard
    make(tmp_path / f"s.{kind}", 2, annotations=annotations)
    annotated = read_ground_truth(str(tmp_path))
    assert len(annotated.image_ids) == 2
    assert annotated.image_ids[0].startswith(f"s.{kind}/")
    assert annotated.class_names == {1: "person", 18: "dog"}
    assert annotated.labels.tolist() == [18]
    assert annotated.boxes_xywh.tolist() == [[1, 2, 10, 20.5]]
    assert annotated.crowd.tolist() == [True]
    assert annotated.coco_ids is not None
    assert annotated.coco_ids.tolist() == [7, 5]


def test_names_for_image_ids_in_a_coco_file_do_not_keep_its_shards_from_being_measured(tmp_path):
    note = {"width": 64, "height": 48, "boxes": [[1, 2, 11, 22.5]], "labels": [1], "image_id": "img_1"}
    (tmp_path / "classes.json").write_bytes(Classes((1,), ("person",)).to_json())
    make_tar_shard(tmp_path / "s.tar", 1, annotations={"000.jpg": note})
    annotated = read_ground_truth(str(tmp_path))
    assert annotated.labels.tolist() == [1]
    assert annotated.coco_ids is None


def test_an_image_of_a_shard_without_annotation_is_refused(tmp_path):
    (tmp_path / "classes.json").write_bytes(Classes((1,), ("person",)).to_json())
    make_tar_shard(tmp_path / "s.tar", 1)
    with pytest.raises(ConfigError, match=r"s\.tar.*has no annotation"):
        read_ground_truth(str(tmp_path))


def test_a_folder_of_another_kind_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no COCO \.json, no VOC folder"):
        read_ground_truth(str(tmp_path))


def test_a_damaged_voc_box_is_refused_with_its_place(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [("dog", "x", 1, 2, 3, 0)]})
    with pytest.raises(ConfigError, match=r"a\.xml object 1"):
        read_ground_truth(str(root))


def test_the_boxes_of_a_real_voc_set_are_all_read(shared_data):
    annotated = read_ground_truth(str(shared_data("data/bccd")), split="test")
    assert annotated.num_images == 72
    assert set(annotated.class_names.values()) == {"RBC", "WBC", "Platelets"}
    assert read_ground_truth(str(shared_data("data/bccd"))).num_counted == 4888


def test_a_coco_file_keeps_mask_areas_and_its_own_ids(tmp_path):
    data = {
        "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 5, "file_name": "a.jpg"}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [
            {"image_id": 9, "category_id": 18, "bbox": [1, 2, 3, 4], "area": 7.5, "iscrowd": 1},
            {"image_id": 5, "category_id": 18, "bbox": [1, 2, 3, 4]},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    annotated = read_ground_truth(str(tmp_path / "a.json"))
    assert annotated.image_ids == ("a.jpg", "b.jpg")
    assert annotated.image_index.tolist() == [1, 0]
    assert annotated.areas.tolist() == [7.5, 12]
    assert annotated.crowd.tolist() == [True, False]


BOX = {"id": 17, "image_id": 9, "category_id": 18, "bbox": [1, 2, 3, 4]}


def write_coco(path, *boxes, images=({"id": 9, "file_name": "b.jpg"},)):
    data = {"images": images, "categories": [{"id": 18, "name": "dog"}], "annotations": boxes}
    path.write_text(json.dumps(data))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 999999}, "annotation 17 of image 999999: that image is not in the file's list"),
        ({"category_id": 99}, "annotation 17 of image 9 is of the unknown category 99"),
        ({"category_id": "18"}, "annotation 17 of image 9 is of the unknown category '18'"),
        ({"bbox": [1, 2, 3, float("nan")]}, "(dog, bbox [1, 2, 3, nan]) is not four numbers"),
        ({"bbox": [1, 2, float("inf"), 4]}, "annotation 17 of image 9 (dog, bbox [1, 2, inf, 4])"),
        ({"bbox": [1, 2, 3]}, "(dog, bbox [1, 2, 3]) is not four numbers"),
        ({"bbox": []}, "(dog, bbox []) is not four numbers"),
        ({"bbox": None}, "(dog, bbox None) is not four numbers"),
        ({"area": float("nan")}, "annotation 17 of image 9 (dog, area nan) is not finite"),
    ],
)
def test_a_wrong_coco_annotation_is_refused_by_its_id_and_value(tmp_path, change, message):
    uri = write_coco(tmp_path / "a.json", BOX | {"id": 16}, BOX | change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_ground_truth(uri)


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox"])
def test_a_coco_annotation_that_lacks_something_is_refused_by_its_place(tmp_path, key):
    box = {name: value for name, value in BOX.items() if name != key}
    uri = write_coco(tmp_path / "a.json", BOX, box)
    with pytest.raises(ConfigError, match=rf"annotations\[1\] \(id 17\) has no {key}$"):
        read_ground_truth(uri)
    del box["id"]
    with pytest.raises(ConfigError, match=rf"annotations\[1\] has no {key}$"):
        read_ground_truth(write_coco(tmp_path / "a.json", BOX, box))


@pytest.mark.parametrize("second", [{"id": 9, "file_name": "c.jpg"}, {"id": 5, "file_name": "b.jpg"}])
def test_an_image_listed_twice_is_refused(tmp_path, second):
    uri = write_coco(tmp_path / "a.json", BOX, images=[{"id": 9, "file_name": "b.jpg"}, second])
    with pytest.raises(ConfigError, match=r"lists image (9|b\.jpg) 2 times; each image may be listed once"):
        read_ground_truth(uri)


def test_a_split_of_something_else_than_voc_is_refused(tmp_path):
    """It would be ignored, and the numbers be those of all images."""
    uri = write_coco(tmp_path / "a.json", BOX)
    with pytest.raises(ConfigError, match=r"^--split test is for VOC folders, .*a\.json is a COCO file"):
        read_ground_truth(uri, split="test")
    (tmp_path / "classes.json").write_bytes(Classes((1,), ("person",)).to_json())
    with pytest.raises(ConfigError, match=r"^--split test is for VOC folders, .* is a folder of shards"):
        read_ground_truth(str(tmp_path), split="test")


def test_coco_boxes_without_area_or_outside_their_image_count_as_in_pycocotools(tmp_path):
    """COCO's own train2017 has boxes without height; an area of null is that of the box."""
    image = {"id": 9, "file_name": "b.jpg", "width": 10, "height": 10}
    boxes = [[1, 2, 3, 0], [50, 2, 3, 4], [-9, -9, 2, 2]]
    uri = write_coco(
        tmp_path / "a.json", *[BOX | {"bbox": box, "area": None} for box in boxes], images=[image]
    )
    assert read_ground_truth(uri).boxes_xywh.tolist() == boxes
    assert read_ground_truth(uri).areas.tolist() == [0, 12, 4]


def test_perfect_detections_of_a_real_voc_set_give_a_map_of_one(shared_data):
    annotated = read_ground_truth(str(shared_data("data/bccd")), split="test")
    perfect = Detected(
        annotated.image_index,
        annotated.boxes_xywh,
        annotated.labels,
        np.linspace(1, 0.1, len(annotated.labels)),
    )
    counts = {int(label): 1 for label in annotated.class_names}
    for metric in ("voc", "voc07"):
        evaluation = measure(annotated, ResultsFile(perfect, counts, {}), metric=metric)
        assert numbers(evaluation)["mAP"] == 1.0

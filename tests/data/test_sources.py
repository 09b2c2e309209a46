"""Reading COCO files, VOC folders and plain folders as people have them."""

import json
from pathlib import Path

import pytest

from pipeline.data.coco import read_coco
from pipeline.data.sources import SourceBox, SourceImage, read_folder
from pipeline.data.voc import read_voc
from pipeline.errors import ConfigError
from tests.conftest import shared
from tests.makers import make_jpeg


def make_images(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make_jpeg(64, 48))
    return str(folder)


CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


def make_coco(path: Path, images: list, annotations: list, categories: list = CATEGORIES) -> str:
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def boxes_of(image: SourceImage) -> list[SourceBox]:
    assert image.boxes is not None
    return list(image.boxes)


def coco_image(id_: int, name: str) -> dict:
    return {"id": id_, "file_name": name, "width": 64, "height": 48}


SIZE = "<width>64</width><height>48</height>"


def make_xml(path: Path, *objects: str, size: str = SIZE, name: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><filename>{name}</filename><path>/home/someone/{name}</path><size>{size}</size>"
        f"{''.join(objects)}</annotation>"
    )


def voc_object(name: str = "cat", box: tuple = (1, 2, 30, 40), extra: str = "") -> str:
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{sides}</bndbox></object>"


# ---- COCO --------------------------------------------------------------------------------------------


def test_coco_boxes_become_corners_and_ids_are_kept(tmp_path):
    images = make_images(tmp_path / "in", "b.jpg", "a.jpg", "extra.jpg")
    boxes = [
        {"id": 5, "image_id": 7, "category_id": 18, "bbox": [1.5, 2, 10, 20]},
        {"id": 6, "image_id": 7, "category_id": 1, "bbox": [0, 0, 64, 48], "iscrowd": 1},
    ]
    uri = make_coco(tmp_path / "a.json", [coco_image(7, "b.jpg"), coco_image(9, "a.jpg")], boxes)

    source = read_coco(images, uri)

    assert source.classes is not None
    assert (source.classes.ids, source.classes.names) == ((1, 18), ("person", "dog"))
    assert [(image.name, image.image_id) for image in source.images] == [("a.jpg", 9), ("b.jpg", 7)]
    first, second = boxes_of(source.images[1])
    assert (first.class_name, first.xyxy, first.crowd) == ("dog", (1.5, 2, 11.5, 22), False)
    assert (second.class_name, second.crowd) == ("person", True)
    assert source.images[0].boxes == ()
    assert source.num_left_out == 1


def test_coco_ids_from_zero_move_up_by_one(tmp_path):
    images = make_images(tmp_path / "in", "a.jpg")
    categories = [{"id": 0, "name": "cells"}, {"id": 1, "name": "RBC"}]

    source = read_coco(images, make_coco(tmp_path / "a.json", [coco_image(1, "a.jpg")], [], categories))

    assert source.classes is not None
    assert (source.classes.ids, source.classes.names) == ((1, 2), ("cells", "RBC"))
    assert source.notes


@pytest.mark.parametrize("written", ["a.jpg", "x/a.jpg", "/data/train/a.jpg", "train\\a.jpg"])
def test_coco_images_are_found_by_path_or_by_their_only_base_name(tmp_path, written):
    images = make_images(tmp_path / "in", "x/a.jpg")

    source = read_coco(images, make_coco(tmp_path / "a.json", [coco_image(1, written)], []))

    assert [image.name for image in source.images] == ["x/a.jpg"]


def test_coco_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    images = make_images(tmp_path / "in", "a.jpg", "x/b.jpg", "y/b.jpg")

    def refused(*args, **options) -> str:
        with pytest.raises(ConfigError) as caught:
            read_coco(images, make_coco(tmp_path / "a.json", *args, **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = refused([coco_image(1, "gone.jpg"), coco_image(2, "a.jpg")], [])
    assert "1 annotated images are not there, such as gone.jpg" in missing
    assert "such as b.jpg" in refused([coco_image(1, "b.jpg")], [])  # which of the two?
    assert "name a.jpg 2 times" in refused([coco_image(1, "a.jpg"), coco_image(2, "a.jpg")], [])
    one_id = refused([coco_image(1, "a.jpg"), coco_image(1, "x/b.jpg")], [])
    assert "lists image 1 2 times" in one_id  # whose boxes would they be?
    nameless = refused([coco_image(1, "a.jpg")], [{"id": 7, "image_id": 1, "bbox": [0, 0, 1, 1]}])
    assert "annotations[0] (id 7) has no category_id" in nameless
    stranger = {"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]}
    assert "such as 99" in refused([coco_image(1, "a.jpg")], [stranger])
    assert "no classes" in refused([coco_image(1, "a.jpg")], [], [])
    assert "no COCO instances file" in refused([{"id": 1}], [])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no COCO instances file"):
        read_coco(images, str(tmp_path / "list.json"))


# ---- VOC ---------------------------------------------------------------------------------------------


def make_voc(root: Path) -> Path:
    make_images(root / "JPEGImages", "a.jpg", "b.JPG", "c.png", "no_xml.jpg")
    make_xml(
        root / "Annotations/a.xml", voc_object("dog"), voc_object("cat", extra="<difficult>1</difficult>")
    )
    make_xml(root / "Annotations/b.xml", voc_object("bird"))
    make_xml(root / "Annotations/c.xml")
    lists = root / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "cat_train.txt").write_text("a  1\nc -1\n")
    return root


def test_voc_pixels_from_one_become_continuous_pixels_from_zero(tmp_path):
    source = read_voc(str(make_voc(tmp_path)))

    assert boxes_of(source.images[0])[0].xyxy == (0, 1, 30, 40)  # pixels 1..30 and 2..40: 30 wide, 39 high


def test_voc_classes_are_all_names_sorted_whatever_the_split(tmp_path):
    source = read_voc(str(make_voc(tmp_path)), split="train")

    assert source.classes is not None
    assert (source.classes.ids, source.classes.names) == ((1, 2, 3), ("bird", "cat", "dog"))
    assert [image.name for image in source.images] == ["a.jpg", "c.png"]
    assert [box.difficult for box in boxes_of(source.images[0])] == [False, True]
    assert source.images[1].boxes == ()


@pytest.mark.parametrize("split", ["train", "cat_train"])
def test_voc_lists_may_have_a_second_column(tmp_path, split):
    assert len(read_voc(str(make_voc(tmp_path)), split=split).images) == 2


def test_voc_folders_may_be_given_in_three_ways(tmp_path):
    root = make_voc(tmp_path / "VOC2007")

    sources = [
        read_voc(str(root)),
        read_voc(f"{root}/JPEGImages"),
        read_voc(f"{root}/JPEGImages/", f"{root}/Annotations/"),
    ]

    assert sources[0] == sources[1]
    assert [image.name for image in sources[2].images] == ["a.jpg", "b.JPG", "c.png"]
    assert [source.num_left_out for source in sources] == [1, 1, 1]


def test_voc_class_names_may_be_given_in_order(tmp_path):
    source = read_voc(str(make_voc(tmp_path)), class_names=("dog", "cat"))

    assert source.classes is not None
    assert source.classes.names == ("dog", "cat")


def test_voc_image_is_found_by_the_name_of_the_xml_file_not_by_its_path(tmp_path):
    make_images(tmp_path / "JPEGImages", "a.png", "a.jpg", "other.jpg")
    make_xml(tmp_path / "Annotations/a.xml", voc_object(), name="a.png")
    make_xml(tmp_path / "Annotations/renamed.xml", voc_object(), name="other.jpg")

    assert [image.name for image in read_voc(str(tmp_path)).images] == ["a.png", "other.jpg"]


def test_voc_parts_of_objects_are_no_objects(tmp_path):
    corners = "<xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax>"
    part = f"<part><name>head</name><bndbox>{corners}</bndbox></part>"
    make_images(tmp_path / "JPEGImages", "a.jpg")
    make_xml(tmp_path / "Annotations/a.xml", voc_object("person", extra=part))

    source = read_voc(str(tmp_path))

    assert source.classes is not None
    assert source.classes.names == ("person",)
    assert [box.xyxy for box in boxes_of(source.images[0])] == [(0, 1, 30, 40)]


@pytest.mark.parametrize("size", ["", "<width>0</width><height>0</height>", "<width>?</width>"])
def test_a_size_that_is_not_said_is_zero(tmp_path, size):
    make_images(tmp_path / "JPEGImages", "a.jpg")
    make_xml(tmp_path / "Annotations/a.xml", voc_object(), size=size)

    assert (read_voc(str(tmp_path)).images[0].width, read_voc(str(tmp_path)).images[0].height) == (0, 0)


def test_voc_folders_that_do_not_fit_are_refused_in_one_line(tmp_path):
    root = make_voc(tmp_path)

    def refused(**options) -> str:
        with pytest.raises(ConfigError) as caught:
            read_voc(str(root), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there are: cat_train, train" in refused(split="val")
    (root / "ImageSets/Main/wrong.txt").write_text("a\nzzz\n")
    assert "1 have no XML file, such as zzz" in refused(split="wrong")
    (root / "ImageSets/Main/empty.txt").write_text("\n")
    assert "is empty" in refused(split="empty")
    make_xml(root / "Annotations/gone.xml", voc_object())
    assert "1 annotated images are not there, such as gone" in refused()
    (root / "Annotations/gone.xml").write_text("<annotation>")
    assert "gone.xml: no XML" in refused()
    (root / "Annotations/gone.xml").write_text("<html></html>")
    assert "gone.xml: no VOC annotation" in refused()


@pytest.mark.parametrize("encoding", ["gb2312", "no-such-code"])
def test_an_xml_file_in_an_encoding_that_is_not_read_is_named(tmp_path, encoding):
    make_images(tmp_path / "JPEGImages", "a.jpg")
    path = tmp_path / "Annotations" / "a.xml"
    make_xml(path, voc_object())
    path.write_text(f'<?xml version="1.0" encoding="{encoding}"?>{path.read_text()}')
    with pytest.raises(ConfigError, match=r"a\.xml: no XML"):
        read_voc(str(tmp_path))


def test_a_split_that_is_no_text_is_named(tmp_path):
    make_images(tmp_path / "JPEGImages", "a.jpg")
    make_xml(tmp_path / "Annotations" / "a.xml", voc_object())
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"train\.txt is no UTF-8 text"):
        read_voc(str(tmp_path), split="train")


def test_a_coco_size_that_is_no_number_is_refused_in_one_line(tmp_path):
    images = make_images(tmp_path / "in", "a.jpg")
    path = make_coco(tmp_path / "a.json", [coco_image(1, "a.jpg") | {"width": "640px"}], [])
    with pytest.raises(ConfigError, match="is no COCO instances file: ValueError"):
        read_coco(images, path)


def test_bccd_has_its_two_empty_boxes():
    source = read_voc(str(shared("data/bccd")))

    boxes = [box for image in source.images for box in boxes_of(image)]
    assert (len(source.images), len(boxes)) == (364, 4888)
    assert [box.where for box in boxes if box.empty] == [
        "BloodImage_00338.xml object 13 (RBC 504 337 504 337)",
        "BloodImage_00343.xml object 4 (RBC 181 329 181 329)",
    ]


# ---- folder ------------------------------------------------------------------------------------------


def test_a_folder_gives_all_its_images_without_annotations(tmp_path):
    make_images(tmp_path, "b.jpg", "x/a.png")
    (tmp_path / "notes.txt").write_text("x")

    source = read_folder(str(tmp_path))

    assert [(image.name, image.boxes) for image in source.images] == [("b.jpg", None), ("x/a.png", None)]
    assert source.classes is None


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no image files there"):
        read_folder(str(tmp_path))

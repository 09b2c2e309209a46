"""Writing shard sets: read back whole, the same bytes each time, nothing half done."""

import fsspec
import numpy as np
import pytest

from pipeline import storage
from pipeline.data import write
from pipeline.data.annotations import Classes, parse_annotation, read_classes
from pipeline.data.shards import list_shards, read_shard
from pipeline.data.sources import Source, SourceBox, SourceImage, read_folder
from pipeline.data.write import summary_text, write_shards
from pipeline.errors import ConfigError, StorageError
from tests.makers import make_jpeg

CLASSES = Classes((1, 18), ("person", "dog"))


def box(xyxy=(1.0, 2.0, 30.0, 40.0), name="dog", *, difficult=False, crowd=False) -> SourceBox:
    return SourceBox(name, xyxy, False, difficult, crowd, f"a.xml object ({name})")


def make_source(folder, images: dict[str, bytes], boxes: dict[str, tuple] | None = None) -> Source:
    found = []
    for number, (name, data) in enumerate(images.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        annotation = None if boxes is None else boxes.get(name, ())
        size = (0, 0) if boxes is None else (64, 48)
        found.append(SourceImage(name, str(folder / name), *size, annotation, number))
    return Source(tuple(found), None if boxes is None else CLASSES)


def read_back(output) -> list:
    return [row for shard in list_shards(str(output)) for row in read_shard(shard)]


def test_images_and_annotations_come_back_as_they_were(tmp_path):
    images = {"x/a.b.jpg": make_jpeg(seed=1), "ünï.jpg": make_jpeg(seed=2), "bad.jpg": b"not an image"}
    boxes = {
        "x/a.b.jpg": (box(difficult=True), box((0.0, 0.0, 9.0, 9.0), "person", crowd=True)),
        "bad.jpg": (box(),),
    }
    output = tmp_path / "out"

    made = write_shards(make_source(tmp_path / "in", images, boxes), str(output), images_per_shard=2)

    rows = read_back(output)
    assert [row.image_id for row in rows] == [
        "shard-00000.tar/x/a.b.jpg", "shard-00000.tar/ünï.jpg", "shard-00001.tar/bad.jpg",
    ]  # fmt: skip
    assert [row.data for row in rows] == list(images.values())
    classes = read_classes(str(output))
    found = [parse_annotation(row.annotation, classes, image_id=row.image_id) for row in rows]
    np.testing.assert_array_equal(found[0].boxes, [[1, 2, 30, 40], [0, 0, 9, 9]])
    assert found[0].labels.tolist() == [2, 1]
    assert (found[0].difficult.tolist(), found[0].crowd.tolist()) == ([True, False], [False, True])
    assert [annotation.image_id for annotation in found] == [0, 1, 2]
    assert [(annotation.width, annotation.height) for annotation in found] == [(64, 48)] * 3
    assert [len(annotation.boxes) for annotation in found] == [2, 0, 1]
    assert (made.num_images, made.num_shards, made.num_empty) == (3, 2, 1)
    assert made.boxes == {"person": 1, "dog": 2}


def test_two_images_that_differ_in_their_ending_keep_their_own_annotation(tmp_path):
    images = {"a.jpg": make_jpeg(seed=1), "a.jpeg": make_jpeg(seed=2)}
    source = make_source(tmp_path / "in", images, {"a.jpg": (box(),), "a.jpeg": (box(name="person"),)})

    write_shards(source, str(tmp_path / "out"), images_per_shard=10)

    assert [row.annotation["class_names"] for row in read_back(tmp_path / "out")] == [["dog"], ["person"]]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    source = make_source(
        tmp_path / "in", {f"{i}.jpg": make_jpeg(seed=i) for i in range(3)}, {"1.jpg": (box(),)}
    )

    for name in ("one", "two"):
        write_shards(source, str(tmp_path / name), images_per_shard=2)

    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert sorted(files[0]) == ["classes.json", "shard-00000.tar", "shard-00001.tar"]


def test_a_shard_ends_before_it_grows_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_SHARD_BYTES", 5000)
    source = make_source(tmp_path / "in", {f"{i}.jpg": bytes(2000) for i in range(5)})

    assert write_shards(source, str(tmp_path / "out"), images_per_shard=100).num_shards == 3
    assert len(read_back(tmp_path / "out")) == 5


def test_a_folder_is_packed_without_annotations(tmp_path):
    make_source(tmp_path / "in", {"a.jpg": b"a", "x/b.png": b"b"})

    write_shards(read_folder(str(tmp_path / "in")), str(tmp_path / "out"), images_per_shard=10)

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-00000.tar"]
    assert [(row.image_id, row.annotation) for row in read_back(tmp_path / "out")] == [
        ("shard-00000.tar/a.jpg", None), ("shard-00000.tar/x/b.png", None),
    ]  # fmt: skip


BAD = {"a.jpg": (box(), box(name="cow"), box((70.0, 0.0, 80.0, 9.0)))}


def test_bad_boxes_are_refused_before_anything_is_written(tmp_path):
    source = make_source(tmp_path / "in", {"a.jpg": make_jpeg()}, BAD)

    with pytest.raises(
        ConfigError, match=r"\(cow\) is of the unknown class 'cow'; .* outside .*--skip-bad-boxes"
    ):
        write_shards(source, str(tmp_path / "out"), images_per_shard=10)
    assert not (tmp_path / "out").exists()


def test_bad_boxes_are_left_out_and_listed_on_request(tmp_path):
    source = make_source(tmp_path / "in", {"a.jpg": make_jpeg()}, BAD)

    made = write_shards(source, str(tmp_path / "out"), images_per_shard=10, skip_bad_boxes=True)

    assert made.boxes == {"person": 0, "dog": 1}
    assert len(made.dropped) == 2
    summary = summary_text(source, made, "out")
    assert "unknown class 'cow'" in summary
    assert "Classes without any box: 1: person" in summary


def test_an_image_turned_by_exif_against_its_annotation_is_refused_and_leaves_nothing(tmp_path):
    images = {"a.jpg": make_jpeg(64, 48), "b.jpg": make_jpeg(64, 48, orientation=6)}
    source = make_source(tmp_path / "in", images, {"b.jpg": (box(),)})
    output = tmp_path / "out"

    with pytest.raises(ConfigError, match=r"b\.jpg is annotated as 64x48, but displayed as 48x64"):
        write_shards(source, str(output), images_per_shard=1)
    assert list(tmp_path.glob("out/*")) == []

    made = write_shards(source, str(output), images_per_shard=1, skip_bad_boxes=True)
    assert (made.num_images, len(made.dropped)) == (1, 1)


def test_an_older_shard_set_is_replaced_only_on_request_and_other_files_never(tmp_path):
    source = make_source(tmp_path / "in", {f"{i}.jpg": make_jpeg() for i in range(3)}, {})
    output = tmp_path / "out"
    write_shards(source, str(output), images_per_shard=1)

    with pytest.raises(ConfigError, match="--overwrite"):
        write_shards(source, str(output), images_per_shard=10)
    write_shards(source, str(output), images_per_shard=10, overwrite=True)

    assert sorted(path.name for path in output.iterdir()) == ["classes.json", "shard-00000.tar"]
    (output / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"other files, such as mine\.txt"):
        write_shards(source, str(output), images_per_shard=10, overwrite=True)


def test_an_image_that_vanishes_leaves_no_half_shard_set(tmp_path):
    source = make_source(tmp_path / "in", {f"{i}.jpg": make_jpeg() for i in range(3)}, {})
    (tmp_path / "in/2.jpg").unlink()

    with pytest.raises(StorageError):
        write_shards(source, str(tmp_path / "out"), images_per_shard=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_no_images_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no images"):
        write_shards(Source((), CLASSES), str(tmp_path / "out"), images_per_shard=1)


def test_shards_can_be_written_to_an_object_store(tmp_path):
    source = make_source(tmp_path / "in", {"a.jpg": make_jpeg()}, {"a.jpg": (box(),)})
    try:
        write_shards(source, "memory://bucket/set", images_per_shard=1)
        rows = read_back("memory://bucket/set")
        assert storage.list_names("memory://bucket/set") == {"classes.json", "shard-00000.tar"}
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)

    assert rows[0].annotation["labels"] == [18]

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import s3fs

from pipeline import schema, storage
from pipeline.errors import ConfigError, StorageError
from pipeline.results import iter_detections, load_detections, load_images, summarise
from tests import servers
from tests.outputs import box, failed_image, image, write_part


@pytest.fixture
def output(tmp_path):
    """Two parts: a.jpg with two boxes, b.jpg empty; c.jpg with one box, d.jpg failed."""
    boxes = [box("a.jpg", "dog", 0.9), box("a.jpg", "person", 0.3, detection_id=1)]
    write_part(tmp_path, "part-0", [image("a.jpg", 2), image("b.jpg")], boxes)
    write_part(tmp_path, "part-1", [image("c.jpg", 1), failed_image("d.jpg")], [box("c.jpg", "person", 0.7)])
    return tmp_path


def test_every_box_is_read_in_the_order_of_the_parts(output):
    frame = load_detections(output)
    assert frame.image_id.tolist() == ["a.jpg", "a.jpg", "c.jpg"]
    assert frame.columns.tolist() == schema.DETECTIONS.names
    assert frame.score.dtype == np.float32
    assert frame.label.dtype == np.int32


def test_filters_keep_what_they_say(output):
    assert load_detections(output, min_score=0.5).image_id.tolist() == ["a.jpg", "c.jpg"]
    assert load_detections(output, class_names=["person"]).image_id.tolist() == ["a.jpg", "c.jpg"]
    assert load_detections(output, class_names="dog", min_score=0.95).empty
    assert load_detections(output, class_names=[]).empty
    assert load_detections(output, image_ids=["c.jpg", "none"]).image_id.tolist() == ["c.jpg"]
    assert load_detections(output, image_ids=[]).empty
    assert load_images(output, status="failed").image_id.tolist() == ["d.jpg"]


def test_one_text_is_as_good_as_a_list_of_one(output):
    assert load_detections(output, image_ids="c.jpg").image_id.tolist() == ["c.jpg"]
    assert load_detections(output, columns="score").columns.tolist() == ["score"]
    assert load_images(output, columns="image_id").columns.tolist() == ["image_id"]
    some = (name for name in ["dog"])
    assert load_detections(output, class_names=some).class_name.tolist() == ["dog"]  # type: ignore[arg-type]


def test_a_score_equal_to_the_threshold_is_kept_although_the_column_is_float32(output):
    assert len(load_detections(output, min_score=0.7)) == 2  # float32(0.7) < 0.7


def test_only_the_named_columns_are_returned_in_the_given_order(output):
    assert load_detections(output, columns=["score", "image_id"]).columns.tolist() == ["score", "image_id"]
    assert load_images(output, columns=["status"]).shape == (4, 1)


def test_classes_that_the_filter_removed_are_not_counted_as_zero(output):
    assert load_detections(output, class_names="dog").class_name.value_counts().to_dict() == {"dog": 1}


def test_a_frame_equals_a_naive_pandas_read(output):
    naive = pd.read_parquet(output / "detections").astype({"image_id": "str"})
    pd.testing.assert_frame_equal(load_detections(output), naive, check_categorical=False)


def test_boxes_that_no_images_part_names_are_ignored(output):
    orphan = pq.read_table(output / "detections/part-0-d.parquet")
    pq.write_table(orphan, output / "detections/part-0-d2.parquet")
    assert len(load_detections(output)) == 3
    assert summarise(output).num_detections == 3


def test_a_part_that_another_took_over_is_ignored(output):
    write_part(
        output,
        "part-2",
        [image("c.jpg", 1), failed_image("d.jpg")],
        [box("c.jpg")],
        replaces=["part-1.parquet"],
    )
    assert sorted(load_images(output).image_id) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert len(load_detections(output)) == 3


def test_the_row_of_a_later_round_replaces_the_older_one(output):
    write_part(
        output, "part-9", [image("d.jpg", 1), image("a.jpg", 1)], [box("d.jpg"), box("a.jpg")], round=1
    )
    assert sorted(load_images(output).image_id) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert load_images(output, status="failed").empty
    assert sorted(load_detections(output).image_id) == ["a.jpg", "c.jpg", "d.jpg"]
    write_part(output, "part-10", [failed_image("a.jpg")], [], round=2)
    assert load_images(output, status="failed").image_id.tolist() == ["a.jpg"]
    assert sorted(load_detections(output, columns=["image_id"]).image_id) == ["c.jpg", "d.jpg"]


def test_the_row_of_a_shard_that_failed_whole_goes_when_its_images_arrive(tmp_path):
    shard = failed_image("s.tar", shard="s.tar", shard_index=-1, shard_size=0, error_stage="read")
    write_part(tmp_path, "part-0", [shard, image("x.jpg", shard="t.tar")], [])
    write_part(tmp_path, "part-1", [image("s.tar/a.jpg", shard="s.tar")], [], round=1)
    assert load_images(tmp_path).image_id.tolist() == ["x.jpg", "s.tar/a.jpg"]


def test_no_boxes_and_no_images_are_empty_frames_of_the_right_types(tmp_path):
    write_part(tmp_path, "part-0", [], [])
    detections, images = load_detections(tmp_path), load_images(tmp_path)
    assert len(detections) == len(images) == 0
    assert detections.dtypes["xmin"] == np.float32
    assert isinstance(detections.dtypes["class_name"], pd.CategoricalDtype)
    assert images.dtypes["num_bytes"] == np.int64
    assert list(iter_detections(tmp_path)) == []
    assert str(summarise(tmp_path)) == "0 images (0 failed, 0 without a box), 0 detections"


def test_frames_of_the_iterator_hold_whole_images_and_add_up_to_the_table(tmp_path):
    counts = [3, 1, 8, 2, 5]
    for i, count in enumerate(counts):
        boxes = [box(f"{i}.jpg", score=0.9 - k / 10, detection_id=k) for k in range(count)]
        write_part(tmp_path, f"part-{i}", [image(f"{i}.jpg", count)], boxes)
    frames = list(iter_detections(tmp_path, rows_per_frame=2, columns=["image_id", "score"]))
    pd.testing.assert_frame_equal(
        pd.concat(frames, ignore_index=True), load_detections(tmp_path, columns=["image_id", "score"])
    )
    owners = [set(frame.image_id) for frame in frames]
    assert sum(map(len, owners)) == 5, "an image is split between frames"
    assert next(iter(iter_detections(tmp_path, columns=["score"]))).columns.tolist() == ["score"]


def test_the_summary_counts_images_boxes_classes_and_failures(output):
    found = summarise(output)
    assert (found.num_images, found.num_failed, found.num_empty, found.num_bytes) == (4, 1, 1, 4000)
    assert found.classes.to_dict("list") == {
        "class_name": ["person", "dog"],
        "num_detections": [2, 1],
        "num_images": [2, 1],
        "mean_score": pytest.approx([0.5, 0.9]),
    }
    assert found.failures.to_numpy().tolist() == [["decode", "UnidentifiedImageError", 1]]
    assert found.score_histogram.nonzero()[0].tolist() == [6, 14, 18]
    assert found.model["architecture"] == "tiny"
    assert str(found) == "4 images (1 failed, 1 without a box), 3 detections: person 2, dog 1"


def test_the_summary_adds_up_over_parts_with_other_images_and_classes(tmp_path):
    for part, name in enumerate(("dog", "cat", "person")):
        ids = [f"{part}-{i}.jpg" for i in range(3)]
        write_part(tmp_path, f"p{part}", [image(i, 1) for i in ids], [box(i, name) for i in [*ids, ids[-1]]])
    found = summarise(tmp_path).classes.set_index("class_name")
    assert found.num_detections.to_dict() == {"cat": 4, "dog": 4, "person": 4}
    assert found.num_images.to_dict() == {"cat": 3, "dog": 3, "person": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["scores", "id"]}, "no column scores, id; columns: image_id"),
        ({"columns": "scores"}, "no column scores; columns: image_id"),
        ({"columns": 3}, "columns: 3 is no text; give one text or a list of them"),
        ({"class_names": ["dgo"]}, "did you mean dog"),
        ({"class_names": 3}, "class_names: 3 is no text"),
        ({"image_ids": ["a.jpg", 1]}, "image_ids: 1 is no text"),
        ({"image_ids": b"a.jpg"}, "image_ids: 97 is no text"),
        ({"min_score": "a"}, "min_score='a': give a number"),
    ],
)
def test_a_typing_error_is_refused_with_a_hint(output, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_detections(output, **arguments)


def test_an_unknown_status_is_refused(output):
    with pytest.raises(ConfigError, match="choose"):
        load_images(output, status="done")  # type: ignore[arg-type]


def test_a_folder_without_results_and_an_unknown_schema_version_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no results in"):
        load_images(tmp_path / "absent")
    write_part(tmp_path, "part-0", [image("a.jpg")], [], version="99")
    with pytest.raises(ConfigError, match="schema version 99, this release reads 1"):
        load_detections(tmp_path)


def test_a_file_is_refused_where_an_output_folder_is_wanted(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\n")
    with pytest.raises(ConfigError, match=r"^no results in .*list\.txt: it is a file; name the --output"):
        load_images(tmp_path / "list.txt")


def test_a_missing_or_damaged_part_is_a_storage_error(output):
    (output / "detections/part-1-d.parquet").unlink()
    with pytest.raises(StorageError, match="a part is gone"):
        load_detections(output)
    (output / "images/part-1.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(StorageError, match="can't be read"):
        load_images(output)


def test_results_in_an_object_store_are_read_as_local_ones(output):
    store = fsspec.filesystem("memory")
    store.put(str(output), "/results-of-a-test", recursive=True)
    remote = "memory://results-of-a-test"
    pd.testing.assert_frame_equal(
        load_detections(remote, min_score=0.5), load_detections(output, min_score=0.5)
    )
    assert summarise(remote).num_images == 4
    store.rm("/results-of-a-test", recursive=True)


def test_only_the_columns_asked_for_are_fetched_from_an_object_store(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    boxes = [box("a.jpg", "dog", 0.9, xmin=rng.random(), ymin=rng.random()) for _ in range(20_000)]
    write_part(tmp_path, "p", [image("a.jpg", len(boxes))], boxes)
    size = (tmp_path / "detections/p-d.parquet").stat().st_size
    with servers.moto() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # those of other tests know other servers
        store, _ = storage.split("s3://bucket-of-results/out")
        store.mkdir("bucket-of-results")
        store.put(str(tmp_path), "bucket-of-results/out", recursive=True)
        fetched = []
        call = s3fs.S3FileSystem._call_s3

        async def counted(self, method, *args, **kwargs):
            answer = await call(self, method, *args, **kwargs)
            if method == "get_object":
                fetched.append(answer["ContentLength"])
            return answer

        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
        assert len(load_detections("s3://bucket-of-results/out", columns=["class_name"])) == len(boxes)
        s3fs.S3FileSystem.clear_instance_cache()
    assert sum(fetched) < size / 3

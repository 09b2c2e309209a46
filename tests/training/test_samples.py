"""Batches out of shards."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.training.order import Pick
from pipeline.training.samples import failures_text, from_row, load_batch, load_images, make_sample, to_row
from tests.makers import encode, make_tar_shard
from tests.training.makers import SIDE, make_picture, make_set, read_set, settings


def picked(*samples, epoch=0):
    return [Pick(epoch, sample) for sample in samples]


def damaged(index, row):
    """The index, with a place in the tar where no image is."""
    offsets = index["offset"].to_pylist()
    offsets[row] += 100
    return index.set_column(index.schema.get_field_index("offset"), "offset", pa.array(offsets))


def test_a_batch_holds_the_picked_images_in_their_order(tmp_path):
    index, _ = read_set(make_set(tmp_path, 5, num_shards=2))
    batch = load_batch(picked(3, 0, 3), index, settings())
    assert batch.image_ids == [index["image_id"][i].as_py() for i in (3, 0, 3)]
    assert batch.images_NHW3.shape == (3, SIDE, SIDE, 3)
    assert np.array_equal(batch.images_NHW3[0], batch.images_NHW3[2])


def test_boxes_follow_the_resize(tmp_path):
    index, _ = read_set(make_set(tmp_path, 2))
    batch = load_batch(picked(1), index, settings())
    wanted = np.array(index["boxes"][1].as_py()).reshape(-1, 4) * [SIDE / 160, 1, SIDE / 160, 1]
    np.testing.assert_allclose(batch.boxes[0], wanted, rtol=1e-6)


@pytest.mark.parametrize("augmentation", ["ssd", "crops", "light"])
def test_augmentation_depends_on_seed_and_epoch_alone(tmp_path, augmentation):
    index, _ = read_set(make_set(tmp_path, 3))
    first = load_batch(picked(0, 1), index, settings(augmentation))
    again = load_batch(picked(2, 1), index, settings(augmentation))
    assert np.array_equal(first.images_NHW3[1], again.images_NHW3[1])
    assert np.array_equal(first.boxes[1], again.boxes[1])
    later = load_batch(picked(0, 1, epoch=1), index, settings(augmentation))
    reseeded = load_batch(picked(0, 1), index, settings(augmentation, seed=1))
    for other in (later, reseeded):
        assert not np.array_equal(first.images_NHW3, other.images_NHW3)


@pytest.mark.parametrize(
    ("flip", "ways"), [("none", {(0, 0)}), ("horizontal", {(0, 0), (1, 0)}), ("both", None)]
)
def test_the_flag_says_which_ways_samples_are_mirrored(tmp_path, flip, ways):
    index, _ = read_set(make_set(tmp_path, 1))
    plain = load_batch(picked(0), index, settings()).boxes[0]
    seen = set()
    for epoch in range(30):
        boxes = load_batch(picked(0, epoch=epoch), index, settings("light", flip=flip)).boxes[0]
        across, down = (SIDE - plain[:, [2, 0]], SIDE - plain[:, [3, 1]])
        seen.add((int(np.allclose(boxes[:, ::2], across)), int(np.allclose(boxes[:, 1::2], down))))
    assert seen == (ways or {(0, 0), (0, 1), (1, 0), (1, 1)})


def test_images_as_large_as_infer_takes_are_learnt_and_validated(tmp_path):
    width, height = 10_000, 6_000  # more than 50 million pixels, fewer than the default of --max-pixels
    file = io.BytesIO()
    Image.new("L", (width, height), 90).save(file, "JPEG")
    annotations = {"a.jpg": {"width": width, "height": height, "boxes": [[0, 0, 999, 999]], "labels": [10]}}
    make_tar_shard(tmp_path / "a.tar", {"a.jpg": file.getvalue()}, annotations=annotations)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": [{"id": 10, "name": "disc"}]}))
    index, _ = read_set(tmp_path)
    assert load_images(index, [0], height=SIDE, width=SIDE, rule="bilinear")[1] == ()
    assert load_batch(picked(0), index, settings()).failures == ()


def test_a_damaged_image_is_named_and_another_stands_in(tmp_path):
    index, _ = read_set(make_set(tmp_path, 4))
    batch = load_batch(picked(0, 1, 2), damaged(index, 1), settings())
    ids = index["image_id"].to_pylist()
    assert batch.image_ids == [ids[0], ids[2], ids[2]]
    assert len(batch.failures) == 1
    assert batch.failures[0].startswith(ids[1])


def test_a_batch_without_any_good_image_is_an_error(tmp_path):
    index, _ = read_set(make_set(tmp_path, 2))
    with pytest.raises(ImageError, match="no image of a whole batch"):
        load_batch(picked(1, 1), damaged(damaged(index, 0), 1), settings())


def test_a_worker_whose_share_is_one_damaged_image_takes_the_next_one(tmp_path):
    index, _ = read_set(make_set(tmp_path, 4))
    ids = index["image_id"].to_pylist()
    batch = load_batch(picked(3), damaged(damaged(index, 3), 0), settings())
    assert batch.image_ids == [ids[1]]
    assert [failure.partition(":")[0] for failure in batch.failures] == [ids[3], ids[0]]


def test_crowd_regions_are_never_learnt_and_difficult_objects_by_flag():
    rng = np.random.default_rng(0)
    pixels, boxes, labels = make_picture(rng, 3)
    found = annotation_of(boxes, labels, difficult=[True, False, False], crowd=[False, True, False])
    for difficult, kept in ((True, [0, 2]), (False, [2])):
        sample = make_sample(encode(pixels, "PNG"), found, settings(train_difficult=difficult), rng)
        assert sample.labels.tolist() == [labels[i] for i in kept]


def annotation_of(boxes, labels, *, difficult, crowd):
    from pipeline.data.annotations import Annotation

    return Annotation(
        width=160,
        height=128,
        boxes=np.array(boxes, np.float32),
        labels=np.array(labels),
        difficult=np.array(difficult),
        crowd=np.array(crowd),
    )


def test_a_row_gives_its_batches_back(tmp_path):
    index, _ = read_set(make_set(tmp_path, 3, empty=1))
    bad = dataclasses.replace(load_batch(picked(2, 0, 1), index, settings()), failures=("x: bad", "y: bad"))
    batches = [load_batch(picked(0, 1, 2), index, settings()), bad]
    row = to_row(batches, step=5, rank=1)
    assert row.num_rows == 1
    assert (row["step"][0].as_py(), row["rank"][0].as_py()) == (5, 1)
    for back, batch in zip(from_row(row, height=SIDE, width=SIDE), batches, strict=True):
        assert np.array_equal(back.images_NHW3, batch.images_NHW3)
        assert back.images_NHW3.flags.writeable
        for name in ("boxes", "labels"):
            for mine, theirs in zip(getattr(back, name), getattr(batch, name), strict=True):
                assert mine.dtype == theirs.dtype
                assert np.array_equal(mine, theirs)
        assert (back.image_ids, back.failures) == (batch.image_ids, batch.failures)


@pytest.mark.parametrize(("parts", "sizes"), [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (9, [1] * 5)])
def test_micro_batches_share_a_batch(tmp_path, parts, sizes):
    index, _ = read_set(make_set(tmp_path, 5))
    batch = load_batch(picked(*range(5)), index, settings())
    pieces = batch.split(parts)
    assert [len(piece.image_ids) for piece in pieces] == sizes
    assert [i for piece in pieces for i in piece.image_ids] == batch.image_ids


def test_validation_images_that_cannot_be_decoded_are_counted_and_the_first_named(tmp_path):
    index, _ = read_set(make_set(tmp_path, 3))
    _, failures = load_images(damaged(index, 1), range(3), height=SIDE, width=SIDE, rule="bilinear")
    text = failures_text(failures, 3)
    assert text.startswith("1 of 3 images of --val can't be decoded, grey stands in for them: ")
    assert text.endswith(failures[0])
    assert failures[0].startswith(f"{index['image_id'][1].as_py()}: ")
    assert failures_text(["a", "b", "c", "d"], 2000).endswith("a; b; c; ...")

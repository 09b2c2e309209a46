import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import InferConfig, flags
from pipeline.data.shards import list_shards, read_shard
from pipeline.gallery import sheet_of_run
from pipeline.gallery.photographs import COLUMNS, read_photographs
from pipeline.gallery.sheet import spread
from pipeline.results import load_images
from tests.makers import make_jpeg, make_parquet_shard, make_tar_shard
from tests.outputs import box, image, write_part


def write_output(input_folder, output):
    """An output with one box for each image of the input."""
    rows = []
    for shard in list_shards(str(input_folder)):
        for raw in read_shard(shard):
            row = image(raw.image_id, 1, uri=raw.uri, shard=raw.shard, shard_index=raw.shard_index)
            rows.append(row | {"shard_size": raw.shard_size, "width": 64, "height": 48})
    boxes = [box(row["image_id"], image_width=64, image_height=48) for row in rows]
    write_part(output, "part-0", rows, boxes)
    return rows


@pytest.fixture
def photographs(tmp_path):
    """A tar, a Parquet shard and a loose rotated image, 64x48 in all, and the output of a run on them."""
    folder = tmp_path / "in"
    make_tar_shard(folder / "a.tar", 3)
    make_parquet_shard(folder / "b.parquet", 2)
    (folder / "ünï 猫.jpg").write_bytes(make_jpeg(48, 64, orientation=6))
    write_output(folder, tmp_path / "out")
    return tmp_path


def test_photographs_of_every_kind_of_shard_are_read_upright(photographs):
    images = load_images(photographs / "out", columns=COLUMNS)
    read = dict(read_photographs(images, photographs / "out"))
    assert read.keys() == set(images.image_id)
    assert {pixels.shape for pixels in read.values()} == {(48, 64, 3)}


def test_only_the_images_asked_for_are_read(photographs):
    images = load_images(photographs / "out", columns=COLUMNS)
    wanted = images.loc[images.image_id == "a.tar/001.jpg"]
    assert [name for name, _ in read_photographs(wanted, photographs / "out")] == ["a.tar/001.jpg"]


def test_an_input_that_moved_is_found_where_it_is_now(photographs):
    images = load_images(photographs / "out", columns=COLUMNS)
    (photographs / "in").rename(photographs / "moved")
    assert list(read_photographs(images, photographs / "out")) == []
    moved = read_photographs(images, photographs / "out", input_uri=str(photographs / "moved"))
    assert len(list(moved)) == len(images)


def write_record(output, **given):
    """What a run with these flags leaves in its output."""
    (output / "_run").mkdir(parents=True)
    (output / "_run/config.json").write_text(json.dumps({"flags": flags(InferConfig(**given))}))


def test_photographs_are_read_with_the_flags_of_their_run(tmp_path):
    shard = make_parquet_shard(tmp_path / "a.parquet", {"a": make_jpeg()}, image_column="photo")
    table = pq.read_table(shard)
    pq.write_table(table.append_column("image", pa.array([make_jpeg(16, 16)])), shard)  # the usual name
    row = image("a.parquet/a", uri=str(shard), shard="a.parquet", shard_size=1)
    for name in ("column", "small"):
        write_part(tmp_path / name, "part-0", [row], [])
    write_record(tmp_path / "column", image_column="photo", id_column="image_id")
    write_record(tmp_path / "small", image_column="photo", max_pixels=64 * 48 - 1)
    rows = load_images(tmp_path / "column", columns=COLUMNS)
    read = dict(read_photographs(rows, tmp_path / "column"))
    assert {image_id: pixels.shape for image_id, pixels in read.items()} == {"a.parquet/a": (48, 64, 3)}
    assert list(read_photographs(rows, tmp_path / "small")) == []


def test_photographs_as_large_as_a_run_takes_are_shown(tmp_path):
    """By default 100 million pixels, with or without a record; `decode_image` alone refuses over 50."""
    picture = io.BytesIO()
    Image.new("RGB", (10_000, 6_000)).save(picture, "JPEG")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/large.jpg").write_bytes(picture.getvalue())
    write_output(tmp_path / "in", tmp_path / "out")
    rows = load_images(tmp_path / "out", columns=COLUMNS)
    assert len(list(read_photographs(rows, tmp_path / "out"))) == 1
    write_record(tmp_path / "out")
    assert len(list(read_photographs(rows, tmp_path / "out"))) == 1


def test_a_sheet_of_a_run_has_its_photographs_with_boxes(photographs):
    sheet = np.asarray(sheet_of_run(photographs / "out", max_images=4))
    assert sheet.shape[1] == 1600
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 500


def test_a_sheet_can_show_the_images_of_a_class_only(photographs):
    assert sheet_of_run(photographs / "out", class_names="dog").size[1] > 100
    assert sheet_of_run(photographs / "out", class_names="cat").size[1] < 100


def test_a_sheet_of_a_run_without_boxes_or_images_is_still_a_picture(tmp_path):
    write_part(tmp_path, "part-0", [], [])
    assert sheet_of_run(tmp_path).size[0] == 1600


def test_a_sample_is_spread_over_the_whole_frame():
    frame = pd.DataFrame({"n": range(100)})
    assert spread(frame, 4).n.tolist() == [0, 33, 66, 99]
    assert spread(frame, 200).n.tolist() == list(range(100))

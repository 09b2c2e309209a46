"""What the tasks do, without Ray: shards to blocks, blocks to detections, detections to tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.data.images import resize_image
from pipeline.data.shards import list_shards
from pipeline.inference import blocks
from pipeline.inference.blocks import ReadSettings, Work, read_blocks, to_tables, with_detections
from pipeline.model.postprocess import Detections
from tests import fakes
from tests.makers import make_image, make_jpeg, make_tar, make_tar_shard

SETTINGS = ReadSettings(
    height=30, width=40, resize_rule="bilinear", images_per_block=8, images_per_chunk=3, max_pixels=10**6,
    max_image_bytes=10**6, max_decode_s=60, reduced_decode=False,
)  # fmt: skip
NAMES = dict.fromkeys(range(1, 12), "thing")


def work_of(folder, **skip):
    return [Work(shard, frozenset(skip.get(Path(shard.name).stem, ()))) for shard in list_shards(str(folder))]


def read(folder, settings=SETTINGS, **skip):
    return list(read_blocks(work_of(folder, **skip), settings))


def column(found, name):
    return [value for block in found for value in block[name].to_pylist()]


def test_blocks_have_a_fixed_number_of_images_across_shards(tmp_path):
    for name, count in (("a", 5), ("b", 9), ("c", 6)):
        make_tar_shard(tmp_path / f"{name}.tar", count)
    found = read(tmp_path)
    assert [len(block) for block in found] == [8, 8, 4]
    chunks = [[len(chunk) for chunk in block["image"].chunks] for block in found]
    assert chunks == [[3, 3, 2], [3, 3, 2], [3, 1]]
    assert column(found, "image_id") == [
        f"{name}.tar/{i:03}.jpg" for name, count in (("a", 5), ("b", 9), ("c", 6)) for i in range(count)
    ]
    assert column(found, "shard_size") == [5] * 5 + [9] * 9 + [6] * 6


def test_two_attempts_yield_equal_blocks(tmp_path):
    make_tar_shard(tmp_path / "a.tar", {"x.jpg": make_jpeg(), "y.jpg": b"broken", "z.jpg": make_jpeg(seed=1)})
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(make_jpeg(seed=i))
    first, second = read(tmp_path), read(tmp_path)
    for left, right in zip(first, second, strict=True):
        columns = [*schema.IMAGES.names, "image"]
        assert left.select(columns).equals(right.select(columns))


def test_pixels_are_the_decoded_image_resized_and_blank_where_it_failed(tmp_path):
    from tests.makers import encode

    picture = make_image(64, 48)
    make_tar_shard(tmp_path / "a.tar", {"x.png": encode(picture, "PNG"), "y.png": b"broken"})
    (block,) = read(tmp_path)
    pixels = block["image"].combine_chunks().to_numpy_ndarray()
    assert (pixels[0] == resize_image(picture, height=30, width=40, rule="bilinear")).all()
    assert pixels[1].max() == 0
    assert block["width"].to_pylist() == [64, 0]
    assert block["status"].to_pylist() == ["ok", "failed"]
    assert block["error_stage"].to_pylist() == ["", "decode"]


def test_finished_images_are_skipped(tmp_path):
    make_tar_shard(tmp_path / "a.tar", 5)
    found = read(tmp_path, a=[0, 2, 3])
    assert column(found, "shard_index") == [1, 4]
    assert column(found, "shard_size") == [5, 5]


def test_a_shard_that_is_cut_or_empty_or_gone_is_one_failed_row(tmp_path):
    make_tar_shard(tmp_path / "a.tar", 3)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:-9000])
    (tmp_path / "c.tar").write_bytes(make_tar([]))
    (tmp_path / "d.jpg").write_bytes(make_jpeg())
    work = work_of(tmp_path)
    (tmp_path / "d.jpg").unlink()
    (block,) = read_blocks(work, SETTINGS)
    rows = block.select(["image_id", "shard_index", "shard_size", "status", "error_stage"]).to_pylist()[3:]
    assert [tuple(row.values()) for row in rows] == [
        ("b.tar", -1, 0, "failed", "read"),
        ("c.tar", -1, 0, "failed", "read"),
        ("d.jpg", 0, 1, "failed", "read"),
    ]
    assert all(block["error_message"].to_pylist()[3:])


def test_no_work_yields_no_block():
    assert list(read_blocks([], SETTINGS)) == []


def test_an_image_that_kills_its_decoder_is_a_failed_row_in_isolation(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "poison"))
    make_tar_shard(tmp_path / "a.tar", {"a.jpg": make_jpeg(), "b.jpg": b"POISON", "c.jpg": make_jpeg(seed=2)})
    (block,) = read(tmp_path, replace(SETTINGS, isolated=True))
    assert block["status"].to_pylist() == ["ok", "failed", "ok"]
    assert block["error_type"].to_pylist() == ["", "ProcessDied", ""]
    (calm,) = read(tmp_path)  # here, in this process, nothing kills
    assert calm["image"][0].equals(block["image"][0])


def test_an_image_that_never_ends_is_a_failed_row_in_isolation(tmp_path):
    make_tar_shard(tmp_path / "a.tar", 1)
    (block,) = read(tmp_path, replace(SETTINGS, isolated=True, max_decode_s=0))
    assert block["error_type"].to_pylist() == ["TimedOut"]


def test_a_bug_in_a_decoder_costs_one_image(tmp_path, monkeypatch):
    make_tar_shard(tmp_path / "a.tar", 3)

    def decode(data, **settings):
        if data == make_jpeg(seed=1):
            raise ZeroDivisionError("a bug")
        return original(data, **settings)

    original = blocks.decode_image
    monkeypatch.setattr(blocks, "decode_image", decode)
    (block,) = read(tmp_path)
    assert block["error_type"].to_pylist() == ["", "ZeroDivisionError", ""]


def test_detections_become_two_tables(tmp_path):
    make_tar_shard(tmp_path / "a.tar", 3)
    (block,) = read(tmp_path)
    found = Detections(
        np.array([0, 0, 2]),
        np.array([[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 9, 9]], np.float32),
        np.array([0.9, 0.8, 0.7], np.float32),
        np.array([3, 1, 3]),
    )
    detected = with_detections(block, [found], 0.5, np.arange(3))
    images, boxes = to_tables(detected, {1: "cat", 3: "dög"})
    assert images.schema.equals(schema.IMAGES)
    assert boxes.schema.equals(schema.DETECTIONS)
    assert images["num_detections"].to_pylist() == [2, 0, 1]
    rows = boxes.select(
        ["image_id", "detection_id", "label", "class_name", "xmin", "image_width"]
    ).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("a.tar/000.jpg", 0, 3, "dög", 1.0, 64),
        ("a.tar/000.jpg", 1, 1, "cat", 5.0, 64),
        ("a.tar/002.jpg", 0, 3, "dög", 0.0, 64),
    ]


def test_no_detections_are_an_empty_table_of_the_right_types(tmp_path):
    make_tar_shard(tmp_path / "a.tar", {"x.jpg": b"broken"})
    (block,) = read(tmp_path)
    images, boxes = to_tables(fakes.NullDetector()(block), NAMES)
    assert boxes.schema.equals(schema.DETECTIONS)
    assert (len(images), len(boxes)) == (1, 0)


def test_sliced_blocks_become_the_same_tables(tmp_path):
    make_tar_shard(tmp_path / "a.tar", 8)
    (block,) = read(tmp_path)
    detected = fakes.FakeDetector()(block)
    whole = to_tables(detected, NAMES)
    halves = [to_tables(detected.slice(start, 4), NAMES) for start in (0, 4)]
    for table, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert table.to_pylist() == pa.concat_tables(parts).to_pylist()


@pytest.fixture(scope="module")
def detector():
    from pipeline.inference.plan import portable_weights
    from pipeline.model import DEFAULT_WEIGHTS

    return blocks.DetectImages(portable_weights(DEFAULT_WEIGHTS), "cpu", {1: 0.05}, 2, 0)


def test_the_detector_keeps_failed_rows_and_drops_boxes_without_area(tmp_path, detector):
    settings = replace(SETTINGS, height=300, width=300, resize_rule="tf_legacy")
    images = {
        "a.jpg": make_jpeg(),
        "b.jpg": b"broken",
        "c.jpg": make_jpeg(seed=4),
        "d.jpg": make_jpeg(seed=5),
    }
    make_tar_shard(tmp_path / "a.tar", images)
    (block,) = read(tmp_path, settings)
    detected = detector(block)
    assert detected["image_id"].to_pylist() == block["image_id"].to_pylist()
    assert detected["num_detections"].to_pylist()[1] == 0
    assert detected["boxes"].to_pylist()[1] == []
    for boxes in detected["boxes"].to_pylist():
        for xmin, ymin, xmax, ymax in boxes:
            assert 0 <= xmin < xmax <= 64
            assert 0 <= ymin < ymax <= 48


def test_what_is_detected_in_an_image_does_not_depend_on_the_chunks(tmp_path, detector):
    settings = replace(SETTINGS, height=300, width=300, resize_rule="tf_legacy")
    members = {f"{i}.jpg": make_jpeg(320, 240, seed=i) if i % 3 else b"broken" for i in range(8)}
    make_tar_shard(tmp_path / "a.tar", members)
    (whole,) = read(tmp_path, replace(settings, images_per_chunk=8))
    (block,) = read(tmp_path, settings)
    expected, found = detector(whole), detector(block)
    assert sum(expected["num_detections"].to_pylist()) > 0
    for name in ("image_id", "num_detections", "labels"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    for name in ("boxes", "scores"):
        np.testing.assert_allclose(flat(found[name]), flat(expected[name]), rtol=1e-4, atol=1e-3)


def flat(values):
    found = values.combine_chunks()
    while hasattr(found, "flatten") and pa.types.is_nested(found.type):
        found = found.flatten()
    return found.to_numpy()


def test_a_block_of_failed_images_only_passes_the_detector(tmp_path, detector):
    make_tar_shard(tmp_path / "a.tar", {"b.jpg": b"broken"})
    (block,) = read(tmp_path, replace(SETTINGS, height=300, width=300))
    assert detector(block)["num_detections"].to_pylist() == [0]


def test_each_class_has_its_own_threshold(tmp_path, detector):
    from pipeline.inference.plan import portable_weights
    from pipeline.model import DEFAULT_WEIGHTS

    settings = replace(SETTINGS, height=300, width=300, resize_rule="tf_legacy")
    make_tar_shard(tmp_path / "a.tar", {f"{i}.jpg": make_jpeg(320, 240, seed=i) for i in range(4)})
    (block,) = read(tmp_path, settings)
    everything = detector(block)
    labels = [label for labels in everything["labels"].to_pylist() for label in labels]
    common = max(set(labels), key=labels.count)
    rest = {label: 0.05 for label in range(1, 91) if label != common}
    chosen = blocks.DetectImages(portable_weights(DEFAULT_WEIGHTS), "cpu", {**rest, common: 0.2}, 2, 0)(block)

    def pairs(found, minimum):
        rows = zip(found["labels"].to_pylist(), found["scores"].to_pylist(), strict=True)
        flat = [pair for labels, scores in rows for pair in zip(labels, scores, strict=True)]
        return [(label, score) for label, score in flat if score >= (minimum if label == common else 0.05)]

    assert pairs(chosen, 0.2) == pairs(everything, 0.2)
    assert len(pairs(chosen, 0)) < len(labels)

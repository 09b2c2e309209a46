"""Decoding and resizing: Pillow, torch and slow loops as oracles."""

import csv
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data import images
from pipeline.data.images import decode_image, image_size, resize_image
from pipeline.errors import ImageError
from tests import oracles
from tests.conftest import shared
from tests.makers import encode, make_image, make_jpeg


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and brings no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def failure(data: bytes, **options) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    assert caught.value.stage == "decode"
    return caught.value


@pytest.mark.parametrize(
    ("image_format", "modes"),
    [
        ("JPEG", ["RGB", "L", "CMYK"]),
        ("PNG", ["RGB", "L", "P", "1"]),
        ("TIFF", ["RGB", "L", "P", "1", "CMYK"]),
        ("BMP", ["RGB", "L", "P", "1"]),
        ("GIF", ["L", "P", "1"]),
        ("PPM", ["RGB", "L", "1"]),
        ("WEBP", ["RGB"]),
    ],
)
def test_decodes_as_pillow_does(image_format, modes):
    for mode in modes:
        assert_decoded_as_pillow_does(encode(Image.fromarray(make_image(40, 30)).convert(mode), image_format))


def assert_decoded_as_pillow_does(data: bytes) -> None:
    decoded = decode_image(data)

    assert (decoded.width, decoded.height) == (40, 30)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does(orientation):
    data = make_jpeg(40, 30, orientation=orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    decoded = decode_image(data)

    assert (decoded.width, decoded.height) == upright.size == image_size(data)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(upright))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_turned_once(image_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_image(40, 30), image_format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    decoded = decode_image(data)

    assert (decoded.width, decoded.height) == upright.size == image_size(data) == (30, 40)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(upright.convert("RGB")))


def test_an_invalid_orientation_is_ignored():
    assert decode_image(make_jpeg(40, 30, orientation=99)).pixels.shape == (30, 40, 3)


def test_transparent_parts_show_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255

    decoded = decode_image(encode(Image.fromarray(pixels, "RGBA"), "PNG"))

    np.testing.assert_array_equal(decoded.pixels[0, :, 0], [255, 127, 0])


def test_a_transparent_palette_colour_shows_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, 9, 8, 7])
    picture.putdata([0, 1])

    decoded = decode_image(encode(picture, "GIF", transparency=0))

    np.testing.assert_array_equal(decoded.pixels[0], [[255, 255, 255], [9, 8, 7]])


def test_16_bits_keep_their_upper_8():
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)

    decoded = decode_image(encode(Image.fromarray(grey), "PNG"))

    np.testing.assert_array_equal(decoded.pixels[0, :, 2], [0, 0, 1, 128, 255])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L"])
def test_large_images_converted_in_strips_are_the_same(monkeypatch, mode):
    data = encode(Image.fromarray(make_image(40, 31)).convert(mode), "TIFF")
    whole = decode_image(data)

    monkeypatch.setattr(images, "_STRIP_PIXELS", 200)

    np.testing.assert_array_equal(decode_image(data).pixels, whole.pixels)


def test_float_pixels_are_refused():
    error = failure(encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))

    assert error.kind == "UnsupportedPixels"


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]

    decoded = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))

    assert (decoded.pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_cut_jpeg_is_refused(progressive, kept):
    data = encode(make_image(320, 240), "JPEG", progressive=progressive)

    assert failure(data[: int(len(data) * kept)]).kind in ("Truncated", "Corrupt")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "Empty"),
        (b"<!DOCTYPE html><html>404</html>", "UnknownFormat"),
        (b"\0" * 1000, "UnknownFormat"),
        (b"\xff\xd8\xff\xd9", "Corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "UnknownFormat"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data, kind):
    assert failure(data).kind == kind


@pytest.mark.parametrize("size", [(10_001, 10_000), (12_000, 12_000), (100_000, 100_000), (2**31 - 1, 1)])
def test_too_many_pixels_are_refused_from_the_header(size):
    error = failure(png_header(*size))

    assert error.kind == "TooManyPixels"
    assert f"{size[0]}x{size[1]}" in str(error) or str(size[0] * size[1]) in str(error)


def test_the_pixel_limit_is_a_choice():
    assert failure(make_jpeg(10, 10), max_pixels=99).kind == "TooManyPixels"
    assert decode_image(make_jpeg(10, 10), max_pixels=100).width == 10


def test_a_progressive_jpeg_with_hundreds_of_scans_is_refused():
    data = encode(make_image(64, 64), "JPEG", progressive=True)

    assert failure(data[:-2] + b"\xff\xda\x00\x02" * 300 + data[-2:]).kind == "TooManyScans"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_never_raise_anything_but_an_image_error(data):
    image_format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if image_format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    file = bytearray(encode(make_image(24, 16), image_format, **options))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))

    try:
        decoded = decode_image(bytes(file[:cut]), max_pixels=1_000_000)
    except ImageError:
        return
    assert decoded.pixels.shape == (decoded.height, decoded.width, 3)
    assert decoded.pixels.dtype == np.uint8


@pytest.mark.parametrize("orientation", [None, 6])
@pytest.mark.parametrize("size", [(640, 480), (1250, 601), (2411, 2399)])
def test_reduced_decoding_keeps_the_original_size_and_never_falls_below_the_minimum(size, orientation):
    data = make_jpeg(*size, orientation=orientation)
    full = decode_image(data)

    reduced = decode_image(data, min_size=(300, 290))

    assert (reduced.width, reduced.height) == (full.width, full.height)
    height, width = reduced.pixels.shape[:2]
    assert width >= 300
    assert height >= 290
    assert width == full.width or width < 610 or height < 590  # another halving would not fit
    small = Image.fromarray(full.pixels).resize((width, height), Image.Resampling.BOX)
    assert np.abs(reduced.pixels.astype(int) - np.asarray(small)).mean() < 3


def test_only_jpegs_are_decoded_at_a_reduced_scale():
    data = encode(make_image(640, 480), "PNG")

    assert decode_image(data, min_size=(30, 30)).pixels.shape == (480, 640, 3)


def assert_rounded(result: np.ndarray, exact: np.ndarray) -> None:
    """`result` is `exact` rounded; within a thousandth of a half either neighbour will do."""
    assert result.dtype == np.uint8
    near_half = np.abs(exact - np.floor(exact) - 0.5) < 1e-3
    np.testing.assert_array_equal(result[~near_half], np.rint(exact)[~near_half])
    np.testing.assert_allclose(result, exact, atol=0.501)


SIZES = [(30, 40), (300, 300), (1, 1), (1, 50), (50, 1), (7, 1301), (601, 13)]


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_is_torchs_interpolate(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    images_N3HW = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    exact = torch.nn.functional.interpolate(images_N3HW, size=(37, 53), mode="bilinear")

    result = resize_image(pixels, height=37, width=53, rule="bilinear")

    assert_rounded(result, exact[0].permute(1, 2, 0).numpy())


def test_antialiased_bilinear_is_torchvisions_of_pillow_images():
    from torchvision.transforms.v2.functional import resize

    pixels = make_image(200, 150, seed=3)
    exact = resize(torch.from_numpy(pixels).permute(2, 0, 1), [37, 53], antialias=True)

    result = resize_image(pixels, height=37, width=53, rule="bilinear_antialias")

    assert np.abs(result.astype(int) - exact.permute(1, 2, 0).numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_tf_legacy_is_the_formula(size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)

    result = resize_image(pixels, height=17, width=23, rule="tf_legacy")

    assert_rounded(result, oracles.resize_tf_legacy(pixels, 17, 23))


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)), rule=st.sampled_from(["bilinear", "tf_legacy"])
)
@settings(max_examples=50, deadline=None)
def test_a_plain_picture_stays_plain(size, rule):
    pixels = np.full((*size, 3), (3, 128, 255), np.uint8)

    assert (resize_image(pixels, height=20, width=30, rule=rule) == (3, 128, 255)).all()


def test_resize_to_the_same_size_changes_nothing():
    pixels = make_image(31, 17)

    np.testing.assert_array_equal(resize_image(pixels, height=17, width=31, rule="bilinear"), pixels)


def test_odd_images_decode_like_pillow_or_fail_with_a_reason():
    folder = shared("data/odd_images")
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    wrong = []
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        try:
            decoded = decode_image(data, max_pixels=50_000_000)
            found = (decoded.width, decoded.height)
            assert decoded.pixels.shape == (*found[::-1], 3)
        except ImageError:
            found = None
        if row["expect"].startswith("ok"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
        elif row["expect"] in ("reject", "limit"):
            # Its first frame is harmless: only later frames would blow it up.
            wanted = (100, 100) if row["file"] == "pil_decompression_bomb_extents.gif" else None
        else:  # "partial" and "either": both answers are fine
            continue
        if found != wanted:
            wrong.append((row["file"], row["expect"], found, wanted))

    assert len(rows) == 146
    assert wrong == []

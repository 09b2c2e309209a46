"""Image bytes -> pixels -> the detector's input size; whatever is wrong with one image is an `ImageError`.

What bounds the cost of one image: its bytes (checked by the reader), its pixels (checked here in the header,
before anything is allocated) and, for progressive JPEGs, its scans. Plugins that start other programs or that
serve no photographs are left out of `FORMATS`.

Pillow decodes everything. torchvision takes 1.6 ms for a JPEG of 640x480 where Pillow takes 1.8, with equal
pixels, but a reader that imports torch starts four seconds later and needs 300 MB more.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.config import MAX_PIXELS
from pipeline.errors import ImageError

ResizeRule = Literal["bilinear", "bilinear_antialias", "tf_legacy"]

# A real progressive JPEG has about 10. Each costs a pass over all pixels: a small file could ask for hours.
MAX_SCANS = 200
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM")
_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP",
    b"\xff\x4f\xff\x51",
)

# Temporaries of 0.3 MB stay in L2: 1.2 ms where all 300 rows at once take 3.2 ms (640x480 to 300x300).
_ROWS_AT_A_TIME = 16
_STRIP_PIXELS = 1_000_000


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One picture in its displayed orientation.

    Attributes:
        pixels: uint8 [H, W, 3] RGB; smaller than `width` x `height` where it was decoded at a reduced scale.
        width: pixels of the original, after its EXIF orientation.
        height: as `width`.
    """

    pixels: np.ndarray
    width: int
    height: int


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_size: tuple[int, int] | None = None
) -> DecodedImage:
    """Decode the first frame of an image file to RGB, upright.

    Grey, palette, CMYK and Lab become RGB; 16 bits keep their upper 8; transparent parts show white, as on
    a page. Warnings about metadata are ignored: the pixels are what counts.

    Args:
        data: the file.
        max_pixels: larger images are refused from the header. Pillow refuses more than 179 million anyway.
        min_size: (width, height) below which the result may not fall; a JPEG of at least twice this is
            decoded at 1/2, 1/4 or 1/8. None decodes at full size.

    Raises:
        ImageError: empty, of no known format, damaged, cut short, or above a limit; `kind` says which.
    """
    if not data:
        raise ImageError("the file is empty (0 bytes)", kind="Empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data, max_pixels)
            return _decode(image, min_size)
        except ImageError:
            raise
        except (
            Exception
        ) as error:  # the per-image boundary: decoders raise all kinds of errors on damaged files
            raise _explained(error, data) from error


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as displayed, from the header alone; None where it can't be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:  # the per-image boundary, as in decode_image
            return None
        width, height = image.size
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns TIFFs itself
        return (height, width) if turned else (width, height)


def resize_image(pixels_HW3: np.ndarray, *, height: int, width: int, rule: ResizeRule) -> np.ndarray:
    """Resize bilinearly, rounded to uint8 [height, width, 3].

    Args:
        pixels_HW3: uint8 [H, W, 3].
        height: rows of the result.
        width: columns of the result.
        rule: where output index o of `size` looks in an input of length n. "bilinear": (o + 0.5) * n/size
            - 0.5, as torch's `interpolate(align_corners=False)` and OpenCV; "tf_legacy": o * n/size, as
            TensorFlow 1. "bilinear_antialias" is Pillow's, which smooths when it shrinks.
    """
    if pixels_HW3.shape[:2] == (height, width):
        return pixels_HW3
    if rule == "bilinear_antialias":
        return np.array(Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling.BILINEAR))
    y0, y1, fy = _taps(pixels_HW3.shape[0], height, rule)
    x0, x1, fx = _taps(pixels_HW3.shape[1], width, rule)
    # Columns of single values, not of pixels: numpy takes 4 bytes at a time faster than 12.
    x0, x1 = ((3 * x[:, None] + np.arange(3)).ravel() for x in (x0, x1))
    fx, fy = fx.repeat(3), fy[:, None]

    out = np.empty((height, 3 * width), np.uint8)
    for start in range(0, height, _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        lines = _lerp(_lines(pixels_HW3, y0[rows]), _lines(pixels_HW3, y1[rows]), fy[rows])
        line = _lerp(lines.take(x0, axis=1), lines.take(x1, axis=1), fx)
        out[rows] = np.rint(line, out=line)
    return out.reshape(height, width, 3)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header and refuse what is too large."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width}x{image.height} is more than the limit of {max_pixels:,} pixels",
            kind="TooManyPixels",
        )
    if image.info.get("progressive") and (num_scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError(
            f"progressive JPEG of {num_scans} scans; the limit is {MAX_SCANS}", kind="TooManyScans"
        )
    return image


def _decode(image: Image.Image, min_size: tuple[int, int] | None) -> DecodedImage:
    """Decode an opened image and turn it upright."""
    width, height = image.size
    if min_size is not None and image.format in ("JPEG", "MPO"):
        turned = _orientation(image) >= 5
        image.draft(None, (min_size[1], min_size[0]) if turned else min_size)
    image.load()
    pixels = _to_rgb(image)
    if image.format == "TIFF":  # Pillow has turned it while loading
        height, width = pixels.shape[:2]
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    return DecodedImage(_upright(pixels, orientation), width, height)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a loaded image as uint8 [H, W, 3], in strips: 50 MP at once took 325 MiB more."""
    num_rows = max(1, _STRIP_PIXELS // image.width)
    if image.height <= num_rows:
        return _strip_to_rgb(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, image.width, bottom)))
    return pixels


def _strip_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_upper_8_bits(image)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image)
        return np.array(page)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _upper_8_bits(image: Image.Image) -> np.ndarray:
    """A grey image of more than 8 bits as uint8 [H, W], as Pillow does it for colour.

    Raises:
        ImageError: 32 bits or floats, which have no fixed scale.
    """
    grey = np.asarray(image)
    if image.mode == "F" or (grey.size and not 0 <= grey.min() <= grey.max() <= 65535):
        raise ImageError(
            f"pixels of mode {image.mode} (32 bits) have no fixed scale to 8 bits", kind="UnsupportedPixels"
        )
    return (grey >> 8).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, it is invalid or the metadata is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the per-image boundary: bad metadata doesn't lose an image
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels_HW3: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, as Pillow's `exif_transpose`."""
    if orientation >= 5:
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels_HW3 = pixels_HW3[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HW3 = pixels_HW3[::-1]
    return np.ascontiguousarray(pixels_HW3)


def _explained(error: Exception, data: bytes) -> ImageError:
    """What a decoder's error means, with a kind that groups well."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(text.split(",")[0], kind="TooManyPixels")
    if isinstance(error, UnidentifiedImageError):
        if data.startswith(_STARTS):
            return ImageError(f"damaged header ({len(data):,} bytes)", kind="Corrupt")
        return ImageError(f"no known image format (begins with {data[:12]!r})", kind="UnknownFormat")
    if isinstance(error, MemoryError):
        return ImageError(f"not enough memory to decode it ({text})", kind="TooMuchMemory")
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return ImageError(f"the file is cut short ({text})", kind="Truncated")
    return ImageError(f"damaged: {text}", kind="Corrupt")


def _taps(length: int, size: int, rule: ResizeRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output index the two input indices that it lies between and the weight of the second."""
    scale = np.float32(length) / np.float32(size)
    index = np.arange(size, dtype=np.float32)
    source = index * scale if rule == "tf_legacy" else np.maximum((index + 0.5) * scale - 0.5, 0)
    first = np.minimum(source.astype(np.intp), length - 1)
    return first, np.minimum(first + 1, length - 1), (source - first).astype(np.float32)


def _lines(pixels_HW3: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of an image, as float32 [rows, W * 3]."""
    return pixels_HW3.take(rows, axis=0).reshape(len(rows), -1).astype(np.float32)


def _lerp(first: np.ndarray, second: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """`first + (second - first) * fraction`, in place of the arguments."""
    second -= first
    second *= fraction
    first += second
    return first

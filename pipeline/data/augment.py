"""Training-time augmentation in the order of the authors' Caffe code: distort, expand, crop, resize, flip.

Each step takes a `Sample` and a random generator and returns a new `Sample`. The first three only decide:
they move the window that is looked at and note how colours will change. So nobody pays for pixels that
`crop` throws away: of the canvas of `expand`, up to sixteen times the image, only what is left of it is built
(all of it, 3 bytes a pixel, where `crop` keeps the whole). `resize` then touches each visible pixel once. The
result is the same: colour changes act on single pixels, so they commute with cropping.

Sources: SSD section 2.2 "Data augmentation", and weiliu89/caffe, branch ssd: examples/ssd/ssd_pascal.py,
src/caffe/util/sampler.cpp, src/caffe/util/im_transforms.cpp, src/caffe/layers/annotated_data_layer.cpp.

Shapes: G objects, H W pixels, S candidate crops.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

Interpolation = Literal["linear", "area", "nearest", "cubic", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
Flip = Literal["horizontal", "both", "none"]

# The smallest IoU that some object must have with the crop. None keeps the whole image; 0.0 takes any patch
# of an image that has objects (Caffe states it as "IoU of at most 1").
SAMPLERS: tuple[float | None, ...] = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
NUM_TRIALS = 50
# Square root of the smallest patch's share of the window's area: the paper's, and for trained detectors.
MIN_SCALE, LARGE_SCALE = 0.3, 0.5
IMAGENET_MEAN = (123, 117, 104)


class Window(NamedTuple):
    """A rectangle in whole pixels of the decoded image; it may reach beyond the image."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Pixels across."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Pixels down."""
        return self.bottom - self.top


@dataclass(frozen=True, slots=True)
class Distortion:
    """One colour change and how strong it is."""

    kind: Literal["brightness", "contrast", "saturation", "hue"]
    amount: float


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its objects on the way into the network.

    Attributes:
        pixels: uint8 [H, W, 3] RGB; never written to.
        boxes: float32 [G, 4] xyxy in pixels of `pixels`.
        labels: int64 [G].
        window: the part that `resize` will show.
        distortions: the colour changes that `resize` will make, in this order.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    window: Window
    distortions: tuple[Distortion, ...] = ()


def whole_image(pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> Sample:
    """A sample that shows all of its image as it is."""
    return Sample(pixels, boxes, labels, window=Window(0, 0, right=pixels.shape[1], bottom=pixels.shape[0]))


def sample_rng(seed: int, *, epoch: int, image_id: str) -> np.random.Generator:
    """The random generator of one image in one epoch: the same on every machine, in any order of reading."""
    digest = hashlib.blake2b(image_id.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, epoch, int.from_bytes(digest, "little")])


def augment(
    sample: Sample,
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
    fill: tuple[int, int, int] = IMAGENET_MEAN,
    flips: Flip = "horizontal",
) -> Sample:
    """Augment one training image for SSD.

    The result may hold no object: as in Caffe, a crop of the "any patch" sampler can miss all centres.

    Args:
        sample: `whole_image` of the decoded image, with boxes of positive area.
        rng: where all randomness comes from, see `sample_rng`.
        height: rows of the result.
        width: columns of the result.
        fill: RGB of the canvas around an expanded image: the mean that the network subtracts.
        flips: as in `flip`.

    Returns:
        Pixels uint8 [height, width, 3]; boxes float32 in pixels of the result, inside it; their labels.
    """
    sample = distort(sample, rng)
    sample = expand(sample, rng)
    sample = crop(sample, rng)
    sample = resize(sample, rng, height=height, width=width, fill=fill)
    return flip(sample, rng, flips=flips)


def augment_lightly(
    sample: Sample,
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
    crops: bool,
    flips: Flip = "horizontal",
) -> Sample:
    """Augment less, for a detector that is trained already: no expansion, and large crops if any.

    Colours change last, on the smaller image: 15 -> 9 ms for 640x480. `crops`: to patches of `LARGE_SCALE` at
    least. Other arguments and the result as of `augment`.
    """
    if crops:
        sample = crop(sample, rng, min_scale=LARGE_SCALE)
    sample = resize(sample, rng, height=height, width=width)
    return flip(recolour(distort(sample, rng)), rng, flips=flips)


def distort(sample: Sample, rng: np.random.Generator) -> Sample:
    """Choose colour changes: each with probability 0.5, contrast second or last.

    Ranges as in Caffe: brightness +-32, contrast and saturation times 0.5 to 1.5, hue +-36 degrees (18 of
    OpenCV's 180). Channels are never shuffled (probability 0 in the authors' configurations).
    """
    contrast_early = rng.random() < 0.5
    brightness = Distortion("brightness", rng.uniform(-32, 32))
    contrast = Distortion("contrast", rng.uniform(0.5, 1.5))
    saturation = Distortion("saturation", rng.uniform(0.5, 1.5))
    hue = Distortion("hue", rng.uniform(-36, 36))
    order = (
        (brightness, contrast, saturation, hue) if contrast_early else (brightness, saturation, hue, contrast)
    )
    chosen = rng.random(4) < 0.5
    return replace(sample, distortions=tuple(d for d, on in zip(order, chosen, strict=True) if on))


def recolour(sample: Sample) -> Sample:
    """Make the chosen colour changes now, on all pixels."""
    pixels = sample.pixels
    for distortion in sample.distortions:
        pixels = _distort_pixels(pixels, distortion)
    return replace(sample, pixels=pixels, distortions=())


def expand(sample: Sample, rng: np.random.Generator) -> Sample:
    """With probability 0.5, put the image somewhere on a canvas of 1 to 4 times its width and height."""
    if rng.random() >= 0.5:
        return sample
    ratio = rng.uniform(1, 4)
    left, top, right, bottom = sample.window
    width, height = int(sample.window.width * ratio), int(sample.window.height * ratio)
    left -= int(rng.uniform(0, width - (right - left)))
    top -= int(rng.uniform(0, height - (bottom - top)))
    return replace(sample, window=Window(left, top, left + width, top + height))


def crop(sample: Sample, rng: np.random.Generator, *, min_scale: float = MIN_SCALE) -> Sample:
    """Crop to a random patch: objects whose centre is outside are dropped, the others clipped to it."""
    _, window = sample_window(sample.boxes, sample.window, rng, min_scale=min_scale)
    centres = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
    inside = np.all((centres >= window[:2]) & (centres <= window[2:]), axis=1)
    boxes = np.clip(sample.boxes[inside], window[:2] * 2, window[2:] * 2).astype(np.float32)
    return replace(sample, boxes=boxes, labels=sample.labels[inside], window=window)


def sample_window(
    boxes_G4: np.ndarray, window: Window, rng: np.random.Generator, *, min_scale: float = MIN_SCALE
) -> tuple[int, Window]:
    """Choose a patch of the window as Caffe's batch samplers do.

    Every sampler of `SAMPLERS` tries up to 50 patches and keeps the first that satisfies it; then one of the
    patches found is chosen uniformly. So a constraint that is hard to meet is used less often, and the whole
    image (always found) more often than one time in seven.

    Returns:
        The index of the sampler in `SAMPLERS`, and its patch.
    """
    constraints = np.array(SAMPLERS[1:], dtype=np.float32)
    candidates_S4 = _random_patches(window, len(constraints) * NUM_TRIALS, rng, min_scale=min_scale)
    best_iou_S = _best_iou(candidates_S4, boxes_G4).reshape(len(constraints), NUM_TRIALS)
    satisfied = best_iou_S >= constraints[:, None]
    found = np.flatnonzero(satisfied.any(axis=1))
    choice = int(rng.integers(len(found) + 1))
    if choice == 0:
        return 0, window
    sampler = int(found[choice - 1])
    patch = candidates_S4[sampler * NUM_TRIALS + int(satisfied[sampler].argmax())]
    return sampler + 1, Window(*(int(side) for side in patch))


def resize(
    sample: Sample,
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
    fill: tuple[int, int, int] = IMAGENET_MEAN,
) -> Sample:
    """Show the window at a size of height x width, warped, with one of five interpolations at random."""
    interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]
    pixels = _resize_pixels(_visible_pixels(sample, fill), height, width, interpolation)
    left, top = sample.window[:2]
    scale = np.array([width / sample.window.width, height / sample.window.height] * 2)
    boxes = (sample.boxes - np.array([left, top] * 2)) * scale
    boxes = np.clip(boxes, 0, [width, height] * 2).astype(np.float32)
    # An object of some 1e-5 pixels can lose its area in float32; the loss refuses boxes without one.
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return whole_image(pixels, boxes[has_area], sample.labels[has_area])


def flip(sample: Sample, rng: np.random.Generator, *, flips: Flip = "horizontal") -> Sample:
    """Mirror left and right with probability 0.5; with "both" top and bottom, too, independently."""
    if flips != "none" and rng.random() < 0.5:
        sample = _mirrored(sample, axis=1)
    if flips == "both" and rng.random() < 0.5:
        sample = _mirrored(sample, axis=0)
    return sample


def _mirrored(sample: Sample, *, axis: Literal[0, 1]) -> Sample:
    """Along the rows (0) or the columns (1) of the pixels."""
    low, high = (0, 2) if axis == 1 else (1, 3)
    boxes = sample.boxes.copy()
    boxes[:, [low, high]] = sample.pixels.shape[axis] - sample.boxes[:, [high, low]]
    return replace(sample, pixels=np.ascontiguousarray(np.flip(sample.pixels, axis)), boxes=boxes)


def _random_patches(
    window: Window, num_patches: int, rng: np.random.Generator, *, min_scale: float = MIN_SCALE
) -> np.ndarray:
    """Patches of scale `min_scale` to 1 and aspect ratio 0.5 to 2, int64 [S, 4] xyxy in whole pixels."""
    scale, aspect, x, y = rng.random((4, num_patches))
    scale = min_scale + (1 - min_scale) * scale
    # Clamped so that neither side is longer than the window's.
    aspect = np.clip(0.5 + 1.5 * aspect, scale**2, 1 / scale**2)
    relative = np.stack([scale * np.sqrt(aspect), scale / np.sqrt(aspect)], axis=1)
    sizes = np.array([window.width, window.height])
    patch_sizes = np.clip(np.round(relative * sizes), 1, sizes).astype(np.int64)
    offsets = np.floor(np.stack([x, y], axis=1) * (sizes - patch_sizes + 1)).astype(np.int64)
    corners = offsets + np.array(window[:2])
    return np.concatenate([corners, corners + patch_sizes], axis=1)


def _best_iou(patches_S4: np.ndarray, boxes_G4: np.ndarray) -> np.ndarray:
    """The highest IoU of each patch with any box, [S]; -1 where there is no box."""
    if len(boxes_G4) == 0:
        return np.full(len(patches_S4), -1.0)
    patches, boxes = patches_S4[:, None].astype(np.float64), boxes_G4[None].astype(np.float64)
    sides = np.minimum(patches[..., 2:], boxes[..., 2:]) - np.maximum(patches[..., :2], boxes[..., :2])
    overlap_SG = sides.clip(min=0).prod(axis=2)
    areas = [(some[..., 2:] - some[..., :2]).prod(axis=2) for some in (patches, boxes)]
    return (overlap_SG / (areas[0] + areas[1] - overlap_SG)).max(axis=1)


def _visible_pixels(sample: Sample, fill: tuple[int, int, int]) -> np.ndarray:
    """The pixels in the window, uint8, distorted where they belong to the image and `fill` elsewhere."""
    window, (image_height, image_width) = sample.window, sample.pixels.shape[:2]
    left, right = np.clip([window.left, window.right], 0, image_width)
    top, bottom = np.clip([window.top, window.bottom], 0, image_height)
    visible = sample.pixels[top:bottom, left:right]
    for distortion in sample.distortions:
        visible = _distort_pixels(visible, distortion)
    canvas = np.empty((window.height, window.width, 3), np.uint8)
    if visible.shape != canvas.shape:
        # Row by row: writing three bytes at a time is 50 times slower (27 ms against 0.6 ms for 2560x1920).
        canvas.reshape(window.height, -1)[:] = np.tile(np.array(fill, np.uint8), window.width)
    canvas[top - window.top : bottom - window.top, left - window.left : right - window.left] = visible
    return canvas


def _resize_pixels(pixels: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    """Resize as OpenCV does: linear and cubic without antialiasing, area as a mean; lanczos is Pillow's.

    Pillow's two may first shrink by a whole factor (`reducing_gap`): 10 instead of 40 ms for a wide canvas.
    """
    if interpolation in ("area", "lanczos"):
        rule = Image.Resampling.BOX if interpolation == "area" else Image.Resampling.LANCZOS
        return np.asarray(Image.fromarray(pixels).resize((width, height), rule, reducing_gap=2.0))
    import torch  # seconds to import: spared in tasks that only read validation images

    mode = {"linear": "bilinear", "cubic": "bicubic", "nearest": "nearest"}[interpolation]
    image_13HW = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(image_13HW, size=(height, width), mode=mode)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _distort_pixels(pixels: np.ndarray, distortion: Distortion) -> np.ndarray:
    """One colour change; uint8 [H, W, 3] in and out, values out of range saturate."""
    if distortion.kind == "brightness":
        return _look_up(_to_uint8(np.arange(256) + distortion.amount), pixels)
    if distortion.kind == "contrast":
        return _look_up(_to_uint8(np.arange(256) * distortion.amount), pixels)
    change = _change_saturation if distortion.kind == "saturation" else _turn_hue
    changed = np.empty_like(pixels, order="C")
    # In strips that stay in the processor's cache: 4 and 6 ms for 640x480, 9 and 14 ms at once.
    for top in range(0, len(pixels), 32):
        planes_3HW = pixels[top : top + 32].transpose(2, 0, 1).astype(np.float32, order="C")
        changed[top : top + 32] = _to_uint8(change(planes_3HW, distortion.amount)).transpose(1, 2, 0)
    return changed


def _look_up(table_256: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    # 0.7 ms for 640x480; np.take 1.0 ms.
    mapped = pixels.tobytes().translate(table_256.tobytes())
    return np.frombuffer(mapped, np.uint8).reshape(pixels.shape)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _change_saturation(planes_3HW: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the S of HSV by `factor`, at most to 1, without leaving RGB.

    With V = max(RGB) and chroma C = V - min(RGB), S is C / V and each channel is V minus its share of C; so
    it is enough to scale the distances to V, but not beyond C = V.
    """
    value = planes_3HW.max(axis=0)
    chroma = value - planes_3HW.min(axis=0)
    factors = np.minimum(factor, value / np.maximum(chroma, 1e-6))
    return value - (value - planes_3HW) * factors


def _turn_hue(planes_3HW: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the H of HSV by `degrees`, which are between -60 and 60.

    Hue is counted in sixths of the circle: red 0, green 2, blue 4. A channel loses all of the chroma while
    the hue is within 1 of the colour opposite to it, and none beyond 2.
    """
    red, green, blue = planes_3HW
    value = planes_3HW.max(axis=0)
    chroma = value - planes_3HW.min(axis=0)
    per_chroma = 1 / np.maximum(chroma, 1e-6)
    hue_if_red = (green - blue) * per_chroma
    hue_if_green = (blue - red) * per_chroma + np.float32(2)
    hue_if_blue = (red - green) * per_chroma + np.float32(4)
    hue = np.where(value == red, hue_if_red, np.where(value == green, hue_if_green, hue_if_blue))
    hue += np.float32(degrees / 60)
    turned = np.empty_like(planes_3HW)
    for channel, opposite in enumerate((3, 5, 1)):
        distance = 3 - np.abs(np.abs(hue - opposite) - 3)
        turned[channel] = value - chroma * np.clip(2 - distance, 0, 1)
    return turned

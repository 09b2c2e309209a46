"""Draw the pictures of docs/ssd.md from the code that they explain.

    python docs/draw_ssd.py

Photographs: astronaut (NASA, public domain), coffee (Rachel Michetti, CC0), chelsea (Stefan van der Walt,
CC0), all as they ship with scikit-image.
"""

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from skimage import data
from torch import Tensor

from pipeline import boxes
from pipeline.data.images import resize_image
from pipeline.model import DEFAULT_WEIGHTS, SSD, build_model, load_checkpoint
from pipeline.model.anchors import VOC_300, prior_boxes
from pipeline.model.loss import background_losses, mine_negatives
from pipeline.model.matching import match, pad_targets
from pipeline.model.postprocess import postprocess

FOLDER = Path(__file__).parent
MAP_COLORS = ("#d62728", "#e58606", "#2a9d3a", "#1f77b4", "#8e44ad", "#5d4037")
INK = "#222222"

# In pixels of the photograph, measured by hand.
COFFEE_OBJECTS = {"cup": (173, 19, 411, 249), "spoon": (322, 66, 424, 328)}


def main() -> None:
    """Draw everything."""
    mpl.rcParams.update(
        {"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.titlesize": 10}
    )
    torch.set_grad_enabled(False)
    detector = load_checkpoint(DEFAULT_WEIGHTS)
    for name, figure in (
        ("network", draw_network()),
        ("default_boxes", draw_default_boxes()),
        ("matching", draw_matching(detector)),
        ("maps", draw_maps(detector)),
    ):
        save(figure, FOLDER / f"ssd_{name}.png")


def draw_network() -> Figure:
    """The maps and what the heads make of each, with shapes taken from a forward pass."""
    model = build_model("ssd300_vgg16", num_classes=21, priors="voc")
    shapes: list[tuple[int, ...]] = []
    for head in model.heads:
        head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    model(torch.zeros(1, 3, 300, 300))
    names = ("conv4_3", "fc7", "conv6_2", "conv7_2", "conv8_2", "conv9_2")
    figure, axes = plt.subplots(figsize=(11, 4.6))
    axes.axis("off")
    axes.annotate("", (10.9, 3), (0.5, 3), zorder=0,
                  arrowprops={"arrowstyle": "-|>", "color": "#999999", "lw": 1.2})  # fmt: skip
    draw_block(axes, 0.35, 300, "image", "300x300x3", "#dddddd")
    x = 2.2
    for index, (name, (_, channels, size, _)) in enumerate(zip(names, shapes, strict=True)):
        num_boxes = len(model.spec.priors.maps[index].sizes_wh)
        color = MAP_COLORS[index]
        draw_block(axes, x, size, name, f"{size}x{size}x{channels}", color)
        axes.annotate("", (x, 1.2), (x, 1.75), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.5})
        axes.text(x, 1.1, f"{num_boxes} boxes a cell", ha="center", va="top", fontsize=8.5)
        axes.text(x, 0.8, f"{size}x{size}x{num_boxes * 4} deltas", ha="center", va="top", fontsize=8.5)
        axes.text(x, 0.5, f"{size}x{size}x{num_boxes * 21} logits", ha="center", va="top", fontsize=8.5)
        axes.text(x, 0.2, f"{size * size * num_boxes} boxes", ha="center", va="top", weight="bold")
        x += 1.55
    axes.text(
        0.35, 1.45, "one 3x3 convolution\nfor deltas, one for logits", ha="center", va="center", fontsize=8.5
    )
    total = f"20 classes and background:\n{model.spec.priors.num_priors} boxes in all"
    axes.text(0.35, 0.35, total, ha="center", va="center", weight="bold", fontsize=9)
    axes.text(3, 4.3, "VGG16 up to fc7 (conv4_3 after L2Norm)", ha="center", color="#666666")
    axes.text(7.6, 4.3, "extra layers: each a 1x1, then a 3x3 convolution", ha="center", color="#666666")
    axes.set(xlim=(-0.95, 11), ylim=(-0.1, 4.6))
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def draw_block(axes: Axes, x: float, size: int, name: str, shape: str, color: str) -> None:
    """A feature map as a square that grows with its side."""
    side = 0.32 + 0.16 * np.log2(size)
    axes.add_patch(
        Rectangle((x - side / 2, 3 - side / 2), side, side, facecolor=color, edgecolor="white", lw=2)
    )
    axes.text(x, 3.9, name, ha="center", weight="bold")
    axes.text(x, 2.05, shape, ha="center", va="center", fontsize=8.5)


def draw_default_boxes() -> Figure:
    """The default boxes of one cell of each map of SSD300, and the centres of all cells."""
    photograph = data.astronaut()
    figure, grid = plt.subplots(2, 3, figsize=(10.5, 7.4))
    priors_A4 = boxes.to_corners(prior_boxes(VOC_300)).numpy() * len(photograph)
    start = 0
    for index, (axes, prior_map) in enumerate(zip(grid.flat, VOC_300.maps, strict=True)):
        per_cell = len(prior_map.sizes_wh)
        show(axes, photograph)
        centres = (np.arange(prior_map.grid) + 0.5) * prior_map.step * len(photograph)
        across, down = np.meshgrid(centres, centres)
        axes.plot(across, down, ".", color=MAP_COLORS[index], markersize=2 if prior_map.grid > 30 else 4)
        # The cell at the face where cells are small, else the one in the middle.
        column = int(0.42 / prior_map.step) if prior_map.grid > 3 else prior_map.grid // 2
        row = int(0.27 / prior_map.step) if prior_map.grid > 3 else prior_map.grid // 2
        first = start + (row * prior_map.grid + column) * per_cell
        for box in priors_A4[first : first + per_cell]:
            outline(axes, box, "white", lw=3.4)
            outline(axes, box, MAP_COLORS[index], lw=1.8)
        num_boxes = prior_map.grid**2 * per_cell
        axes.set_title(f"{prior_map.grid}x{prior_map.grid}: {per_cell} boxes a cell, {num_boxes} boxes")
        axes.set(xlim=(-85, 597), ylim=(597, -85))
        start += num_boxes
    figure.tight_layout()
    return figure


def draw_matching(detector: SSD) -> Figure:
    """Default boxes that learn the cup and the spoon, and the ones mined as background."""
    photograph = data.coffee()
    height, width = photograph.shape[:2]
    corners = np.array(list(COFFEE_OBJECTS.values()), np.float32)
    classes = np.array([detector.spec.class_names.index(name) + 1 for name in COFFEE_OBJECTS])
    targets = pad_targets(
        [corners],
        [classes],
        height=height,
        width=width,
        num_classes=detector.spec.num_classes,
        image_ids=["coffee"],
    )
    matched_A = match(targets, detector.priors_cxcywh)[0]
    forced_A = match(targets, detector.priors_cxcywh, iou_threshold=1.1)[0] >= 0
    _, logits_1AC = predict(detector, photograph)
    logits_1AC[..., 0] = 0  # this model has sigmoid scores: each class stands against a logit of 0
    mined_A = mine_negatives(background_losses(logits_1AC), matched_A[None] >= 0)[0]

    priors_A4 = boxes.to_corners(detector.priors_cxcywh).numpy() * [width, height, width, height]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3))
    colors = ("#1f77b4", "#2a9d3a")
    for axes in (left, right):
        show(axes, photograph)
        axes.set(xlim=(-60, width + 60), ylim=(height + 60, -60))
    for index, (name, color) in enumerate(zip(COFFEE_OBJECTS, colors, strict=True)):
        for prior in np.flatnonzero(matched_A == index):
            outline(left, priors_A4[prior], color, lw=2.6 if forced_A[prior] else 1.0)
        outline(left, corners[index], "white", lw=4.4)
        outline(left, corners[index], INK, lw=2.2)
        count = int((matched_A == index).sum())
        x, y = corners[index][:2]
        left.text(x + 5, y - 6, f"{name}: {count} matched", weight="bold", va="bottom",
                  bbox={"facecolor": "white", "edgecolor": color, "pad": 2})  # fmt: skip
    losses_A = background_losses(logits_1AC)[0].masked_fill(~mined_A, -1)
    for rank, prior in enumerate(losses_A.argsort(descending=True)[: int(mined_A.sum())].tolist()):
        outline(right, priors_A4[prior], "#d62728", lw=1.8 if rank < 8 else 0.6, alpha=1 if rank < 8 else 0.4)
    for box in corners:
        outline(right, box, "white", lw=4.4)
        outline(right, box, INK, lw=2.2)
    left.set_title("matched: the best box of each object (thick) and all with IoU ≥ 0.5")
    right.set_title(
        f"mined: the {int(mined_A.sum())} others that look least like background (8 worst: thick)"
    )
    figure.tight_layout()
    return figure


def draw_maps(detector: SSD) -> Figure:
    """One cat at five sizes: which map is most sure of it, and its best box."""
    figure, grid = plt.subplots(2, 5, figsize=(11, 4.6), height_ratios=[1, 0.62])
    column = detector.spec.class_names.index("cat") + 1
    names = [str(prior_map.grid) for prior_map in detector.spec.priors.maps]
    for (top, bottom), share in zip(grid.T, (1.0, 0.72, 0.5, 0.35, 0.25), strict=True):
        picture = shrunk(data.chelsea(), share)
        deltas_1A4, logits_1AC = predict(detector, picture)
        scores = [float(part.max()) for part in split_by_map(detector, logits_1AC[0, :, column].sigmoid())]
        best = int(np.argmax(scores))
        only_best = torch.full_like(logits_1AC, -20.0)
        rows = torch.zeros(logits_1AC.shape[1], dtype=torch.bool)
        split_by_map(detector, rows)[best][:] = True
        only_best[:, rows, column] = logits_1AC[:, rows, column]
        found = postprocess(
            deltas_1A4,
            only_best,
            detector.priors_cxcywh,
            sizes_N2=torch.tensor([[512, 512]]),
            spec=detector.spec,
        )
        show(top, picture)
        outline(top, found.boxes[0].numpy(), "white", lw=4.4)
        outline(top, found.boxes[0].numpy(), MAP_COLORS[best], lw=2.6)
        top.set_title(
            f"cat {scores[best]:.2f} by {names[best]}x{names[best]}", color=MAP_COLORS[best], weight="bold"
        )
        bottom.bar(names, scores, color=MAP_COLORS)
        bottom.set(ylim=(0, 1.05), yticks=(0, 1))
        bottom.tick_params(axis="x", length=0)
        bottom.set_xlabel("cells per side of the map")
        bottom.spines[["top", "right"]].set_visible(False)
    grid[1, 0].set_ylabel("best score")
    figure.tight_layout()
    return figure


def predict(model: SSD, pixels_HW3: np.ndarray) -> tuple[Tensor, Tensor]:
    """Deltas and logits of one photograph."""
    spec = model.spec
    resized = resize_image(
        pixels_HW3, height=spec.input_height, width=spec.input_width, rule=spec.resize_rule
    )
    mean, std = (torch.tensor(values) for values in (spec.mean, spec.std))
    normalised_HW3 = (torch.from_numpy(np.array(resized)) - mean) / std
    return model(normalised_HW3.permute(2, 0, 1)[None])


def split_by_map(model: SSD, values_A: Tensor) -> tuple[Tensor, ...]:
    """Views of the values of each map's default boxes."""
    return values_A.split(
        [prior_map.grid**2 * len(prior_map.sizes_wh) for prior_map in model.spec.priors.maps]
    )


def shrunk(pixels_HW3: np.ndarray, share: float) -> np.ndarray:
    """The photograph on a 512x512 canvas, `share` of it wide."""
    height, width = pixels_HW3.shape[:2]
    size = round(512 * share), round(512 * share * height / width)
    canvas = Image.new("RGB", (512, 512), tuple(pixels_HW3.mean(axis=(0, 1)).round().astype(int).tolist()))
    small = Image.fromarray(pixels_HW3).resize(size, Image.Resampling.LANCZOS)
    canvas.paste(small, ((512 - size[0]) // 2, (512 - size[1]) // 2))
    return np.asarray(canvas)


def show(axes: Axes, pixels_HW3: np.ndarray) -> None:
    """The photograph, paler so that lines stand out."""
    axes.imshow((pixels_HW3 * 0.62 + 255 * 0.38).astype(np.uint8))
    axes.axis("off")


def outline(axes: Axes, box: np.ndarray, color: str, *, lw: float, alpha: float = 1) -> None:
    """A rectangle of line width `lw` in points."""
    (left, top), (width, height) = box[:2], box[2:] - box[:2]
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=color, lw=lw, alpha=alpha))


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 96 colours, small enough for a repository."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="white")
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    print(f"{path.name} {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

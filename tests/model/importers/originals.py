"""The original networks and their post-processing written out plainly: what the importers are held against.

Nothing of it is taken from the package under test, which only `run_model` and `run_postprocess` call. Layers
have Caffe's names; each test maps them to the names of its release.
"""

import io
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.model.postprocess import postprocess
from pipeline.model.ssd import SSD

TRUNK = [
    ("conv1_1", 3, 64), ("conv1_2", 64, 64), "pool",
    ("conv2_1", 64, 128), ("conv2_2", 128, 128), "pool",
    ("conv3_1", 128, 256), ("conv3_2", 256, 256), ("conv3_3", 256, 256), "pool",
    ("conv4_1", 256, 512), ("conv4_2", 512, 512), ("conv4_3", 512, 512), "pool",
    ("conv5_1", 512, 512), ("conv5_2", 512, 512), ("conv5_3", 512, 512),
]  # fmt: skip

# name, channels in and out, kernel, stride, padding
EXTRAS = {
    300: [
        ("conv6_1", 1024, 256, 1, 1, 0), ("conv6_2", 256, 512, 3, 2, 1),
        ("conv7_1", 512, 128, 1, 1, 0), ("conv7_2", 128, 256, 3, 2, 1),
        ("conv8_1", 256, 128, 1, 1, 0), ("conv8_2", 128, 256, 3, 1, 0),
        ("conv9_1", 256, 128, 1, 1, 0), ("conv9_2", 128, 256, 3, 1, 0),
    ],
    512: [
        ("conv6_1", 1024, 256, 1, 1, 0), ("conv6_2", 256, 512, 3, 2, 1),
        ("conv7_1", 512, 128, 1, 1, 0), ("conv7_2", 128, 256, 3, 2, 1),
        ("conv8_1", 256, 128, 1, 1, 0), ("conv8_2", 128, 256, 3, 2, 1),
        ("conv9_1", 256, 128, 1, 1, 0), ("conv9_2", 128, 256, 3, 2, 1),
        ("conv10_1", 256, 128, 1, 1, 0), ("conv10_2", 128, 256, 4, 1, 1),
    ],
}  # fmt: skip

# name, channels, boxes per cell
SOURCES = {
    300: [("conv4_3_norm", 512, 4), ("fc7", 1024, 6), ("conv6_2", 512, 6), ("conv7_2", 256, 6),
          ("conv8_2", 256, 4), ("conv9_2", 256, 4)],
    512: [("conv4_3_norm", 512, 4), ("fc7", 1024, 6), ("conv6_2", 512, 6), ("conv7_2", 256, 6),
          ("conv8_2", 256, 6), ("conv9_2", 256, 4), ("conv10_2", 256, 4)],
}  # fmt: skip

GRIDS = {300: [38, 19, 10, 5, 3, 1], 512: [64, 32, 16, 8, 4, 2, 1]}
STEPS = {300: [8, 16, 32, 64, 100, 300], 512: [8, 16, 32, 64, 128, 256, 512]}
RATIOS = {300: [[2], [2, 3], [2, 3], [2, 3], [2], [2]], 512: [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]]}

Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]


def random_image(size: int, *, seed: int = 0) -> torch.Tensor:
    """A smooth uint8 RGB image [3, size, size]."""
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)[0]


def random_conv(
    out_channels: int, in_channels: int, kernel: int, generator: torch.Generator, *, gain: float = 2
):
    """Weight and bias that keep the size of the activations; gain 2 makes good for the ReLU."""
    std = math.sqrt(gain / (in_channels * kernel**2))
    weight = torch.randn(out_channels, in_channels, kernel, kernel, generator=generator) * std
    return weight, torch.randn(out_channels, generator=generator) * 0.1


def random_head(boxes: int, columns: int, in_channels: int, generator: torch.Generator, *, std: float):
    """Weight and bias of a 3x3 head with outputs of about that spread, [box, column] by channel."""
    weight, bias = random_conv(boxes * columns, in_channels, 3, generator, gain=std**2)
    return weight - weight.mean(dim=1, keepdim=True), bias  # features are positive: without their mean


def places_of_trunk() -> dict[str, int]:
    """Place of each convolution in the one list of layers that ssd.pytorch makes of VGG16."""
    places, place = {}, 0
    for layer in [*TRUNK, "pool", ("fc6", 512, 1024), ("fc7", 1024, 1024)]:
        if layer == "pool":
            place += 1
        else:
            places[layer[0]] = place  # the ReLU comes after it
            place += 2
    return places


def prior_box(size: int, *, min_sizes: list[float], max_sizes: list[float]) -> torch.Tensor:
    """Default boxes of ssd.pytorch and lufficc: centre form, clamped."""
    priors = []
    for grid, step, smallest, largest, ratios in zip(
        GRIDS[size], STEPS[size], min_sizes, max_sizes, RATIOS[size], strict=True
    ):
        for row in range(grid):
            for column in range(grid):
                cx, cy = (column + 0.5) / (size / step), (row + 0.5) / (size / step)
                side = smallest / size
                priors.append([cx, cy, side, side])
                extra = math.sqrt(smallest * largest) / size
                priors.append([cx, cy, extra, extra])
                for ratio in ratios:
                    priors.append([cx, cy, side * math.sqrt(ratio), side / math.sqrt(ratio)])
                    priors.append([cx, cy, side / math.sqrt(ratio), side * math.sqrt(ratio)])
    return torch.tensor(priors).clamp(0, 1)


def random_vgg(size: int, num_classes: int, *, background: float, seed: int) -> tuple[Layers, torch.Tensor]:
    """Layers of an SSD with VGG16 and the scale of its L2Norm; background is the bias of column 0."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in TRUNK:
        if layer != "pool":
            name, in_channels, out_channels = layer
            layers[name] = random_conv(out_channels, in_channels, 3, generator)
    layers["conv1_1"] = (layers["conv1_1"][0] / 70, layers["conv1_1"][1])  # inputs are as large
    layers["fc6"] = random_conv(1024, 512, 3, generator)
    layers["fc7"] = random_conv(1024, 1024, 1, generator)
    for name, in_channels, out_channels, kernel, _, _ in EXTRAS[size]:
        layers[name] = random_conv(out_channels, in_channels, kernel, generator)
    for name, channels, boxes in SOURCES[size]:
        layers[f"{name}_mbox_loc"] = random_head(boxes, 4, channels, generator, std=2)
        weight, bias = random_head(boxes, num_classes, channels, generator, std=3.2)
        bias.view(boxes, num_classes)[:, 0] += background
        layers[f"{name}_mbox_conf"] = weight, bias
    return layers, 20 + 3 * torch.randn(512, generator=generator)


def vgg_forward(
    images: torch.Tensor,
    get: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
    scale: torch.Tensor,
    *,
    size: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The outputs of the box head and the class head of each map, as they leave the convolutions."""
    x, maps = images, []
    for layer in TRUNK:
        if layer == "pool":
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
            continue
        x = F.relu(F.conv2d(x, *get(layer[0]), padding=1))
        if layer[0] == "conv4_3":
            norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
            maps.append(scale[None, :, None, None] * (x / norm))
    x = F.max_pool2d(x, 3, 1, 1)
    x = F.relu(F.conv2d(x, *get("fc6"), padding=6, dilation=6))
    x = F.relu(F.conv2d(x, *get("fc7")))
    maps.append(x)
    for index, (name, _, _, _, stride, padding) in enumerate(EXTRAS[size]):
        x = F.relu(F.conv2d(x, *get(name), stride=stride, padding=padding))
        if index % 2 == 1:
            maps.append(x)
    return [
        (
            F.conv2d(features, *get(f"{name}_mbox_loc"), padding=1),
            F.conv2d(features, *get(f"{name}_mbox_conf"), padding=1),
        )
        for features, (name, _, _) in zip(maps, SOURCES[size], strict=True)
    ]


def by_cell(outputs: list[torch.Tensor], columns: int) -> torch.Tensor:
    """[1, boxes * columns, H, W] of each map -> [all boxes, columns], cell by cell."""
    return torch.cat([output.permute(0, 2, 3, 1).reshape(-1, columns) for output in outputs])


def decode(deltas: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Corners from deltas and centre-form priors, with variances 0.1 and 0.2."""
    centres = priors[:, :2] + deltas[:, :2] * 0.1 * priors[:, 2:]
    sizes = priors[:, 2:] * torch.exp(deltas[:, 2:] * 0.2)
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)


def greedy_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """Indices that stay, best first; each removes later ones that overlap it by more than the threshold."""
    order = scores.argsort(descending=True).tolist()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order:
        best, rest = order[0], torch.tensor(order[1:], dtype=torch.int64)
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        intersection = (high - low).clamp(min=0).prod(dim=1)
        overlaps = intersection / (areas[best] + areas[rest] - intersection)
        order = rest[~(overlaps > threshold)].tolist()  # NaN of two empty boxes is no overlap
    return kept


def detect(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    *,
    threshold: float,
    iou: float,
    top_k: int | None,
    max_detections: int,
) -> list[tuple[int, float, list[float]]]:
    """(column, score, box) of the best detections: threshold, top k and suppression by class, best of all."""
    found = []
    for column in range(1, scores.shape[1]):
        candidates = (scores[:, column] > threshold).nonzero()[:, 0]
        candidates = candidates[scores[candidates, column].argsort(descending=True)][:top_k]
        for index in candidates[greedy_nms(boxes[candidates], scores[candidates, column], iou)].tolist():
            found.append((column, float(scores[index, column]), boxes[index].tolist()))
    return sorted(found, key=lambda item: -item[1])[:max_detections]


def saved(contents: object, **options: object) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def run_model(model: SSD, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Deltas [A, 4] and logits [A, C] of a uint8 RGB image [3, H, W], normalised as the model's spec says."""
    mean = torch.tensor(model.spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(model.spec.std).view(1, 3, 1, 1)
    with torch.inference_mode():
        deltas, logits = model((image[None].float() - mean) / std)
    return deltas[0], logits[0]


def run_postprocess(model: SSD, deltas: torch.Tensor, logits: torch.Tensor, *, width: int, height: int):
    """The package's detections of given raw predictions [A, 4] and [A, C]."""
    return postprocess(
        deltas[None],
        logits[None],
        model.priors_cxcywh,
        sizes_N2=torch.tensor([[width, height]]),
        spec=model.spec,
    )


def limits(model: SSD) -> tuple[float, float, int | None, int]:
    """Score threshold, IoU of the suppression, candidates of a class and detections of an image."""
    spec = model.spec
    return spec.score_threshold, spec.nms_iou_threshold, spec.pre_nms_top_k, spec.max_detections


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal within 1e-4 of the spread of the numbers."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.std())


def assert_same_detections(ours, theirs: list, label_ids: list[int], *, width: int, height: int) -> None:
    """The package's detections are (column, score, box in fractions) of the original, best first."""
    assert ours.labels.tolist() == [label_ids[column - 1] for column, _, _ in theirs]
    torch.testing.assert_close(
        ours.scores, torch.tensor([score for _, score, _ in theirs]), rtol=1e-4, atol=1e-6
    )
    boxes = torch.tensor([box for _, _, box in theirs]).clamp(0, 1)
    boxes = boxes * torch.tensor([width, height, width, height])
    torch.testing.assert_close(ours.boxes, boxes, rtol=1e-4, atol=1e-3)

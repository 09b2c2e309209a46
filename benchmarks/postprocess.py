"""Postprocess of a batch, ours against torchvision's: milliseconds, ratio, whether detections are the same.

    THP_MEM_ALLOC_ENABLE=1 python benchmarks/postprocess.py [--pairs 15] [--threads 2] [--json FILE]

Batch 8, 91 classes, 8732 default boxes. Raw predictions are spread as those of a trained network, with the
background shifted so that a given mean number of candidates an image passes 0.01. Both sides get the same
tensors, run in turns in one process, and apply torchvision's thresholds (0.01, 400, 0.45, 200). With more
threads than idle cores the ratio says little: each parallel operation waits for the slowest thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD

from pipeline import boxes
from pipeline.model.anchors import prior_boxes
from pipeline.model.importers.torchvision import spec_of
from pipeline.model.postprocess import postprocess

SPEC = spec_of("ssd300_vgg16")
PRIORS = prior_boxes(SPEC.priors)
SIZES = torch.tensor([[SPEC.input_width, SPEC.input_height]])


def predictions(mean_candidates: int, *, num_images: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Deltas [N, A, 4] and logits [N, A, C] of images with 3 to 11 objects each.

    Default boxes near an object predict it, the better the more they overlap it, and to a lesser degree two
    classes that resemble its own; their boxes agree up to some noise. All others are clutter. The counts of
    candidates differ between images about threefold, as on photographs.
    """
    generator = torch.Generator().manual_seed(seed)
    num_classes = SPEC.num_classes
    logits = torch.randn(num_images, len(PRIORS), num_classes, generator=generator)
    deltas = torch.randn(num_images, len(PRIORS), 4, generator=generator) * 0.7
    for image in range(num_images):
        num_objects = int(torch.randint(3, 12, (1,), generator=generator))
        centres = torch.rand(num_objects, 2, generator=generator)
        objects = torch.cat([centres, torch.rand(num_objects, 2, generator=generator) * 0.5 + 0.05], dim=1)
        ious = boxes.iou(boxes.to_corners(PRIORS), boxes.to_corners(objects))
        classes = torch.randint(1, num_classes, (num_objects, 3), generator=generator)
        for object_ious, three in zip(ious.T, classes, strict=True):
            logits[image][:, three] += object_ious[:, None] * torch.tensor([16.0, 9.0, 7.0])
        best_iou, best = ious.max(dim=1)
        near = best_iou > 0.3
        deltas[image, near] = boxes.encode(objects[best], PRIORS)[near] + deltas[image, near]
    logits[..., 0] += _background(logits, mean_candidates * num_images)
    return deltas, logits


def _background(logits_NAC: Tensor, num_candidates: int) -> float:
    """What to add to the background's logits so that so many candidates pass, by bisection."""
    low, high = -20.0, 40.0
    for _ in range(30):
        middle = (low + high) / 2
        if count_candidates(logits_NAC, middle) > num_candidates:
            low = middle
        else:
            high = middle
    return high


def count_candidates(logits_NAC: Tensor, background: float = 0.0) -> int:
    """Pairs of default box and class above the score threshold, in all images together."""
    moved = logits_NAC.clone()
    moved[..., 0] += background
    return int((moved.softmax(dim=-1)[..., 1:] > SPEC.score_threshold).sum())


def torchvisions(deltas_NA4: Tensor, logits_NAC: Tensor) -> list[dict[str, Tensor]]:
    """Its detections, by the method of its class; one dictionary per image."""
    model: Any = SimpleNamespace(
        box_coder=BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)),
        score_thresh=SPEC.score_threshold,
        topk_candidates=SPEC.pre_nms_top_k,
        nms_thresh=SPEC.nms_iou_threshold,
        detections_per_img=SPEC.max_detections,
    )
    outputs = {"bbox_regression": deltas_NA4, "cls_logits": logits_NAC}
    anchors = boxes.to_corners(PRIORS) * SPEC.input_width
    size = (SPEC.input_height, SPEC.input_width)
    return SSD.postprocess_detections(model, outputs, [anchors] * len(deltas_NA4), [size] * len(deltas_NA4))


def ours(deltas_NA4: Tensor, logits_NAC: Tensor) -> list[dict[str, Tensor]]:
    """Our detections in the form of torchvision's."""
    found = postprocess(deltas_NA4, logits_NAC, PRIORS, sizes_N2=SIZES.expand(len(deltas_NA4), 2), spec=SPEC)
    counts = found.image_index.bincount(minlength=len(deltas_NA4)).tolist()
    fields = (found.boxes.split(counts), found.scores.split(counts), found.labels.split(counts))
    return [
        dict(zip(("boxes", "scores", "labels"), image, strict=True)) for image in zip(*fields, strict=True)
    ]


def same_detections(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    """Whether labels are equal, scores to 1e-6 and boxes to 0.001 pixel, in order."""
    return all(
        torch.equal(a["labels"], b["labels"])
        and torch.allclose(a["scores"], b["scores"], rtol=0, atol=1e-6)
        and torch.allclose(a["boxes"], b["boxes"], rtol=0, atol=1e-3)
        for a, b in zip(first, second, strict=True)
    )


def compare(mean_candidates: int, *, num_pairs: int) -> dict[str, float | bool]:
    """Milliseconds of both sides in interleaved pairs."""
    deltas_NA4, logits_NAC = predictions(mean_candidates)
    same = same_detections(torchvisions(deltas_NA4, logits_NAC), ours(deltas_NA4, logits_NAC))
    pairs = []
    for _ in range(num_pairs):
        pairs.append([_milliseconds(side, deltas_NA4, logits_NAC) for side in (torchvisions, ours)])
    theirs_ms, ours_ms = zip(*pairs, strict=True)
    return {
        "candidates_per_image": count_candidates(logits_NAC) / len(logits_NAC),
        "torchvision_ms": statistics.median(theirs_ms),
        "ours_ms": statistics.median(ours_ms),
        "ratio": statistics.median(theirs / own for theirs, own in pairs),
        "ratio_of_best": min(theirs_ms) / min(ours_ms),
        "same_detections": same,
    }


def _milliseconds(side: Callable[[Tensor, Tensor], object], deltas_NA4: Tensor, logits_NAC: Tensor) -> float:
    start = time.perf_counter()
    side(deltas_NA4, logits_NAC)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, nargs="+", default=[400, 1800])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        rows = [compare(mean_candidates, num_pairs=args.pairs) for mean_candidates in args.candidates]
    print("candidates/image  torchvision ms  ours ms  ratio (median)  ratio (best)  same detections")
    for row in rows:
        print(
            f"{row['candidates_per_image']:16.0f}  {row['torchvision_ms']:14.1f}  {row['ours_ms']:7.1f}  "
            f"{row['ratio']:14.1f}  {row['ratio_of_best']:12.1f}  {'yes' if row['same_detections'] else 'NO'}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"threads": args.threads, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

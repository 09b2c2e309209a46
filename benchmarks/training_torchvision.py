"""Our recipe against torchvision's, from the same weights, on the same images: AP and images per second.

    python benchmarks/training_torchvision.py --data BCCD [--images 4800] [--seeds 0 1 2] [--json FILE]
                                              [--architecture ssd300_vgg16 --init VGG16_LAYERS --device cuda]

Both sides begin with the same weights (the bundled COCO ones) and new class heads, see the same number of
training images in batches of the same size, and are measured on BCCD's test list by the same code (COCO AP).
Theirs is torchvision's own `SSD` class (its matcher, 3:1 mining, softmax loss, coder, post-processing) around
the same layers, its "ssd" augmentation preset (photometric distortion, zoom-out, IoU crop, flip), and its
reference loop: SGD with momentum 0.9 and weight decay 5e-4, linear warm-up over the first epoch, a tenth of
the rate after 80/120 and 110/120 of the run. Threads, device and THP_MEM_ALLOC_ENABLE=1 are the same on both
sides; on a GPU ours has bfloat16, its default, and theirs float32, its own (`--precision float32` for both).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import ssd as torchvision_ssd
from torchvision.transforms import v2
from training_bccd import make_shards  # the script beside this one

from pipeline import boxes
from pipeline.config import TrainConfig
from pipeline.data.annotations import Classes, read_classes
from pipeline.evaluation.boxsets import Detected
from pipeline.evaluation.coco import class_numbers, coco_curves, coco_numbers
from pipeline.model.ssd import SSD
from pipeline.training.index import annotation, index_shards, training_shards
from pipeline.training.loop import Learner
from pipeline.training.order import picks
from pipeline.training.plan import initial_model, make_recipe, sample_settings, with_fitted_priors
from pipeline.training.samples import fetch, load_batch, load_images
from pipeline.training.validation import ground_truth, validate

Tables = dict[str, pa.Table]


class Maps(nn.Module):
    """Backbone and extra layers as torchvision's SSD wants them."""

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.backbone, self.extras = model.backbone, model.extras

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Feature maps by number."""
        maps = self.backbone(images)
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return OrderedDict((str(i), features) for i, features in enumerate(maps))


class Heads(nn.Module):
    """Our heads under torchvision's names."""

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.heads = model.heads

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Deltas [N, A, 4] and logits [N, A, C]."""
        outputs = [head(features) for head, features in zip(self.heads, maps, strict=True)]
        return {
            "bbox_regression": torch.cat([deltas for deltas, _ in outputs], dim=1),
            "cls_logits": torch.cat([logits for _, logits in outputs], dim=1),
        }


class Anchors(nn.Module):
    """Our default boxes, in pixels."""

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.register_buffer("corners", boxes.to_corners(model.priors_cxcywh) * model.spec.input_width)

    def forward(self, images: Any, _maps: list[Tensor]) -> list[Tensor]:
        """Corners [A, 4] for each image."""
        corners: Any = self.corners
        return [corners for _ in images.image_sizes]


def torchvision_model(ours: SSD) -> torchvision_ssd.SSD:
    """Torchvision's SSD around the layers of `ours`."""
    spec = ours.spec
    for head in ours.heads:  # softmax begins at zero bias, not at a sigmoid's prior
        convolutions = [m for m in head.get_submodule("logits").modules() if isinstance(m, nn.Conv2d)]
        assert convolutions[-1].bias is not None
        nn.init.zeros_(convolutions[-1].bias)
    return torchvision_ssd.SSD(
        Maps(ours),
        Anchors(ours),  # type: ignore[arg-type]
        (spec.input_width, spec.input_height),
        spec.num_classes,
        image_mean=[value / 255 for value in spec.mean],
        image_std=[value / 255 for value in spec.std],
        head=Heads(ours),
        score_thresh=0.001,
        nms_thresh=spec.nms_iou_threshold,
        detections_per_img=spec.max_detections,
    )


def ssd_preset(mean: list[int]) -> v2.Compose:
    """The preset "ssd" of torchvision's references/detection/presets.py."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=mean),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(p=0.5),
            v2.ToDtype(torch.float, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )


def decode(data: bytes) -> Tensor:
    """uint8 [3, H, W] of a file, by torchvision."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def their_sample(data: bytes, row: dict, preset: v2.Compose) -> tuple[Tensor, dict[str, Tensor]]:
    """Decode and augment one image as torchvision's reference does."""
    image = decode(data)
    found = annotation(row)
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.from_numpy(found.boxes), format="XYXY", canvas_size=(found.height, found.width)
        ),  # type: ignore[call-overload]
        "labels": torch.from_numpy(found.labels),
    }
    return preset(tv_tensors.Image(image), target)


def ours(data: Tables, classes: Classes, seed: int, args: argparse.Namespace) -> dict[str, float]:
    config = train_config(seed, args, lr=args.lr, precision=args.precision)
    recipe = make_recipe(config, device=args.device)
    model = with_fitted_priors(initial_model(config, classes), data["train"], config)
    learner = Learner(model, recipe, device=args.device)
    epochs = args.images // len(data["train"])
    settings = sample_settings(config, learner.model.spec, num_epochs=epochs)
    num_steps, ingest_s, started = args.images // args.batch_size, 0.0, time.perf_counter()
    for step in range(num_steps):
        began = time.perf_counter()
        batch = load_batch(chosen(step, data, seed, args), data["train"], settings)
        ingest_s += time.perf_counter() - began
        learner.step(batch, progress=(step + 1) / num_steps)
    seconds = time.perf_counter() - started
    spec, test = learner.model.spec, data["test"]
    size = {"height": spec.input_height, "width": spec.input_width, "rule": spec.resize_rule}
    images, _ = load_images(test, range(len(test)), **size)
    numbers = validate(learner.averaged, [images], ground_truth(test, classes), device=args.device)
    return numbers | speeds(num_steps * args.batch_size, ingest_s, seconds)


def theirs(data: Tables, classes: Classes, seed: int, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(seed)
    model = torchvision_model(initial_model(train_config(seed, args, freeze=0), classes))
    model = model.to(args.device).train()
    preset = ssd_preset([round(255 * value) for value in model.transform.image_mean])
    optimizer = torch.optim.SGD(model.parameters(), lr=args.their_lr, momentum=0.9, weight_decay=5e-4)
    num_steps, ingest_s, started = args.images // args.batch_size, 0.0, time.perf_counter()
    warmup = min(1000, len(data["train"]) // args.batch_size - 1)
    for step in range(num_steps):
        began = time.perf_counter()
        rows = data["train"].take([p.sample for p in chosen(step, data, seed, args)]).to_pylist()
        samples = [their_sample(d, row, preset) for d, row in zip(fetch(rows), rows, strict=True)]
        ingest_s += time.perf_counter() - began
        rate = args.their_lr * 0.1 ** sum(step / num_steps >= share for share in (80 / 120, 110 / 120))
        for group in optimizer.param_groups:
            group["lr"] = rate * max(0.001, min(1.0, step / warmup))
        images = [image.to(args.device) for image, _ in samples]
        losses = model(images, [{k: v.to(args.device) for k, v in target.items()} for _, target in samples])
        optimizer.zero_grad()
        (losses["bbox_regression"] + losses["classification"]).backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    found = their_detections(model.eval(), data["test"], classes, device=args.device)
    truth = ground_truth(data["test"], classes)
    curves = coco_curves(truth, found, sorted(truth.class_names))
    by_class = {f"AP/{truth.class_names[k]}": n["AP"] for k, n in class_numbers(curves).items()}
    return coco_numbers(curves) | by_class | speeds(num_steps * args.batch_size, ingest_s, seconds)


@torch.inference_mode()
def their_detections(
    model: torchvision_ssd.SSD, test: pa.Table, classes: Classes, *, device: str
) -> Detected:
    ids, columns = np.array([0, *classes.ids]), []
    for number, row in enumerate(test.to_pylist()):
        (data,) = fetch([row])
        image = decode(data)
        (some,) = model([image.to(device) / 255])
        some = {name: values.cpu() for name, values in some.items()}
        corners = some["boxes"].double().numpy()
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        index = np.full(len(xywh), number, np.int32)
        columns.append((index, xywh, ids[some["labels"].numpy()], some["scores"].double().numpy()))
    return Detected(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def train_config(seed: int, args: argparse.Namespace, **flags: Any) -> TrainConfig:
    """Flags that both sides share, and some of one side."""
    shared = {"seed": seed, "batch_size": args.batch_size, "architecture": args.architecture}
    return TrainConfig(train="t", val="v", output="o", init=args.init, **shared, **flags)


def chosen(step: int, data: Tables, seed: int, args: argparse.Namespace) -> list[Any]:
    sizes = {"batch_size": args.batch_size, "num_samples": len(data["train"])}
    return picks(step, rank=0, num_workers=1, seed=seed, **sizes)


def speeds(num_images: int, ingest_s: float, seconds: float) -> dict[str, float]:
    return {"ingest/s": num_images / ingest_s, "step/s": num_images / (seconds - ingest_s)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--architecture", default=TrainConfig(train="t", val="v", output="o").architecture)
    parser.add_argument("--init", default="auto", help="as for jobs/train.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", help="of ours")
    parser.add_argument("--lr", type=float, default=5e-4, help="of ours")
    parser.add_argument("--images", type=int, default=4800)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--their-lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_shards(args.data, Path(folder))
        classes = read_classes(f"{folder}/train")
        data = {
            split: index_shards(training_shards(f"{folder}/{split}", flag="--train"), classes)
            for split in ("train", "test")
        }
        rows = []
        for seed in args.seeds:
            for name, side in (("ours", ours), ("torchvision", theirs)):
                rows.append({"side": name, "seed": seed, **side(data, classes, seed, args)})
                print(_line(rows[-1]), flush=True)
    for name in ("ours", "torchvision"):
        mine = [row for row in rows if row["side"] == name]
        mean = {
            key: statistics.mean(row[key] for row in mine) for key in mine[0] if key not in ("side", "seed")
        }
        print(_line({"side": name, "seed": "mean", **mean}))
    if args.json:
        args.json.write_text(json.dumps({"images": args.images, "rows": rows}, indent=2))


def _line(row: dict[str, Any]) -> str:
    shown = [key for key in row if key in ("AP", "AP50") or "/" in key]
    return f"{row['side']:<12} {row['seed']!s:>5}  " + "  ".join(f"{key} {row[key]:.3f}" for key in shown)


if __name__ == "__main__":
    main()

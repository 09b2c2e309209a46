"""A whole training step of ssd300_vgg16 against torchvision's: how long, and how much memory?

    python benchmarks/training_step.py [--batch-size 4] [--pairs 5] [--threads 2] [--json FILE]

A step is: normalise a batch of uint8 images, forward, match, loss, backward, SGD with momentum. 91 classes,
about 7 objects an image, random weights. Times are of alternating steps in one process, their ratio is taken
pair by pair; processor time counts both threads and suffers less from other programs. Memory is what three
steps add to a process of their own at their peak, with large tensors mapped one by one
(MALLOC_MMAP_THRESHOLD_) so that nothing depends on fragmentation. Threads and allocator settings
(THP_MEM_ALLOC_ENABLE=1) are the same on both sides. Prints one table.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16

from pipeline.model.initialise import initialise
from pipeline.model.loss import multibox_loss
from pipeline.model.matching import match, pad_targets
from pipeline.model.ssd import build_model

Side = Literal["ours", "torchvision"]
SIDES: tuple[Side, ...] = ("ours", "torchvision")


def make_batch(batch_size: int) -> tuple[Tensor, list[np.ndarray], list[np.ndarray]]:
    """Random images uint8 [N, 3, 300, 300], and per image 1 to 13 boxes and labels."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (batch_size, 3, 300, 300), dtype=np.uint8))
    counts = rng.integers(1, 14, batch_size)
    corners = [np.sort(rng.uniform(0, 300, (count, 2, 2)), axis=1).reshape(-1, 4) for count in counts]
    boxes = [np.concatenate([some[:, :2], some[:, 2:] + 2], axis=1).astype(np.float32) for some in corners]
    return images, boxes, [rng.integers(1, 91, count) for count in counts]


def our_step(batch_size: int) -> Callable[[], float]:
    """A function that does one step and returns the loss."""
    images, boxes, labels = make_batch(batch_size)
    images = images.contiguous(memory_format=torch.channels_last)  # as decoded images are
    model = build_model("ssd300_vgg16", num_classes=91).train()
    initialise(model, generator=torch.Generator().manual_seed(0))
    model = model.to(memory_format=torch.channels_last)  # 0.8 to 0.9 of the time on a CPU
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.spec.mean, model.spec.std))
    optimizer = make_optimizer(model)
    names = [str(index) for index in range(batch_size)]

    def step() -> float:
        targets = pad_targets(boxes, labels, height=300, width=300, num_classes=91, image_ids=names)
        matched = match(targets, model.priors_cxcywh)
        deltas, logits = model((images - mean) / std)
        losses = multibox_loss(deltas, logits, targets, matched, model.priors_cxcywh)
        del deltas, logits  # 3.2 MB an image that backward doesn't need
        return descend(losses.total, optimizer)

    return step


def torchvision_step(batch_size: int) -> Callable[[], float]:
    """The same with torchvision's model, which normalises and matches inside."""
    images, boxes, labels = make_batch(batch_size)
    targets = [
        {"boxes": torch.from_numpy(some), "labels": torch.from_numpy(classes)}
        for some, classes in zip(boxes, labels, strict=True)
    ]
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).train()
    optimizer = make_optimizer(model)

    def step() -> float:
        losses = model(list(images / 255), targets)
        return descend(losses["bbox_regression"] + losses["classification"], optimizer)

    return step


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=5e-4)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


STEPS: dict[Side, Callable[[int], Callable[[], float]]] = {"ours": our_step, "torchvision": torchvision_step}


def time_both(args: argparse.Namespace) -> None:
    """Print the seconds (wall, processor) of each step of both sides, in alternating order."""
    steps = {side: STEPS[side](args.batch_size) for side in SIDES}
    seconds: dict[Side, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for pair in range(args.pairs + 1):  # the first pair warms up
        for side in SIDES if pair % 2 else reversed(SIDES):
            start = time.perf_counter(), time.process_time()
            steps[side]()
            seconds[side].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    print(json.dumps({side: values[1:] for side, values in seconds.items()}))


def measure_memory(args: argparse.Namespace) -> None:
    """Print what three steps of one side add to this process at their peak, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = STEPS[args.child](args.batch_size)
    for _ in range(3):
        step()
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def run_child(child: str, args: argparse.Namespace, **environment: str) -> Any:
    """What `--child` prints, in a fresh process with the allocator settings."""
    command = [sys.executable, __file__, "--child", child]
    for name in ("batch_size", "pairs", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"} | environment
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["time", *SIDES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return time_both(args) if args.child == "time" else measure_memory(args)
    seconds = run_child("time", args)
    num_bytes = {side: run_child(side, args, MALLOC_MMAP_THRESHOLD_="65536") for side in SIDES}
    print(f"{'':<12} {'s a step':>9} {'processor s':>12} {'peak MB':>8}")
    for side in SIDES:
        wall, processor = (statistics.median(column) for column in zip(*seconds[side], strict=True))
        print(f"{side:<12} {wall:>9.2f} {processor:>12.2f} {num_bytes[side] / 1e6:>8.0f}")
    ratios = np.median(np.divide(*(seconds[side] for side in SIDES)), axis=0).tolist()
    ratios.append(num_bytes["ours"] / num_bytes["torchvision"])
    print("{:<12} {:>9.3f} {:>12.3f} {:>8.3f}".format("ratio", *ratios))
    if args.json:
        result = {"seconds": seconds, "peak_bytes": num_bytes, "ratios": ratios}
        args.json.write_text(json.dumps(vars(args) | {"json": None} | result, indent=2))


if __name__ == "__main__":
    main()

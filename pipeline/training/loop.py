"""The optimizer steps, in plain PyTorch: one worker alone, or several that `torch.distributed` has joined.

Shapes: N images, A default boxes, C classes incl. background.
"""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import PipelineError
from pipeline.model.loss import Losses, focal_loss, multibox_loss
from pipeline.model.matching import Targets, match, pad_targets, shares
from pipeline.model.ssd import SSD
from pipeline.training.optimise import (
    AveragedWeights,
    Recipe,
    learning_rate,
    make_optimizer,
    set_rate,
    train_mode,
)
from pipeline.training.samples import Batch


@dataclass(frozen=True)
class StepResult:
    """What one step tells; losses are those of the global batch."""

    box_loss: float
    class_loss: float
    gradient_norm: float
    rate: float
    num_positives: int

    @property
    def loss(self) -> float:
        """Both parts."""
        return self.box_loss + self.class_loss


class Learner:
    """A model, its optimizer and its averaged weights.

    Attributes:
        model: what is trained.
        averaged: what is validated and kept in the end; the model itself where there is no averaging.
        num_steps: optimizer steps so far.

    Args:
        model: with frozen parts already frozen; it moves to `device`.
        recipe: how weights change.
        device: where to train.
    """

    def __init__(self, model: SSD, recipe: Recipe, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.recipe = recipe
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.num_steps = 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        if self.world_size > 1 and self.device.type == "cuda":
            self.model = cast("SSD", nn.SyncBatchNorm.convert_sync_batchnorm(self.model))
        self.optimizer = make_optimizer(self.model, recipe)
        self._average = AveragedWeights(self.model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self._forward: nn.Module = self.model
        if self.world_size > 1:
            self._forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        spec = model.spec
        std = torch.tensor(spec.std, device=self.device)
        self._factor = (1 / std).view(1, 3, 1, 1)
        self._shift = (-torch.tensor(spec.mean, device=self.device) / std).view(1, 3, 1, 1)
        train_mode(self.model)

    @property
    def averaged(self) -> SSD:
        """The weights to validate and to keep."""
        return self.model if self._average is None else self._average.model

    def step(self, batch: Batch, *, progress: float) -> StepResult:
        """One optimizer step on this worker's share of a global batch.

        Gradients and losses are those of the whole global batch, however it is divided: sums over all its
        default boxes, divided by all its matches. Only batch norms that are trained see each micro-batch
        and, on CPUs, each worker's alone.

        Args:
            batch: this worker's share.
            progress: how much of the run will be done after this step, 0 to 1.

        Raises:
            PipelineError: loss or gradient is not finite; nothing was changed. The message names the images.
            ImageError: an object can't be learnt.
        """
        parts = [(part, *self._match(part)) for part in batch.split(self.recipe.micro_batches)]
        num_positives = self._sum(sum((matched >= 0).sum() for _, _, matched in parts))
        weights = self._weights([(targets, matched) for _, targets, matched in parts], num_positives)
        sums = torch.zeros(2, device=self.device)
        for i, (part, targets, matched) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                losses = self._losses(part, targets, matched, num_positives, weights[i])
                with warnings.catch_warnings():
                    # Weights of 1x1 kernels are channels_last and contiguous at once; DDP notes that the
                    # strides of their gradients are written the other way and copies them.
                    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
                    (losses.total * self.world_size).backward()
            sums += torch.stack([losses.boxes.detach(), losses.classes.detach()])
        trained = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.recipe.clip_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(trained, limit))
        if not norm < float("inf"):
            self._explain(batch, sums, norm)
        rate = learning_rate(progress, self.recipe)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        if self._average is not None:
            self._average.update(self.model, step=self.num_steps)
        box_loss, class_loss = self._sum(sums).tolist()
        return StepResult(box_loss, class_loss, norm, rate, int(num_positives))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "num_steps": self.num_steps,
            "model": self.model.state_dict(),
            "averaged": None if self._average is None else self._average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.num_steps = state["num_steps"]
        self.model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.model.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])

    # ---- one micro-batch -----------------------------------------------------------------------------

    def _match(self, batch: Batch) -> tuple[Targets, Tensor]:
        spec = self.model.spec
        targets = pad_targets(
            batch.boxes,
            batch.labels,
            height=spec.input_height,
            width=spec.input_width,
            num_classes=spec.num_classes,
            image_ids=batch.image_ids,
        ).to(self.device)
        return targets, match(targets, self.model.priors_cxcywh)

    def _weights(self, parts: Sequence[tuple[Targets, Tensor]], num_positives: Tensor) -> list[Tensor | None]:
        """What matched default boxes weigh in each micro-batch, 1 on average over the global batch."""
        if self.recipe.balance == "matches":
            return [None] * len(parts)
        of_parts = [shares(matched, num_objects=targets.labels.shape[1]) for targets, matched in parts]
        num_objects = self._sum(sum(share.sum() for share in of_parts))
        return [share * (num_positives / num_objects.clamp(min=1)) for share in of_parts]

    def _losses(
        self,
        batch: Batch,
        targets: Targets,
        matched_NA: Tensor,
        num_positives: Tensor,
        weights_NA: Tensor | None,
    ) -> Losses:
        images_NHW3 = torch.from_numpy(batch.images_NHW3)
        if self.device.type == "cuda":
            images_NHW3 = images_NHW3.pin_memory().to(self.device, non_blocking=True)
        images_N3HW = images_NHW3.permute(0, 3, 1, 2).float() * self._factor + self._shift
        lower = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower):
            deltas_NA4, logits_NAC = self._forward(images_N3HW)
        spec = self.model.spec
        shared: dict[str, Any] = {
            "num_positives": num_positives,
            "weights_NA": weights_NA,
            "coder_weights": spec.coder_weights,
        }
        if spec.score_function == "sigmoid":
            return focal_loss(deltas_NA4, logits_NAC, targets, matched_NA, self.model.priors_cxcywh, **shared)
        return multibox_loss(
            deltas_NA4,
            logits_NAC,
            targets,
            matched_NA,
            self.model.priors_cxcywh,
            **shared,
            negatives_per_positive=self.recipe.negatives_per_positive,
            negatives_without_positives=self.recipe.negatives_without_positives,
        )

    # ---- workers -------------------------------------------------------------------------------------

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        return cast("Any", self._forward).no_sync() if self.world_size > 1 else contextlib.nullcontext()

    def _sum(self, value: Tensor | int) -> Tensor:
        """The sum over all workers."""
        total = torch.as_tensor(value, device=self.device, dtype=torch.float32).clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def _explain(self, batch: Batch, sums: Tensor, norm: float) -> None:
        """Raise with the images at fault, on every worker at once: the gradient is the same on all."""
        finite = bool(sums.isfinite().all())
        mine: Sequence[str] = () if finite else batch.image_ids
        found: list[Any] = [mine]
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, mine)
        images = [image for some in found for image in some]
        what = "the loss" if images else f"the gradient ({norm})"
        raise PipelineError(
            f"step {self.num_steps + 1}: {what} is not finite, in the batch of "
            f"{', '.join(images or batch.image_ids)}; look at these images, or lower --lr"
        )

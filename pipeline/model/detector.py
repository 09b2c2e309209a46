"""A trained model ready for batches of uint8 images: normalise, forward, decode, suppress, on one device.

Shapes: N images, H W pixels of the network's input.
"""

import numpy as np
import torch

from pipeline.model.checkpoint import load_checkpoint
from pipeline.model.layers import fold_batch_norm
from pipeline.model.postprocess import Detections, postprocess


class Detector:
    """Detections of image batches; weights are loaded once, batch norm is folded, all is float32.

    GPUs compute convolutions in float32 too, not in the shorter TF32 that PyTorch gives them: with TF32 a box
    more or less of 24 photographs came and went, and scores depended on the batch by 0.002; without it boxes
    are the CPU's to 1e-4 pixel and scores to 1e-6, at 0.88 of the speed (bundled weights, batches of 64).

    Attributes:
        spec: what the checkpoint says, with the score threshold in use.

    Args:
        weights: what `load_checkpoint` takes.
        device: "cpu", "cuda" or "cuda:<index>".
        score_threshold: instead of the checkpoint's own.

    Raises:
        CheckpointError: no such weights.
    """

    def __init__(self, weights: str, *, device: str = "cpu", score_threshold: float | None = None) -> None:
        self.device = torch.device(device)
        model = fold_batch_norm(load_checkpoint(weights))
        self.model = model.requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)
        self.spec = model.spec
        self.score_threshold = model.spec.score_threshold if score_threshold is None else score_threshold
        # x / std - mean / std, one multiplication and one addition per value
        std = torch.tensor(model.spec.std, device=self.device)
        self._factor = (1 / std).view(1, 3, 1, 1)
        self._shift = (-torch.tensor(model.spec.mean, device=self.device) / std).view(1, 3, 1, 1)

    def __call__(self, images_NHW3: np.ndarray, sizes_N2: np.ndarray) -> Detections[np.ndarray]:
        """Detections of a batch, the same whatever the size of the batch.

        Args:
            images_NHW3: uint8 RGB images of the input size in `spec`, resized by its rule; may be read-only.
            sizes_N2: width and height of the original images, whose pixels the boxes are in.

        Returns:
            Detections as NumPy arrays, see `Detections`.
        """
        try:
            return self._detect(self._moved(images_NHW3), torch.from_numpy(sizes_N2)).numpy()
        except torch.cuda.OutOfMemoryError:
            if len(images_NHW3) <= 1:
                raise
        half = len(images_NHW3) // 2
        torch.cuda.empty_cache()
        first = self(images_NHW3[:half], sizes_N2[:half])
        second = self(images_NHW3[half:], sizes_N2[half:])
        return Detections(
            np.concatenate([first.image_index, second.image_index + half]),
            np.concatenate([first.boxes, second.boxes]),
            np.concatenate([first.scores, second.scores]),
            np.concatenate([first.labels, second.labels]),
        )

    def _moved(self, images_NHW3: np.ndarray) -> torch.Tensor:
        """The images on the device, as bytes: a quarter of what they are in float32."""
        if self.device.type == "cuda":  # one copy on the host, and the other one goes on beside it
            pinned = torch.empty(images_NHW3.shape, dtype=torch.uint8, pin_memory=True)
            np.copyto(pinned.numpy(), images_NHW3)
            return pinned.to(self.device, non_blocking=True)
        return torch.from_numpy(images_NHW3 if images_NHW3.flags.writeable else images_NHW3.copy())

    @torch.inference_mode()
    def _detect(self, images_NHW3: torch.Tensor, sizes_N2: torch.Tensor) -> Detections[torch.Tensor]:
        # The permuted view of NHWC bytes is channels_last. Time of a forward on one core, contiguous over
        # channels_last: 1.66 (ssdlite300), 1.14 (ssdlite320), 1.23 (ssd300_vgg16), 1.07 (ssd300_resnet50).
        images_N3HW = images_NHW3.permute(0, 3, 1, 2).float() * self._factor + self._shift
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            deltas_NA4, logits_NAC = self.model(images_N3HW)
        return postprocess(
            deltas_NA4,
            logits_NAC,
            self.model.priors_cxcywh,
            sizes_N2=sizes_N2,
            spec=self.spec,
            score_threshold=self.score_threshold,
        )

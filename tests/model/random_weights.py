"""torchvision's detectors with random weights that make a meaningful test.

As initialised, their scores are all but equal: an equality test would prove nothing. Here batch norm has the
statistics of activations, disturbed at random; the class heads give logits of a standard deviation of 3, and
the background has a bias such that about 800 candidates of an image pass 0.01.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalMemberAccess=false

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD


def torchvision_model(name: str, *, seed: int, num_classes: int = 91) -> tuple[SSD, Tensor]:
    """The network in eval mode, and the image [3, H, W] in 0..1 that its heads are scaled for."""
    torch.manual_seed(seed)
    make = {"ssd300_vgg16": ssd300_vgg16, "ssdlite320_mobilenet_v3_large": ssdlite320_mobilenet_v3_large}[
        name
    ]
    model = make(weights=None, weights_backbone=None, num_classes=num_classes)
    size = 300 if name == "ssd300_vgg16" else 320
    image = _image(size)
    batch = model.transform([image])[0].tensors
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        _measure_batch_norm(model, norms, model.transform([_image(size) for _ in range(8)])[0].tensors)
    _scale_heads(model.eval(), batch, num_classes)
    return model, image


def head_outputs(model: SSD, images_N3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Raw deltas and logits for normalised images."""
    with torch.inference_mode():
        outputs = model.head(list(model.backbone(images_N3HW).values()))
    return outputs["bbox_regression"], outputs["cls_logits"]


def _image(size: int) -> Tensor:
    """Blobs of colour of several sizes under a light of its own: images and cells must not look alike."""
    layers = [
        nn.functional.interpolate(torch.rand(1, 3, n, n), (size, size), mode="bilinear") for n in (2, 9, 40)
    ]
    return torch.stack(layers).mean(dim=0)[0] ** (4 * torch.rand(3, 1, 1))


@torch.no_grad()
def _measure_batch_norm(model: SSD, norms: list[nn.BatchNorm2d], batch: Tensor) -> None:
    """Statistics of this batch, then a random change of every number of each batch norm."""
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.7, 1.4)
        norm.bias.normal_(std=0.2)
    model.train()
    model.head(list(model.backbone(batch).values()))
    for norm in norms:
        norm.running_mean.add_(torch.randn_like(norm.running_mean) * 0.1 * norm.running_var.sqrt())
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.4))


@torch.no_grad()
def _scale_heads(model: SSD, images: Tensor, num_classes: int) -> None:
    maps = list(model.backbone(images).values())
    heads = model.head.classification_head.module_list, model.head.regression_head.module_list
    for module_list, std in zip(heads, (3.0, 1.0), strict=True):
        for head, features in zip(module_list, maps, strict=True):
            conv = head if isinstance(head, nn.Conv2d) else head[-1]
            factor = std / head(features).std()
            conv.weight.mul_(factor)
            conv.bias.mul_(factor)
    _, logits = head_outputs(model, images)
    bias = _background_bias(logits, wanted=800)
    for head in model.head.classification_head.module_list:
        conv = head if isinstance(head, nn.Conv2d) else head[-1]
        conv.bias.view(-1, num_classes)[:, 0] += bias


def _background_bias(logits: Tensor, *, wanted: int) -> float:
    """What to add to the background's logits, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(30):
        middle = (low + high) / 2
        moved = logits.clone()
        moved[..., 0] += middle
        low, high = (middle, high) if count_candidates(moved) > wanted else (low, middle)
    return low


def count_candidates(logits: Tensor, *, threshold: float = 0.01) -> int:
    """Pairs of a default box and a class with a score above the threshold, in a batch."""
    return int((logits.softmax(dim=-1)[..., 1:] > threshold).sum())

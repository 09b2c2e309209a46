# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalMemberAccess=false
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torchvision.models import resnet50, vgg16

from pipeline.model import backbones
from pipeline.model.layers import L2Norm, SameConv2d, conv_unit, fold_batch_norm


@pytest.mark.parametrize(
    ("backbone", "size", "grids"),
    [
        (backbones.VGG16, 300, (38, 19)),
        (backbones.MobileNetV2, 300, (19, 10)),
        (backbones.MobileNetV3Large, 320, (20, 10)),
        (backbones.ResNet50, 300, (38,)),
    ],
)
def test_maps_have_the_published_sizes_and_the_declared_channels(backbone, size, grids):
    module = backbone().eval()
    with torch.inference_mode():
        maps = module(torch.zeros(1, 3, size, size))
    assert [features.shape[1:] for features in maps] == [
        (channels, grid, grid) for channels, grid in zip(module.channels, grids, strict=True)
    ]


def test_trunk_of_vgg16_computes_what_torchvisions_does():
    theirs, ours = vgg16(weights=None).features.eval(), backbones.VGG16().eval()
    theirs[16].ceil_mode = True
    convs = [layer for layer in theirs if isinstance(layer, nn.Conv2d)]
    names = [name for name, layer in ours.layers.named_children() if isinstance(layer, nn.Conv2d)]
    assert names[-2:] == ["fc6", "fc7"]
    for name, conv in zip(names, convs, strict=False):
        ours.layers.get_submodule(name).load_state_dict(conv.state_dict())
    image = torch.randn(1, 3, 75, 75)
    with torch.inference_mode():
        conv4_3 = theirs[:23](image)
        conv5_3 = theirs[23:30](conv4_3)
        layers = ours.layers
        fc6 = F.relu(
            F.conv2d(
                F.max_pool2d(conv5_3, 3, 1, 1), layers.fc6.weight, layers.fc6.bias, padding=6, dilation=6
            )
        )
        fc7 = F.relu(F.conv2d(fc6, layers.fc7.weight, layers.fc7.bias))
        first, second = ours(image)
    torch.testing.assert_close(first, 20 * conv4_3 / conv4_3.norm(dim=1, keepdim=True).clamp(min=1e-10))
    torch.testing.assert_close(second, fc7)


def test_resnet50_is_torchvisions_with_stride_1_in_its_last_stage():
    theirs, ours = resnet50(weights=None).eval(), backbones.ResNet50().eval()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    ours.load_state_dict(state)
    assert {name.split(".")[0] for name in state} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    with torch.inference_mode():
        image = torch.randn(1, 3, 64, 64)
        features = nn.Sequential(*list(theirs.children())[:6])(image)
        for block in theirs.layer3:
            block.conv2.stride = (1, 1)
            if block.downsample is not None:
                block.downsample[0].stride = (1, 1)
        torch.testing.assert_close(ours(image)[0], theirs.layer3(features))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 19, 75, 150])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_is_tensorflows(size, stride):
    conv = SameConv2d(2, 3, 3, stride)
    image = torch.randn(1, 2, size, size)
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + 3 - size, 0)
    padded = F.pad(image, (total // 2, total - total // 2) * 2)
    expected = F.conv2d(padded, conv.weight, conv.bias, stride)
    assert expected.shape[-1] == outputs
    torch.testing.assert_close(conv(image), expected)


def test_same_padding_of_an_even_input_is_asymmetric():
    conv = SameConv2d(1, 1, 3, 2, bias=False)
    nn.init.ones_(conv.weight)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    # Windows start at the first pixel, the zeros are below and to the right: rows 0..2 and 2..3.
    expected = [
        [image[0, 0, :3, :3].sum(), image[0, 0, :3, 2:].sum()],
        [image[0, 0, 2:, :3].sum(), image[0, 0, 2:, 2:].sum()],
    ]
    assert conv(image)[0, 0].tolist() == [[value.item() for value in row] for row in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_l2norm_is_finite_for_huge_and_for_zero_activations(dtype):
    norm = L2Norm(512, scale=20.0)
    features = torch.full((1, 512, 2, 2), 1e4, dtype=dtype)
    features[..., 1] = 0
    scaled = norm(features)
    assert scaled.dtype == dtype
    torch.testing.assert_close(
        scaled[..., 0].float(), torch.full((1, 512, 2), 20 / 512**0.5), rtol=1e-2, atol=0
    )
    assert bool((scaled[..., 1] == 0).all())


def test_l2norm_stays_in_float32_under_autocast():
    norm = L2Norm(512, scale=20.0)
    features = torch.full((1, 512, 1, 1), 1e4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scaled = norm(features)
    torch.testing.assert_close(scaled, torch.full((1, 512, 1, 1), 20 / 512**0.5))


def test_l2norm_gradient_is_finite_at_zero():
    norm = L2Norm(4, scale=20.0)
    features = torch.zeros(1, 4, 1, 1, requires_grad=True)
    norm(features).sum().backward()
    assert bool(features.grad.isfinite().all())


def test_folded_batch_norm_computes_the_same():
    unit = nn.Sequential(conv_unit(3, 8, 3, norm=nn.BatchNorm2d), conv_unit(8, 4, 1, norm=nn.BatchNorm2d))
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    image = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        expected = unit.eval()(image)
        folded = fold_batch_norm(unit)
        torch.testing.assert_close(folded(image), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())

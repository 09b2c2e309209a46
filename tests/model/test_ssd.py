# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalMemberAccess=false
import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.model import architectures, build_model
from pipeline.model.anchors import formula_priors
from pipeline.model.layers import fold_batch_norm
from pipeline.model.ssd import Head

PRIORS = {
    "ssd300_vgg16": 8732,
    "ssd512_vgg16": 24564,
    "ssd300_resnet50": 8732,
    "ssdlite320_mobilenet_v3_large": 3234,
    "ssdlite300_mobilenet_v2": 1917,
}


@pytest.mark.parametrize("name", PRIORS)
def test_every_architecture_predicts_for_each_of_its_priors(name):
    model = build_model(name, num_classes=4).eval()
    with torch.inference_mode():
        deltas, logits = model(torch.zeros(1, 3, model.spec.input_height, model.spec.input_width))
    assert deltas.shape == (1, PRIORS[name], 4)
    assert logits.shape == (1, PRIORS[name], 4)
    assert model.priors_cxcywh.shape == (PRIORS[name], 4)
    assert model.priors_cxcywh.dtype == torch.float32


def test_there_are_no_other_architectures():
    assert set(architectures()) == set(PRIORS)


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [  # torchvision's published num_params, and the paper's network counted by hand for VOC
        ("ssd300_vgg16", 91, 35_641_826),
        ("ssd300_vgg16", 21, 26_285_486),
        ("ssdlite320_mobilenet_v3_large", 91, 3_440_060),
    ],
)
def test_number_of_parameters_is_the_published_one(name, num_classes, expected):
    model = build_model(name, num_classes=num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_ssd512_ends_with_a_4x4_convolution_with_padding_1():
    model = build_model("ssd512_vgg16", num_classes=2)
    conv = model.get_submodule("extras.4.expand.conv")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.padding, conv.stride) == ((4, 4), (1, 1), (1, 1))


def test_head_of_the_papers_worked_example():
    head = Head(256, num_boxes=3, num_classes=21)
    features = torch.randn(2, 256, 5, 5)
    assert head.boxes(features).shape == (2, 12, 5, 5)
    assert head.logits(features).shape == (2, 63, 5, 5)
    deltas, logits = head(features)
    assert deltas.shape == (2, 75, 4)
    assert logits.shape == (2, 75, 21)


def test_head_outputs_follow_the_order_of_the_priors():
    head = Head(1, num_boxes=2, num_classes=3)
    with torch.no_grad():
        head.boxes.weight.zero_()
        head.boxes.weight[:, 0, 1, 1] = 1.0  # passes the value of the cell through
        head.boxes.bias.copy_(torch.arange(8) / 10)  # plus a mark for box and coordinate
        deltas, _ = head(torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]]))
    expected = [
        [cell + (box * 4 + side) / 10 for side in range(4)] for cell in (0, 10, 20, 30) for box in (0, 1)
    ]
    torch.testing.assert_close(deltas[0], torch.tensor(expected))


def test_priors_are_not_weights():
    assert "priors_cxcywh" not in build_model("ssdlite300_mobilenet_v2", num_classes=2).state_dict()


def test_names_in_the_state_dict_are_stable():
    vgg = build_model("ssd300_vgg16", num_classes=2).state_dict()
    lite = build_model("ssdlite320_mobilenet_v3_large", num_classes=2).state_dict()
    assert {
        "backbone.layers.conv1_1.weight",
        "backbone.layers.fc7.bias",
        "backbone.conv4_3_norm.scale",
        "extras.3.reduce.conv.weight",
        "extras.3.expand.conv.bias",
        "heads.5.boxes.weight",
        "heads.5.logits.bias",
    } <= set(vgg)
    assert {
        "extras.0.depthwise.norm.running_var",
        "heads.0.boxes.depthwise.conv.weight",
        "heads.0.logits.project.bias",
    } <= set(lite)


def test_custom_priors_change_the_heads():
    priors = formula_priors("mine", grids=(19, 10, 5, 3, 2, 1), ratios=((2,),) * 6, extra_square=False)
    model = build_model("ssdlite300_mobilenet_v2", num_classes=2, priors=priors).eval()
    with torch.inference_mode():
        deltas, _ = model(torch.zeros(1, 3, 300, 300))
    assert deltas.shape[1] == priors.num_priors == 3 * (361 + 100 + 25 + 9 + 4 + 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": "ssd300"}, "ssd300_vgg16"),
        ({"architecture": "ssd300_vgg16", "priors": "imagenet"}, "coco, voc"),
        (
            {"architecture": "ssd300_vgg16", "priors": formula_priors("two maps", grids=(4, 2))},
            "2 feature maps",
        ),
    ],
)
def test_wrong_requests_are_refused_with_what_there_is(arguments, words):
    with pytest.raises(ConfigError, match=words):
        build_model(**arguments, num_classes=2)


@pytest.mark.parametrize("name", ["ssd300_resnet50", "ssdlite320_mobilenet_v3_large"])
def test_folding_batch_norm_changes_no_output(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.2)
    image = torch.randn(1, 3, model.spec.input_height, model.spec.input_width)
    with torch.inference_mode():
        expected = model(image)
        folded = fold_batch_norm(model)(image)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for found, wanted in zip(folded, expected, strict=True):
        assert (found - wanted).abs().max() < 1e-3 * wanted.std()

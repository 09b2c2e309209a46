import dataclasses
import math

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from pipeline import boxes
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbones import VGG16
from pipeline.model.initialise import (
    caffe_xavier,
    initialise,
    load_vgg16,
    replace_classes,
    replace_priors,
    subsample_fc6,
    subsample_fc7,
)
from pipeline.model.ssd import build_model
from tests.conftest import shared


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vgg_layer(model, name):
    return conv_of(model, f"backbone.layers.{name}")


def conv_of(model, name) -> nn.Conv2d:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    return layer


def bias_of(conv):
    assert conv.bias is not None
    return conv.bias.detach()


def make_vgg16_state():
    """Random convolutions of VGG16 under torchvision's names, without a classifier."""
    features = make_layers(cfgs["D"])
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, generator=make_generator())
                nn.init.uniform_(bias_of(layer), -0.1, 0.1, generator=make_generator(1))
    return features, {f"features.{name}": tensor for name, tensor in features.state_dict().items()}


@pytest.fixture(scope="module")
def ssd300():
    model = build_model("ssd300_vgg16", num_classes=4)
    initialise(model, generator=make_generator())
    return model


def test_xavier_is_caffes_and_not_pytorchs():
    conv = nn.Conv2d(512, 16, 3, padding=1)  # the box head of conv4_3
    caffe_xavier(conv, generator=make_generator())

    weight = conv.weight.detach()
    assert float(weight.abs().max()) == pytest.approx(math.sqrt(3 / (512 * 9)), rel=1e-3)  # .0255, not .0355
    assert float(weight.var()) == pytest.approx(1 / (512 * 9), rel=0.02)
    assert not bias_of(conv).any()


def test_the_same_generator_gives_the_same_model_whatever_the_global_one_says(ssd300):
    torch.manual_seed(1234)
    other = build_model("ssd300_vgg16", num_classes=4)
    state = torch.get_rng_state()
    initialise(other, generator=make_generator())

    assert torch.equal(torch.get_rng_state(), state)
    for (name, ours), theirs in zip(ssd300.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_untrained_vgg_keeps_a_signal_of_about_one(ssd300):
    images = torch.randn(1, 3, 96, 96, generator=make_generator()) * 60
    with torch.no_grad():
        conv4_3, fc7 = ssd300.backbone(images)
        logits = conv_of(ssd300, "heads.1.logits")(fc7)

    assert float(conv4_3.norm(dim=1).mean()) == pytest.approx(20, rel=0.01)
    assert 0.3 < fc7.std() < 3
    assert 0.3 < logits.std() < 3


def test_untrained_sigmoid_models_give_each_class_one_percent():
    model = build_model("ssdlite300_mobilenet_v2", num_classes=4)
    initialise(model, generator=make_generator())

    for index in range(6):
        bias = bias_of(conv_of(model, f"heads.{index}.logits.project"))
        assert bias.sigmoid().tolist() == pytest.approx([0.01] * len(bias))
        assert not bias_of(conv_of(model, f"heads.{index}.boxes.project")).any()


def test_fc6_and_fc7_are_subsampled_alike():
    fc6 = torch.arange(8 * 5 * 49).reshape(8, 5 * 49)
    fc7 = torch.arange(8 * 8).reshape(8, 8)
    reduced6, reduced7 = subsample_fc6(fc6), subsample_fc7(fc7)

    assert reduced6.shape == (2, 5, 3, 3)
    for out in range(2):
        for channel in range(5):
            for row in range(3):
                for column in range(3):
                    expected = fc6[4 * out, channel * 49 + 3 * row * 7 + 3 * column]
                    assert reduced6[out, channel, row, column] == expected
    assert reduced7[:, :, 0, 0].tolist() == [[fc7[0, 0], fc7[0, 4]], [fc7[4, 0], fc7[4, 4]]]


def test_the_backbone_computes_what_torchvisions_vgg16_computes(ssd300):
    features, state = make_vgg16_state()
    found_classifier = load_vgg16(ssd300, state, generator=make_generator())
    images = torch.randn(1, 3, 64, 64, generator=make_generator())

    with torch.no_grad():
        layers = ssd300.get_submodule("backbone.layers")
        assert isinstance(layers, nn.Sequential)
        conv4_3 = layers[:23](images)
        conv5_3 = layers[23:30](conv4_3)
        expected = features[:23](images)
        torch.testing.assert_close(conv4_3, expected)
        torch.testing.assert_close(conv5_3, features[23:30](expected))
    assert not found_classifier
    assert vgg_layer(ssd300, "fc6").weight.abs().max() <= math.sqrt(3 / (512 * 9))


def test_a_classifier_fills_fc6_and_fc7():
    model, (_, state) = build_model("ssd300_vgg16", num_classes=2), make_vgg16_state()
    # The real size, without the 470 MB: rows that repeat one line.
    line = torch.arange(512 * 49.0)
    state |= {"classifier.0.weight": line.expand(4096, -1), "classifier.0.bias": torch.arange(4096.0)}
    state |= {
        "classifier.3.weight": line[:4096].expand(4096, -1),
        "classifier.3.bias": torch.arange(4096.0) + 1,
    }

    assert load_vgg16(model, state, generator=make_generator())
    assert vgg_layer(model, "fc6").weight[7, 100, 1, 2] == 100 * 49 + 3 * 7 + 6
    assert vgg_layer(model, "fc7").weight[7, 100, 0, 0] == 400
    assert bias_of(vgg_layer(model, "fc6")).tolist() == list(range(0, 4096, 4))
    assert bias_of(vgg_layer(model, "fc7"))[1] == 5


def test_a_classifier_of_nan_counts_as_none(ssd300):
    _, state = make_vgg16_state()
    state |= {"classifier.0.weight": torch.tensor(math.nan).expand(4096, 25088)}

    assert not load_vgg16(ssd300, state, generator=make_generator())
    assert torch.isfinite(vgg_layer(ssd300, "fc6").weight).all()


def test_reduced_weights_of_ssd_pytorch_are_taken_as_they_are(ssd300):
    _, state = make_vgg16_state()
    state = {name.removeprefix("features."): tensor for name, tensor in state.items()}
    fc6, fc7 = torch.rand(1024, 512, 3, 3), torch.rand(1024, 1024, 1, 1)
    state |= {"31.weight": fc6, "31.bias": torch.ones(1024), "33.weight": fc7, "33.bias": torch.ones(1024)}

    assert load_vgg16(ssd300, state, generator=make_generator())
    assert torch.equal(vgg_layer(ssd300, "fc6").weight, fc6)
    assert torch.equal(vgg_layer(ssd300, "fc7").weight, fc7)


def test_weights_for_divided_images_give_the_same_on_undivided_ones(ssd300):
    _, state = make_vgg16_state()
    std = torch.tensor([58.395, 57.12, 57.375])
    load_vgg16(ssd300, state, generator=make_generator(), std=tuple(std.tolist()))
    images = torch.randn(1, 3, 16, 16, generator=make_generator()) * 60

    expected = nn.functional.conv2d(
        images / std.view(3, 1, 1), state["features.0.weight"], state["features.0.bias"], padding=1
    )
    torch.testing.assert_close(vgg_layer(ssd300, "conv1_1")(images), expected)


def test_the_imagenet_convolutions_of_shared_load(ssd300):
    path = shared("models/vgg16_imagenet_conv.safetensors")
    assert not load_vgg16(ssd300, safetensors.torch.load_file(path), generator=make_generator())

    assert vgg_layer(ssd300, "conv1_1").weight.dtype == torch.float32
    # First kernel values of the Keras file (conv1_1, BGR there), to float16.
    first = vgg_layer(ssd300, "conv1_1").weight[:3, 2, 0, 0].tolist()
    assert first == pytest.approx([0.42947057, 0.11727387, 0.03401296], rel=1e-3)


def test_what_is_missing_or_misfits_is_named(ssd300):
    _, state = make_vgg16_state()
    with pytest.raises(CheckpointError, match=r"no 'features\.28\.bias'"):
        load_vgg16(
            ssd300, {k: v for k, v in state.items() if k != "features.28.bias"}, generator=make_generator()
        )
    with pytest.raises(CheckpointError, match=r"conv1_2 is \(1, 2, 3, 3\), expected \(64, 64, 3, 3\)"):
        load_vgg16(ssd300, state | {"features.2.weight": torch.zeros(1, 2, 3, 3)}, generator=make_generator())
    with pytest.raises(ConfigError, match="no VGG16 backbone"):
        load_vgg16(build_model("ssdlite300_mobilenet_v2", num_classes=2), state, generator=make_generator())
    assert isinstance(ssd300.backbone, VGG16)


@pytest.mark.parametrize("num_classes", [91, 4, 3])
@pytest.mark.parametrize("architecture", ["ssdlite300_mobilenet_v2", "ssdlite320_mobilenet_v3_large"])
def test_other_classes_draw_only_the_class_layer_anew_however_many_they_are(architecture, num_classes):
    model = build_model(architecture, num_classes=num_classes).eval()
    initialise(model, generator=make_generator())
    new = replace_classes(model, class_names=("RBC", "WBC"), label_ids=(1, 7), generator=make_generator(1))

    assert (new.spec.class_names, new.spec.label_ids, new.training) == (("RBC", "WBC"), (1, 7), False)
    assert new.spec.score_function == "softmax"
    assert conv_of(new, "heads.0.logits.project").out_channels == 3 * len(new.spec.priors.maps[0].sizes_wh)
    old_state = model.state_dict()
    changed = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, old_state[name])}
    biases = {f"heads.{i}.logits.project.bias" for i in range(6)}
    assert all(not new.state_dict()[name].any() for name in biases)
    assert changed | biases == {
        f"heads.{i}.logits.project.{part}" for i in range(6) for part in ("weight", "bias")
    }


def test_the_same_classes_keep_all_weights():
    model = build_model("ssdlite300_mobilenet_v2", num_classes=3)
    initialise(model, generator=make_generator())
    model.spec = dataclasses.replace(model.spec, class_names=("cat", "dog"))
    new = replace_classes(model, class_names=("cat", "dog"), label_ids=(17, 18), generator=make_generator())

    assert (new.spec.class_names, new.spec.label_ids) == (("cat", "dog"), (17, 18))
    assert new.spec.score_function == model.spec.score_function == "sigmoid"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name]), name


def test_the_same_classes_in_another_order_are_other_classes():
    model = build_model("ssd300_vgg16", num_classes=3)
    model.spec = dataclasses.replace(model.spec, class_names=("cat", "dog"))
    new = replace_classes(model, class_names=("dog", "cat"), label_ids=(1, 2), generator=make_generator())

    assert 0 < conv_of(new, "heads.0.logits").weight.abs().max() < 0.1
    assert not torch.equal(conv_of(new, "heads.0.logits").weight, conv_of(model, "heads.0.logits").weight)


@pytest.mark.parametrize("architecture", ["ssdlite300_mobilenet_v2", "ssd300_vgg16"])
def test_other_default_boxes_predict_the_same_boxes(architecture):
    model = build_model(architecture, num_classes=3).eval()
    initialise(model, generator=make_generator())
    sizes = torch.rand(model.spec.priors.num_priors, 2, generator=make_generator(1)) * 0.5 + 0.05
    rows = iter(sizes.tolist())
    maps = tuple(
        dataclasses.replace(one, sizes_wh=tuple(tuple(next(rows)) for _ in one.sizes_wh))
        for one in model.spec.priors.maps
    )
    new = replace_priors(model, dataclasses.replace(model.spec.priors, maps=maps))
    image = torch.randn(1, 3, 300, 300, generator=make_generator(2))

    with torch.no_grad():
        (deltas, logits), (new_deltas, new_logits) = model(image), new(image)
    assert not torch.allclose(deltas, new_deltas, atol=0.1)
    torch.testing.assert_close(
        boxes.decode(new_deltas[0], new.priors_cxcywh), boxes.decode(deltas[0], model.priors_cxcywh),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert torch.equal(logits, new_logits)
    assert new.spec.priors.maps == maps
    assert not new.training

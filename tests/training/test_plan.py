"""What a run will do, and what is refused before it."""

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from pipeline.config import TrainConfig
from pipeline.data import augment
from pipeline.data.annotations import read_classes
from pipeline.data.images import resize_image
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.checkpoint import load_checkpoint, save_checkpoint
from pipeline.model.ssd import build_model
from pipeline.training.plan import (
    initial_model,
    make_plan,
    make_recipe,
    num_frozen,
    sample_settings,
    shard_classes,
    usable_rows,
    with_fitted_priors,
)
from tests.training.makers import make_set, read_set, save_small_model


def config(tmp_path, **changes):
    given: dict[str, Any] = {name: str(tmp_path / name) for name in ("train", "val")}
    given["output"] = str(tmp_path / "out")
    return TrainConfig(**(given | changes))


@pytest.fixture
def sets(tmp_path):
    make_set(tmp_path / "train", 6, empty=2)
    make_set(tmp_path / "val", 3, seed=1)
    return tmp_path


def test_bundled_weights_get_new_classes_and_keep_their_boxes(sets):
    classes = read_classes(str(sets / "train"))
    model: Any = initial_model(config(sets), classes)
    bundled = load_checkpoint("coco_ssdlite300_mobilenet_v2")
    assert model.spec.class_names == ("disc", "square")
    assert model.spec.label_ids == (10, 20)
    for name in ("backbone.stem.conv.weight", "heads.0.boxes.project.weight"):
        assert torch.equal(model.state_dict()[name], bundled.state_dict()[name])
    assert not model.backbone.stem.conv.weight.requires_grad


@pytest.mark.parametrize(
    ("flags", "name", "weighed"),
    [
        ({}, "fitted", "objects"),
        ({"priors": "coco"}, "coco", "objects"),
        ({"balance": "matches"}, "fitted", "matches"),
        ({"init": "none"}, "coco", "matches"),
        ({"architecture": "ssd300_vgg16", "init": "none"}, "coco", "matches"),
        ({"architecture": "ssd300_vgg16", "init": "none", "priors": "voc"}, "voc", "matches"),
        ({"architecture": "ssd300_vgg16", "init": "none", "priors": "fitted"}, "fitted", "matches"),
    ],
)
def test_weights_that_are_adapted_get_default_boxes_for_the_objects_and_weigh_objects(
    sets, flags, name, weighed
):
    train, classes = read_set(make_set(sets / "more", 20))
    wanted = config(sets, **flags)
    before: Any = initial_model(wanted, classes)
    model: Any = with_fitted_priors(before, train, wanted)
    plan = make_plan(wanted, classes, model, device="cpu", train=train, val=train)
    assert model.spec.priors.name == name
    assert plan.decided()["balance"] == make_recipe(wanted, device="cpu").balance == weighed
    assert f"default boxes {name}; in the loss, {weighed} weigh the same" in plan.text()
    if name == "fitted":
        # Discs and squares of 28 to 43 pixels in pictures of 160x128.
        moved = {size for one in model.spec.priors.maps for size in one.sizes_wh} - {
            size for one in before.spec.priors.maps for size in one.sizes_wh
        }
        assert moved
        assert all(28 / 160 <= w <= 43 / 160 and 28 / 128 <= h <= 43 / 128 for w, h in moved)
        trained = [[p.requires_grad for p in one.parameters()] for one in (before, model)]
        assert trained[0] == trained[1]
    else:
        assert model is before


def test_objects_of_an_image_of_unknown_size_move_no_default_box(sets):
    train, classes = read_set(make_set(sets / "more", 20))
    wanted = config(sets, priors="fitted")
    width = pa.array([0] * 5 + train["width"].to_pylist()[5:], train.schema.field("width").type)
    unknown = train.set_column(train.schema.get_field_index("width"), "width", width)
    fitted = [
        with_fitted_priors(initial_model(wanted, classes), rows, wanted).spec.priors.maps
        for rows in (unknown, train.slice(5))
    ]
    assert fitted[0] == fitted[1]


def test_default_boxes_are_fitted_to_the_objects_that_are_learnt(sets):
    train, classes = read_set(make_set(sets / "more", 20))
    marked = [[True] * len(labels) for labels in train["labels"].to_pylist()]
    plain = [one.sizes_wh for one in load_checkpoint("coco_ssdlite300_mobilenet_v2").spec.priors.maps]
    for column, flags, moves in [
        ("crowd", {}, False), ("difficult", {"difficult": False}, False), ("difficult", {}, True),
    ]:  # fmt: skip
        wanted = config(sets, **flags)
        place = train.schema.get_field_index(column)
        table = train.set_column(place, train.schema.field(column), pa.array(marked, pa.list_(pa.bool_())))
        model = with_fitted_priors(initial_model(wanted, classes), table, wanted)
        assert ([one.sizes_wh for one in model.spec.priors.maps] != plain) == moves


def test_the_map_of_labels_goes_into_the_checkpoint(sets, tmp_path):
    classes = read_classes(str(sets / "train"))
    save_checkpoint(initial_model(config(sets), classes), tmp_path / "model.safetensors")
    spec = load_checkpoint(tmp_path / "model.safetensors").spec
    assert dict(zip(spec.label_ids, spec.class_names, strict=True)) == {10: "disc", 20: "square"}
    assert "coco_ssdlite300_mobilenet_v2" in spec.provenance


def vgg16_layers():
    """Random convolutions of VGG16 under torchvision's names, without a classifier."""
    donor: Any = build_model("ssd300_vgg16", num_classes=2).backbone.layers
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    convs = [m for m in donor.children() if isinstance(m, torch.nn.Conv2d)][:13]
    return {
        f"features.{n}.{part}": getattr(conv, part).detach().clone()
        for n, conv in zip(numbers, convs, strict=True)
        for part in ("weight", "bias")
    }


def test_vgg16_layers_fill_the_trunk(sets, tmp_path):
    classes = read_classes(str(sets / "train"))
    state = vgg16_layers() | {"classifier.0.weight": torch.full((1, 1), torch.nan)}
    path = tmp_path / "vgg16.safetensors"
    safetensors.torch.save_file(state, path)
    wanted = config(sets, architecture="ssd300_vgg16", init=str(path), priors="voc")
    model: Any = initial_model(wanted, classes)
    torch.testing.assert_close(model.backbone.layers.conv5_3.weight, state["features.28.weight"])
    torch.testing.assert_close(model.backbone.layers.conv1_1.weight, state["features.0.weight"])
    assert model.spec.class_names == ("disc", "square")
    assert model.spec.priors.name == build_model("ssd300_vgg16", num_classes=2, priors="voc").spec.priors.name
    assert num_frozen(wanted) == 0


@pytest.mark.parametrize("prefix", ["features.", ""])
def test_vgg16_layers_that_do_not_tell_how_images_are_scaled_are_refused(sets, tmp_path, prefix):
    path = tmp_path / "vgg16.safetensors"
    state = {name.replace("features.", prefix): value for name, value in vgg16_layers().items()}
    safetensors.torch.save_file(state, path)
    wanted = config(sets, architecture="ssd300_vgg16", init=str(path))
    with pytest.raises(ConfigError, match=r"--init .*: VGG16 layers without a classifier don't tell"):
        initial_model(wanted, read_classes(str(sets / "train")))


def test_real_vgg16_layers_fill_the_trunk(sets, shared_data):
    path = shared_data("models/vgg16_imagenet_conv.safetensors")
    wanted = config(sets, architecture="ssd300_vgg16", init=str(path))
    model: Any = initial_model(wanted, read_classes(str(sets / "train")))
    state = safetensors.torch.load_file(path)
    torch.testing.assert_close(model.backbone.layers.conv1_1.weight, state["features.0.weight"].float())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"architecture": "ssd300_vgg16"}, "no bundled weights"),
        ({"architecture": "ssd300"}, "no architecture 'ssd300'; there are"),
        (
            {"architecture": "ssd300_vgg16", "init": "coco_ssdlite300_mobilenet_v2"},
            "is a ssdlite300_mobilenet_v2, not a ssd300_vgg16",
        ),
        ({"freeze": 20}, "has 19 stages"),
        ({"priors": "voc"}, "--priors voc: ssdlite300_mobilenet_v2 has only coco"),
        (
            {"priors": "voc", "architecture": "ssdlite320_mobilenet_v3_large", "init": "none"},
            "--priors voc: ssdlite320_mobilenet_v3_large has only coco",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(sets, flags, message):
    with pytest.raises(ConfigError, match=message):
        initial_model(config(sets, **flags), read_classes(str(sets / "train")))


def test_missing_weights_are_refused(sets):
    with pytest.raises(CheckpointError, match=r"no weights .*nowhere.safetensors"):
        initial_model(config(sets, init="nowhere.safetensors"), read_classes(str(sets / "train")))


def test_classes_of_both_sets_must_agree(sets):
    classes = [{"id": 1, "name": "disc"}, {"id": 2, "name": "star"}]
    (sets / "val" / "classes.json").write_text(json.dumps({"classes": classes}))
    with pytest.raises(ConfigError, match=r"--train has the classes 10 disc.*--val has 1 disc, 2 star"):
        shard_classes(config(sets))


def test_folders_that_are_no_annotated_shards_are_refused(sets):
    (sets / "val" / "classes.json").unlink()
    with pytest.raises(ConfigError, match=r"classes.json is missing: make annotated shards"):
        shard_classes(config(sets))


def test_images_without_objects_are_left_out_by_flag(sets):
    table, _ = read_set(sets / "train")
    assert len(usable_rows(table, config(sets))) == 6
    assert len(usable_rows(table, config(sets, empty_images=False))) == 4


def test_sets_without_any_object_are_refused(tmp_path):
    make_set(tmp_path / "train", 2, empty=2)
    make_set(tmp_path / "val", 1, empty=1)
    table, classes = read_set(tmp_path / "train")
    with pytest.raises(ConfigError, match="none of its 2 images has an object"):
        usable_rows(table, config(tmp_path))
    full, _ = read_set(make_set(tmp_path / "full", 1))
    model: Any = initial_model(config(tmp_path), classes)
    empty, _ = read_set(tmp_path / "val")
    with pytest.raises(ConfigError, match=r"--val .*has an object to measure"):
        make_plan(config(tmp_path), classes, model, device="cpu", train=full, val=empty)


def test_the_plan_tells_images_boxes_steps_and_rates(sets):
    wanted = config(sets, epochs=10, batch_size=4, max_minutes=5)
    train, classes = read_set(sets / "train")
    val, _ = read_set(sets / "val")
    plan = make_plan(wanted, classes, initial_model(wanted, classes), device="cpu", train=train, val=val)
    text = plan.text()
    counts = np.bincount([label for row in train["labels"].to_pylist() for label in row], minlength=3)[1:]
    assert plan.objects == dict(zip(("disc", "square"), counts.tolist(), strict=True))
    for part in ("6 images to learn from (2 without", "15 steps of 4 images = 10 epochs, at most 5 minutes"):
        assert part in text
    assert "1 workers on cpu, 10 validations" in text
    assert "10% 0.0005" in text
    assert "adamw, augmentation light, flip horizontal;" in text
    assert "5 of 19 backbone stages frozen" in text


@pytest.mark.parametrize(
    ("given", "minutes", "num_images", "epochs", "augmentation"),
    [
        (0, 0, 1000, 48, "crops"),
        (0, 15, 1000, 48, "crops"),
        (0, 14.9, 1000, 12, "light"),
        (0, 5, 200, 12, "light"),
        (0, 5, 6, 400, "crops"),  # 300 steps at least
        (0, 5, 7, 343, "crops"),
        (0, 0, 6, 400, "crops"),
        (12, 25, 6, 12, "light"),
        (18, 25, 6, 18, "light"),
        (19, 1, 6, 19, "crops"),
    ],
)
def test_short_runs_have_fewer_epochs_and_crop_if_these_are_more_than_18(
    sets, given, minutes, num_images, epochs, augmentation
):
    wanted = config(sets, epochs=given, max_minutes=minutes, batch_size=8)
    train, classes = read_set(sets / "train")
    plan = make_plan(wanted, classes, initial_model(wanted, classes), device="cpu", train=train, val=train)
    plan = dataclasses.replace(plan, num_images=num_images)
    assert (plan.num_epochs, plan.num_steps) == (epochs, -(-epochs * num_images // 8))
    assert plan.samples.augmentation == augmentation


def test_networks_without_trained_weights_are_augmented_as_in_the_paper(sets):
    for flags in ({"init": "none"}, {"architecture": "ssd300_vgg16", "init": "none"}):
        wanted = config(sets, **flags)
        model = initial_model(wanted, read_classes(str(sets / "train")))
        for epochs in (1, 100):
            assert sample_settings(wanted, model.spec, num_epochs=epochs).augmentation == "ssd"


def test_a_checkpoint_brings_its_own_input_size(sets, tmp_path):
    init = save_small_model(tmp_path / "small.safetensors")
    wanted = config(sets, init=str(init))
    model: Any = initial_model(wanted, read_classes(str(sets / "train")))
    made = sample_settings(wanted, model.spec, num_epochs=1)
    assert (made.height, made.width, made.fill) == (128, 128, (128, 128, 128))


def centre_of_light(pixels):
    """x and y of what is brighter than its dark surroundings, from 0 to 1."""
    light = pixels.astype(float).sum(axis=2)
    light -= light.min()
    sides = [(np.arange(size) + 0.5) / size for size in light.shape[::-1]]
    return np.array([light.sum(axis=axis) @ side for axis, side in enumerate(sides)]) / light.sum()


def test_training_and_validation_show_an_object_in_the_same_place(sets):
    y, x = np.ogrid[:600, :900]
    blob = 200 * np.exp(-((x - 460) ** 2 + (y - 250) ** 2) / 50**2)
    pixels = np.repeat(blob[..., None], 3, axis=2).astype(np.uint8)
    wanted = config(sets)
    model: Any = initial_model(wanted, read_classes(str(sets / "train")))
    size = {"height": model.spec.input_height, "width": model.spec.input_width}
    validated = resize_image(pixels, **size, rule=model.spec.resize_rule)
    whole, rng = augment.whole_image(pixels, np.zeros((0, 4)), np.zeros(0)), np.random.default_rng(0)
    learnt = [augment.resize(whole, rng, **size).pixels for _ in range(20)]
    shifts = [(centre_of_light(image) - centre_of_light(validated)) * 300 for image in learnt]
    # Without interpolation, one time in five, an index is rounded down: a third of a pixel here.
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.1


def test_precision_follows_the_device_unless_it_is_given(sets):
    assert make_recipe(config(sets), device="cuda").precision == "bfloat16"
    assert make_recipe(config(sets), device="cpu").precision == "float32"
    assert make_recipe(config(sets, precision="float32"), device="cuda").precision == "float32"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 9, "workers": 2}, "--batch-size 9 can't be divided among --workers 2"),
        ({"epochs": -1}, "--epochs -1 is out of range"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"milestones": (0.5, 1.5)}, "--milestones"),
        ({"max_minutes": -1.0}, "--max-minutes -1.0"),
        ({"val": "same", "train": "same/"}, "--train and --val are the same"),
    ],
)
def test_flags_out_of_range_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **flags)


def test_flags_are_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config(tmp_path).lr = 1.0  # type: ignore[misc]

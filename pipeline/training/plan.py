"""What a training run will do, decided and checked before anything starts: classes, weights, steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.annotations import Classes, read_classes
from pipeline.errors import ConfigError
from pipeline.model.anchors import fit_priors
from pipeline.model.architectures import find_architecture
from pipeline.model.checkpoint import DEFAULT_WEIGHTS, load_checkpoint, read_spec, read_weights
from pipeline.model.initialise import initialise, load_vgg16, replace_classes, replace_priors
from pipeline.model.spec import ModelSpec
from pipeline.model.ssd import SSD, build_model
from pipeline.training.optimise import Recipe, freeze, learning_rate, stages
from pipeline.training.order import num_steps
from pipeline.training.samples import SampleSettings

# Of a trained MobileNetV2: the first blocks (up to stride 8) are better left alone, and their backward pass
# is much of the cost. BCCD, 2,400 images, one seed, focal loss: AP on val 0.575 with 5 of them, 0.556
# with 8.
MOBILENET_FROZEN = 5
# Without crops a small set is learnt by heart after 12 to 18 epochs: BCCD, 205 images, a run of 24 epochs,
# AP on val after 62, 132, 294, 464 and 615 steps: .499, .563, .577, .566, .564. With crops a run of 12
# epochs misses more objects (AP50 .891 rather than .897, two seeds), but one of 48 goes on learning: AP .567,
# .573, .592, .592 and AP50 .890, .890, .903, .903 after each quarter (one seed).
# Generated pictures (`make train-demo`, 15 epochs): AP .913 without crops, .887 with them (one run each).
EPOCHS, LONG_EPOCHS = 12, 48
MOST_UNCROPPED_EPOCHS = 18
LONG_MINUTES = 15
MIN_STEPS = 300
# torchvision's IMAGENET1K_V1 was trained on images divided by this; the original VGG16 on none.
_TORCHVISION_STD = (58.395, 57.12, 57.375)
# First values of the original's first kernels, for blue (Keras's file, conv1_1).
_ORIGINAL_VGG16 = (0.42947057, 0.11727387, 0.03401296)
_UNCHANGING = ("output", "overwrite", "dry_run", "log_s")


def shard_classes(config: TrainConfig) -> Classes:
    """The classes of both shard sets.

    Raises:
        ConfigError: a set has no classes, or they differ.
    """
    classes, others = read_classes(config.train), read_classes(config.val)
    if classes != others:
        raise ConfigError(
            f"--train has the classes {_named(classes)}, --val has {_named(others)}: "
            "make both with the same --classes"
        )
    return classes


def _named(classes: Classes) -> str:
    shown = [f"{id_} {name}" for id_, name in zip(classes.ids, classes.names, strict=True)]
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def usable_rows(table: pa.Table, config: TrainConfig) -> pa.Table:
    """The rows of the index to learn from.

    Raises:
        ConfigError: there are none, or none with objects.
    """
    counts = pc.list_value_length(table["labels"]).to_numpy()  # type: ignore[attr-defined]
    if not counts.any():
        raise ConfigError(f"--train {config.train}: none of its {len(table)} images has an object")
    return table if config.empty_images else table.filter(pa.array(counts > 0))


def objects_by_class(table: pa.Table, classes: Classes) -> dict[str, int]:
    """Annotated objects of each class; crowd regions don't count."""
    labels = _of_objects(table, "labels")[~_of_objects(table, "crowd")]
    counts = np.bincount(labels, minlength=len(classes.names) + 1)[1:]
    return dict(zip(classes.names, counts.tolist(), strict=True))


def _of_objects(table: pa.Table, column: str) -> np.ndarray:
    """The values of a list column of the index, those of all images in one array."""
    values = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(bool) if column in ("crowd", "difficult") else values


# ---- the model ---------------------------------------------------------------------------------------


def initial_model(config: TrainConfig, classes: Classes) -> SSD:
    """The model before the first step: weights of `--init`, heads for the classes.

    Raises:
        ConfigError: `--init` is of another architecture, or there is no default for this one; it holds VGG16
            layers that don't tell what their images were divided by; the network has no such `--priors`.
        CheckpointError: no such weights.
    """
    known = find_architecture(config.architecture).priors
    if config.priors not in {"auto", "fitted", *known}:
        raise ConfigError(f"--priors {config.priors}: {config.architecture} has only {', '.join(known)}")
    generator = torch.Generator().manual_seed(config.seed)
    init = config.init
    if init == "auto":
        if read_spec(DEFAULT_WEIGHTS).architecture != config.architecture:
            raise ConfigError(
                f"--init: {config.architecture} has no bundled weights; give a checkpoint, "
                "torchvision:<name>, a file of VGG16 layers, or none to begin with random weights"
            )
        init = DEFAULT_WEIGHTS
    if init == "none":
        model = _new_model(config, classes, generator)
    elif (layers := _vgg16_layers(init)) is not None:
        model = _new_model(config, classes, generator)
        load_vgg16(model, layers, generator=generator, std=_vgg16_std(layers, init))
    else:
        model = load_checkpoint(init)
        if model.spec.architecture != config.architecture:
            raise ConfigError(
                f"--init {init} is a {model.spec.architecture}, not a {config.architecture}: "
                f"give --architecture {model.spec.architecture}"
            )
        model = replace_classes(model, class_names=classes.names, label_ids=classes.ids, generator=generator)
    # As augmentation resizes. TensorFlow 1's rule shows objects half a pixel of BCCD's photographs beside the
    # place where they were learnt: AP on val .551 rather than .559, and .561 rather than .565 (two runs).
    model.spec = replace(
        model.spec, provenance=f"shardshot training; begun with {init}", resize_rule="bilinear"
    )
    freeze(model, num_frozen(config))
    return model


def with_fitted_priors(model: SSD, table: pa.Table, config: TrainConfig) -> SSD:
    """The model with default boxes for the objects of the index, where `--priors` wants them so."""
    if config.priors != "fitted" and not (config.priors == "auto" and _adapts(config)):
        return model
    table = table.filter(pc.and_(pc.greater(table["width"], 0), pc.greater(table["height"], 0)))  # known  # type: ignore[attr-defined]
    boxes_G4 = _of_objects(table, "boxes").reshape(-1, 4)
    counts = pc.list_value_length(table["labels"]).to_numpy()  # type: ignore[attr-defined]
    images_N2 = np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1)
    sizes_G2 = (boxes_G4[:, 2:] - boxes_G4[:, :2]) / images_N2.repeat(counts, axis=0)
    learnt = ~_of_objects(table, "crowd") & (config.difficult | ~_of_objects(table, "difficult"))
    labels_G = _of_objects(table, "labels")[learnt]
    priors = fit_priors(model.spec.priors, torch.from_numpy(sizes_G2[learnt]), torch.from_numpy(labels_G))
    model = replace_priors(model, priors)
    freeze(model, num_frozen(config))
    return model


def num_frozen(config: TrainConfig) -> int:
    """Stages of the backbone that are not trained."""
    if config.freeze >= 0:
        return config.freeze
    return MOBILENET_FROZEN if _adapts(config) else 0


def balance(config: TrainConfig) -> Literal["matches", "objects"]:
    """What weighs the same in the loss."""
    if config.balance != "auto":
        return config.balance
    return "objects" if _adapts(config) else "matches"


def _adapts(config: TrainConfig) -> bool:
    """Whether a run adapts a small detector that is trained already: some defaults differ for it."""
    return config.architecture == "ssdlite300_mobilenet_v2" and config.init != "none"


def _new_model(config: TrainConfig, classes: Classes, generator: torch.Generator) -> SSD:
    priors = "voc" if config.priors == "voc" else "coco"
    model = build_model(config.architecture, num_classes=len(classes.names) + 1, priors=priors)
    model.spec = replace(model.spec, class_names=classes.names, label_ids=classes.ids)
    initialise(model, generator=generator)
    return model


def _vgg16_layers(init: str) -> Mapping[str, Tensor] | None:
    """The tensors of a file of VGG16 layers; None where `init` is something else."""
    if init.startswith("torchvision:") or not init.endswith((".safetensors", ".pth", ".pt")):
        return None
    data = read_weights(init)
    try:
        state = safetensors.torch.load(data)
    except SafetensorError:
        import io
        import pickle
        import struct

        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (
            *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, struct.error, ValueError, TypeError),
            *(LookupError, AttributeError, AssertionError, OverflowError),  # damaged bytes lead anywhere
        ):
            return None  # load_checkpoint says what it is
    if not isinstance(state, dict) or not {"features.28.weight", "28.weight"} & state.keys():
        return None
    return state


def _vgg16_std(layers: Mapping[str, Tensor], init: str) -> tuple[float, float, float]:
    """What the images were divided by on which VGG16 layers were trained: see `load_vgg16`.

    Raises:
        ConfigError: the layers don't tell.
    """
    classifier = layers.get("classifier.0.weight")
    # fc6 as a convolution is that of vgg16_reducedfc, one of NaN that of torchvision's IMAGENET1K_FEATURES.
    reduced = "31.weight" in layers or (classifier is not None and bool(classifier.isnan().any()))
    if reduced or _is_original_vgg16(layers):
        return (1.0, 1.0, 1.0)
    if classifier is None:
        raise ConfigError(
            f"--init {init}: VGG16 layers without a classifier don't tell whether images were divided by "
            "their spread; give torchvision's whole file, or vgg16_reducedfc"
        )
    return _TORCHVISION_STD


def _is_original_vgg16(layers: Mapping[str, Tensor]) -> bool:
    first = layers.get("features.0.weight", layers.get("0.weight"))
    if first is None or first.shape != (64, 3, 3, 3):
        return False
    return torch.allclose(first[:3, 2, 0, 0].float(), torch.tensor(_ORIGINAL_VGG16), rtol=0.01)


# ---- the run -----------------------------------------------------------------------------------------


def make_recipe(config: TrainConfig, *, device: str) -> Recipe:
    """How weights change, with `auto` resolved."""
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "float32"
    return Recipe(
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        milestones=config.milestones,
        warmup=config.warmup,
        ema_decay=config.ema,
        clip_norm=config.clip,
        balance=balance(config),
        negatives_without_positives=config.hard_negatives,
        precision=precision,
        micro_batches=config.accumulate,
    )


def sample_settings(config: TrainConfig, spec: ModelSpec, *, num_epochs: int) -> SampleSettings:
    """How images become samples for this model, in a run of so many epochs."""
    red, green, blue = (round(value) for value in spec.mean)
    augmentation = config.augmentation
    if augmentation == "auto":
        adapting = "crops" if num_epochs > MOST_UNCROPPED_EPOCHS else "light"
        augmentation = adapting if _adapts(config) else "ssd"
    return SampleSettings(
        height=spec.input_height,
        width=spec.input_width,
        resize_rule=spec.resize_rule,
        fill=(red, green, blue),
        augmentation=augmentation,
        flip=config.flip,
        train_difficult=config.difficult,
        seed=config.seed,
    )


def unchanging_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """The flags that a resumed run must share with the run that it goes on with."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flags.items()
        if name not in _UNCHANGING
    }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do."""

    config: TrainConfig
    classes: Classes
    spec: ModelSpec
    device: str
    num_parameters: int
    num_trained: int
    num_stages: int
    num_images: int
    num_empty: int
    num_val_images: int
    objects: dict[str, int]
    val_objects: dict[str, int]

    @property
    def num_epochs(self) -> int:
        """Times that every image is seen."""
        enough = math.ceil(MIN_STEPS * self.config.batch_size / self.num_images)
        short = 0 < self.config.max_minutes < LONG_MINUTES
        return self.config.epochs or max(EPOCHS if short else LONG_EPOCHS, enough)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return num_steps(
            epochs=self.num_epochs, num_samples=self.num_images, batch_size=self.config.batch_size
        )

    @property
    def samples(self) -> SampleSettings:
        """How images become samples."""
        return sample_settings(self.config, self.spec, num_epochs=self.num_epochs)

    def decided(self) -> dict[str, object]:
        """What defaults came to; a resumed run must share it, as it shares the flags."""
        return {
            "epochs": self.num_epochs,
            "augmentation": self.samples.augmentation,
            "frozen stages": num_frozen(self.config),
            "resize rule": self.spec.resize_rule,
            "score function": self.spec.score_function,
            "default boxes": self.spec.priors.name,
            "balance": balance(self.config),
        }

    def text(self) -> str:
        """The plan for a person."""
        config, spec = self.config, self.spec
        budget = f", at most {config.max_minutes:g} minutes" if config.max_minutes else ""
        rates = ", ".join(
            f"{p:.0%} {learning_rate(p, make_recipe(config, device=self.device)):.2g}" for p in _MARKS
        )
        augmentation = self.samples.augmentation
        flips = f", flip {config.flip}" if augmentation != "none" else ""
        width = max(len(name) for name in self.objects)
        return "\n".join(
            [
                f"{config.architecture}, begun with {spec.provenance.rsplit(' ', 1)[-1]}: "
                f"{self.num_parameters / 1e6:.1f} million weights, {self.num_trained / 1e6:.1f} million of "
                f"them trained ({num_frozen(config)} of {self.num_stages} backbone stages frozen)",
                f"{self.num_images:,} images to learn from ({self.num_empty:,} without objects), "
                f"{self.num_val_images:,} to validate on; objects of {len(self.objects)} classes:",
                *(
                    f"  {id_:>4} {name:<{width}} {self.objects[name]:>9,} {self.val_objects[name]:>9,}"
                    for id_, name in zip(self.classes.ids, self.classes.names, strict=True)
                ),
                f"{self.num_steps:,} steps of {config.batch_size} images = {self.num_epochs:,} epochs"
                f"{budget}; {config.workers} workers on {self.device}, {config.validations} validations",
                f"default boxes {spec.priors.name}; in the loss, {balance(config)} weigh the same",
                f"{config.optimizer}, augmentation {augmentation}{flips}; learning rate by progress: {rates}",
            ]
        )


_MARKS = (0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def make_plan(
    config: TrainConfig, classes: Classes, model: SSD, *, device: str, train: pa.Table, val: pa.Table
) -> Plan:
    """Put the plan together.

    Raises:
        ConfigError: nothing to measure.
    """
    if not len(val) or not sum(objects_by_class(val, classes).values()):
        raise ConfigError(f"--val {config.val}: none of its {len(val)} images has an object to measure")
    counts = pc.list_value_length(train["labels"]).to_numpy()  # type: ignore[attr-defined]
    parameters = list(model.parameters())
    return Plan(
        config=config,
        classes=classes,
        spec=model.spec,
        device=device,
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        num_stages=len(stages(model)),
        num_images=len(train),
        num_empty=int((counts == 0).sum()),
        num_val_images=len(val),
        objects=objects_by_class(train, classes),
        val_objects=objects_by_class(val, classes),
    )

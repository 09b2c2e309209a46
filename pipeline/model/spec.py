"""Everything that changes the result of a model apart from its weights: the header of a checkpoint."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import CheckpointError
from pipeline.model.anchors import PriorMap, PriorSet

VERSION = 1

ResizeRule = Literal["bilinear", "bilinear_antialias", "tf_legacy"]
ScoreFunction = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a checkpoint says about itself; with the weights, nothing else is needed to run it.

    Attributes:
        architecture: name of the network, one of `architectures()`.
        class_names: name of each class; index 0 is the class of logit column 1. No background.
        label_ids: id of each class in its data set (COCO: 1..90), what detections carry as label.
        input_height: height of the network's input in pixels.
        input_width: width of the network's input in pixels.
        resize_rule: how an image becomes that size, see `pipeline.data.images.resize_image`.
        mean: subtracted from the 0..255 values of red, green and blue.
        std: what the difference is divided by.
        channel_order: order of the input channels; always RGB, importers turn kernels of BGR networks.
        background_index: logit column of the background; always 0, importers move it there.
        priors: the default boxes and how they are clipped.
        coder_weights: factors of the deltas of centres and sizes; (10, 5) are the variances 0.1 and 0.2.
        max_log_size: limit of dw / 5 and dh / 5 at decoding. 40 is no limit in effect: it keeps areas finite.
        clip_before_nms: whether decoded boxes are clipped to the image before the suppression (torchvision,
            TensorFlow) or only in the output (Caffe).
        score_function: softmax over all columns, or a sigmoid for each class on its own.
        score_threshold: only scores above it count.
        pre_nms_top_k: best candidates of each class that go into the suppression; None: all.
        nms_iou_threshold: of two boxes of a class with more overlap than this, the better one stays.
        max_detections: detections kept per image, over all classes.
        provenance: where the weights come from and under which licence.
    """

    architecture: str
    class_names: tuple[str, ...]
    label_ids: tuple[int, ...]
    input_height: int
    input_width: int
    resize_rule: ResizeRule = "bilinear"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channel_order: Literal["rgb"] = "rgb"
    background_index: Literal[0] = 0
    priors: PriorSet
    coder_weights: tuple[float, float] = (10.0, 5.0)
    max_log_size: float = 40.0
    clip_before_nms: bool = False
    score_function: ScoreFunction = "softmax"
    score_threshold: float = 0.01
    pre_nms_top_k: int | None = 400
    nms_iou_threshold: float = 0.45
    max_detections: int = 200
    provenance: str = ""

    def __post_init__(self) -> None:
        if not self.class_names or len(self.class_names) != len(self.label_ids):
            raise CheckpointError(
                f"{len(self.class_names)} class names, {len(self.label_ids)} label ids; each class needs both"
            )
        if self.channel_order != "rgb" or self.background_index != 0:
            raise CheckpointError(
                "channel_order must be rgb and background_index 0; convert the weights, as the importers do"
            )

    @property
    def num_classes(self) -> int:
        """Logit columns: the classes and the background."""
        return len(self.class_names) + 1

    def to_json(self) -> str:
        """The header as JSON text, the same for equal specs."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """The spec from the text of `to_json`. Raises CheckpointError where it doesn't fit this version."""
        try:
            fields = json.loads(text)
            version = fields.pop("version")
            if version != VERSION:
                raise CheckpointError(f"checkpoint header of version {version}; this package reads {VERSION}")
            maps = tuple(PriorMap(**_tuples(item)) for item in fields["priors"].pop("maps"))
            priors = PriorSet(maps=maps, **fields.pop("priors"))
            return cls(priors=priors, **_tuples(fields))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"damaged checkpoint header: {error}") from error


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples, at every depth."""
    return {name: _tuple(value) for name, value in fields.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value

"""What the importers share: class lists by number of logit columns, and loading with one clear error."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.classes import COCO_IDS_80, COCO_NAMES_80, VOC_NAMES
from pipeline.model.spec import ModelSpec
from pipeline.model.ssd import SSD, load_weights

VOC_COLUMNS = len(VOC_NAMES) + 1
COCO_COLUMNS = len(COCO_NAMES_80) + 1


def class_list(columns: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and label ids of a network with so many logit columns, the background included.

    21 are the classes of VOC, 81 the 80 annotated ones of COCO in the order of their ids 1..90; the classes
    of any other network are numbered.
    """
    if columns == COCO_COLUMNS:
        return COCO_NAMES_80, COCO_IDS_80
    ids = tuple(range(1, columns))
    return (VOC_NAMES if columns == VOC_COLUMNS else tuple(map(str, ids))), ids


def num_columns(state: Mapping[str, Tensor]) -> int:
    """Logit columns of a network, from the heads of its largest map in our names.

    Raises:
        CheckpointError: it has no heads.
    """
    logits, boxes = state.get("heads.0.logits.bias"), state.get("heads.0.boxes.bias")
    if logits is None or boxes is None:
        raise CheckpointError("no biases of the heads of the largest map; is the file complete?")
    return logits.numel() // max(1, boxes.numel() // 4)


def load(spec: ModelSpec, state: Mapping[str, Tensor], *, release: str) -> SSD:
    """The model of `spec` with the weights `state`. Raises: CheckpointError where they don't fit."""
    model = SSD(spec)
    load_weights(model, state, source=release)
    return model

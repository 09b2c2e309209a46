import pickle
import traceback

import pytest
import safetensors.torch
import torch

from pipeline.errors import CheckpointError
from pipeline.model.importers.releases import import_release
from tests.model.importers import originals
from tests.model.importers.test_ssd_pytorch import make_state


@pytest.fixture(scope="module")
def state():
    return make_state(21, seed=8)


def test_a_release_is_recognised_in_a_safetensors_file(state):
    assert import_release(safetensors.torch.save(state), "x").spec.provenance == "amdegroot/ssd.pytorch"


def test_a_file_cut_off_is_refused(state):
    data = originals.saved(state)
    for end in (0, 1, 4, 100, len(data) // 2, len(data) - 30):
        with pytest.raises(CheckpointError, match=r"^weights.pth: neither safetensors"):
            import_release(data[:end], "weights.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_are_refused(state):
    data = originals.saved({name: tensor.flatten()[:2].clone() for name, tensor in state.items()})
    old = originals.saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    generator = torch.Generator().manual_seed(0)
    for whole in (data[:4000], old):
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[int(torch.randint(len(whole), (1,), generator=generator))] ^= 0xFF
            with pytest.raises(CheckpointError, match=r"^x: "):
                import_release(bytes(damaged), "x")


@pytest.mark.parametrize("contents", [[torch.ones(2)], torch.ones(2), None, 3])
def test_pickles_of_something_else_are_refused(contents):
    with pytest.raises(CheckpointError, match=r"^x: holds a \w+, not tensors by name"):
        import_release(originals.saved(contents), "x")


def test_a_dictionary_that_holds_itself_is_refused():
    contents: dict = {}
    contents["model"] = contents
    with pytest.raises(CheckpointError, match=r"unknown release \(first names: none\)"):
        import_release(originals.saved(contents), "x")


def test_unknown_names_are_refused_with_what_is_known():
    contents = {"state_dict": {"backbone.stem.weight": torch.ones(2), "epoch": 3}, "epoch": 3}
    with pytest.raises(
        CheckpointError, match=r"'backbone.stem.weight'\); known are .*ssd.pytorch.*caffemodel"
    ):
        import_release(originals.saved(contents), "x")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "data",
    [
        b"person\nbicycle\ncar\n",
        b"Photographs of dogs\n" * 9,
        b"\x89PNG\r\n\x1a\n" + bytes(90),
        originals.saved({"a": torch.ones(9)})[:300],
        pickle.dumps({"a": 1}, protocol=4),
    ],
)
def test_a_file_of_another_kind_is_one_line_with_the_formats_and_no_advice_of_torch(data):
    with pytest.raises(CheckpointError) as refused:
        import_release(data, "classes.txt")
    assert str(refused.value) == (
        "classes.txt: neither safetensors nor a pickle of tensors (.pth, .pt) nor a .caffemodel: damaged, or "
        "a file of another kind"
    )
    assert "Re-running" not in "".join(traceback.format_exception(refused.value))


def test_a_pickle_of_a_whole_model_is_refused_with_the_name_of_what_it_holds():
    with pytest.raises(CheckpointError) as refused:
        import_release(originals.saved({"model": torch.nn.Linear(2, 2)}), "x.pth")
    assert str(refused.value) == (
        "x.pth: a pickle that holds more than tensors, such as torch.nn.modules.linear.Linear; "
        "save the model's state_dict() alone"
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(90), b"hello", pickle.dumps({"a": 1}, protocol=4)]
)
def test_files_of_other_kinds_are_refused(data):
    with pytest.raises(CheckpointError, match=r"^photo.png: "):
        import_release(data, "photo.png")

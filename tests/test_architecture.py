"""The direction of imports, and which modules may know Ray and the stores."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lower layers never import higher ones; neighbours on one layer may, except data, model and results.
LAYERS = {
    "errors": 0,
    "schema": 1, "boxes": 1, "config": 1, "storage": 1, "runlog": 1,
    "data": 2, "model": 2, "results": 2,
    "runtime": 3,
    "inference": 4, "evaluation": 4, "gallery": 4,
    "training": 5,
}  # fmt: skip
STRANGERS = {"data", "model", "results"}
RAY = {
    "pipeline.runtime",
    "pipeline.evaluation.run",
    "pipeline.inference.monitor",
    "pipeline.inference.run",
    "pipeline.inference.sink",
    "pipeline.training.board",
    "pipeline.training.feed",
    "pipeline.training.run",
    "pipeline.training.worker",
}
STORES = {"pipeline.storage"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name, parsed."""
    found = {}
    for path in (ROOT / "pipeline").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of everything that a module imports, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(dotted: str) -> tuple[str, int] | None:
    """First part below `pipeline` and its layer."""
    parts = dotted.split(".")
    if parts[0] != "pipeline" or len(parts) < 2:
        return None
    return parts[1], LAYERS[parts[1]]


def test_imports_point_down():
    wrong = []
    for name, tree in modules().items():
        here = layer(name)
        for imported in imports(tree):
            there = layer(imported)
            if here is None or there is None or here[0] == there[0]:
                continue
            if there[1] > here[1] or (here[0] in STRANGERS and there[0] in STRANGERS):
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize(
    ("packages", "allowed"),
    [(("ray",), RAY), (("fsspec", "s3fs", "gcsfs", "pyarrow.fs"), STORES)],
    ids=["ray", "stores"],
)
def test_ray_and_stores_are_known_in_few_places(packages, allowed):
    wrong = [
        f"{name} imports {imported}"
        for name, tree in modules().items()
        for imported in imports(tree)
        if name not in allowed and any(imported == p or imported.startswith(f"{p}.") for p in packages)
    ]
    assert wrong == []


def test_importing_the_package_is_quick_and_loads_neither_ray_nor_torch():
    code = (
        "import sys, time; start = time.process_time(); import pipeline; "
        "print(time.process_time() - start); print({'ray', 'torch', 'pyarrow', 'pandas'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, loaded = out.split("\n")[:2]
    assert float(seconds) < 0.3
    assert loaded == "set()"

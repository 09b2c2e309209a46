"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from s3fs import S3FileSystem

settings.register_profile("any machine", deadline=None)  # how long an example takes is no behaviour
settings.load_profile("any machine")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Tests without Ray share out the cores, a thread each; clusters come one after another."""
    if config.option.markexpr != "not ray":
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see pipeline/runtime.py
    return min(os.cpu_count() or 1, 8)


def shared(path: str) -> Path:
    """The file or folder `path` of the shared test data; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs ../shared/{path}")
    return found


@pytest.fixture
def shared_data():
    """The function `shared` as a fixture."""
    return shared


@pytest.fixture(autouse=True)
def fresh_clients():
    """s3fs keeps one client per set of arguments, and every test has a server of its own."""
    S3FileSystem.clear_instance_cache()

"""Fixtures that all tests share."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


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

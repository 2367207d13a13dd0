"""What the tests of this paper share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cohobate.core.testing import golden

NAMES = ["main", "dec4", "dec3", "dec2", "dec1", "enc1", "enc2", "enc3", "enc4"]


@pytest.fixture
def names() -> list[str]:
    """Order of the outputs in the recorded files."""
    return NAMES


@pytest.fixture
def recorded():
    """Arrays recorded from the official code, by file name without ending."""

    def read(name: str) -> dict[str, Any]:
        return golden(Path(__file__).parent / "golden" / f"{name}.npz")

    return read

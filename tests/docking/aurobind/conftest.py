"""What the tests of this paper share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cohobate.core.testing import golden


@pytest.fixture
def recorded():
    """Recorded arrays by file name without ending."""

    def read(name: str) -> dict[str, Any]:
        return golden(Path(__file__).parent / "golden" / f"{name}.npz")

    return read

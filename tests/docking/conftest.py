"""What the tests of this package share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real files beside the checkout; tests that need it are skipped without."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "shared" / "data" / "docking").is_dir():
            return folder / "shared" / "data" / "docking"
    pytest.skip("no real files beside the checkout")

"""What the tests of this paper share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cohobate.core import catalog, runs
from cohobate.core.testing import golden

TINY = [
    "--model.single=8", "--model.pair=4", "--model.width=8", "--model.diffusion_blocks=1",
    "--model.heads=2", "--model.sample_steps=2", "--data.max_residues=8",
    "--data.epoch_samples=6", "--data.batch_size=3", "--data.unlabelled=2",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1", "--model.keep.samples=1", "--model.keep.steps=2",
]  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """All five stages on the embedded complexes, tiny."""
    out = tmp_path_factory.mktemp("runs") / "aurobind"
    more = ["--model.keep.override_gate=true", "--model.keep.min_keep=1"]
    runs.fit(catalog.find("docking/aurobind"), [*TINY, *more], out=out)
    return out


@pytest.fixture
def recorded():
    """Recorded arrays by file name without ending."""

    def read(name: str) -> dict[str, Any]:
        return golden(Path(__file__).parent / "golden" / f"{name}.npz")

    return read

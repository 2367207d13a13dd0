"""What the tests of this paper share."""

from __future__ import annotations

from collections.abc import Callable
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
def fit() -> Callable[..., None]:
    """Train the stages up to the last one named, tiny, in a folder."""

    def train(out: Path, *options: str, last: str = "5-student") -> None:
        recipe = catalog.find("docking/aurobind")
        more = ["--model.keep.override_gate=true", "--model.keep.min_keep=1"]
        stages = tuple(s for s in recipe.stages if s.path.stem <= last)
        if len(stages) == 1:  # a single stage has the folder itself
            out = out / last
        runs.fit(
            catalog.Recipe(recipe.paper, recipe.name, stages), [*TINY, *more, *options], out=out
        )

    return train


@pytest.fixture(scope="session")
def run(fit, tmp_path_factory) -> Path:
    """All five stages on the embedded complexes, tiny."""
    out = tmp_path_factory.mktemp("runs") / "aurobind"
    fit(out)
    return out


@pytest.fixture
def recorded():
    """Recorded arrays by file name without ending."""

    def read(name: str) -> dict[str, Any]:
        return golden(Path(__file__).parent / "golden" / f"{name}.npz")

    return read

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cohobate.core import catalog, runs

TINY = [
    "--data.rows=[512,256,256]",
    "--data.length=8",
    "--data.batch_size=64",
    "--model.common.head=[8]",
    "--trainer.enable_progress_bar=false",
]

Fit = Callable[..., Path]


@pytest.fixture(scope="session")
def fit() -> Fit:
    """Train the default recipe on a few generated rows into a folder: ``fit(out, *options)``."""

    def run(out: Path, *options: str, arm: str | None = None, recipe: str = "ctr/suan") -> Path:
        found = catalog.find(recipe)
        overlay = found.paper.arms[arm] if arm else None
        return runs.fit(found, [*TINY, *options], arm=overlay, out=out)[-1].path

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, fit: Fit) -> Path:
    return fit(tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture
def killed() -> Callable[..., int]:
    """Run a function in a forked process that is killed at an optimiser step; its exit code."""
    from cohobate.ctr.suan import DistilSUAN

    def run(function: Callable[[], object], step: int) -> int:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            end = DistilSUAN.on_train_batch_end

            def die(self: DistilSUAN, *args: object) -> None:
                end(self, *args)  # type: ignore[arg-type]
                if self.trainer.global_step == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            DistilSUAN.on_train_batch_end = die  # type: ignore[method-assign]
            function()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run

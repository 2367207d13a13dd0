"""A made-up package, ``toy``, that uses the core as a real one does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from cohobate.core import catalog, runs

TOY = Path(__file__).parent / "toy_package"
sys.path.append(str(TOY))
os.environ["PYTHONPATH"] = os.pathsep.join(
    path for path in (str(TOY), os.environ.get("PYTHONPATH")) if path
)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run folders go to a temporary directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fit() -> Callable[..., Path]:
    """Train the toy paper quietly; returns the run folder."""

    def run(out: Path, *options: str, recipe: str = "toy/tiny") -> Path:
        words = ["--trainer.enable_progress_bar=false", *options]
        return runs.fit(catalog.find(recipe), words, out=out)[-1].path

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of the toy paper."""
    out = tmp_path_factory.mktemp("trained") / "run"
    runs.fit(catalog.find("toy/tiny"), ["--trainer.enable_progress_bar=false"], out=out)
    return out


@pytest.fixture
def in_child() -> Callable[..., int]:
    """Run a function in a forked process; returns its exit code (negative: killed by a signal)."""

    def run(function: Callable[..., object], *args: object) -> int:
        process = get_context("fork").Process(target=function, args=args)
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return run

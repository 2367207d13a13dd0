"""What README, CONTRIBUTING and the guides tell the reader to run does run."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from cohobate.core import cli
from cohobate.core.testing import run_command

ROOT = Path(__file__).parents[2]
PACKAGES = [path.parent / "README.md" for path in ROOT.glob("packages/*/pyproject.toml")]
OUTSIDE = sorted([*ROOT.glob("*.md"), ROOT / "shared/README.md", *PACKAGES])
PAGES = [*OUTSIDE, *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:srun |.*--no-python )?cohobate(?:-\w+)? ([\w-]+)", re.MULTILINE)


def blocks(page: Path, language: str) -> dict[str, str]:
    """The fenced blocks of one language by title; those without a title are one text."""
    found: dict[str, str] = {}
    for kind, title, text in FENCE.findall(page.read_text()):
        if kind == language:
            found[title] = found.get(title, "") + text
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if "" in blocks(p, "python")], ids=name)
def test_the_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        exec(compile(blocks(page, "python")[""], page.name, "exec"), {"__name__": "page"})


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The paper of CONTRIBUTING, written to files as its titles say, on the Python path."""
    page = ROOT / "CONTRIBUTING.md"
    for title, text in {**blocks(page, "python"), **blocks(page, "yaml")}.items():
        if title:
            path = tmp_path / "cohobate" / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for module in [m for m in sys.modules if m.startswith("cohobate.example")]:
        del sys.modules[module]


def test_the_paper_of_contributing_is_a_paper(example: Path) -> None:
    quiet = "--trainer.enable_progress_bar=false"
    for arm in ([], ["--config", "cohobate/example/mean_teacher/recipe/baseline.yaml"]):
        out = example / f"run{len(arm)}"
        done = run_command("fit", "example/mean-teacher", "--out", out, quiet, *arm)
        assert done.code == 0, done.err
        assert (out / "student.safetensors").exists()
        assert ("train/consistency" in (out / "metrics.csv").read_text()) == (not arm)
    assert "mean-teacher" in run_command("list").out
    losses = importlib.import_module("cohobate.example.mean_teacher.losses")
    assert doctest.testmod(losses) == (0, 2)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    used = set(COMMAND.findall(blocks(page, "bash").get("", "")))
    assert used <= set(cli.COMMANDS)


@pytest.mark.parametrize("page", OUTSIDE, ids=name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Those inside the site are checked when it is built."""
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", FENCE.sub("", page.read_text()))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing

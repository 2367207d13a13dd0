"""What README, CONTRIBUTING and the guides tell the reader to run does run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cohobate.core import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "shared/README.md"]
    + [path.parent / "README.md" for path in ROOT.glob("packages/*/pyproject.toml")]
)
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(title, text) of the fenced blocks of one language."""
    return [(t, text) for kind, t, text in FENCE.findall(page.read_text()) if kind == language]


def python(*words: str, cwd: Path, path: Path | None = None) -> str:
    """Run Python as a reader would; its output."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not title for title, _ in blocks(page, "python"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    text = "\n".join(text for title, text in blocks(page, "python") if not title)
    (tmp_path / "page.py").write_text(text)
    python("page.py", cwd=tmp_path)


def test_the_paper_of_contributing_trains(tmp_path: Path) -> None:
    page = ROOT / "CONTRIBUTING.md"
    for title, text in [*blocks(page, "python"), *blocks(page, "yaml")]:
        if title:
            path = tmp_path / "cohobate" / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    command = ("-m", "cohobate.core", "fit", "example/mean-teacher", "--out", "run")
    python(*command, cwd=tmp_path, path=tmp_path)
    assert (tmp_path / "run/student.safetensors").exists()
    python(
        "-m", "doctest", "-o", "ELLIPSIS", "cohobate/example/mean_teacher/losses.py",
        cwd=tmp_path, path=tmp_path,
    )  # fmt: skip


def test_ci_calls_the_test_command_of_the_readme() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    shell = [text.strip() for _, text in blocks(ROOT / "README.md", "bash")]
    assert " && ".join(commands) in shell


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page: Path) -> None:
    shell = "\n".join(text for _, text in blocks(page, "bash"))
    used = set(re.findall(r"^(?:srun |.*--no-python )?cohobate(?:-\w+)? ([\w-]+)", shell, re.M))
    assert used <= set(cli.COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing

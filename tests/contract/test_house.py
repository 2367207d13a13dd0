"""The rules of the house, read from the sources: nothing is imported."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("shared/src/**/*.py")) + sorted(ROOT.glob("packages/*/src/**/*.py"))
PAPERS = sorted(path.parent for path in ROOT.glob("packages/*/src/cohobate/*/*/paper.yaml"))
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()


def module(path: Path) -> list[str]:
    """``cohobate.lidar.slidr.losses`` as a list of its parts."""
    return list(path.with_suffix("").parts[path.parts.index("cohobate") :])


def imports(path: Path) -> Iterator[list[str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: import by full name"
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


def papers_of(domain: str) -> set[str]:
    return {folder.name for folder in PAPERS if folder.parent.name == domain}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    own = module(path)
    domain = own[1]
    paper = own[2] if len(own) > 2 and own[2] in papers_of(domain) else None
    for target in imports(path):
        if target[0] != "cohobate" or len(target) < 2 or target[1] == "core":
            continue
        assert domain != "core", f"the core knows no domain, it imports {'.'.join(target)}"
        assert target[1] == domain, f"a domain imports another: {'.'.join(target)}"
        own_command = own[2:] == ["commands"]  # stands above the papers, as the core's command does
        if len(target) > 2 and target[2] in papers_of(domain) and not own_command:
            assert target[2] == paper, f"only a paper imports itself: {'.'.join(target)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500, "split the file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("forward", "_row_kernel"):
            body = node.end_lineno - node.body[0].lineno + 1
            if ast.get_docstring(node) is not None:
                body = node.end_lineno - node.body[0].end_lineno
            assert body <= 60, f"{node.name} has {body} lines"


def test_the_namespace_has_no_init() -> None:
    assert [p for p in SOURCES if p.name == "__init__.py" and p.parent.name == "cohobate"] == []


@pytest.mark.parametrize("folder", [p.parent for p in ROOT.glob("**/src/cohobate/*/py.typed")])
def test_every_package_is_typed_and_depends_on_the_core_by_range(folder: Path) -> None:
    project = folder.parents[2] / "pyproject.toml"
    if folder.name != "core":
        assert re.search(r'"cohobate-core>=[\d.]+,<[\d.]+"', project.read_text())


@pytest.mark.parametrize("folder", PAPERS, ids=lambda p: p.name)
def test_a_paper_is_complete(folder: Path) -> None:
    domain, slug = folder.parent.name, folder.name.replace("_", "-")
    about = yaml.safe_load((folder / "paper.yaml").read_text())
    wanted = {"title", "authors", "year", "arxiv", "code", "summary", "claim", "metric", "baseline"}
    assert wanted | {"stages", "differences"} <= set(about), wanted - set(about)
    recipes = {path.name for path in (folder / "recipe").iterdir()}
    assert "baseline.yaml" in recipes
    assert "fit.yaml" in recipes or any(name.startswith("1-") for name in recipes)
    for name in ("__init__.py", "losses.py", "method.py"):
        assert (folder / name).exists(), name
    assert (ROOT / "tests" / domain / folder.name).is_dir()
    assert (ROOT / "docs" / "papers" / f"{slug}.md").exists()
    assert list((ROOT / "docs" / "results").glob(f"{domain}-{slug}*.json")), "no measured result"


@pytest.mark.parametrize("folder", PAPERS, ids=lambda p: p.name)
def test_a_recipe_opens_with_what_it_is(folder: Path) -> None:
    for path in folder.glob("recipe/**/*.yaml"):
        assert path.read_text().startswith("#"), path


@pytest.mark.parametrize("folder", PAPERS, ids=lambda p: p.name)
def test_an_arm_goes_without_stages_that_there_are(folder: Path) -> None:
    stages = {path.stem.partition("-")[2] for path in folder.glob("recipe/[0-9]*-*.yaml")}
    for path in [folder / "recipe/baseline.yaml", *folder.glob("recipe/arms/*.yaml")]:
        assert set(yaml.safe_load(path.read_text()).get("without", [])) <= stages, path


def test_nothing_from_elsewhere_is_unpickled() -> None:
    dangerous = re.compile(
        r"weights_only=False|pickle\.load|allow_pickle=True|yaml\.load\((?!.*_L)"
    )
    found = [str(p) for p in SOURCES if dangerous.search(p.read_text())]
    assert found == []


def test_no_file_names_a_machine() -> None:
    paths = re.compile(r"(?<![\w./-])/(?:work|root|opt|home)/\w")
    hosts = re.compile(r"https?://[^\s)\"'>]*(?:pypi|npmjs|mirror|proxy)")
    texts = {".py", ".md", ".toml", ".yaml", ".yml", ".cff", ".json", ".svg", ""}
    found = []
    for name in TRACKED:
        path = ROOT / name
        if path.suffix in texts and path.is_file() and path != Path(__file__):
            text = path.read_text(errors="replace")
            found += [f"{name}: {m.group()}" for r in (paths, hosts) if (m := r.search(text))]
    assert found == []


def test_ci_runs_the_readmes_test_command() -> None:
    words = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in ("-m venv .venv", '"nox[uv]"', ".venv/bin/nox"):
        assert command in words
        assert command in readme

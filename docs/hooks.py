"""Pages and navigation of the site follow from the tree: a new package or paper needs no edit.

MkDocs calls `on_config` and `on_files` (``hooks`` in ``mkdocs.yml``), mkdocstrings `House`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FIRST = ["index.md", "quickstart.md", "how-it-works.md"]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the navigation: guides, papers by package, API by package."""
    guides = sorted(path.name for path in DOCS.glob("*.md"))
    pages: list[Any] = [*FIRST, *(page for page in guides if page not in FIRST)]
    config.nav = [*pages, *_section("Papers", _papers()), *_section("API", _api())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every module and subpackage that stands directly in a package."""
    for package, units in _api().items():
        for unit in units:
            for name, page in unit.items():
                content = f"::: cohobate.{package}.{name}\n"
                files.append(File.generated(config, page, content=content))
    return files


class House(griffe.Extension):
    """What griffe must know about these docstrings and packages."""

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Show what a package re-exports where it is defined, once."""
        if mod.is_init_module:
            mod.exports = None

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Show the section ``Example`` as code; griffe knows it as ``Examples``."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _section(title: str, parts: dict[str, list[Any]]) -> list[Any]:
    return [{title: [{name: pages} for name, pages in parts.items()]}] if parts else []


def _papers() -> dict[str, list[str]]:
    """Package → pages of its papers."""
    found: dict[str, list[str]] = {}
    for page in sorted(DOCS.glob("papers/*.md")):
        folder = page.stem.replace("-", "_")
        homes = ROOT.glob(f"packages/*/src/cohobate/*/{folder}/paper.yaml")
        package = next((path.parts[-3] for path in homes), "other")
        found.setdefault(package, []).append(f"papers/{page.name}")
    return dict(sorted(found.items()))


def _api() -> dict[str, list[Any]]:
    """Package → its modules and subpackages by name, each with its page."""
    found = {}
    packages = [ROOT / "shared/src/cohobate/core", *sorted(ROOT.glob("packages/*/src/cohobate/*"))]
    for package in packages:
        modules = [*package.glob("[!_]*.py"), *(p.parent for p in package.glob("*/__init__.py"))]
        units = sorted(path.stem for path in modules)
        if units:
            found[package.name] = [{unit: f"api/{package.name}/{unit}.md"} for unit in units]
    return found

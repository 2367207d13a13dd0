"""What is installed: every package's papers and recipes, read from files without importing them.

A paper is a folder ``cohobate/<domain>/<paper>/`` with a ``paper.yaml``. Listing needs neither
torch nor the paper's own modules, so ``cohobate list`` answers at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from cohobate.core.errors import InputError

_STAGE = re.compile(r"^(\d+)-(.+)$")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        path: The file.

    Returns:
        Its top-level mapping; empty for an empty file.

    Raises:
        InputError: The file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


@dataclass(frozen=True)
class Stage:
    """One training run of a recipe: a complete LightningCLI config."""

    name: str
    path: Path

    @property
    def shared(self) -> bool:
        """Whether it is the same for every arm of a comparison (``shared: true``)."""
        return bool(read_yaml(self.path).get("shared", False))


@dataclass(frozen=True)
class Paper:
    """One installed paper, known by its files alone.

    Attributes:
        domain: The package, ``medseg``.
        slug: The paper's name on the command line, ``dsd``.
        folder: Where ``paper.yaml`` lies.
    """

    domain: str
    slug: str
    folder: Path

    @property
    def name(self) -> str:
        """``<domain>/<slug>``."""
        return f"{self.domain}/{self.slug}"

    @cached_property
    def about(self) -> dict[str, Any]:
        """The content of ``paper.yaml``."""
        return read_yaml(self.folder / "paper.yaml")

    @cached_property
    def recipes(self) -> dict[str, list[Stage]]:
        """Recipe name → its stages in order; ``fit`` is the default on the embedded data."""
        root = self.folder / "recipe"
        found: dict[str, list[Stage]] = {}
        default = _numbered(root)
        if default:
            found["fit"] = default
        for path in sorted(root.glob("*.yaml")):
            if path.stem != "baseline" and not _STAGE.match(path.stem):
                found[path.stem] = [Stage(path.stem, path)]
        for folder in sorted(p for p in root.glob("*/") if p.name != "arms"):
            if stages := _numbered(folder):
                found[folder.name] = stages
        return found

    @cached_property
    def arms(self) -> dict[str, Path]:
        """Overlays that ``compare`` knows: ``baseline`` first, then those of ``recipe/arms``."""
        root = self.folder / "recipe"
        paths = [root / "baseline.yaml", *sorted((root / "arms").glob("*.yaml"))]
        return {path.stem: path for path in paths if path.exists()}


@dataclass(frozen=True)
class Recipe:
    """A paper's recipe as typed: ``medseg/dsd`` or ``medseg/dsd/hippocampus``."""

    paper: Paper
    name: str
    stages: tuple[Stage, ...]

    @property
    def full_name(self) -> str:
        """The name that finds this recipe again."""
        return self.paper.name if self.name == "fit" else f"{self.paper.name}/{self.name}"

    @property
    def shared(self) -> Recipe | None:
        """Its leading stages that are the same for every arm; None without such."""
        first = tuple(takewhile(lambda stage: stage.shared, self.stages))
        return replace(self, stages=first) if first else None


def papers(domain: str | None = None) -> dict[str, Paper]:
    """All installed papers by name, in order.

    Args:
        domain: Only this package's papers.
    """
    import cohobate  # the namespace: its path lists the source tree of every installed package

    found: dict[str, Paper] = {}
    for root in map(Path, cohobate.__path__):
        for path in root.glob("*/*/paper.yaml"):
            paper = Paper(path.parts[-3], path.parts[-2].replace("_", "-"), path.parent)
            if domain in (None, paper.domain):
                found.setdefault(paper.name, paper)  # the first wins, as for an import
    return dict(sorted(found.items()))


def find(name: str, domain: str | None = None) -> Recipe:
    """Find a recipe by ``<domain>/<paper>[/<recipe>]``.

    The domain may be left out where only one package is meant. A stage's own name also works
    (``docking/aurobind/screen``): it runs that stage alone.

    Args:
        name: The name as typed; underscores and dashes are the same.
        domain: The package the command is restricted to.

    Raises:
        InputError: There is no such paper or recipe; close names are suggested.
    """
    known = papers(domain)
    parts = name.replace("_", "-").strip("/").split("/")
    if domain is not None and parts[0] != domain:
        parts.insert(0, domain)
    paper = known.get("/".join(parts[:2]))
    if paper is None:
        raise InputError(f"unknown recipe '{name}'{_suggest('/'.join(parts[:2]), known)}")
    wanted = "/".join(parts[2:]) or "fit"
    by_name = {key.replace("_", "-"): (key, stages) for key, stages in paper.recipes.items()}
    for stages in list(paper.recipes.values()):
        for stage in stages:
            by_name.setdefault(stage.name.replace("_", "-"), (stage.name, [stage]))
    if wanted not in by_name:
        raise InputError(f"unknown recipe '{name}'{_suggest(wanted, by_name, f'{paper.name}/')}")
    key, stages = by_name[wanted]
    return Recipe(paper, key, tuple(stages))


def overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Lay one config over another: mappings merge, everything else is replaced.

    A change of ``class_path`` drops the ``init_args`` below it, which belonged to another class.

    Example:
        >>> overlay({"model": {"alpha": 1, "beta": 2}}, {"model": {"alpha": 0}})
        {'model': {'alpha': 0, 'beta': 2}}
    """
    result = dict(base)
    changed = "class_path" in top and top["class_path"] != base.get("class_path")
    if changed:
        result.pop("init_args", None)
    for key, value in top.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = overlay(old, value) if both else value  # type: ignore[arg-type]
    return result


def stage_name(stem: str) -> str:
    """A stage's name without its number and with dashes, as names are compared.

    Example:
        >>> stage_name("4-classify_again")
        'classify-again'
    """
    match = _STAGE.match(stem)
    return (match[2] if match else stem).replace("_", "-")


def suggestion(word: str, known: Any) -> str:
    """``", did you mean 'x'?"`` or the empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""


def _suggest(word: str, known: Any, prefix: str = "") -> str:
    if hint := suggestion(word, known):
        return hint.replace("'", f"'{prefix}", 1)
    names = ", ".join(known)
    return f"; there is: {names}" if names else "; no package with papers is installed"


def _numbered(folder: Path) -> list[Stage]:
    matches = [
        (match, path) for path in folder.glob("*.yaml") if (match := _STAGE.match(path.stem))
    ]
    return [Stage(m[2], path) for m, path in sorted(matches, key=lambda pair: int(pair[0][1]))]

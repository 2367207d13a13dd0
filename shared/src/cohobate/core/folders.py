"""Run folders: what lies in one, which checkpoint stands for it, whether it may go on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohobate.core import catalog
from cohobate.core.catalog import Stage
from cohobate.core.errors import InputError
from cohobate.core.io import write_json
from cohobate.core.recipes import Config, read_config


@dataclass(frozen=True)
class RunFolder:
    """The files of one training run.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation metric."""
        return self.path / "best.ckpt"

    @property
    def last(self) -> Path:
        """The checkpoint a stopped run goes on from."""
        return self.path / "last.ckpt"

    @property
    def student(self) -> Path:
        """The student's weights alone."""
        return self.path / "student.safetensors"

    def chosen(self, evaluate: str | None = None) -> Path | None:
        """The checkpoint that is tested and used; None where there is none yet.

        Args:
            evaluate: ``best`` or ``last``; default: as ``config.yaml`` says. Where the run has no
                such checkpoint, it is the other.
        """
        if evaluate is None and self.config.exists():
            evaluate = read_config(self.config).get("evaluate")
        order = (self.last, self.best) if evaluate == "last" else (self.best, self.last)
        return next((file for file in order if file.exists()), None)

    @property
    def info(self) -> dict[str, Any]:
        """The content of ``run.json``; empty when there is none."""
        path = self.path / "run.json"
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from None
        return dict(content)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.info.get("status") == "finished"

    def note(self, **items: Any) -> None:
        """Add to ``run.json``."""
        write_json(self.path / "run.json", {**self.info, **items})


def stage_folders(recipe: catalog.Recipe, folder: Path) -> list[RunFolder]:
    """The run folder of each stage of a recipe, in order.

    A single stage has the folder itself, except where the folder holds its recipe's other stages.

    Args:
        recipe: The recipe.
        folder: Where it is trained.
    """
    if len(recipe.stages) == 1:
        others = recipe.stages[0].path.parent.glob("[0-9]*-*.yaml")
        staged = any(RunFolder(folder / path.stem).config.exists() for path in others)
        if not staged or RunFolder(folder).config.exists():
            return [RunFolder(folder)]
    return [RunFolder(folder / stage.path.stem) for stage in recipe.stages]


def read_run_config(folder: Path) -> Config:
    """The config of a run folder.

    Raises:
        InputError: The folder is no run folder.
    """
    path = RunFolder(folder).config
    if not path.exists():
        raise InputError(f"{folder}: not a run folder (it has no config.yaml)")
    return read_config(path)


def checkpoint_file(path: Path, *, paper: str | None = None) -> Path:
    """The checkpoint meant by a run folder (the one its run was tested with) or by a file.

    Of a run with several stages the last stage that has one is taken.

    Args:
        path: A run folder or a checkpoint.
        paper: Name of the paper that the run must be of; a file without ``run.json`` may be of any.

    Raises:
        InputError: There is none, or it is of another paper.
    """
    path = Path(path)
    if path.is_file():
        file = path
    elif path.is_dir():
        stages = sorted(p.parent for p in path.glob("*/config.yaml"))
        found = (RunFolder(folder).chosen() for folder in [path, *reversed(stages)])
        file = next(filter(None, found), path)
        if file is path:
            raise InputError(f"{path}: no best.ckpt or last.ckpt in this folder")
    else:
        raise InputError(f"{path}: no such run folder or checkpoint")
    if paper is not None:
        check_paper(RunFolder(file.parent), paper)
    return file


def stage_source(recipe: catalog.Recipe, stage: Stage, source: str, folder: Path) -> Path:
    """Where the weights are that a stage starts from.

    An earlier stage is looked for by its name, with or without its number, in the folder, beside
    it, and in the run of the whole recipe (``runs/x``, or ``runs/x-warm``, for ``runs/x-distil``).

    Args:
        recipe: The recipe that is trained.
        stage: Its stage.
        source: Name of an earlier stage, a run folder or a checkpoint.
        folder: Where the recipe is trained.

    Raises:
        InputError: There is none.
    """
    name, beside = catalog.stage_name(source), folder.absolute().parent
    alone = folder.absolute().name.removesuffix(f"-{stage.name}")
    setting = stage.path.parent.name  # recipe/<setting>/1-warm.yaml
    whole = alone if setting == "recipe" else f"{alone}-{setting}"
    places = [p for p in (folder, beside, beside / whole) if p.is_dir()]
    found = [p for place in places for p in sorted(place.iterdir())]
    named = [p for p in found if catalog.stage_name(p.name) == name]
    for path in (*named, beside / f"{alone}-{source}"):
        if RunFolder(path).info.get("paper") == recipe.paper.name:
            return path
    if not Path(source).exists():
        raise InputError(
            f"init_from: no run of stage '{source}' in {folder} or beside it, and no such file; "
            "--init_from takes a run folder or a checkpoint"
        )
    return Path(source)


def check_same(old: Config, new: Config, run: RunFolder) -> None:
    """Refuse to continue a run under another model, data, seed or start.

    Raises:
        InputError: The first option that differs.
    """
    for key in ("model", "data", "seed_everything", "init_from"):
        if (difference := _difference(old.get(key), new.get(key), key)) is not None:
            name, before, after = difference
            raise InputError(
                f"{run.path}: this run was started with {name.replace('.init_args', '')} = "
                f"{before}, not {after}; choose another --out"
            )


def check_paper(run: RunFolder, paper: str, stage: str | None = None) -> None:
    """Refuse a run of another paper or stage; one without ``run.json`` may be of any.

    Raises:
        InputError: It is.
    """
    info = run.info
    made, part = info.get("paper", paper), info.get("stage")
    if made != paper:
        raise InputError(f"{run.path}: a run of {made}, not of {paper}")
    if None not in (stage, part) and part != stage:
        raise InputError(
            f"{run.path}: a run of {paper}, stage {part}, not {stage}; choose another --out"
        )


def same_length(old: Config, new: Config) -> bool:
    """Whether two configs train equally long."""
    keys = ("max_epochs", "max_steps", "max_time")
    return all(old.get("trainer", {}).get(k) == new.get("trainer", {}).get(k) for k in keys)


def _difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            if found := _difference(old.get(name), new.get(name), f"{key}.{name}"):
                return found
        return None
    return None if old == new else (key, old, new)

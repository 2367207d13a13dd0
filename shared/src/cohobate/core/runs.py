"""Run folders: training a recipe into one, resuming it, and reading it back."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save
from torch import Tensor

from cohobate.core import catalog
from cohobate.core.catalog import Stage
from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights, save_atomic, write_json
from cohobate.core.module import DistillModule
from cohobate.core.recipes import Config, Recipe, build_model, read_config, take_config_files
from cohobate.core.training.checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    ExactResume,
    LastCheckpoint,
)
from cohobate.core.training.logger import MetricsCsv
from cohobate.core.training.measure import StepTimer, peak_memory

log = logging.getLogger("cohobate")


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


def fit(
    recipe: catalog.Recipe,
    args: Sequence[str] = (),
    *,
    arm: Path | None = None,
    out: Path | None = None,
) -> list[RunFolder]:
    """Train a recipe, all its stages in order; what is finished is skipped, what stopped goes on.

    Args:
        recipe: The recipe.
        args: Options as on the command line.
        arm: An overlay for every stage that is not ``shared``, such as ``baseline.yaml``.
        out: The run folder, when ``args`` do not name it; default ``runs/<paper>[-<recipe>]``.

    Returns:
        The run folder of each stage.

    Raises:
        InputError: Bad options or data.
    """
    _quiet()
    rest, folder = _take_out(list(args))
    folder = folder or out or Path("runs") / recipe.full_name.split("/", 1)[1].replace("/", "-")
    folders: dict[str, RunFolder] = {}
    for stage, run in zip(recipe.stages, stage_folders(recipe, folder), strict=True):
        _fit_stage(recipe, stage, rest, arm, run, folders, folder)
        folders[stage.name] = run
    return list(folders.values())


def stage_folders(recipe: catalog.Recipe, folder: Path) -> list[RunFolder]:
    """The run folder of each stage of a recipe, in order; a single stage has the folder itself.

    Args:
        recipe: The recipe.
        folder: Where it is trained.
    """
    if len(recipe.stages) == 1:
        return [RunFolder(folder)]
    return [RunFolder(folder / stage.path.stem) for stage in recipe.stages]


def validate(checkpoint: Path, args: Sequence[str] = ()) -> dict[str, float]:
    """Evaluate a run's weights on its validation and test data.

    Args:
        checkpoint: A run folder, or a checkpoint in one.
        args: Options that change the run's config, such as ``--data.root``.

    Returns:
        All metrics by name.

    Raises:
        InputError: There is no such run, or its data cannot be read.
    """
    _quiet()
    file = checkpoint_file(checkpoint)
    rest, config = take_config_files(args, read_run_config(file.parent))
    built = Recipe(config, rest, lambda _: {"logger": [], "enable_checkpointing": False})
    model = _model(built)
    model.load_state_dict(fitting_weights(model, load_weights(file), file))
    results: dict[str, float] = {}
    for run in (built.trainer.validate, built.trainer.test):
        results |= _evaluate(run, model, built.datamodule)
    return results


def read_run_config(folder: Path) -> Config:
    """The config of a run folder.

    Raises:
        InputError: The folder is no run folder.
    """
    path = RunFolder(folder).config
    if not path.exists():
        raise InputError(f"{folder}: not a run folder (it has no config.yaml)")
    return read_config(path)


def checkpoint_file(path: Path) -> Path:
    """The checkpoint meant by a run folder (its best, else its last) or by a file.

    Of a run with several stages the last stage that has one is taken.

    Raises:
        InputError: There is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder or checkpoint")
    stages = sorted(p.parent for p in path.glob("*/config.yaml"))
    for folder in [path, *reversed(stages)]:
        for file in (RunFolder(folder).best, RunFolder(folder).last):
            if file.exists():
                return file
    raise InputError(f"{path}: no best.ckpt or last.ckpt in this folder")


def load_run(checkpoint: Path) -> DistillModule:
    """The trained model of a run, without its data.

    Args:
        checkpoint: A run folder, or a checkpoint in one.

    Raises:
        InputError: There is none, or its weights do not fit its config.
    """
    file = checkpoint_file(checkpoint)
    model = build_model(read_run_config(file.parent))
    weights = load_weights(file)
    if file.suffix == ".safetensors":  # the student alone
        model.student.load_state_dict(fitting_weights(model.student, weights, file))
    else:
        model.load_state_dict(fitting_weights(model, weights, file))
    return model.eval()


def make_run(folder: Path, weights: Mapping[str, Tensor], model: Config, data: Config) -> None:
    """Make a run folder of weights from elsewhere, for predict, validate and export.

    Args:
        folder: The run folder.
        weights: The module's ``state_dict``.
        model: Its ``class_path`` and ``init_args``.
        data: Those of the data module.

    Raises:
        InputError: There is a run already.
    """
    run = RunFolder(folder)
    if run.config.exists():
        raise InputError(f"{folder}: there is a run already")
    with save_atomic(run.best) as temporary:
        torch.save({"state_dict": dict(weights)}, temporary)
    with save_atomic(run.config) as temporary:
        temporary.write_text(yaml.safe_dump({"model": model, "data": data}, sort_keys=False))


def save_student(model: DistillModule, path: Path) -> None:
    """Write the student's weights alone as safetensors.

    Args:
        model: The trained module.
        path: The file.
    """
    weights = {
        k: v.detach().cpu().contiguous().clone() for k, v in model.student.state_dict().items()
    }
    with save_atomic(path) as temporary:
        temporary.write_bytes(save(weights, metadata={"format": "pt"}))


def _fit_stage(
    recipe: catalog.Recipe,
    stage: Stage,
    args: list[str],
    arm: Path | None,
    run: RunFolder,
    earlier: dict[str, RunFolder],
    root: Path,
) -> None:
    config = read_config(stage.path)
    source = config.get("init_from")
    if arm is not None and not stage.shared:
        config = catalog.overlay(config, read_config(arm))
    fresh = not run.config.exists()
    if not fresh:
        config = read_run_config(run.path)
    rest, config = take_config_files(args, config)
    built = Recipe(config, rest, lambda cli: _trainer_parts(cli, run))
    resolved = built.resolved()
    if not fresh:
        _same_run(read_run_config(run.path), resolved, run)
        if run.finished and _same_length(read_run_config(run.path), resolved):
            log.info("%s: already finished (%s)", run.path, stage.name)
            return
    model = _model(built)
    if source is not None and not run.last.exists():
        weights = checkpoint_file(earlier[source].path if source in earlier else root / source)
        model.load_stage(load_weights(weights))
    _start(recipe, stage, built, resolved, run)
    resume = run.last if run.last.exists() else None
    pl.seed_everything(built.config.seed_everything, verbose=False)
    built.trainer.fit(model, built.datamodule, ckpt_path=resume, weights_only=True)
    if built.trainer.interrupted:
        raise KeyboardInterrupt
    _finish(built, model, run)


def _trainer_parts(cli: Recipe, run: RunFolder) -> dict[str, Any]:
    kind = cli.model_class
    return {
        "logger": [MetricsCsv(run.path)],
        "callbacks": [
            ExactResume(),
            StepTimer(),
            BestCheckpoint(run.path, kind.monitor, kind.mode),  # type: ignore[union-attr]
            LastCheckpoint(run.path, cli.config.checkpoint_minutes, cli.config.checkpoint_steps),
        ],
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": run.path,
    }


@rank_zero_only
def _start(
    recipe: catalog.Recipe, stage: Stage, built: Recipe, resolved: Config, run: RunFolder
) -> None:
    model, data = _model(built), built.datamodule
    with save_atomic(run.config) as temporary:
        temporary.write_text(yaml.safe_dump(resolved, sort_keys=False))
    describe = getattr(data, "describe", None)
    total = sum(p.numel() for p in model.parameters())
    student = sum(p.numel() for p in model.student.parameters())
    run.note(
        paper=recipe.paper.name,
        recipe=recipe.name,
        stage=stage.name,
        seed=built.config.seed_everything,
        status="running",
        data=describe() if describe else "",
        parameters={"student": student, "added": total - student},
        versions=_versions(),
    )
    log.info("%s → %s", recipe.full_name, run.path)
    if describe:
        log.info("data: %s", describe())


def _finish(built: Recipe, model: DistillModule, run: RunFolder) -> None:
    """Test the chosen weights, write the student and the pictures, close ``run.json``."""
    chosen = run.last if built.config.evaluate == "last" or not run.best.exists() else run.best
    model.load_state_dict(load_weights(chosen))
    results = _evaluate(built.trainer.test, model, built.datamodule)
    if not built.trainer.is_global_zero:
        return
    save_student(model, run.student)
    model.eval()
    with torch.no_grad():
        model.pictures(run.path)
    timer = next(c for c in built.trainer.callbacks if isinstance(c, StepTimer))  # type: ignore[attr-defined]
    device = built.trainer.strategy.root_device  # the model itself has been moved to the CPU
    best = built.trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
    run.note(
        status="finished",
        steps=built.trainer.global_step,
        step_seconds=timer.step_seconds,
        step_cpu_seconds=timer.step_cpu_seconds if device.type == "cpu" else None,
        peak_memory_bytes=peak_memory(device),
        best={model.monitor: None if best is None else float(best)},
        test=results,
        evaluated=chosen.name,
    )
    for name, value in results.items():
        log.info("%s = %.4g", name, value)


def _evaluate(
    run: Any, model: DistillModule, data: pl.LightningDataModule | None
) -> dict[str, float]:
    """Run one of the trainer's evaluations, when model and data both have it."""
    stage = run.__name__
    loader = "val_dataloader" if stage == "validate" else "test_dataloader"
    step = "validation_step" if stage == "validate" else "test_step"
    has_data = getattr(type(data), loader, None) is not getattr(pl.LightningDataModule, loader)
    if getattr(type(model), step) is getattr(pl.LightningModule, step) or not has_data:
        return {}
    found = run(model, datamodule=data, verbose=False)
    return {name: float(value) for metrics in found for name, value in metrics.items()}


def _model(built: Recipe) -> DistillModule:
    model = built.model
    assert isinstance(model, DistillModule)
    return model


def _same_run(old: Config, new: Config, run: RunFolder) -> None:
    """Refuse to continue a run under another model, data or seed.

    Raises:
        InputError: The first option that differs.
    """
    for key in ("model", "data", "seed_everything"):
        if (difference := _difference(old.get(key), new.get(key), key)) is not None:
            name, before, after = difference
            raise InputError(
                f"{run.path}: this run was started with {name.replace('.init_args', '')} = "
                f"{before}, not {after}; choose another --out"
            )


def _same_length(old: Config, new: Config) -> bool:
    keys = ("max_epochs", "max_steps", "max_time")
    return all(old.get("trainer", {}).get(k) == new.get("trainer", {}).get(k) for k in keys)


def _difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            if found := _difference(old.get(name), new.get(name), f"{key}.{name}"):
                return found
        return None
    return None if old == new else (key, old, new)


def _take_out(args: list[str]) -> tuple[list[str], Path | None]:
    """Take ``--out DIR`` from the arguments; the trainer's parts need it before parsing."""
    rest, out = [], None
    while args:
        word = args.pop(0)
        if word == "--out" and args:
            out = Path(args.pop(0))
        elif word.startswith("--out="):
            out = Path(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, out


def _versions() -> dict[str, str]:
    names = ["torch", "lightning", "numpy"]
    names += [
        d.metadata["Name"]
        for d in importlib.metadata.distributions()
        if (d.metadata["Name"] or "").startswith("cohobate-")
    ]
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "platform": sys.platform, **found}


def _quiet() -> None:
    """One line per event: Lightning's start-up chatter and advice are left out."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode at the start of training.*",
        "Checkpoint directory .* exists and is not empty",
        ".*is smaller than the logging interval.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)

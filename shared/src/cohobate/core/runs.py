"""Training a recipe into a run folder, resuming it, and reading it back."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from cohobate.core.folders import (
    RunFolder,
    check_paper,
    check_same,
    checkpoint_file,
    read_run_config,
    same_length,
    stage_folders,
    stage_source,
)
from cohobate.core.io import fitting_weights, load_weights, result_folder, save_atomic
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

__all__ = [
    "RunFolder",
    "checkpoint_file",
    "fit",
    "load_run",
    "read_run_config",
    "save_student",
    "stage_folders",
    "validate",
]

log = logging.getLogger("cohobate")


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
    rest, given = _take(args, "--out")
    default = Path("runs") / recipe.full_name.split("/", 1)[1].replace("/", "-")
    folder = Path(given) if given else out or default
    folders: dict[str, RunFolder] = {}
    for stage, run in zip(recipe.stages, stage_folders(recipe, folder), strict=True):
        _fit_stage(recipe, stage, rest, arm, run, folders, folder)
        folders[stage.name] = run
    return list(folders.values())


def validate(
    checkpoint: Path, args: Sequence[str] = (), *, paper: str | None = None
) -> dict[str, float]:
    """Evaluate a run's weights on its validation and test data.

    Args:
        checkpoint: A run folder, or a checkpoint in one.
        args: Options that change the run's config, such as ``--data.root``.
        paper: Name of the paper that the run must be of.

    Returns:
        All metrics by name.

    Raises:
        InputError: There is no such run, it is of another paper, or its data cannot be read.
    """
    _quiet()
    file = checkpoint_file(checkpoint, paper=paper)
    rest, config = take_config_files(args, read_run_config(file.parent))
    built = Recipe(config, rest, lambda _: {"logger": [], "enable_checkpointing": False})
    if Path(checkpoint).is_dir():  # --evaluate may stand among the options
        file = RunFolder(file.parent).chosen(built.config.evaluate) or file
    model = _model(built)
    model.load_state_dict(fitting_weights(model, load_weights(file), file))
    results: dict[str, float] = {}
    for run in (built.trainer.validate, built.trainer.test):
        results |= _evaluate(run, model, built.datamodule)
    return results


def load_run(checkpoint: Path, *, paper: str | None = None) -> DistillModule:
    """The trained model of a run, without its data.

    Args:
        checkpoint: A run folder, or a checkpoint in one.
        paper: Name of the paper that the run must be of.

    Raises:
        InputError: There is none, it is of another paper, or its weights do not fit its config.
    """
    file = checkpoint_file(checkpoint, paper=paper)
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
    if arm is not None and not stage.shared:
        config = catalog.overlay(config, read_config(arm))
    fresh = not run.config.exists()
    if not fresh:
        check_paper(run, recipe.paper.name, stage.name)
        config = read_run_config(run.path)
    source = config.get("init_from")
    rest, config = take_config_files(args, config)
    if earlier:  # the options say where the first stage starts, the recipe where the others do
        rest, _ = _take(rest, "--init_from")
        config = {**config, "init_from": source}
    built = Recipe(config, rest, lambda cli: _trainer_parts(cli, run))
    resolved = built.resolved()
    if not fresh:
        check_same(read_run_config(run.path), resolved, run)
        if run.finished and same_length(read_run_config(run.path), resolved):
            log.info("%s: already finished (%s)", run.path, stage.name)
            return
    model = _model(built)
    if (source := built.config.init_from) is not None and not run.last.exists():
        known = earlier.get(source)
        begun = known.path if known else stage_source(recipe, stage, source, root)
        _begin(model, checkpoint_file(begun))
    with _nothing_left_of_bad_input(run):
        _start(recipe, stage, built, resolved, run)
        resume = run.last if run.last.exists() else None
        pl.seed_everything(built.config.seed_everything, verbose=False)
        built.trainer.fit(model, built.datamodule, ckpt_path=resume, weights_only=True)
    if built.trainer.interrupted:
        raise KeyboardInterrupt
    _finish(built, model, run)


def _begin(model: DistillModule, file: Path) -> None:
    """Give a stage the weights it starts from.

    Raises:
        InputError: They do not fit.
    """
    weights = load_weights(file)
    if file.suffix == ".safetensors":  # the student alone, under its own names
        place = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}
        own = model.student.state_dict(keep_vars=True)
        weights = {place[id(t)]: weights[name] for name, t in own.items() if name in weights}
    try:
        model.load_stage(weights)
    except InputError as error:
        raise InputError(f"init_from {file}: {error}") from None
    log.info("starts from %s", file)


@contextmanager
def _nothing_left_of_bad_input(run: RunFolder) -> Iterator[None]:
    """A new run that fails before its first checkpoint does not bind the next to its options."""
    fresh = not run.config.exists()
    with result_folder(run.path):
        try:
            yield
        except Exception:
            if fresh and run.chosen("last") is None:
                for name in ("config.yaml", "run.json", "metrics.csv"):
                    (run.path / name).unlink(missing_ok=True)
            raise


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
    model, describe = _model(built), getattr(built.datamodule, "describe", None)
    data = describe() if describe else ""
    with save_atomic(run.config) as temporary:
        temporary.write_text(yaml.safe_dump(resolved, sort_keys=False))
    total = sum(p.numel() for p in model.parameters())
    student = sum(p.numel() for p in model.student.parameters())
    run.note(
        paper=recipe.paper.name,
        recipe=recipe.name,
        stage=stage.name,
        seed=built.config.seed_everything,
        status="running",
        data=data,
        parameters={"student": student, "added": total - student},
        versions=_versions(),
    )
    log.info("%s → %s", recipe.full_name, run.path)
    if data:
        log.info("data: %s", data)


def _finish(built: Recipe, model: DistillModule, run: RunFolder) -> None:
    """Test the chosen weights, write the student and the pictures, close ``run.json``."""
    chosen = run.chosen(built.config.evaluate)
    assert chosen is not None
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


def _take(args: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """Take an option and its value from the arguments before they are parsed."""
    rest: list[str] = []
    queue, found = list(args), None
    while queue:
        word = queue.pop(0)
        if word == option and queue:
            found = queue.pop(0)
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, found


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

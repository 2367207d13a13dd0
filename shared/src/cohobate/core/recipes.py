"""From a recipe's YAML and the command line to a model, its data and a trainer.

Lightning's CLI does the work. The recipe fixes the two classes, so their options are short
(``--model.alpha``, ``--data.root``) and ``--help`` shows them with their docstrings.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cohobate.core.catalog import overlay, read_yaml, suggestion
from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule

Config = dict[str, Any]
"""A LightningCLI config: ``model`` and ``data`` by class_path and init_args, ``trainer``, ..."""

STAGE_KEYS = ("shared", "without")
"""What YAML says of stages to `compare`: which all arms share, which an arm has no use for."""

TRAINER_DEFAULTS: Config = {
    "accelerator": "auto",
    "devices": 1,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    # EpochSampler shares out the data itself, without counting a sample twice.
    "use_distributed_sampler": False,
}


def read_config(path: Path) -> Config:
    """Read a recipe, an overlay or a user's own YAML.

    Args:
        path: The file. Options of ``model`` and ``data`` may stand under ``init_args`` or directly.

    Returns:
        The config with every option under ``init_args``.

    Raises:
        InputError: The file cannot be read.
    """
    config = read_yaml(path)
    for key in ("model", "data"):
        part = config.get(key)
        if isinstance(part, dict) and not {"class_path", "init_args"} & set(part):
            config[key] = {"init_args": part}
    return config


def take_config_files(args: Sequence[str], config: Config) -> tuple[list[str], Config]:
    """Lay the files given by ``--config`` over a config, in order.

    Args:
        args: Command-line arguments.
        config: What the files are laid over.

    Returns:
        The other arguments, and the merged config.
    """
    rest: list[str] = []
    queue = list(args)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        if name not in ("--config", "-c"):
            rest.append(word)
            continue
        if not equals:
            if not queue:
                raise InputError("--config needs a file")
            value = queue.pop(0)
        config = overlay(config, read_config(Path(value)))
    return rest, config


def import_class(path: str) -> type:
    """Import a class by its path.

    Raises:
        InputError: There is no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"class_path {path}: {error}") from None
    if not isinstance(found, type):
        raise InputError(f"class_path {path}: not a class")
    return found


def model_class(config: Config) -> type[DistillModule]:
    """The paper's module that a config names.

    Raises:
        InputError: The config names none, or something else.
    """
    path = config.get("model", {}).get("class_path")
    if not path:
        raise InputError("the recipe has no model.class_path")
    found = import_class(path)
    if not issubclass(found, DistillModule):
        raise InputError(f"class_path {path}: not a DistillModule")
    return found


class Recipe(LightningCLI):
    """A parsed recipe: ``model``, ``datamodule`` and ``trainer``, ready to run.

    Args:
        config: The recipe, its overlays and the user's files, merged.
        args: The remaining command-line arguments; they win over the config.
        trainer_parts: Called with the parsed config before the trainer is made; returns its logger,
            callbacks and plugins.

    Raises:
        InputError: An option is unknown or has a wrong value.
    """

    def __init__(self, config: Config, args: Sequence[str], trainer_parts: Any) -> None:
        self._args = list(args)
        self._trainer_parts = trainer_parts
        self._classes = {key: config[key]["class_path"] for key in ("model", "data")}
        short = {k: v for k, v in config.items() if k not in STAGE_KEYS}
        model = model_class(config)
        data = import_class(self._classes["data"])
        for key in ("model", "data"):
            short[key] = config[key].get("init_args", {})
        # A run's config.yaml also holds what the model took from the data; it takes it again.
        short["model"] = {k: v for k, v in short["model"].items() if k not in model.from_data}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as defaults:
            yaml.safe_dump(short, defaults)
            defaults.flush()
            try:
                super().__init__(
                    model,
                    data,
                    save_config_callback=None,
                    seed_everything_default=0,
                    parser_kwargs={
                        "default_config_files": [defaults.name],
                        "exit_on_error": False,
                        "prog": "cohobate",
                    },
                    run=False,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                )
            except (ArgumentError, TypeError, KeyError) as error:
                if not isinstance(error, ArgumentError) and not _from_parser(error):
                    raise
                raise InputError(one_line(error, self.parser)) from None

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options in the order people look for them: model, data, trainer."""
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=False)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=False)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder's options and link what the model takes from the data."""
        group = parser.add_argument_group("Run folder")
        group.add_argument(
            "--out", type=str, default=None, help="Run folder; an existing one resumes"
        )
        group.add_argument(
            "--checkpoint_minutes", type=float, default=10.0, help="Longest time without last.ckpt"
        )
        group.add_argument(
            "--checkpoint_steps", type=int, default=0, help="Save last.ckpt every so many steps too"
        )
        group.add_argument(
            "--evaluate",
            choices=["best", "last"],
            default="best",
            help="Weights that are tested, and used wherever the run folder is named",
        )
        group.add_argument(
            "--init_from",
            type=str,
            default=None,
            help="Start from a run folder, a checkpoint, or an earlier stage by its name; of "
            "several stages the first does",
        )
        model, data = self._model_class, self._datamodule_class
        for name in model.from_data:  # type: ignore[union-attr]
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        if "seed" in inspect.signature(data).parameters:
            parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse our own arguments; the base would warn that ``sys.argv`` has others."""
        self.config = parser.parse_args(self._args)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer with the run folder's logger, callbacks and plugins."""
        parts = self._trainer_parts(self)
        config = dict(self.config_init["trainer"])
        for key in ("logger", "callbacks", "plugins"):
            given = config.get(key)
            own = given if isinstance(given, list) else [given] if given not in (None, True) else []
            config[key] = [*own, *parts.pop(key, [])] if given is not False else parts.pop(key, [])
        return pl.Trainer(**{**config, **parts})

    def resolved(self) -> Config:
        """The whole config as it is run, with what the model took from the data.

        Model, data and trainer are as LightningCLI (``subclass_mode``) writes them.
        """
        dump = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
        for key in ("out", "checkpoint_minutes", "checkpoint_steps"):
            dump.pop(key, None)
        for name in type(self.model).from_data:
            dump["model"][name] = _plain(getattr(self.datamodule, name))
        for key, path in self._classes.items():
            dump[key] = {"class_path": path, "init_args": dump[key]}
        return dump


def build_model(config: Config) -> DistillModule:
    """Make the model of a run folder's config, without its data.

    Args:
        config: As written to ``config.yaml`` or a student's ``config.json``.

    Raises:
        InputError: The config does not fit the class.
    """
    kind = model_class(config)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    try:
        parsed = parser.parse_object({"model": config["model"].get("init_args", {})})
        model = parser.instantiate_classes(parsed).model
    except (ArgumentError, TypeError, KeyError) as error:
        raise InputError(f"config of {kind.__name__}: {one_line(error, parser)}") from None
    assert isinstance(model, DistillModule)
    return model


def one_line(error: Exception, parser: ArgumentParser | None = None) -> str:
    """An option parser's complaint in one line, with the closest option when one is misspelt."""
    text = " ".join(str(error).split())
    for mark in ("Unrecognized arguments: ", "unrecognized arguments: "):
        if mark in text and parser is not None:
            word = text.split(mark, 1)[1].split()[0].partition("=")[0]
            known = [o for action in parser._actions for o in action.option_strings]
            return f"unknown option {word}{suggestion(word, known)}"
    return text


def _from_parser(error: Exception) -> bool:
    """Whether a TypeError or KeyError came from parsing and not from a paper's constructor."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "jsonargparse" in trace.tb_frame.f_code.co_filename


def _plain(value: Any) -> Any:
    """A value as YAML can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: _plain(v) for k, v in dataclasses.asdict(value).items()}
    if isinstance(value, Namespace | dict):
        return {str(k): _plain(v) for k, v in dict(value).items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value

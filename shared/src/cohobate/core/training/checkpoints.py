"""Checkpoints that are whole or absent, and a run that goes on as if it had never stopped."""

from __future__ import annotations

import errno
import json
import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import STEP_OUTPUT

from cohobate.core.io import load_checkpoint, save_atomic
from cohobate.core.training.data import ResumableLoader
from cohobate.core.training.logger import MetricsCsv


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; reads tensors only.

    A run killed while it writes, or one whose disk is full, keeps its previous checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save all or nothing.

        Raises:
            InputError: The disk is full or the folder cannot be written.
        """
        with save_atomic(Path(path)) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:
                # torch's zip writer hides the operating system's reason
                raise OSError(errno.ENOSPC, "no space left, or the file is too large") from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load as data; ``weights_only`` is always true here."""
        return load_checkpoint(Path(path))


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the checkpoint with the best value of one validation metric.

    Args:
        folder: The run folder.
        monitor: Name of the logged metric.
        mode: ``min`` or ``max``.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath=folder,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self._validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on the metric must exist."""
        super().on_validation_end(trainer, pl_module)
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; not before the first validation, which may be epochs away."""
        if self._validated or self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)


class LastCheckpoint(Checkpoint):
    """``last.ckpt``: where a stopped run goes on.

    Saved at the end of every epoch and, inside long epochs, every few minutes.

    Args:
        folder: The run folder.
        minutes: Longest time without a checkpoint.
        every_n_steps: Also save after this many steps; 0 leaves it to the clock.
    """

    def __init__(self, folder: Path, minutes: float = 10.0, every_n_steps: int = 0) -> None:
        self.path = folder / "last.ckpt"
        self.seconds = 60.0 * minutes
        self.every_n_steps = every_n_steps
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save inside an epoch when it is time."""
        by_step = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        by_time = time.monotonic() - self._saved_at > self.seconds
        if trainer.world_size > 1:  # saving is collective: all processes must agree
            by_time = trainer.strategy.broadcast(by_time)
        if (by_step or by_time) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after the epoch's validation, when best.ckpt is up to date."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()


class ExactResume(Callback):
    """Keeps in the checkpoint what Lightning leaves out: a resumed run repeats every number.

    The random states of python, numpy, torch and CUDA, the length of ``metrics.csv``, and the place
    in the epoch, which `ResumableLoader` tells. Evolving teachers are kept by `DistillModule`.

    Lightning forgets that place when a method's ``configure_optimizers`` asks for the number of
    steps: the data are then set up before a checkpoint is read.
    """

    def __init__(self) -> None:
        self._random: dict[str, Any] | None = None
        self._places: list[dict[str, int]] = []

    def state_dict(self) -> dict[str, Any]:
        """All random states as tensors and numbers, readable with ``weights_only``."""
        kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (what libraries use)
        return {
            "python": json.dumps(random.getstate()),
            "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64))],
            "numpy_rest": [int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts; setting up must not consume them."""
        self._random = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the place in the epoch, and what of ``metrics.csv`` belongs to this checkpoint."""
        checkpoint["places"] = [loader.state_dict() for loader in _loaders(trainer)]
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                checkpoint["metrics_rows"] = logger.rows_written
                checkpoint["metrics_pending"] = _pending(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Drop the rows written after the checkpoint: they will be written again."""
        self._places = checkpoint["places"]
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.truncate(checkpoint["metrics_rows"])
                if pending := checkpoint["metrics_pending"]:
                    logger.log_metrics(pending, step=checkpoint["global_step"] - 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put places and random states back, last of all before the first step."""
        places, self._places = self._places, []
        if places:
            for loader, place in zip(_loaders(trainer), places, strict=True):
                loader.load_state_dict(place)
        state, self._random = self._random, None
        if state is None:
            return
        version, internal, gauss = json.loads(state["python"])
        random.setstate((version, tuple(internal), gauss))
        kind, keys = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *state["numpy_rest"]))  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _loaders(trainer: pl.Trainer) -> list[ResumableLoader]:
    """The training data's loaders that know their place."""
    loaders = CombinedLoader(trainer.train_dataloader or []).flattened
    return [loader for loader in loaders if isinstance(loader, ResumableLoader)]


def _pending(trainer: pl.Trainer) -> dict[str, float]:
    """The row of the step just done, when it is not in the log yet.

    Lightning logs a step after ``on_train_batch_end``, where a checkpoint inside an epoch is saved.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    logs: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if progress.completed == progress.processed or not logs or trainer.global_step % logs:
        return {}
    logged = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("train/")}
    return {**logged, "epoch": float(trainer.current_epoch)}

"""The LightningModule every paper starts from: task loss plus weighted distillation terms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.teachers import Teacher
from cohobate.core.training.schedules import Constant, Schedule, as_schedule

Losses = Tensor | dict[str, Tensor]


class DistillModule(pl.LightningModule):
    """Trains a student on ``task loss + Σ weightᵢ(progress) · termᵢ``.

    A paper implements `student`, `forward_train`, `task_loss` and `distill_loss`; its
    ``validation_step`` and ``configure_optimizers`` are plain Lightning. Every term is logged as
    ``train/<term>`` before weighting, scheduled weights as ``train/<term>_weight``.

    With ``distill=False`` the distillation terms are neither computed nor added: the paper's
    baseline. Build the student first in the constructor, so that both arms start from the same
    weights, and everything that only distillation needs after it.

    Args:
        distill: Whether to distil.
        weights: Weight of each named term, a number or a schedule; 1 when not given.

    Attributes:
        from_data: Constructor arguments that the command fills from attributes of the data module.
        monitor: Metric that picks ``best.ckpt``.
        mode: Whether the monitored metric should be small (``min``) or large (``max``).
    """

    from_data: ClassVar[tuple[str, ...]] = ()
    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"

    def __init__(
        self, *, distill: bool = True, weights: Mapping[str, float | Schedule] | None = None
    ) -> None:
        super().__init__()
        self.distill = distill
        self.weights = {name: as_schedule(value) for name, value in (weights or {}).items()}

    # --- what a paper implements -------------------------------------------------------------

    @property
    @abstractmethod
    def student(self) -> nn.Module:
        """The network the user keeps: saved and exported alone."""

    @abstractmethod
    def example_input(self) -> tuple[Tensor, ...]:
        """Inputs of the student with batch size 1, for export and shape checks."""

    def open_axes(self) -> tuple[dict[int, str], ...]:
        """Axes of each example input that an exported graph leaves open, by name.

        Axes of one name have one size. Default: the batch.
        """
        return tuple({0: "batch"} for _ in self.example_input())

    @abstractmethod
    def forward_train(self, batch: Any) -> Any:
        """One forward pass in training; returns whatever the losses need."""

    @abstractmethod
    def task_loss(self, outputs: Any, batch: Any) -> Losses:
        """The loss against ground truth: one scalar, or several by name."""

    def distill_loss(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """The distillation terms by name, each a scalar before weighting."""
        return {}

    def predict_files(self, inputs: list[Path], out: Path) -> list[Path]:
        """What ``cohobate predict`` does: read ``inputs``, write results to ``out``.

        A paper overrides this with its own keyword options; they become options of the command.

        Args:
            inputs: Files or folders.
            out: Folder for the results.

        Returns:
            The files written.
        """
        raise InputError(f"{type(self).__name__} does not predict from files")

    def pictures(self, out: Path) -> None:
        """Draw what people would rather look at than read; called after training."""

    # --- what the base does ------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """How much of the training is done, from 0 to 1."""
        trainer = self._trainer
        if trainer is None:
            return 0.0
        total = trainer.estimated_stepping_batches
        return min(trainer.global_step / total, 1.0) if 0 < total < float("inf") else 0.0

    def forward(self, *inputs: Tensor) -> Any:
        """The student's own output."""
        return self.student(*inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum the weighted terms and log each."""
        outputs = self.forward_train(batch)
        task = self.task_loss(outputs, batch)
        terms = task if isinstance(task, dict) else {"task": task}
        if self.distill:
            terms = {**terms, **self.distill_loss(outputs, batch)}
        return self.weigh(terms)

    def weigh(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Add up terms with their weights and log everything.

        Args:
            terms: Scalars by name.

        Returns:
            The training loss, a scalar.
        """
        progress = self.progress
        total: Tensor | None = None
        log = {}
        for name, value in terms.items():
            schedule = self.weights.get(name, _ONE)
            weight = schedule(progress)
            log[f"train/{name}"] = value.detach()
            if not isinstance(schedule, Constant):
                log[f"train/{name}_weight"] = torch.tensor(weight)
            weighted = value if weight == 1 else value * weight
            total = weighted if total is None else total + weighted
        if total is None:
            raise ValueError(f"{type(self).__name__}: no loss term")
        log["train/loss"] = total.detach()
        if self._trainer is not None:
            # Means over the processes, so that the log does not depend on their number.
            self.log_dict(log, sync_dist=self.trainer.world_size > 1)
        return total

    def teachers(self) -> dict[str, Teacher]:
        """The teachers in this module by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Teacher)}

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Start from the weights of an earlier stage (a recipe's ``init_from``).

        The default takes every tensor whose name this module has; all of the student's must be
        among them.

        Args:
            weights: The earlier stage's ``state_dict``.

        Raises:
            InputError: A tensor of the student is missing or has another shape.
        """
        own = self.state_dict()
        matching = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
        student = {id(t) for t in self.student.state_dict(keep_vars=True).values()}
        missing = [
            name
            for name, tensor in self.state_dict(keep_vars=True).items()
            if id(tensor) in student and name not in matching
        ]
        if missing:
            raise InputError(f"the earlier stage has no fitting weights for {missing[0]}")
        self.load_state_dict(matching, strict=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of teachers that change in training (EMA, snapshots)."""
        states = {name: teacher.changing_state() for name, teacher in self.teachers().items()}
        checkpoint["teachers"] = {name: state for name, state in states.items() if state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the changing teachers back."""
        for name, teacher in self.teachers().items():
            if state := checkpoint.get("teachers", {}).get(name):
                teacher.load_changing_state(state)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the teachers follow.

        Here and not in ``on_train_batch_end``, because a checkpoint may be saved before that hook
        of the module runs.
        """
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def after_step(self) -> None:
        """Let the teachers follow a step; a paper with manual optimisation calls it itself."""
        for teacher in self.teachers().values():
            teacher.after_step(self.progress)

    def on_train_epoch_end(self) -> None:
        """Let the teachers follow the student's epoch."""
        for teacher in self.teachers().values():
            teacher.after_epoch(self.progress)


_ONE = Constant(1.0)

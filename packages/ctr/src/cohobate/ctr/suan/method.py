"""Online distillation of LightSUAN from SUAN, trained together on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights
from cohobate.core.module import DistillModule
from cohobate.core.training.schedules import Schedule
from cohobate.ctr.data import ClickData
from cohobate.ctr.metrics import ClickMetrics, calibrate, reliability
from cohobate.ctr.nets.inputs import Batch, ClickNetwork, Common, Features, Layout
from cohobate.ctr.optim import EmbeddingOptimizer, click_optimizer
from cohobate.ctr.suan.losses import click_loss, soft_click_loss

Network = Callable[[Layout, Common], ClickNetwork]


class DistilSUAN(DistillModule):
    """Trains a student and a high-grade teacher together, or a network alone.

    ``L = BCE(z_S, y) + BCE(z_T, y) + lambda BCE(z_S / t, s(z_T / t))`` with
    ``lambda = lambda0 t^2``. The weights ``student``, ``teacher`` and ``kd`` (lambda0) scale the
    terms; any may be a schedule.

    Args:
        layout: sizes of the data.
        student: the network to serve.
        teacher: the network to learn from; not built when ``distill`` is off.
        sample_rate: share of the negatives in the data; undone in predicted probabilities.
        common: settings of both networks: embedding width, head.
        temperature: t.
        teacher_warmup_epochs: epochs in which the teacher trains alone, so that the student never
            learns from a random one. They come on top of ``trainer.max_epochs``: with and without
            distillation the student trains as many steps, in the same order.
        train_teacher: False freezes the teacher (offline distillation); it then needs weights.
        teacher_checkpoint: run folder or weights of the paper's stage A that the teacher starts
            from.
        detach_teacher: the teacher learns from clicks alone.
        share_embeddings: one embedding table for both; it gets both gradients.
        lr: learning rate.
        embedding_lr: learning rate of the embedding tables; default ``lr``.
        embedding_optimizer: of the embedding tables.
        exact_metrics: exact AUC and GAUC; else AUC from 10,000 bins in constant memory.
        distill: False trains the student alone.
        weights: weight of each term.

    Raises:
        InputError: settings that contradict each other, or weights that do not fit.

    References:
        Lai et al., Exploring Scaling Laws of CTR Model for Online Performance Improvement, RecSys
        2025, arXiv:2508.15326, section on online distillation.
    """

    from_data: ClassVar[tuple[str, ...]] = ("layout", "sample_rate")
    monitor: ClassVar[str] = "val/auc"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        layout: Layout,
        student: Network,
        teacher: Network,
        sample_rate: float = 1.0,
        common: Common = Common(),  # noqa: B008 (frozen)
        temperature: float = 2.0,
        teacher_warmup_epochs: int = 1,
        train_teacher: bool = True,
        teacher_checkpoint: Path | None = None,
        detach_teacher: bool = True,
        share_embeddings: bool = False,
        lr: float = 1e-3,
        embedding_lr: float | None = None,
        embedding_optimizer: EmbeddingOptimizer = "adam",
        exact_metrics: bool = True,
        distill: bool = True,
        weights: Mapping[str, float | Schedule] | None = None,
    ) -> None:
        super().__init__(distill=distill, weights=weights)
        if temperature <= 0:
            raise InputError(f"model.temperature {temperature}: must be positive")
        if not train_teacher and teacher_warmup_epochs:
            raise InputError("model.teacher_warmup_epochs: a frozen teacher has no warm-up")
        self.layout, self.sample_rate, self.temperature = layout, sample_rate, temperature
        self.teacher_warmup_epochs = teacher_warmup_epochs
        self.detach_teacher, self.train_teacher = detach_teacher, train_teacher
        self.teacher_checkpoint = teacher_checkpoint
        self.lr, self.embedding_lr, self.embedding_optimizer = lr, embedding_lr, embedding_optimizer
        # the student first: with and without a teacher it starts from the same weights
        self.network = student(layout, common)
        self.teacher = teacher(layout, common) if distill else None
        if self.teacher is not None and share_embeddings:
            if self.teacher.dim != self.network.dim:
                raise InputError(
                    f"model.share_embeddings: widths {self.network.dim} and {self.teacher.dim}"
                )
            self.teacher.table = self.network.table
        if self.teacher is not None and not train_teacher:
            self.teacher.requires_grad_(False).eval()
        self.metrics = ClickMetrics(exact=exact_metrics, sample_rate=sample_rate)
        self.teacher_metrics = ClickMetrics(exact=exact_metrics, sample_rate=sample_rate)
        self.gap: list[Tensor] = []
        self.reliability: Tensor | None = None

    @property
    def student(self) -> nn.Module:
        """The network to serve."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """Features of one row, with half the longest history."""
        row = Features(*(x[:1] for x in self.layout.example(2)))
        half = max(1, self.network.length // 2)
        return tuple(
            row._replace(
                # contiguous, or the tracer learns that the length is not the whole
                history=row.history[:, -half:].contiguous(),
                history_time=row.history_time[:, -half:].contiguous(),
            )
        )

    def open_axes(self) -> tuple[dict[int, str], ...]:
        """The batch, and the length of the history."""
        histories = ("history", "history_time")
        return tuple(
            {0: "batch", 1: "length"} if name in histories else {0: "batch"}
            for name in Features._fields
        )

    def train(self, mode: bool = True) -> DistilSUAN:
        """Switch mode; a frozen teacher stays in evaluation."""
        super().train(mode)
        if self.teacher is not None and not self.train_teacher:
            self.teacher.eval()
        return self

    # -- weights of a teacher that was trained before ------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the teacher of stage A; a resumed run overwrites it by its own."""
        if stage != "fit":
            return
        data = None if self.distill else getattr(self.trainer, "datamodule", None)
        if isinstance(data, ClickData):
            # the order of the epochs in which a distilled student trains
            data.first_epoch = self.teacher_warmup_epochs
        if self.teacher is not None and self.teacher_checkpoint is not None:
            path = self.teacher_checkpoint
            path = path / "student.safetensors" if path.is_dir() else path
            self.teacher.load_state_dict(fitting_weights(self.teacher, load_weights(path), path))

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Take the network that an earlier stage trained as the teacher.

        Raises:
            InputError: it is not the teacher's network.
        """
        if self.teacher is None:
            return super().load_stage(weights)
        prefix = "network."
        found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        self.teacher.load_state_dict(
            fitting_weights(self.teacher, found, Path("the earlier stage"))
        )
        return None

    # -- training ------------------------------------------------------------------------------

    @property
    def warming(self) -> bool:
        """Whether the teacher trains alone now."""
        return self.teacher is not None and self.current_epoch < self.teacher_warmup_epochs

    def on_fit_start(self) -> None:
        """Add the warm-up to the student's epochs."""
        loop = self.trainer.fit_loop
        if self.teacher is not None and loop.max_epochs is not None and loop.max_epochs > 0:
            loop.max_epochs += self.teacher_warmup_epochs

    def forward_train(self, batch: Batch) -> dict[str, Tensor]:
        """Logits of the networks that train, ``student`` and ``teacher``, each (B,)."""
        logits = {} if self.warming else {"student": self.network(*batch.features)}
        if self.teacher is not None:
            with torch.set_grad_enabled(self.train_teacher):
                logits["teacher"] = self.teacher(*batch.features)
        return logits

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Click loss of each network that trains."""
        return {
            name: click_loss(logit, batch.label)
            for name, logit in outputs.items()
            if name == "student" or self.train_teacher
        }

    def distill_loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """``t^2 BCE(z_S / t, s(z_T / t))``; nothing while the teacher warms up."""
        if self.warming:
            return {}
        teacher = outputs["teacher"].detach() if self.detach_teacher else outputs["teacher"]
        return {"kd": soft_click_loss(outputs["student"], teacher, temperature=self.temperature)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser for both networks; they share no parameter unless the tables are shared."""
        return click_optimizer(
            self,
            lr=self.lr,
            embedding_lr=self.embedding_lr,
            embedding_optimizer=self.embedding_optimizer,
        )

    # -- evaluation ----------------------------------------------------------------------------

    def _evaluate(self, batch: Batch) -> None:
        logit = self.network(*batch.features)
        self.metrics.update(logit, batch.label, batch.user)
        if self.teacher is not None:
            teacher = self.teacher(*batch.features)
            self.teacher_metrics.update(teacher, batch.label, batch.user)
            self.gap.append((torch.sigmoid(teacher) - torch.sigmoid(logit)).abs().mean())

    def _report(self, stage: str) -> None:
        """Log the student's metrics, the teacher's AUC and the mean gap of their probabilities."""
        log = {f"{stage}/{k}": v.float() for k, v in self.metrics.compute().items()}
        self.metrics.reset()
        if self.teacher is not None:
            log[f"{stage}/teacher_auc"] = self.teacher_metrics.compute()["auc"].float()
            self.teacher_metrics.reset()
            log[f"{stage}/teacher_gap"] = torch.stack(self.gap).mean()
            self.gap.clear()
        self.log_dict(log, sync_dist=self.trainer.world_size > 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the scores of a batch."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._report("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the scores of a batch."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics and keep the calibration table for the picture."""
        if self.metrics.exact and self.trainer.world_size == 1:
            p = calibrate(torch.cat(self.metrics.scores).sigmoid(), self.sample_rate)
            self.reliability = reliability(p, torch.cat(self.metrics.labels)).cpu()
        self._report("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Click probabilities (B,), corrected for the sampling rate."""
        return calibrate(self.network(*batch.features).sigmoid(), self.sample_rate)

    # -- use -----------------------------------------------------------------------------------

    def predict_files(
        self,
        inputs: list[Path],
        out: Path,
        *,
        schema: Path | None = None,
        batch_size: int = 4096,
    ) -> list[Path]:
        """Add a column ``probability`` to parquet files.

        Args:
            inputs: parquet files, or folders of them.
            out: folder for files of the same names.
            schema: the schema the run was trained with; default ``schema.yaml`` beside the file or
                one folder up.
            batch_size: rows at once.

        Returns:
            The files written.
        """
        from cohobate.ctr.predict import predict_parquet

        return predict_parquet(self.network, self.sample_rate, inputs, out, schema, batch_size)

    def pictures(self, out: Path) -> None:
        """Draw the calibration of the tested weights."""
        if self.reliability is not None:
            from cohobate.ctr.plots import calibration_plot

            calibration_plot(self.reliability, out / "calibration.png")

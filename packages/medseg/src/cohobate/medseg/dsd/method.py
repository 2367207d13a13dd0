"""Dual self-distillation (DSD): the deepest stage of each side of a U-shaped network teaches."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule
from cohobate.medseg import nets
from cohobate.medseg.data import Batch, Preprocess, Sample
from cohobate.medseg.data.preprocess import voxel_size
from cohobate.medseg.dsd.losses import Target, dice_ce, distillation, prepare
from cohobate.medseg.dsd.network import Outputs, SelfDistilled, Share, Upsample
from cohobate.medseg.metrics import Scores
from cohobate.medseg.plots import overlay
from cohobate.medseg.predict import Segmenter

log = logging.getLogger("cohobate")

Side = Literal["both", "decoder", "encoder", "none"]


class Pass(NamedTuple):
    """One training pass.

    Attributes:
        outputs: Logits of all heads.
        target: The label, prepared for them all.
    """

    outputs: Outputs
    target: Target


class DSD(DistillModule):
    """Trains a U-shaped network with dual self-distillation.

    ``L = DCE(Y, y) + Σ DCE(D_i, y) + α (Σ KL(D_i ← D₁) + Σ KL(E_i ← E_Z))``. The heads that make
    D and E exist in training only; the student is the network itself.

    Args:
        num_classes: K with the background; from the data.
        in_channels: Channels of the image; from the data.
        class_names: Names of the classes; from the data.
        roi_size: Size of a patch and of the sliding window; from the data.
        preprocess: Preprocessing, kept for prediction; from the data.
        backbone: A MONAI network by name, or any module ``(B, C, *S) → (B, K, *S)`` by class_path.
        backbone_args: Arguments of a network given by name, see `cohobate.medseg.nets.build`.
        encoder: Module paths of E₁ … E_Z, for a class without preset.
        decoder: Module paths of D₁ … D_Z, from high to low resolution.
        share_heads: One head for an encoder and a decoder stage that look alike; ``auto`` does so
            for DynUNet and SwinUNETR as the official code does.
        upsample: How heads reach the input size: ``deconv``, ``deconv_once`` or ``linear``.
        temperature: T of the softmax in the KL terms.
        alpha: Weight of the KL terms.
        kl: On which sides to distil; ``none`` leaves deep supervision.
        detach_teacher: Where to stop the gradient to the teacher.
        kl_background: Whether the background takes part in the KL terms.
        learn_weights: A learnable weight per student, initially 1.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: ``step`` halves the learning rate six times, ``constant`` keeps it.
        overlap: Overlap of the sliding windows.
        windows: Windows per forward pass in evaluation.
        voxel_distances: Report surface distances in voxels, as the official code does, not in mm.
        distill: False trains the baseline: the same network with ``DCE(Y, y)`` alone.
    """

    from_data: ClassVar[tuple[str, ...]] = (
        "num_classes",
        "in_channels",
        "class_names",
        "roi_size",
        "preprocess",
    )
    monitor: ClassVar[str] = "val/dice"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        class_names: list[str],
        roi_size: tuple[int, ...],
        preprocess: Preprocess,
        backbone: nets.Backbone | nn.Module = "dynunet",
        backbone_args: dict[str, Any] | None = None,
        encoder: list[str] | None = None,
        decoder: list[str] | None = None,
        share_heads: Share = "auto",
        upsample: Upsample = "deconv",
        temperature: float = 3.0,
        alpha: float = 1.0,
        kl: Side = "both",
        detach_teacher: Literal["none", "decoder", "both"] = "none",
        kl_background: bool = True,
        learn_weights: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        schedule: Literal["step", "constant"] = "step",
        overlap: float = 0.25,
        windows: int = 4,
        voxel_distances: bool = False,
        distill: bool = True,
    ) -> None:
        super().__init__(distill=distill, weights={"decoder_kl": alpha, "encoder_kl": alpha})
        if isinstance(backbone, str):
            backbone = nets.build(backbone, in_channels, num_classes, roi_size, backbone_args)
        self.temperature, self.kl, self.detach_teacher = temperature, kl, detach_teacher
        self.kl_background = kl_background
        self.lr, self.weight_decay, self.schedule = lr, weight_decay, schedule
        with torch.random.fork_rng(devices=[]):  # both arms go on with the same random numbers
            self.model = SelfDistilled(
                backbone,
                in_channels=in_channels,
                out_channels=num_classes,
                roi_size=roi_size,
                encoder=encoder,
                decoder=decoder,
                share_heads=share_heads,
                upsample=upsample,
                encoder_heads=distill and kl in ("both", "encoder"),
                decoder_heads=distill,
            )
        stages = [stage.name for stage in self.model.stages]
        self.student_weights = nn.ParameterDict()
        if learn_weights and distill:
            for side in self._sides():
                students = sum(name.startswith(side[:3]) for name in stages) - 1
                self.student_weights[side] = nn.Parameter(torch.ones(students))
        self.segmenter = Segmenter(
            self.student,
            preprocess,
            in_channels,
            class_names,
            roi_size,
            overlap,
            windows,
        )
        self.voxel_distances = voxel_distances
        self._scores = Scores(class_names)

    @property
    def student(self) -> nn.Module:
        """The backbone without heads."""
        return self.model.network

    def example_input(self) -> tuple[Tensor, ...]:
        """One patch of zeros."""
        return (torch.zeros(1, self.segmenter.in_channels, *self.segmenter.roi_size),)

    # --- training, in the order of the paper --------------------------------------------------

    def forward_train(self, batch: Batch) -> Pass:
        """All logits of a batch of patches, and its label."""
        outputs = self.model(batch["image"])
        return Pass(outputs, prepare(batch["label"], outputs.main))

    def task_loss(self, outputs: Pass, batch: Batch) -> dict[str, Tensor]:
        """``DCE(Y, y)``, all that the baseline has."""
        return {"dice_ce": dice_ce(outputs.outputs.main, outputs.target)}

    def distill_loss(self, outputs: Pass, batch: Batch) -> dict[str, Tensor]:
        """Deep supervision of the decoder and the KL terms of both sides."""
        (_, decoder, encoder), target = outputs
        supervision = [dice_ce(logits, target) for logits in decoder]
        terms = {"deep_supervision": torch.stack(supervision).sum()}
        if self.kl in ("both", "decoder"):
            teacher, *students = decoder
            terms["decoder_kl"] = self._distil("decoder", students, teacher)
        if self.kl in ("both", "encoder"):
            *students, teacher = encoder
            terms["encoder_kl"] = self._distil("encoder", students, teacher)
            self._log_entropy(teacher)
        return terms

    def _distil(self, side: str, students: list[Tensor], teacher: Tensor) -> Tensor:
        terms = distillation(
            students,
            teacher,
            temperature=self.temperature,
            include_background=self.kl_background,
            detach_teacher=self.detach_teacher in ("both", side),
        )
        if side in self.student_weights:
            terms = terms * self.student_weights[side]
        return terms.sum()

    def _sides(self) -> list[str]:
        return [side for side in ("decoder", "encoder") if self.kl in ("both", side)]

    @torch.no_grad()
    def _log_entropy(self, teacher: Tensor) -> None:
        """Entropy of E_Z's prediction in nats: nothing but the KL may hold it, so it is watched."""
        trainer: Any = self._trainer
        if trainer is None or self.global_step % trainer.log_every_n_steps:
            return
        log_p = teacher.float().log_softmax(1)
        self.log("train/encoder_entropy", -(log_p.exp() * log_p).sum(1).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW; with ``step`` the rate is halved every sixth of the epochs."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise InputError("model.schedule 'step' needs trainer.max_epochs")
        steps = torch.optim.lr_scheduler.StepLR(optimizer, max(epochs // 6, 1), gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "epoch"}}

    @rank_zero_only
    def on_fit_start(self) -> None:
        """Show the stages that were found."""
        if self.model.stages:
            log.info(self.model.table())

    # --- evaluation, the heads off ------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start new scores; surface distances are left to the test."""
        self._scores = Scores(self.segmenter.class_names, distances=False)

    def on_test_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = Scores(self.segmenter.class_names, in_voxels=self.voxel_distances)

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Segment one volume and score it."""
        logits = self.segmenter.logits(batch["image"])
        loss = dice_ce(logits, prepare(batch["label"], logits))
        self.log("val/loss", loss, batch_size=1, sync_dist=True)
        self._scores.add(logits[0].argmax(0), batch["label"][0, 0], voxel_size(batch["affine"]))

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Segment one volume and score it."""
        logits = self.segmenter.logits(batch["image"])
        self._scores.add(logits[0].argmax(0), batch["label"][0, 0], voxel_size(batch["affine"]))

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation volumes."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test volumes."""
        self._log_scores("test")

    def _log_scores(self, part: str) -> None:
        self.log_dict({f"{part}/{k}": v for k, v in self._scores.summary().items()}, sync_dist=True)

    # --- use ----------------------------------------------------------------------------------

    def predict_files(
        self, inputs: list[Path], out: Path, *, overlap: float = 0.25, picture: bool = True
    ) -> list[Path]:
        """Segment NIfTI files on their own grid.

        Args:
            inputs: Files, or folders of files.
            out: Folder for ``<name>_seg.nii.gz`` and ``<name>_seg.png``.
            overlap: Overlap of the sliding windows.
            picture: Whether to draw three slices of each.
        """
        self.eval()
        return replace(self.segmenter, overlap=overlap).files(inputs, out, picture)

    def pictures(self, out: Path) -> None:
        """Label and segmentation of the first test volume, as ``segmentation.png``."""
        sample: Sample = next(iter(self.trainer.datamodule.test_dataloader()))  # type: ignore[attr-defined]
        logits = self.segmenter.logits(sample["image"].to(self.device))
        overlay(
            out / "segmentation.png",
            sample["image"][0, 0].cpu().numpy(),
            {
                "label": sample["label"][0, 0].cpu().numpy(),
                "segmentation": logits[0].argmax(0).cpu().numpy(),
            },
            self.segmenter.class_names,
            sample["affine"],
            f"test volume {sample['name']}",
        )

"""DWPose: a pose network learns from a larger one, then its head from itself."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights
from cohobate.core.module import DistillModule
from cohobate.core.teachers import Teacher
from cohobate.core.training.schedules import Linear
from cohobate.detection.dwpose.checkpoint import load_into, merge, read_weights
from cohobate.detection.dwpose.codec import decode, encode, flip_back
from cohobate.detection.dwpose.data import Batch
from cohobate.detection.dwpose.keypoints import KeypointSet
from cohobate.detection.dwpose.losses import SimCC, feature_loss, simcc_distillation, simcc_loss
from cohobate.detection.dwpose.metrics import PoseScores
from cohobate.detection.dwpose.network import RTMPose, Variant, channels_of
from cohobate.detection.dwpose.plots import draw_people
from cohobate.detection.dwpose.predict import Poser, boxes_from
from cohobate.detection.dwpose.teachers import Average, BatchNorm, HeadTeacher, PoseTeacher
from cohobate.detection.plots import side_by_side

log = logging.getLogger("cohobate")

Stage = Literal["plain", "distil", "head"]
Lessons = Literal["both", "first", "second"]
_STAGE = Path("the earlier stage")


class Pass(NamedTuple):
    """One training pass.

    Attributes:
        images: ``(B, 3, height, width)``.
        features: The backbone's ``(B, C, h, w)``.
        logits: The head's.
    """

    images: Tensor
    features: Tensor
    logits: SimCC


class DWPose(DistillModule):
    """Trains RTMPose, alone or by one of the paper's two stages.

    - ``plain``: labels only. A teacher, or any RTMPose.
    - ``distil``: ``L = L_ori + r(t) (L_fea + 0.1 L_logit)`` with a larger, frozen teacher;
      ``r(t) = 1 - t / t_max`` falls with the epoch t.
    - ``head``: the backbone is frozen, a new head learns the old head's logits, ``L = L_logit``,
      no labels. The teacher is what the stage starts from.

    The weights' moving average is evaluated, kept and exported.

    Args:
        keypoints: What is predicted; from the data.
        size: Width and height of the input; from the data.
        stage: What is trained.
        variant: Size of the network.
        hidden: Width of the head.
        attention: Width of the head's queries and keys.
        init: Weights to start from; what does not fit, such as the head of other key points,
            starts afresh.
        teacher: Weights of the teacher of ``distil``, a ``.pth`` or a run folder; not needed when
            the stage before trained it.
        start: What ``head`` starts from, the result of the first stage or any RTMPose; not needed
            after a stage before.
        teacher_variant: Its size, in the stage ``distil``.
        teacher_bn: ``eval`` keeps the teacher as it is; ``train`` normalises by batches and lets
            its running statistics drift, as the released code does in both stages.
        lessons: Which of the two stages teach. ``distil`` without lessons trains on labels,
            ``head`` without lessons leaves the network as it is.
        alpha: Weight of the feature loss.
        logit_weight: Weight of the logit loss; by default 0.1 in ``distil`` and 1 in ``head``.
        decay: Whether the distillation terms of ``distil`` fall with the epochs.
        beta: Inverse temperature of all losses.
        sigma: Widths of the labels in bins; by default those of the released settings.
        reference_batch_size: Make the task loss that of so many people a batch, so that its balance
            with the distillation terms does not depend on the batch. The released settings have 64.
        lr: Learning rate of AdamW; meant for 512 people a step.
        weight_decay: Not of biases and normalisation.
        warmup: Steps of linear warm-up.
        flat: Share of the training before the learning rate falls; 1 never lets it fall.
        final: Share of the learning rate at the end of the cosine.
        ema: Momentum of the average; None evaluates the weights as they are.
        flip_test: Whether evaluation also looks at the mirror image.
        distill: False trains without any lessons.

    References:
        Yang et al., arXiv 2307.15880.
    """

    from_data: ClassVar[tuple[str, ...]] = ("keypoints", "size")
    monitor: ClassVar[str] = "val/oks"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        *,
        keypoints: KeypointSet,
        size: tuple[int, int],
        stage: Stage = "distil",
        variant: Variant = "s",
        hidden: int = 256,
        attention: int = 128,
        init: Path | None = None,
        start: Path | None = None,
        teacher: Path | None = None,
        teacher_variant: Variant = "l",
        teacher_bn: BatchNorm = "eval",
        lessons: Lessons = "both",
        alpha: float = 7e-5,
        logit_weight: float | None = None,
        decay: bool = True,
        beta: float = 10.0,
        sigma: tuple[float, float] | None = None,
        reference_batch_size: int | None = None,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        warmup: int = 1000,
        flat: float = 0.5,
        final: float = 0.05,
        ema: float | None = 2e-4,
        flip_test: bool = True,
        distill: bool = True,
    ) -> None:
        weight = logit_weight if logit_weight is not None else 0.1 if stage == "distil" else 1.0
        falls = stage == "distil" and decay
        terms = {"feature": 1.0, "logit": weight}
        super().__init__(
            distill=distill,
            weights={k: Linear(v, 0.0) if falls else v for k, v in terms.items()},
        )
        self.keypoints, self.size, self.stage = keypoints, (size[0], size[1]), stage
        self._shape: dict[str, Any] = {
            "points": len(keypoints.names), "size": self.size, "hidden": hidden,
            "attention": attention,
        }  # fmt: skip
        self.network = _network(variant, self._shape)
        self.ema = None if ema is None else Average(self.network, ema)
        teaches = {"plain": (), "distil": ("both", "first"), "head": ("both", "second")}[stage]
        self.taught = distill and lessons in teaches
        self.teacher: Teacher | None = None  # made when its weights are known
        self.teacher_variant, self.teacher_bn = teacher_variant, teacher_bn
        self.align: nn.Module = nn.Identity()
        if self.taught and stage == "distil" and variant != teacher_variant:
            self.align = nn.Conv2d(channels_of(variant), channels_of(teacher_variant), 1)
        if stage == "head":
            self.network.backbone.requires_grad_(False)
        self.init = init if stage != "head" else None
        self.source = {"plain": None, "distil": teacher, "head": start}[stage]
        self.alpha, self.beta, self.sigma = alpha, beta, sigma
        self.reference_batch_size = reference_batch_size
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.flat, self.final, self.flip_test = flat, final, flip_test
        self._scores: PoseScores | None = None
        self.train()  # the trainer keeps the modes it finds

    @property
    def student(self) -> nn.Module:
        """The network; in a checkpoint it holds the averaged weights."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """A crop of noise."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(1, 3, self.size[1], self.size[0], generator=generator),)

    # --- who teaches --------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read the files: only a run that trains needs them."""
        if stage != "fit":
            return
        if self.init is not None:
            fresh = load_into(self.network, self.init, strict=False)
            if fresh:
                log.info("%s: %d tensors start afresh, %s first", self.init, len(fresh), fresh[0])
            self._restart_average()
        if self.source is None:
            return
        if self.taught:
            self._teach(read_weights(self.source), self.source)
        elif self.stage == "head":
            load_into(self.network, self.source)
            self._restart_average()

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Start from the stage before: ``distil`` has it teach, ``head`` goes on with it."""
        if self.taught:
            self._teach(merge(weights), _STAGE)
        elif self.stage == "head":
            super().load_stage(weights)
            self._restart_average()

    def _teach(self, weights: dict[str, Tensor], source: Path) -> None:
        """Make the teacher of its weights; in ``head`` the backbone takes its part of them."""
        if self.stage == "distil":
            network = _network(self.teacher_variant, self._shape)
            network.load_state_dict(fitting_weights(network, weights, source))
            stored = self.source is None
            self.teacher = PoseTeacher(network, batch_norm=self.teacher_bn, stored=stored)
        else:
            whole = copy.deepcopy(self.network)
            whole.load_state_dict(fitting_weights(whole, weights, source))
            self.network.backbone.load_state_dict(whole.backbone.state_dict())
            self._restart_average()
            self.teacher = HeadTeacher(whole.head)
        self.teacher.to(self.device)

    def _restart_average(self) -> None:
        if self.ema is not None:
            self.ema.restart()

    def train(self, mode: bool = True) -> DWPose:
        """Switch the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.stage == "head" and not (self.taught and self.teacher_bn == "train"):
            self.network.backbone.eval()
        return self

    # --- training -----------------------------------------------------------------------------

    @property
    def untouched(self) -> bool:
        """Whether there is nothing to train: ``head`` without lessons."""
        return self.stage == "head" and not self.taught

    def on_train_start(self) -> None:
        """Say what is missing before the first step."""
        if self.taught and self.teacher is None:
            option = "teacher" if self.stage == "distil" else "start"
            raise InputError(f"stage {self.stage}: has no teacher, give model.{option} a file")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Leave the epoch at once when there is nothing to train."""
        return -1 if self.untouched else None

    @property
    def progress(self) -> float:
        """The share of the epochs done, by which the terms fall."""
        trainer = self._trainer
        epochs = None if trainer is None else trainer.max_epochs
        return self.current_epoch / epochs if epochs and epochs > 0 else super().progress

    def forward_train(self, batch: Batch) -> Pass:
        """Features and logits of the student."""
        with torch.set_grad_enabled(self.stage != "head"):
            features = self.network.backbone(batch.images)
        return Pass(batch.images, features, self.network.head(features))

    def task_loss(self, outputs: Pass, batch: Batch) -> dict[str, Tensor]:
        """L_ori; in ``head`` labels are not used."""
        if self.stage == "head":
            return {}
        labels, weight = encode(batch.points, batch.visible, self.size, self.sigma)
        reference = self.reference_batch_size
        loss = simcc_loss(
            outputs.logits, labels, weight, beta=self.beta, reference_batch_size=reference
        )
        if reference is not None and self._trainer is not None:
            self.log("train/task_as_released", loss.detach() * len(weight) / reference)
        return {"task": loss}

    def distill_loss(self, outputs: Pass, batch: Batch) -> dict[str, Tensor]:
        """L_fea and L_logit in ``distil``, L_logit in ``head``."""
        if not self.taught or self.teacher is None:
            return {}
        if self.stage == "head":
            wanted = self.teacher(outputs.features)
            return {"logit": simcc_distillation(outputs.logits, wanted, beta=self.beta)}
        features, wanted = self.teacher(outputs.images)
        return {
            "feature": feature_loss(self.align(outputs.features), features, alpha=self.alpha),
            "logit": simcc_distillation(outputs.logits, wanted, beta=self.beta),
        }

    def configure_optimizers(self) -> Any:
        """AdamW: linear warm-up, constant, cosine."""
        norms = {id(p) for m in self.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        spared = [id(p) in norms or n.endswith(".bias") for n, p in named]
        groups = [
            {"params": [p for (_, p), s in zip(named, spared, strict=True) if not s],
             "weight_decay": self.weight_decay},
            {"params": [p for (_, p), s in zip(named, spared, strict=True) if s],
             "weight_decay": 0.0},
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, self.lr, fused=True)
        if self.untouched:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: self._rate(n, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int, total: int) -> float:
        """The learning rate's share."""
        begin = self.flat * total
        if step < begin or begin >= total:
            warm = step / self.warmup if self.warmup else 1.0
            return min(max(warm, 1e-5), 1.0)
        wave = 0.5 + 0.5 * math.cos(math.pi * min((step - begin) / (total - begin), 1.0))
        warm = min(step / self.warmup, 1.0) if self.warmup else 1.0
        return warm * (self.final + (1 - self.final) * wave)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The averaged weights are the checkpoint's; those in training go beside them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["live"] = state = checkpoint["state_dict"]
        if self.ema is not None:
            averaged = {f"network.{k}": v for k, v in self.ema.network.state_dict().items()}
            checkpoint["state_dict"] = {**state, **averaged}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the weights in training, and with the teacher that was kept."""
        if state := checkpoint["teachers"].get("teacher"):
            if self.stage == "head":
                head = copy.deepcopy(self.network.head)
                self.teacher = HeadTeacher(head).to(self.device)
            elif self.teacher is None:
                self._teach(state, _STAGE)
        super().on_load_checkpoint(checkpoint)
        if self.ema is not None:
            self.ema.network.load_state_dict(merge(checkpoint["state_dict"]))
        checkpoint["state_dict"] = checkpoint["live"]

    # --- evaluation ---------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, network: Any, images: Tensor) -> SimCC:
        """Logits, with the flip test those of both mirror images.

        Args:
            network: An RTMPose.
            images: ``(B, 3, height, width)``.
        """
        found = network(images)
        if not self.flip_test:
            return found
        mirror = flip_back(network(images.flip(-1)), self.keypoints.flip)
        return SimCC(*((a + b) / 2 for a, b in zip(found, mirror, strict=True)))

    def _start_scores(self, part: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._scores = PoseScores(data.parts[part], data.boxed[part], self.keypoints)

    def on_validation_epoch_start(self) -> None:
        """Start new scores."""
        self._start_scores("val")

    def on_test_epoch_start(self) -> None:
        """Start new scores."""
        self._start_scores("test")

    def _add(self, network: Any, batch: Batch) -> None:
        points, scores = decode(self.look(network, batch.images))
        centre, extent = batch.crops.split(2, -1)
        size = torch.tensor(self.size, device=points.device)
        there = points.double() / size * extent[:, None] + (centre - extent / 2)[:, None]
        found = torch.cat([there, scores[..., None].double()], -1).cpu().numpy()
        assert self._scores is not None
        self._scores.add(batch.rows.cpu().numpy(), found)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the averaged weights while training, the loaded ones otherwise."""
        training = self._trainer is not None and self.trainer.state.fn == "fit"
        self._add(self.ema.network if training and self.ema else self.network, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score."""
        self._add(self.network, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all points."""
        self._log_scores("val", parts=False)

    def on_test_epoch_end(self) -> None:
        """Log all scores."""
        self._log_scores("test", parts=True)

    def _log_scores(self, part: str, parts: bool) -> None:
        assert self._scores is not None
        found = self._scores.summary(parts)
        self.log_dict({f"{part}/{name}": value for name, value in found.items()}, sync_dist=True)

    # --- use ----------------------------------------------------------------------------------

    def poser(self) -> Poser:
        """The network for pictures."""
        return Poser(lambda images: self.look(self.network, images), self.size, self.keypoints)

    def predict_files(
        self,
        inputs: list[Path],
        out: Path,
        *,
        detector: Path | None = None,
        boxes: Path | None = None,
        sure: float = 0.4,
        threshold: float = 0.3,
        picture: bool = True,
        black: bool = False,
        openpose: bool = False,
        batch: int = 8,
    ) -> list[Path]:
        """Find the key points of people in pictures and clips.

        People are where the detector or the file of boxes says; without either the whole picture is
        taken for one person.

        Args:
            inputs: Pictures, clips, or folders of them.
            out: Folder for ``poses.json``, and ``<name>.json`` of each clip.
            detector: Run folder of a detector; of its classes ``person`` is taken, if it has it.
            boxes: JSON of file name → list of [x, y, width, height].
            sure: Lowest score of a detected person.
            threshold: Lowest score of a point that is drawn.
            picture: Whether to draw the people on a copy.
            black: Draw on black instead, as ControlNet takes it.
            openpose: Write the points in the order of ControlNet's preprocessors, with the neck.
            batch: Frames a pass.
        """
        where = boxes_from(detector, boxes, sure, self.device)
        poser = self.poser()
        poser.threshold, poser.black, poser.openpose = threshold, black, openpose
        return poser.files(inputs, out, self.device, where, picture=picture, batch=batch)

    def pictures(self, out: Path) -> None:
        """Truth (left) and found points (right) of the first test people, ``people.png``."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        people, poser = data.boxed["test"], self.poser()
        rows: list[list[np.ndarray]] = []
        for n in range(min(len(people), 6)):
            pixels = people.photos[people.photo[n]].read()
            if rows and pixels.shape != rows[0][0].shape:
                continue
            found = poser.find(pixels, people.boxes[n : n + 1], self.device)
            rows.append([
                draw_people(pixels, points, self.keypoints, level)
                for points, level in ((people.points[n : n + 1], 0.5), (found, 0.0))
            ])  # fmt: skip
        if rows:
            side_by_side(out / "people.png", rows)


def _network(variant: Variant, shape: dict[str, Any]) -> RTMPose:
    """Channels last in memory, as the crops are: convolutions are a quarter faster."""
    return RTMPose(variant, **shape).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

"""SelfDRSC: learn to correct dual reversed rolling shutter from the pairs themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule
from cohobate.core.teachers import EMATeacher, FrozenTeacher, Teacher
from cohobate.video.flow import FlowKind, make_flow
from cohobate.video.metrics import frame_scores, load_lpips, psnr
from cohobate.video.perceptual import VGGFeatures
from cohobate.video.plots import overview
from cohobate.video.selfdrsc import losses
from cohobate.video.selfdrsc.checkpoint import load_official
from cohobate.video.selfdrsc.network import Corrected, preset
from cohobate.video.selfdrsc.predict import Task, frames_at, times_of
from cohobate.video.timing import encoding, row_times

log = logging.getLogger("cohobate")


class SelfDRSC(DistillModule):
    """Trains a correction network on dual reversed pairs without global-shutter truth.

    The network predicts frames at 0, t and 1; with the flows between them both inputs are made
    again and compared: ``L1 = sum_dir [l(R, RS) + l(R_mid, RS)] + 0.1 sum_i TV(F_i)`` with
    ``l = Charbonnier + 0.1 perceptual``. With a ``margin`` this is the second stage: a frozen copy
    of the first stage's network sees the whole patch, the student the patch without its margin,
    and ``l(E_student, E_teacher)`` is added on the student's part.

    ``distill=False`` leaves the teacher out: the first stage goes on, on the same crops.

    Args:
        network: ``tiny`` (0.4 M parameters, for a CPU) or ``paper`` (28.8 M).
        margin: Pixels that the student does not see on each side, and the teacher does; 0 is the
            first stage.
        distill: Whether there is a teacher in the second stage.
        supervised: Learn from true frames instead, with the same distances.
        flow: The frozen estimator of flows between predicted frames.
        flow_weights: Its file of weights.
        vgg_weights: torchvision's file of ``vgg19``; without it there is no perceptual term.
        perceptual: Weight of the perceptual terms.
        variation: Weight of the flows' variation.
        boundary: What becomes of pixels that leave the image: ``zero`` as published, or
            ``normalised``.
        official_warp: Sample in the reconstruction as the released code does.
        double_encode_first: As for the network.
        weights: Released weights to start from; only with ``network: paper``.
        bgr: The network sees blue first, as released weights do.
        teacher_decay: Decay of the teacher's average of the student; 1 keeps it as it was.
        lr: Learning rate of AdamW at the start; a cosine takes it to ``min_lr``.
        min_lr: Learning rate at the end.
        weight_decay: Of AdamW; the released code runs with PyTorch's default.
        border: Pixels cut off each side before scoring; published scores cut 20.
        ring: Width of the border that is scored by itself.
        lpips_weights: torchvision's file of ``alexnet``, for LPIPS.

    References:
        Shang, Ren, Feng, Wang, Lei, Zuo: Self-supervised Learning to Bring Dual Reversed Rolling
        Shutter Images Alive, ICCV 2023, arXiv 2305.19862.
    """

    monitor: ClassVar[str] = "val/reconstruction"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        network: Literal["tiny", "paper"] = "tiny",
        margin: int = 0,
        distill: bool = True,
        supervised: bool = False,
        flow: FlowKind = "lucas-kanade",
        flow_weights: Path | None = None,
        vgg_weights: Path | None = None,
        perceptual: float = 0.1,
        variation: float = 0.1,
        boundary: losses.Boundary = "zero",
        official_warp: bool = False,
        double_encode_first: bool = True,
        weights: Path | None = None,
        bgr: bool = False,
        teacher_decay: float = 1.0,
        lr: float = 1e-4,
        min_lr: float = 1e-7,
        weight_decay: float = 0.01,
        border: int = 0,
        ring: int = 6,
        lpips_weights: Path | None = None,
    ) -> None:
        scale = {"perceptual": perceptual, "distil_perceptual": perceptual, "variation": variation}
        super().__init__(distill=distill and margin > 0, weights=scale)
        self.network = preset(network, double_encode_first)
        if weights is not None:
            load_official(self.network, weights)
        self.flow = _Between(make_flow(flow, flow_weights, official_warp=official_warp))
        self.features = _features(vgg_weights, perceptual)
        self.teacher = EMATeacher(self.network, teacher_decay) if self.distill else None
        self.margin, self.supervised, self.bgr = margin, supervised, bgr
        self.boundary, self.official_warp = boundary, official_warp
        self.lr, self.min_lr, self.weight_decay = lr, min_lr, weight_decay
        self.border, self.ring = border, ring
        self.judge = None if lpips_weights is None else FrozenTeacher(load_lpips(lpips_weights))
        self._example: tuple[Tensor, ...] | None = None

    @property
    def student(self) -> nn.Module:
        """The correction network."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """A pair ``(1, 2, 3, 64, 64)`` and its encoding ``(1, 6, 64, 1)`` for t = 0.5."""
        return torch.rand(1, 2, 3, 64, 64), encoding(row_times(64), torch.tensor([0.5]))

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Student and teacher start from the first stage's student."""
        super().load_stage(weights)
        if self.teacher is not None:
            self.teacher.load_changing_state(self.network.state_dict())

    # --- training ----------------------------------------------------------------------------

    def forward_train(self, batch: dict[str, Any]) -> _Outputs:
        """Correct the crop's centre, and make both inputs again from the result."""
        images, times = self._order(batch["images"]), self._times(batch)
        self._check(images)
        seen, seen_times = losses.centre(images, self.margin), losses.centre(times, self.margin)
        out = self.network.correct(seen, encoding(seen_times, batch["time"]))
        made = None
        if not self.supervised:
            made = losses.reconstruct(
                out.frames, self.flow(out.frames), seen_times, batch["time"],
                boundary=self.boundary, official_warp=self.official_warp,
            )  # fmt: skip
        wanted = None
        if self.teacher is not None:
            wanted = self.teacher(images, encoding(times, batch["time"]))
        return _Outputs(out, seen, made, wanted)

    def task_loss(self, outputs: _Outputs, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Distances of the reconstructed inputs (or of the frames from truth), and variation."""
        if outputs.made is not None:
            terms = losses.self_supervised(
                outputs.made, outputs.seen, self.features, boundary=self.boundary
            )
        else:
            if "frames" not in batch:
                raise InputError("supervised: the data has no true frames")
            truth = losses.centre(self._order(batch["frames"]), self.margin)
            frames = outputs.out.frames
            terms = {"reconstruction": losses.charbonnier(frames, truth)}
            if self.features is not None:
                terms["perceptual"] = losses.perceptual(frames, truth, self.features)
        levels = [losses.variation(flow) for flow in outputs.out.flows]
        return {**terms, "variation": torch.stack(levels).sum()}

    def distill_loss(self, outputs: _Outputs, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Distance from what the teacher, who saw the margin too, gives on the student's part."""
        assert outputs.wanted is not None
        return losses.self_distillation(outputs.out.frames, outputs.wanted, self.features)

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine from ``lr`` to ``min_lr`` over the whole training."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.lr, weight_decay=self.weight_decay
        )
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, self.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _times(self, batch: dict[str, Any]) -> Tensor:
        return row_times(batch["rows"], batch["top"], batch["images"].shape[-2])

    def _order(self, images: Tensor) -> Tensor:
        """Colours as the network sees them, and back."""
        return images.flip(-3) if self.bgr else images

    def _check(self, images: Tensor) -> None:
        multiple = self.network.multiple
        for size in images.shape[-2:]:
            inner = size - 2 * self.margin
            if inner < multiple or inner % multiple or (self.teacher and size % multiple):
                raise InputError(
                    f"data.patch: crops of {images.shape[-1]}×{images.shape[-2]} pixels with a "
                    f"margin of {self.margin}, both sides must be multiples of {multiple}"
                )

    # --- evaluation --------------------------------------------------------------------------

    def correct(self, images: Tensor, times: Sequence[float]) -> Tensor:
        """Frames ``(len(times), 3, H, W)`` of a pair ``(2, 3, H, W)`` of any size."""
        images = self._order(images.to(self.device))
        return self._order(frames_at(self.network, images, times))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """How well the inputs are made again, which needs no truth."""
        self._log("val", {"reconstruction": self._reconstruction(batch["images"][0])})

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same, and where there is truth the scores of frames and of the inputs as such."""
        images = batch["images"][0]
        scores = {"reconstruction": self._reconstruction(images)}
        truth = batch["frames"][0] if "frames" in batch else None
        times = times_of(9 if truth is None else len(truth), None)
        found = self.correct(images, times)
        if truth is not None:
            options = {"border": self.border, "ring": self.ring}
            scores |= frame_scores(found, truth, **options)
            for name, still in (("rs", images[0]), ("average", images.mean(0))):
                same = frame_scores(still.expand_as(truth), truth, **options)
                scores |= {f"{name}_{key}": value for key, value in same.items()}
            if self.judge is not None:
                scores["lpips"] = self.judge(found * 2 - 1, truth * 2 - 1).mean()
        if batch_idx == 0:
            shown = (images, found) if truth is None else (images, found, truth)
            self._example = tuple(x.cpu() for x in shown)
        self._log("test", scores)

    def _reconstruction(self, images: Tensor) -> Tensor:
        """PSNR of both inputs made again from the frames at 0, 0.5 and 1."""
        frames = self.correct(images, (0.0, 0.5, 1.0))[None]
        with torch.no_grad():
            made = losses.reconstruct(
                frames, self.flow(frames), row_times(images.shape[-2]).to(images),
                torch.tensor([0.5]), boundary="normalised",
            )  # fmt: skip
        wanted = torch.cat((images, images))
        shown = torch.where(made.valid[0] > 0, made.images[0], wanted)
        return psnr(255 * shown, 255 * wanted).mean()

    def _log(self, split: str, scores: dict[str, Tensor]) -> None:
        named = {f"{split}/{name}": value for name, value in scores.items()}
        self.log_dict(named, batch_size=1, sync_dist=True)

    # --- use ---------------------------------------------------------------------------------

    def predict_files(
        self,
        inputs: list[Path],
        out: Path,
        *,
        frames: int = 9,
        times: list[float] | None = None,
        fps: float = 25.0,
        side_by_side: bool = True,
    ) -> list[Path]:
        """Make global-shutter frames of two clips, of two pictures, or of a folder of pairs.

        Args:
            inputs: t2b and b2t, or a folder with ``<name>_t2b.png`` and ``<name>_b2t.png``.
            out: Folder for the results.
            frames: Frames of each pair, at evenly spaced times of the readout.
            times: These times instead, from 0 (first row of t2b) to 1 (its last row).
            fps: Frames a second of the clips written.
            side_by_side: Also write a clip with inputs and result beside each other.

        Returns:
            The files written.
        """
        if fps <= 0:
            raise InputError(f"fps {fps:g}: must be positive")
        task = Task(self.correct, times_of(frames, times), fps, side_by_side, out)
        return task.run(inputs)

    def pictures(self, out: Path) -> None:
        """The first test pair: inputs, frames, errors."""
        if self._example is None:
            return
        shown = [(255 * x).round().byte().permute(0, 2, 3, 1).numpy() for x in self._example]
        times = times_of(len(shown[1]), None)
        truth = shown[2] if len(shown) > 2 else None
        overview(out / "frames.png", shown[0], shown[1], times, truth)


class _Outputs(NamedTuple):
    """What a training step computes; images are the student's part."""

    out: Corrected
    seen: Tensor
    made: losses.Reconstruction | None
    wanted: Tensor | None


class _Between(Teacher):
    """The frozen flow estimator on three frames; gradients go through it to the frames."""

    def __init__(self, estimator: nn.Module) -> None:
        super().__init__(estimator, grad_input=True)

    def answer(self, frames: Tensor) -> Tensor:
        """Flows ``(B, 6, 2, H, W)`` of `losses.PAIRS`, float32."""
        with torch.autocast(frames.device.type, enabled=False):
            estimator: Any = self.networks[0]
            return estimator.pairs(frames.float(), losses.PAIRS)


def _features(weights: Path | None, weight: float) -> FrozenTeacher | None:
    """VGG where its weights are at hand."""
    if weight == 0:
        return None
    if weights is None:
        log.warning("no perceptual term: model.vgg_weights names no file")
        return None
    return FrozenTeacher(VGGFeatures(weights), grad_input=True)

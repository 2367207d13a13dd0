"""D-FINE: boxes as refined edge distributions, the last layer as teacher of the others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint
from cohobate.core.module import DistillModule
from cohobate.detection.boxes import Targets
from cohobate.detection.d_fine.checkpoint import load_weights_into
from cohobate.detection.d_fine.criterion import Criterion, Distillation, Matched, total_by_kind
from cohobate.detection.d_fine.denoising import Denoising
from cohobate.detection.d_fine.ema import WarmEMA
from cohobate.detection.d_fine.network import DFineNet, Regression, best, deploy
from cohobate.detection.d_fine.optim import RATES, adamw
from cohobate.detection.d_fine.sizes import Size, config_of
from cohobate.detection.data import Batch, Category, Picture
from cohobate.detection.media import Found, look_through
from cohobate.detection.metrics import CocoScores
from cohobate.detection.plots import draw, side_by_side
from cohobate.detection.predict import Detector

log = logging.getLogger("cohobate")

WEIGHTS = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5, "ld": 1.5, "kd": 0.1}
_DENOISING = Denoising()


class Pass(NamedTuple):
    """One training pass.

    Attributes:
        matched: Outputs with their matches: matching queries, then denoising ones.
        targets: The objects.
    """

    matched: list[Matched]
    targets: Targets


class DFine(DistillModule):
    """Trains D-FINE.

    ``L = VFL + 5 L1 + 2 GIoU + 0.15 FGL + 1.5 DDF`` over all decoder layers, the initial boxes, the
    encoder's proposals and the denoising queries. The weights' moving average is evaluated, kept
    and exported.

    Training has two stages when the data has a ``stop_epoch``: from then on the strong
    augmentations are off, the best checkpoint of the first stage is taken up again, and whenever an
    epoch brings nothing better the average's decay falls by 1e-4 and that checkpoint is taken up
    once more.

    Args:
        categories: The classes with their ids; from the data.
        size: Side of the square input; from the data.
        stop_epoch: First epoch of the second stage; from the data.
        variant: Size of the network.
        init: Weights to start from, an official ``.pth`` or a Hub folder; what does not fit, such
            as the heads of other classes, starts afresh.
        regression: ``fdr`` as in the paper, or ``plain`` iterative box regression.
        distillation: ``go_lsd``, or what the paper compares it with: ``localization`` distillation
            of matched queries' edges, mimicking of class ``logits``.
        num_queries: Q.
        decoder_layers: L; by default the size's.
        top: Detections an image.
        denoising: Of the denoising queries.
        temperature: T of the distillation.
        weights: Of the terms, over the paper's.
        lr: Learning rate; by default the size's.
        backbone_lr: The backbone's; by default the size's.
        weight_decay: By default the size's.
        warmup: Steps of linear warm-up; 0 when fine-tuning.
        clip: Largest norm of the gradient.
        ema_decay: Decay of the average.
        ema_warmup: Steps over which the decay grows; 0 when fine-tuning.
        ema_restart: Decay in the second stage.
        distill: False trains without the last layer's lessons and with each output's own match.

    Raises:
        InputError: The options contradict each other.

    References:
        arXiv 2410.13842.
    """

    from_data: ClassVar[tuple[str, ...]] = ("categories", "size", "stop_epoch")
    monitor: ClassVar[str] = "val/ap"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        *,
        categories: list[Category],
        size: int,
        stop_epoch: int | None = None,
        variant: Size = "n",
        init: Path | None = None,
        regression: Regression = "fdr",
        distillation: Distillation = "go_lsd",
        num_queries: int = 300,
        decoder_layers: int | None = None,
        top: int = 300,
        denoising: Denoising = _DENOISING,
        temperature: float = 5.0,
        weights: dict[str, float] | None = None,
        lr: float | None = None,
        backbone_lr: float | None = None,
        weight_decay: float | None = None,
        warmup: int = 500,
        clip: float = 0.1,
        ema_decay: float = 0.9999,
        ema_warmup: int = 1000,
        ema_restart: float = 0.9999,
        distill: bool = True,
    ) -> None:
        super().__init__(distill=distill, weights={**WEIGHTS, **(weights or {})})
        if distill and regression == "plain" and distillation in ("go_lsd", "localization"):
            raise InputError(
                f"model.distillation: plain regression has no edge distributions for {distillation}"
            )
        self.categories, self.size, self.stop_epoch = categories, size, stop_epoch
        config = config_of(
            variant, len(categories), num_queries=num_queries, decoder_layers=decoder_layers
        )
        self.network = DFineNet(config, regression=regression, top=top)
        self.ema = WarmEMA(self.network, ema_decay, ema_warmup)
        self.init, self.denoising = init, denoising
        self.criterion = Criterion(
            distillation if distill else "none",
            up=config.up,
            reg_scale=config.reg_scale,
            temperature=temperature,
        )
        own = RATES[variant]
        self.rates = own._replace(
            lr=own.lr if lr is None else lr,
            backbone=own.backbone if backbone_lr is None else backbone_lr,
            weight_decay=own.weight_decay if weight_decay is None else weight_decay,
        )
        self.warmup, self.clip, self.ema_restart = warmup, clip, ema_restart
        self._best, self._second_stage, self._stale = -1.0, False, False
        self._scores: dict[str, CocoScores] = {}

    @property
    def student(self) -> nn.Module:
        """The network; in a checkpoint it holds the averaged weights."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """An image of noise and its size."""
        noise = torch.rand(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        return noise, torch.full((1, 2), float(self.size))

    # --- training -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the initial weights: only a run that starts needs their file."""
        if stage == "fit" and self.init is not None:
            fresh = load_weights_into(self.network, self.init, strict=False)
            self.ema.network.load_state_dict(self.network.state_dict())
            if fresh:
                log.info("%s: %d tensors start afresh, %s first", self.init, len(fresh), fresh[0])

    def forward_train(self, batch: Batch) -> Pass:
        """All layers' outputs and their matches.

        Raises:
            InputError: An image has a pixel that is no finite number: its losses would be nothing.
        """
        targets, finite = batch.targets, batch.images.isfinite().flatten(1).all(1)
        if not finite.all():
            name = batch.pictures[int(finite.long().argmin())].name
            raise InputError(f"{name}: has pixels that are no finite numbers")
        outputs, noised = self.network.outputs(batch.images, targets, self.denoising)
        return Pass(self.criterion.match(outputs, targets, noised), targets)

    def task_loss(self, outputs: Pass, batch: Batch) -> dict[str, Tensor]:
        """VFL, L1, GIoU and FGL, each summed over all outputs."""
        return total_by_kind(self.criterion.task(outputs.matched, outputs.targets))

    def distill_loss(self, outputs: Pass, batch: Batch) -> dict[str, Tensor]:
        """DDF, or the term it is compared with, summed over the layers that learn."""
        return total_by_kind(self.criterion.distill(outputs.matched))

    def configure_optimizers(self) -> Any:
        """AdamW at constant rates after a linear warm-up."""
        mixed = self._trainer is not None and "mixed" in str(self.trainer.precision)
        optimizer = adamw(self.network, self.rates, mixed=mixed)
        steps = max(self.warmup, 1)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm; the trainer's own option wins."""
        value = self.clip if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, value, gradient_clip_algorithm or "norm")

    # --- two stages ---------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Begin the second stage when it is time."""
        if self.current_epoch != self.stop_epoch or self._second_stage:
            return
        self._second_stage = True
        self.ema.final = self.ema_restart
        best_file = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best_file:
            if self.trainer.is_global_zero:
                shutil.copyfile(best_file, self._first_stage_file())
            self.trainer.strategy.barrier()
            self._take_up_first_stage()

    def on_train_epoch_end(self) -> None:
        """Take up the first stage's best again when the epoch brought nothing better."""
        super().on_train_epoch_end()
        if self._stale:
            self._stale, self._best = False, -1.0
            self.ema.final -= 1e-4
            if self._first_stage_file().exists():
                self._take_up_first_stage()

    def _first_stage_file(self) -> Path:
        return Path(self.trainer.default_root_dir) / "first-stage.ckpt"

    def _take_up_first_stage(self) -> None:
        """Weights, average and optimiser of the first stage's best epoch."""
        checkpoint = load_checkpoint(self._first_stage_file())
        self.ema.network.load_state_dict(_network_of(checkpoint["state_dict"]))
        self.network.load_state_dict(_network_of(checkpoint["live"]))
        self.ema.updates = int(checkpoint["teachers"]["ema"]["updates"])
        self.trainer.optimizers[0].load_state_dict(checkpoint["optimizer_states"][0])

    def _judge(self, ap: float) -> None:
        if ap > self._best:
            self._best = ap
        elif self._second_stage:
            self._stale = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The averaged weights are the checkpoint's; those in training go beside them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["live"] = checkpoint["state_dict"]
        averaged = {f"network.{k}": v for k, v in self.ema.network.state_dict().items()}
        checkpoint["state_dict"] = averaged
        checkpoint["two_stages"] = [self._best, self._second_stage, self._stale]
        checkpoint["categories"] = [[c.id, c.name] for c in self.categories]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the weights in training."""
        super().on_load_checkpoint(checkpoint)
        self.ema.network.load_state_dict(_network_of(checkpoint["state_dict"]))
        checkpoint["state_dict"] = checkpoint["live"]
        self._best, self._second_stage, self._stale = checkpoint["two_stages"]

    # --- evaluation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = {"": CocoScores(self.categories)}

    def on_test_epoch_start(self) -> None:
        """Start new scores, of the first layer too."""
        self._scores = {key: CocoScores(self.categories) for key in ("", "_layer0")}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the averaged weights while training, the loaded ones otherwise."""
        training = self._trainer is not None and self.trainer.state.fn == "fit"
        network = self.ema.network if training else self.network
        assert isinstance(network, DFineNet)
        self._add("", *network.predict(batch.images), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the last and the first layer."""
        outputs, _ = self.network.outputs(batch.images)
        last = outputs.layers - 1
        self._add("", outputs.logits[last], outputs.boxes[last], batch)
        self._add("_layer0", outputs.logits[0], outputs.boxes[0], batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores; judge the epoch."""
        found = self._log_scores("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._judge(found["val/ap"])

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("test")

    def _add(self, key: str, logits: Tensor, boxes: Tensor, batch: Batch) -> None:
        found = best(logits.float(), boxes.float(), batch.sizes, self.network.top)
        for picture, *rows in zip(batch.pictures, *found, strict=True):
            self._scores[key].add(picture, *rows)

    def _log_scores(self, part: str) -> dict[str, float]:
        found = {
            f"{part}/{name}{key}": value
            for key, scores in self._scores.items()
            for name, value in scores.summary().items()
            if not (key and name.startswith("ap_"))
        }
        self.log_dict(found, sync_dist=True)
        return found

    # --- use ----------------------------------------------------------------------------------

    def detector(self) -> Detector:
        """The network in the form for inference, for files."""
        return Detector(deploy(self.network), self.size, self.categories)

    def predict_files(
        self,
        inputs: list[Path],
        out: Path,
        *,
        threshold: float = 0.4,
        picture: bool = True,
        batch: int = 8,
    ) -> list[Path]:
        """Detect in pictures and clips.

        Args:
            inputs: Pictures, clips, or folders of them.
            out: Folder for ``detections.json``, and ``<name>.json`` of each clip.
            threshold: Lowest score.
            picture: Whether to draw the boxes on a copy.
            batch: Frames a pass.
        """
        detector = self.detector()

        def look(_: Path, pictures: Sequence[np.ndarray]) -> list[Found]:
            found = detector.detect(pictures, self.device, threshold)
            return [
                Found(one, partial(detector.drawn, pixels, one))
                for pixels, one in zip(pictures, found, strict=True)
            ]

        return look_through(
            inputs, out, look, doing="detecting", results="detections.json",
            ending="_detected.jpg" if picture else None, batch=batch,
        )  # fmt: skip

    def pictures(self, out: Path) -> None:
        """Truth (left) and detections (right) of the first test pictures, ``detections.png``."""
        loader = self.trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]
        detector, rows = self.detector(), []
        size: tuple[int, ...] | None = None
        for picture in (loader.dataset[n].picture for n in range(min(len(loader.dataset), 4))):
            pixels = picture.read()
            if size is not None and pixels.shape != size:
                continue
            size = pixels.shape
            found = detector.detect([pixels], self.device, threshold=0.4)[0]
            rows.append([_truth(picture, self.categories), detector.drawn(pixels, found)])
        side_by_side(out / "detections.png", rows)


def _truth(picture: Picture, categories: list[Category]) -> Any:
    boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in picture.boxes.tolist()]
    labels = picture.labels.tolist()
    return draw(picture.read(), boxes, labels, [categories[n].name for n in labels])


def _network_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}

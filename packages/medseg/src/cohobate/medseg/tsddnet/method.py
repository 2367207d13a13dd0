"""TSDDNet: a detector and a classifier that correct the boxes, then one network out of both.

Three stages, each a class: `Detect` trains D-Net on the drawn boxes, `Classify` trains C-Net on
crops of them, `Fuse` first lets both choose new boxes and then trains them jointly.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.core.io import load_weights
from cohobate.core.module import DistillModule
from cohobate.core.runs import checkpoint_file
from cohobate.medseg.tsddnet.audit import read_audit
from cohobate.medseg.tsddnet.data import Batch, UltrasoundData
from cohobate.medseg.tsddnet.losses import branch_ce, branch_hint, branch_kl
from cohobate.medseg.tsddnet.metrics import Scores
from cohobate.medseg.tsddnet.network import Detector, Diagnoser, Diagnosis, build_classifier
from cohobate.medseg.tsddnet.predict import FOUND, TRUTH, boxed, grid, predict
from cohobate.medseg.tsddnet.refine import quality, refine
from cohobate.medseg.tsddnet.selection import Selection, iou

log = logging.getLogger("cohobate")
_RULE = Selection()


class TSDDNet(DistillModule):
    """What the stages share: the networks, candidate selection, evaluation and prediction.

    All stages have the same networks and take the same options, so that one's weights are the
    next one's start.

    Args:
        class_names: The two classes, the positive one second; from the data.
        image_size: Side of the canvas; from the data.
        cross_fit: Inner folds; from the data.
        detector: D-Net: a detector of torchvision, or a timm backbone for a Faster R-CNN on it.
        detector_args: Arguments of the detector, see `network.Detector`.
        classifier: C-Net, a model of timm.
        crop_size: Side of C-Net's input.
        context: Share of the box that a crop adds on each side.
        fusion: False leaves D-Net and C-Net a plain pipeline.
        roi_hidden: Hidden units of the head on the detector's features.
        width: Size of each branch's vector.
        fused_width: Size of the fused vector.
        selection: How boxes are chosen.
        select: Choose boxes anew before this stage trains.
        threshold: Lowest detector score of a lesion; below, the whole image is diagnosed.
        detected_share: Share of training images for which the best detection, where it overlaps the
            box by 0.5, is diagnosed in its place.
        alpha: a, the weight of self-distillation against the label in the branches.
        temperature: T of the softmax in the KL terms.
        hint: c, the weight of the feature terms.
        detector_weights: Weights of a torchvision detector to start from, but for its predictor.
        classifier_weights: Weights of the timm classifier to start from, but for its head.
        start: Run folder of the classify stage to start from; fits strictly.
        lr: Learning rate; in the joint stage that of the heads.
        backbone_lr: Learning rate of detector backbone and C-Net in the joint stage.
        weight_decay: Weight decay.
        distill: False leaves out the KL and feature terms (a = c = 0).

    Raises:
        InputError: An option is out of range, or there is no such network.
    """

    from_data: ClassVar[tuple[str, ...]] = ("class_names", "image_size", "cross_fit")

    def __init__(
        self,
        *,
        class_names: list[str],
        image_size: int,
        cross_fit: int,
        detector: str = "fasterrcnn_resnet50_fpn",
        detector_args: dict[str, Any] | None = None,
        classifier: str = "resnet18",
        crop_size: int = 224,
        context: float = 0.1,
        fusion: bool = True,
        roi_hidden: int = 1024,
        width: int = 256,
        fused_width: int = 128,
        selection: Selection = _RULE,
        select: bool = False,
        threshold: float = 0.05,
        detected_share: float = 0.25,
        alpha: float = 0.3,
        temperature: float = 3.0,
        hint: float = 0.03,
        detector_weights: Path | None = None,
        classifier_weights: Path | None = None,
        start: Path | None = None,
        lr: float = 1e-4,
        backbone_lr: float = 1e-5,
        weight_decay: float = 0.05,
        distill: bool = True,
    ) -> None:
        distill = distill and fusion  # there is nothing to distil between without the branches
        weights = {
            "branch_ce": 1.0 - alpha if distill else 1.0,
            "self_kl": alpha,
            "self_hint": hint,
        }
        super().__init__(distill=distill, weights=weights)
        if not 0 <= alpha <= 1 or hint < 0 or not 0 <= detected_share <= 1:
            raise InputError("model: alpha and detected_share lie in 0 to 1, hint is not negative")
        self.class_names, self.image_size = class_names, image_size
        found = Detector(detector, detector_args, image_size, selection.nms)
        self.net = Diagnoser(
            found, classifier, len(class_names), crop_size, context,
            fusion, roi_hidden, width, fused_width, threshold,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # every arm goes on with the same random numbers
            self.fold_nets = nn.ModuleList(
                build_classifier(classifier, len(class_names)) for _ in range(cross_fit)
            )
            maps = [nn.Linear(width, fused_width) for _ in range(2 if distill else 0)]
            self.maps = nn.ModuleList(maps)
        self.selection, self.select, self.detected_share = selection, select, detected_share
        self.temperature = temperature
        self.detector_weights, self.classifier_weights = detector_weights, classifier_weights
        self.start = start
        self.lr, self.backbone_lr, self.weight_decay = lr, backbone_lr, weight_decay
        self.quality: dict[str, float] = {}
        self._initialised = False
        self._scores = Scores()

    @property
    def student(self) -> nn.Module:
        """Detector, classifier and fused head; the inner folds' C-Nets are not part of it."""
        return self.net

    def example_input(self) -> tuple[Tensor, ...]:
        """One canvas and its size."""
        side = self.image_size
        return torch.zeros(1, 3, side, side), torch.full((1, 2), side)

    def open_axes(self) -> tuple[dict[int, str], ...]:
        """None: a detector cannot be written as a fixed graph.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "medseg/tsddnet: no ONNX export, the number of detections depends on the image; "
            "export safetensors or hub"
        )

    # --- before a stage trains ----------------------------------------------------------------

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Start from an earlier stage, strictly: D-Net, C-Net and the inner folds' C-Nets."""
        needed = [k for k in self.state_dict() if k.startswith("fold_nets.")]
        if missing := [k for k in needed if k not in weights]:
            raise InputError(f"the earlier stage has no fitting weights for {missing[0]}")
        super().load_stage(weights)
        self._initialised = True

    def setup(self, stage: str) -> None:
        """Load the weights given by path, unless an earlier stage has been loaded."""
        if stage != "fit" or self._initialised:
            return
        if self.start is not None:
            self.load_stage(load_weights(checkpoint_file(Path(self.start))))
        if self.detector_weights is not None:
            self._load_detector(Path(self.detector_weights))
        if self.classifier_weights is not None:
            self._load_classifier(Path(self.classifier_weights))
        self._initialised = True

    def _load_detector(self, path: Path) -> None:
        try:
            fitting, left = self.net.detector.torchvision_state(load_weights(path))
        except InputError as error:
            raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        self.net.detector.load_state_dict(fitting, strict=False)
        log.info("%s: all but %s", path, ", ".join(left) or "nothing")

    def _load_classifier(self, path: Path) -> None:
        weights = load_weights(path)
        for net in (self.net.classifier, *self.fold_nets):
            own = net.state_dict()
            fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
            head = {n for n, m in net.named_modules() if m is net.get_classifier()}  # type: ignore[operator]
            left = [k for k in own if k not in fitting and k.rpartition(".")[0] not in head]
            if left:
                raise InputError(f"{path}: no fitting weights for {left[0]} of C-Net")
            net.load_state_dict(fitting, strict=False)
        log.info("%s: C-Net, all but its head", path)

    def on_fit_start(self) -> None:
        """Choose the boxes, or take them from a table; a resumed run has chosen before."""
        data: UltrasoundData = self.trainer.datamodule  # type: ignore[attr-defined]
        table = Path(self.trainer.default_root_dir) / "audit.csv"
        choosing = data.audit is None and self.select and self.selection.scope != "none"
        if choosing and not table.exists():
            self._select(data, table)
        self.trainer.strategy.barrier("audit")  # one process chooses, all apply
        source = table if choosing else data.audit
        if source is not None:
            data.apply(read_audit(Path(source), data.train.samples))
        self.quality = quality(data)
        if self.quality:
            told = ", ".join(f"{k} {v:.3f}" for k, v in self.quality.items())
            log.info("training boxes against the true ones: %s", told)

    @rank_zero_only
    def _select(self, data: UltrasoundData, table: Path) -> None:
        training = self.training
        self.eval()
        nets = list(self.fold_nets) or [self.net.classifier]
        with torch.random.fork_rng(devices=[]):  # as if the boxes came from a table
            audit = refine(self.net, nets, data, self.selection)
        self.train(training)
        audit.write_html(table.with_suffix(".html"), data.train.samples.images)
        audit.write_csv(table)
        log.info("boxes: %s (%s)", audit.summary(), table)

    # --- evaluation: the best detection, then its diagnosis -----------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = Scores()

    def on_test_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = Scores()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch."""
        self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch."""
        self._score(batch)

    def _score(self, batch: Batch) -> Diagnosis:
        images = rgb(batch)
        features = self.net.detector.features(images)
        found = self.net.detector.detect(features, images, batch["size"])
        box, _ = found.top(batch["size"], self.net.threshold)
        said = self.net.diagnose(features, images, batch["size"], box)
        p = said.logits.float().softmax(1)
        self._scores.add(found, box, p, batch["box"], batch["label"])
        return said

    def on_validation_epoch_end(self) -> None:
        """Log the scores; average precision is left to the test."""
        found = self._scores.summary(precision=False)
        found["score"] = (found.get("miou", 0.0) + found.get("auc", 0.0)) / 2
        self.log_dict({f"val/{k}": v for k, v in found.items()}, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the scores, and how good the training boxes were."""
        found = {**self._scores.summary(), **self.quality}
        self.log_dict({f"test/{k}": v for k, v in found.items()}, sync_dist=True)

    # --- use ----------------------------------------------------------------------------------

    def predict_files(
        self, inputs: list[Path], out: Path, *, threshold: float = 0.05, picture: bool = True
    ) -> list[Path]:
        """Find and diagnose the lesion of each image.

        Args:
            inputs: Image files, or folders of them.
            out: Folder for ``lesions.csv`` and ``<name>_lesion.png``.
            threshold: Lowest detector score of a lesion; below, the whole image is diagnosed.
            picture: Whether to draw.
        """
        self.eval()
        self.net.threshold = threshold
        return predict(self.net, inputs, out, self.class_names, self.image_size, picture)

    def pictures(self, out: Path) -> None:
        """Twelve test images with the true box and the one found, as ``lesions.png``."""
        data: UltrasoundData = self.trainer.datamodule  # type: ignore[attr-defined]
        batch = next(iter(data.whole(data.test, 12)))
        moved: Any = {k: v.to(self.device) for k, v in batch.items()}
        box, score, logits = self.net(rgb(moved), moved["size"])
        p = logits.softmax(1)[:, 1].cpu()
        cards = []
        for i, canvas in enumerate(data.test.canvas[: len(p)]):
            truth = data.class_names[int(batch["label"][i])]
            title = f"{truth}, p({data.class_names[1]}) {p[i]:.2f}, score {score[i]:.2f}"
            cards.append(
                boxed(canvas, {TRUTH: data.test.boxes[i], FOUND: box[i].cpu().numpy()}, title)
            )
        grid(out / "lesions.png", cards)


class Detect(TSDDNet):
    """Stage 1: D-Net alone on the boxes in use.

    ``L_det = L_rpn_obj + L_rpn_box + L_roi_cls + L_roi_box``.
    """

    monitor: ClassVar[str] = "val/miou"
    mode: ClassVar[str] = "max"

    def forward_train(self, batch: Batch) -> Tensor:
        """The detector's loss."""
        images = rgb(batch)
        features = self.net.detector.features(images)
        return self.net.detector.losses(features, images, batch["box"])

    def task_loss(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The same, by name; zero without gradient when no image of the batch has a box."""
        return {"detection": outputs if outputs.requires_grad else _no_loss(self.net.detector)}

    def distill_loss(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Nothing yet."""
        return {}

    def configure_optimizers(self) -> Any:
        """SGD with momentum; the rate falls by ten at 60 % and 85 % of the epochs."""
        optimizer = torch.optim.SGD(
            self.net.detector.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay
        )
        epochs = _epochs(self)
        drops = sorted({max(1, round(epochs * share)) for share in (0.6, 0.85)})
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "epoch"}}


class Classify(TSDDNet):
    """Stage 1: C-Net on crops of the boxes in use, ``CE(C(crop(x, b)), y)``.

    With cross-fitting, each inner fold has a C-Net more, trained on the other folds.
    """

    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"

    def forward_train(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of C-Net, and of the folds' C-Nets on images outside their fold."""
        crops = self._crops(batch)
        label, of = batch["label"], self._folds(batch["index"])
        losses = {"ce": F.cross_entropy(self.net.classifier(crops).float(), label)}
        terms = []
        for fold, net in enumerate(self.fold_nets):
            mine = of != fold  # only these pass through it: nothing of the others may leak
            if mine.sum() > 1:  # a batch norm needs two
                terms.append(F.cross_entropy(net(crops[mine]).float(), label[mine]))
        if terms:
            losses["fold_ce"] = torch.stack(terms).sum()
        return losses

    def task_loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The same."""
        return outputs

    def distill_loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Nothing yet."""
        return {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch; the loss is C-Net's on the drawn boxes."""
        super().validation_step(batch, batch_idx)
        boxed = batch["box"].isfinite().all(1)
        if boxed.any():
            kept: Any = {k: v[boxed] for k, v in dict[str, Any](batch).items()}
            loss = F.cross_entropy(self.net.classifier(self._crops(kept)).float(), kept["label"])
            self.log("val/loss", loss, batch_size=int(boxed.sum()), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine over the epochs."""
        parameters = [*self.net.classifier.parameters(), *self.fold_nets.parameters()]
        return _adamw([{"params": parameters, "lr": self.lr}], self)

    def _crops(self, batch: Batch) -> Tensor:
        return self.net.crops(rgb(batch), batch["size"], jittered(batch["box"], batch))

    def _folds(self, index: Tensor) -> Tensor:
        data: UltrasoundData = self.trainer.datamodule  # type: ignore[attr-defined]
        return torch.from_numpy(data.train.fold).to(index.device)[index]


class Fuse(TSDDNet):
    """Stage 2: detector, classifier and fused head jointly, with self-distillation.

    ``L = L_det + L_cls``; L_det on images with a box, L_cls on all, see `losses`.
    """

    monitor: ClassVar[str] = "val/score"
    mode: ClassVar[str] = "max"

    def forward_train(self, batch: Batch) -> tuple[Tensor, Diagnosis]:
        """The detector's loss and what the three heads say."""
        images = rgb(batch)
        features = self.net.detector.features(images)
        loss = self.net.detector.losses(features, images, batch["box"])
        box = jittered(self._boxes(features, images, batch), batch)
        return loss, self.net.diagnose(features, images, batch["size"], box)

    def task_loss(self, outputs: tuple[Tensor, Diagnosis], batch: Batch) -> dict[str, Tensor]:
        """L_det, CE(z_F, y) and Σ CE(z_i, y), whose weight is 1 − a."""
        loss, said = outputs
        terms = {"detection": loss, "ce": F.cross_entropy(said.logits.float(), batch["label"])}
        if said.branches:
            terms["branch_ce"] = branch_ce(said.branches, batch["label"])
        return terms

    def distill_loss(self, outputs: tuple[Tensor, Diagnosis], batch: Batch) -> dict[str, Tensor]:
        """The KL and feature terms; the fused head teaches and gets no gradient."""
        said = outputs[1]
        assert said.fused is not None
        mapped = [m(f) for m, f in zip(self.maps, said.features, strict=True)]
        return {
            "self_kl": branch_kl(said.branches, said.logits, temperature=self.temperature),
            "self_hint": branch_hint(mapped, said.fused),
        }

    @torch.no_grad()
    def _boxes(self, features: dict[str, Tensor], images: Tensor, batch: Batch) -> Tensor:
        """The boxes to diagnose: those in use, some replaced by the current best detection.

        Where there is none the best detection serves, and the whole image where nothing is found.
        """
        box, size = batch["box"], batch["size"]
        missing = ~box.isfinite().all(1)
        asked = missing | (batch["chance"] < self.detected_share)
        if not asked.any():
            return box
        some = {k: v[asked].detach() for k, v in features.items()}
        found = self.net.detector.detect(some, images[asked], size[asked])
        best, _ = found.top(size[asked], self.net.threshold)
        close = iou(best, box[asked]) >= 0.5  # False where there is no box
        new = torch.where((missing[asked] | close)[:, None], best, box[asked])
        result = box.clone()
        result[asked] = new
        return result

    def configure_optimizers(self) -> Any:
        """AdamW, a smaller rate for what stage 1 trained longest; a cosine over the epochs."""
        slow = [*self.net.detector.backbone.parameters(), *self.net.classifier.parameters()]
        known = {id(p) for p in slow} | {id(p) for p in self.fold_nets.parameters()}
        heads = [p for p in self.parameters() if id(p) not in known]
        groups = [{"params": slow, "lr": self.backbone_lr}, {"params": heads, "lr": self.lr}]
        return _adamw(groups, self)


def rgb(batch: Batch) -> Tensor:
    """Images (B, 3, S, S) in [0, 1]."""
    return batch["image"].expand(-1, 3, -1, -1)


def jittered(box: Tensor, batch: Batch) -> Tensor:
    """Boxes (B, 4) with each side moved by the batch's share of their size."""
    sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    return box + batch["jitter"] * sides


def _no_loss(net: nn.Module) -> Tensor:
    """A zero that the optimiser can step on."""
    return 0.0 * next(net.parameters()).sum()


def _epochs(module: TSDDNet) -> int:
    epochs = module.trainer.max_epochs
    if epochs is None or epochs < 1:
        raise InputError("the schedule needs trainer.max_epochs")
    return epochs


def _adamw(groups: list[dict[str, Any]], module: TSDDNet) -> Any:
    optimizer = torch.optim.AdamW(groups, weight_decay=module.weight_decay)
    steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _epochs(module))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "epoch"}}

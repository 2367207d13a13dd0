"""ESP-MedSAM's stages: medical teacher, common knowledge, modality controllers, joint tuning."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cohobate.core.cache import TeacherCache, write_cache
from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule
from cohobate.core.runs import load_run
from cohobate.core.teachers import CachedTeacher, FrozenTeacher, weights_hash
from cohobate.medseg.esp_medsam.encoder import SAMEncoder, TinyViTEncoder, TinyViTSize, ViTSize
from cohobate.medseg.esp_medsam.losses import embedding_loss, mask_loss, patch_loss, patch_target
from cohobate.medseg.esp_medsam.metrics import Scores
from cohobate.medseg.esp_medsam.network import (
    SHARED,
    DecoderSize,
    MaskDecoder,
    Network,
    Outputs,
    PatchPrompt,
    Sharing,
)
from cohobate.medseg.esp_medsam.official import load_mobile_sam
from cohobate.medseg.esp_medsam.pictures import Normalization
from cohobate.medseg.esp_medsam.predict import draw_results, segment_files
from cohobate.medseg.esp_medsam.weights import copy_heads, load_sam, take_known

log = logging.getLogger("cohobate")

Stage = Literal["teacher", "common", "modality", "joint"]
Adapt = Literal["modality", "shared", "encoder", "none"]
TEACHER_STAGE = "1-teacher"
_SHARING: dict[Adapt, Sharing] = {
    "modality": "modality",
    "shared": "shared",
    "encoder": "none",
    "none": "none",
}


class MedicalTeacher(FrozenTeacher):
    """A trained teacher that gives embeddings: with controllers F_T-med, without F_T."""

    def answer(self, image: Tensor, modality: Sequence[str] | None = None) -> Tensor:
        """``(B, 3, H, W) → (B, E, H / 16, W / 16)``."""
        (network,) = self.networks
        assert isinstance(network, Network)
        return network.encoder(image) if modality is None else network.embed(image, modality)


class ESPMedSAM(DistillModule):
    """Trains one stage of ESP-MedSAM.

    - ``teacher``: prompt tokens and adapters in SAM's ViT, patch prompt and decoder, by the masks.
      Without SAM's weights (``sam``) the ViT is trained too.
    - ``common``: the student's shared encoder θ_shared learns the teacher's embedding of natural
      images, ``L_MA = mean (F_S(x) − F_T(x))²``.
    - ``modality``: patch prompt and decoder are the teacher's, θ_shared is frozen, and each
      modality's controller θ_k learns ``L_MC = mean (F_S(x; θ_k) − F_T-med(x))²``. What results is
      the assembled student.
    - ``joint``: controllers, patch prompt and decoder of the student are tuned by the masks.

    Args:
        modalities: Names of the modalities; from the data.
        image_size: Side of an image; from the data.
        normalization: Kept for prediction; from the data.
        stage: Which stage.
        adapt: What the ``modality`` stage trains: a controller per modality (the paper), one shared
            by all, the shared encoder itself without controllers, or nothing.
        known: Modalities of the run in ``start``, which stay as they are when others are added.
        slots: Names of the queries that attend together; default ``known`` or ``modalities``.
        width: Channels E of the embedding.
        student: Sizes of the student's encoder.
        vit: Sizes of the teacher's encoder.
        decoder: Sizes of patch prompt and decoder.
        adapter_ratio: Hidden width of the teacher's adapters over the ViT's.
        separate_kv: A token for keys and another for values.
        teacher: Run folder with the teacher; default the teacher stage of the same run.
        start: Run folder whose weights are taken to begin with.
        sam: Folder of a SAM that transformers can load, frozen in the ``teacher`` stage.
        mobile_sam: MobileSAM's weights for θ_shared, instead of a ``common`` stage.
        cache: Keep the teacher's embeddings on disk: in the run folder, or in the folder given.
        patch_weight: λ of the patches' loss.
        ablations: Also test without the prompt, and with the wrong modality.
        lr: Learning rate of Adam.
        gamma: Its factor each epoch.
    """

    from_data: ClassVar[tuple[str, ...]] = ("modalities", "image_size", "normalization")

    def __init__(
        self,
        *,
        modalities: list[str],
        image_size: int,
        normalization: Normalization,
        stage: Stage = "modality",
        adapt: Adapt = "modality",
        known: list[str] | None = None,
        slots: list[str] | None = None,
        width: int = 256,
        student: TinyViTSize = TinyViTSize(),  # noqa: B008 (frozen)
        vit: ViTSize = ViTSize(),  # noqa: B008
        decoder: DecoderSize = DecoderSize(),  # noqa: B008
        adapter_ratio: float = 0.25,
        separate_kv: bool = False,
        teacher: Path | None = None,
        start: Path | None = None,
        sam: Path | None = None,
        mobile_sam: Path | None = None,
        cache: bool | Path = False,
        patch_weight: float = 0.5,
        ablations: bool = True,
        lr: float = 5e-4,
        gamma: float = 0.98,
    ) -> None:
        super().__init__(weights={"patches": patch_weight})
        self.stage, self.adapt, self.known = stage, adapt, list(known or [])
        self.new = [name for name in modalities if name not in self.known]
        self.image_size, self.normalization = image_size, normalization
        self.teacher_run, self.start, self.sam, self.mobile_sam = teacher, start, sam, mobile_sam
        self.cache, self.patch_weight, self.ablations = cache, patch_weight, ablations
        self.lr, self.gamma = lr, gamma
        if start is None and (self.known or stage == "joint"):
            raise InputError("model.start: name the run to go on from")
        if self.known and stage == "common":
            raise InputError("model.known: the common stage changes what all modalities share")
        names = [*self.known, *self.new]
        sharing: Sharing = "modality" if stage == "teacher" else _SHARING[adapt]
        controlled = {"modality": names, "shared": [SHARED], "none": []}[sharing]
        encoder = (
            SAMEncoder(controlled, width, vit, adapter_ratio, separate_kv)
            if stage == "teacher"
            else TinyViTEncoder(controlled, width, student, separate_kv)
        )
        self.network = Network(
            encoder,
            PatchPrompt(width, decoder.patch_dim),
            MaskDecoder(names, slots or self.known or names, width, decoder),
            sharing,
        )
        self.teacher: MedicalTeacher | None = None
        self.answers = nn.ModuleDict()  # from disk; of_train, of_val, of_test
        self._scores: dict[str, Scores] = {}
        trained = self._trained()
        self.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)
        self.automatic_optimization = bool(trained)
        self.train()  # Lightning leaves the modes as it finds them

    # --- what is trained ----------------------------------------------------------------------

    def _trained(self) -> list[nn.Module | nn.Parameter]:
        """The parts that this stage changes."""
        network, encoder = self.network, self.network.encoder
        if self.stage == "common":
            return [encoder.vit, encoder.neck] if isinstance(encoder, TinyViTEncoder) else []
        if self.stage == "modality":
            if self.adapt == "encoder":
                assert isinstance(encoder, TinyViTEncoder)
                return [encoder.vit, encoder.neck]
            chosen = {"modality": self.new, "shared": [SHARED], "none": []}[network.controllers]
            return [encoder.controllers[name] for name in chosen]
        if self.known:  # what all modalities use stays as it is
            return [part for name in self.new for part in network.own_parts(name)]
        parts: list[nn.Module | nn.Parameter] = [
            encoder.controllers,
            network.prompter,
            network.decoder,
        ]
        if self.stage == "teacher" and self.sam is None:
            parts.append(encoder.vit)
        return parts

    def train(self, mode: bool = True) -> ESPMedSAM:
        """Batch statistics move in the ``common`` stage alone."""
        super().train(mode)
        if self.stage != "common":
            for layer in self.network.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        return self

    def configure_optimizers(self) -> Any:
        """Adam on what this stage trains, its rate multiplied by gamma each epoch."""
        trained = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            return []
        optimizer = torch.optim.Adam(trained, self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.gamma)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "epoch"},
        }

    # --- where it starts ----------------------------------------------------------------------

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Take θ_shared from the ``common`` stage, or the whole student for ``joint``."""
        if self.stage == "modality":
            take_known(self.network.encoder, weights, "network.encoder.", ("vit.", "neck."))
        else:
            super().load_stage(weights)

    def setup(self, stage: str) -> None:
        """Read what the stage starts from, and the teacher."""
        if stage != "fit":
            if self.teacher_run is not None and not self._answered("test"):
                self.teacher = MedicalTeacher(self._load_teacher())
            return
        encoder = self.network.encoder
        if self.sam is not None and isinstance(encoder, SAMEncoder):
            load_sam(encoder, self.sam)
        if self.mobile_sam is not None and isinstance(encoder, TinyViTEncoder):
            load_mobile_sam(encoder, self.mobile_sam)
        if self.start is not None:
            self._begin(self.start)
        if self.stage not in ("common", "modality"):
            return
        teacher = self._load_teacher()
        self.teacher = MedicalTeacher(teacher)
        if self.stage == "modality":
            copy_heads(self.network, teacher)
            if self.cache is not False:
                self._keep_answers()

    def _begin(self, run: Path) -> None:
        """Take the weights of a finished run, all that this network has of them."""
        stage = run / TEACHER_STAGE
        try:
            source = load_run(stage if self.stage == "teacher" and stage.is_dir() else run)
        except InputError as error:
            raise InputError(f"model.start: {error}") from None
        parts = {n: t for n, t in source.state_dict().items() if n.startswith("network.")}
        missing = [m for m in self.known if m not in getattr(source, "network").modalities]  # noqa: B009
        if missing:
            raise InputError(f"{run}: has no modality {missing[0]} (model.known)")
        take_known(self, parts, "", ("network.",), new=self.new)

    def _load_teacher(self) -> Network:
        run = self.teacher_run or Path(self.trainer.default_root_dir).parent
        run = run / TEACHER_STAGE if (run / TEACHER_STAGE).is_dir() else run
        try:
            found = load_run(run)
        except InputError as error:
            raise InputError(f"model.teacher: {error}") from None
        if not isinstance(found, ESPMedSAM) or found.stage != "teacher":
            raise InputError(f"model.teacher: {run}: holds no teacher of ESP-MedSAM")
        return found.network

    def _keep_answers(self) -> None:
        """Ask the teacher about every image in every way it may be drawn, and let it go."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        root = Path(self.trainer.default_root_dir) / "teacher-embeddings"
        folder = self.cache if isinstance(self.cache, Path) else root
        assert self.teacher is not None
        teacher, name = self.teacher.to(self.device), weights_hash(self.teacher)

        def ask(batch: Any) -> Tensor:
            return teacher(batch["image"].to(self.device), batch["modality"])

        for part, pictures in data.parts.items():
            if self.trainer.is_global_zero:
                write_cache(
                    folder / part,
                    dataset=pictures,
                    ask=ask,
                    teacher=name,
                    transform=pictures.transform_key,
                    form="dense",
                    draws=pictures.every_draw(),
                    batch_size=data.batch_size,
                    progress=self.trainer.progress_bar_callback is not None,
                )
            self.trainer.strategy.barrier()
            cache = TeacherCache(
                folder / part, teacher=name, transform=pictures.transform_key, classes=None
            )
            self.answers[f"of_{part}"] = CachedTeacher(cache)
        self.teacher = None

    # --- the losses, in the paper's order -------------------------------------------------------

    @property
    def student(self) -> nn.Module:
        """The network of this stage: the medical teacher first, the student afterwards."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """One image of zeros, taken as one of the first modality."""
        return (torch.zeros(1, 3, self.image_size, self.image_size),)

    def forward_train(self, batch: Any) -> Outputs | Tensor:
        """Masks for the stages that learn from masks, else the embedding."""
        if self.stage == "common":
            return self.network.encoder(batch["image"])
        if self.stage == "modality":
            return self.network.embed(batch["image"], batch["modality"])
        return self.network(batch["image"], batch["modality"])

    def task_loss(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """``L_seg`` and ``L_SPPG``, in the stages that learn from masks."""
        if self.stage in ("common", "modality"):
            return {}
        return {
            "masks": mask_loss(outputs.masks, batch["mask"]),
            "patches": patch_loss(outputs.patches, batch["mask"]),
        }

    def distill_loss(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """``L_MA`` or ``L_MC``."""
        if self.stage not in ("common", "modality"):
            return {}
        return {"embedding": embedding_loss(outputs, self._ask(batch, "train"))}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As for any paper; with nothing to train only the loss is logged."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        with torch.no_grad():
            return super().training_step(batch, batch_idx)

    def _ask(self, batch: Any, part: str) -> Tensor:
        """The teacher's embeddings, live or from disk."""
        if f"of_{part}" in self.answers:
            return self.answers[f"of_{part}"](batch["sample"], batch["augmentation"])
        if self.teacher is None:
            raise InputError("model.teacher: name the run folder of the teacher")
        return self.teacher(batch["image"], None if self.stage == "common" else batch["modality"])

    def _answered(self, part: str) -> bool:
        """Whether the teacher's embeddings are at hand."""
        return self.teacher is not None or f"of_{part}" in self.answers

    # --- evaluation ---------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = {"": Scores()}

    def on_test_epoch_start(self) -> None:
        """Start new scores."""
        self._scores = {"": Scores()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The stage's own loss, and the masks' scores."""
        size = len(batch["image"])
        if self.stage == "common":
            loss = embedding_loss(self.network.encoder(batch["image"]), self._ask(batch, "val"))
            self.log("val/loss", loss, batch_size=size, sync_dist=True)
            return
        out = self.network(batch["image"], batch["modality"])
        self._add("", out, batch)
        if self.stage != "modality":
            terms = self.task_loss(out, batch)
            loss = terms["masks"] + self.patch_weight * terms["patches"]
        elif self._answered("val"):
            loss = embedding_loss(out.embedding, self._ask(batch, "val"))
        else:
            return
        self.log("val/loss", loss, batch_size=size, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores with and without the prompt, of the wrong modality, and the embedding's error."""
        if self.stage == "common":
            error = embedding_loss(self.network.encoder(batch["image"]), self._ask(batch, "test"))
            size = len(batch["image"])
            self.log("test/embedding_mse", error, batch_size=size, sync_dist=True)
            return
        names = batch["modality"]
        out = self.network(batch["image"], names)
        self._add("", out, batch, distances=True)
        if self.ablations:
            self._add("no_prompt", self.network.decode(out.embedding, names, prompted=False), batch)
            if len(others := self.network.modalities) > 1:
                wrong = [others[(others.index(name) + 1) % len(others)] for name in names]
                self._add("wrong_modality", self.network(batch["image"], wrong), batch)
        if self.stage == "modality" and self._answered("test"):
            error = embedding_loss(out.embedding, self._ask(batch, "test"))
            self.log("test/embedding_mse", error, batch_size=len(names), sync_dist=True)

    def _add(self, name: str, out: Outputs, batch: Any, distances: bool = False) -> None:
        """Score masks, at the network's size; what is padded counts as background."""
        found = (out.masks >= 0) & _inside(batch["inside"], out.masks)
        scores = self._scores.setdefault(name, Scores())
        scores.add(found, batch["mask"] > 0.5, batch["modality"], distances=distances)
        if not name:
            right = ((out.patches >= 0) == _patches(batch["mask"], out.patches)).float().mean()
            part = "test" if self.trainer.testing else "val"
            count = len(batch["modality"])
            self.log(f"{part}/patch_accuracy", right, batch_size=count, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self.log_dict(dict(self._summary("val")), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self.log_dict(dict(self._summary("test")), sync_dist=True)

    def _summary(self, part: str) -> Iterator[tuple[str, float]]:
        if self.stage == "common":
            return
        for name, scores in self._scores.items():
            found = scores.summary()
            if name:
                yield f"{part}/dice_{name}", found["dice"]
            else:
                yield from ((f"{part}/{key}", value) for key, value in found.items())

    # --- use ----------------------------------------------------------------------------------

    def predict_files(
        self, inputs: list[Path], out: Path, *, modality: str | None = None, picture: bool = True
    ) -> list[Path]:
        """Segment images, without any click or box.

        Args:
            inputs: Files, or folders of files.
            out: Folder for ``<name>_mask.png``, of the image's own size with 255 as foreground, and
                ``<name>_overlay.png``.
            modality: What kind of images they are.
            picture: Whether to draw the overlay.
        """
        known = self.network.modalities
        if modality is None and len(known) != 1:
            raise InputError(f"--modality: choose one of {', '.join(known) or 'none'}")
        chosen = modality or known[0]
        self.eval()
        return segment_files(
            self.network, chosen, inputs, out, self.image_size, self.normalization, picture
        )

    def pictures(self, out: Path) -> None:
        """Image, truth and mask of test images of each modality, as ``segmentation.png``."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.stage != "common":
            draw_results(self.network, data.parts["test"], out / "segmentation.png", self.device)


def _inside(sizes: Tensor, like: Tensor) -> Tensor:
    """Which pixels ``(B, 1, H, W)`` are image and not padding."""
    rows = torch.arange(like.shape[2], device=like.device)[None, :, None] < sizes[:, :1, None]
    columns = torch.arange(like.shape[3], device=like.device)[None, None] < sizes[:, 1:, None]
    return (rows & columns)[:, None]


def _patches(mask: Tensor, like: Tensor) -> Tensor:
    return patch_target(mask, (like.shape[2], like.shape[3])) > 0

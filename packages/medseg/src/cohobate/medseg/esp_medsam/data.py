"""The data module: pictures with masks, or natural images for the common stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader, Dataset

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.medseg.esp_medsam import synthetic
from cohobate.medseg.esp_medsam.network import PATCH
from cohobate.medseg.esp_medsam.official import MODALITIES
from cohobate.medseg.esp_medsam.pictures import (
    PARTS,
    Found,
    Normalization,
    Picture,
    Pictures,
    Source,
    each_modality,
    image_files,
    prepare,
)


class ImageData(pl.LightningDataModule):
    """Images with masks, each of a named modality.

    Every training batch is of one modality, which is drawn at random among those that still have
    images in the epoch.

    Args:
        root: Folder; ``None`` is the embedded data set. With ``manifest.csv`` (columns image, mask,
            modality, split), with ``images`` and ``masks`` paired by name (and ``modality``), or
            with ``image_1024`` and ``mask_1024`` (and ``splits``).
        splits: Modality → JSON with the lists train, valid and test, as the official code has them.
        modality: What a folder of ``images`` and ``masks`` shows.
        modalities: Names that may occur; default the official six.
        test: Share of ``images`` for the test, drawn with a fixed seed.
        val: Share of ``images`` for validation.
        image_size: Side of the square image, divisible by 32; images are scaled and padded to it.
        normalization: ``sam`` divides by SAM's standard deviation, ``official`` by the mean as the
            official loader does (released checkpoints expect that).
        flip: Probability that a training image is flipped, with its mask.
        batch_size: Images a step.
        num_workers: Processes that read.
        keep: Keep all images in memory.
        images: ``labelled``, or ``natural`` for the common stage, which needs no masks.
        natural: Folder of natural images, the last of which (sorted) are for validation; ``None``
            is random parts of two photographs.
        epoch_images: Parts of the photographs in an epoch.
        seed: Seed of order and augmentation; the command sets it to the run's.

    Attributes:
        modalities: Those that occur; none for natural images.

    Raises:
        InputError: The folder or a file in it is not as described.
    """

    def __init__(
        self,
        root: Path | None = None,
        splits: dict[str, Path] | None = None,
        modality: str | None = None,
        modalities: list[str] | None = None,
        test: float = 0.2,
        val: float = 0.1,
        image_size: int = 1024,
        normalization: Normalization = "sam",
        flip: float = 0.1,
        batch_size: int = 4,
        num_workers: int = 0,
        keep: bool = False,
        images: Literal["labelled", "natural"] = "labelled",
        natural: Path | None = None,
        epoch_images: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_size(image_size)
        self.images, self.natural = images, natural
        self.root = None if root is None else Path(root)
        self.image_size, self.normalization = image_size, normalization
        self.flip, self.batch_size, self.num_workers = flip, batch_size, num_workers
        self.keep, self.seed = keep or root is None, seed
        self.modalities: list[str] = []
        self.parts: dict[str, Dataset[dict[str, Any]]]
        if images == "natural":
            self.parts = _natural(natural, val, image_size, normalization, epoch_images)
            return
        found: Found
        if self.root is None:
            found, self.modalities = synthetic.pictures(image_size), [*synthetic.MODALITIES]
        else:
            known = list(modalities or MODALITIES)
            found = Source(self.root, known, splits or {}, modality, test, val).find()
            everything = [picture for part in found.values() for picture in part]
            self.modalities = each_modality(everything, known)
        self.parts = {
            part: Pictures(
                found[part], image_size, normalization, flip if part == "train" else 0.0, self.keep
            )
            for part in PARTS
        }

    def describe(self) -> str:
        """What the data is, in one line."""
        if self.images == "natural":
            train, val = (len(self.parts[part]) for part in ("train", "val"))  # type: ignore[arg-type]
            name = synthetic.PHOTOS if self.natural is None else f"images of {self.natural.name}"
            return f"{name}: {train} train, {val} val"
        if self.root is None:
            return synthetic.DESCRIPTION
        counts = {part: Counter(self._names(part)) for part in PARTS}
        each = ", ".join(
            f"{name} {'/'.join(str(counts[part][name]) for part in PARTS)}"
            for name in self.modalities
        )
        return f"{self.root.name}: {each} (train/val/test) at {self.image_size} pixels"

    def train_dataloader(self) -> ResumableLoader:
        """Batches with ``image`` ``(B, 3, S, S)``; labelled ones are of one modality."""
        if self.images == "natural":
            sampler = EpochSampler(len(self.parts["train"]), seed=self.seed)  # type: ignore[arg-type]
        else:
            sampler = ModalitySampler(self._names("train"), self.batch_size, seed=self.seed)
        return ResumableLoader(
            self.parts["train"],
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """All validation images in order, the modalities mixed."""
        return self._whole("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """All test images in order, the modalities mixed."""
        return self._whole("test")

    def _whole(self, part: str) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            self.parts[part], batch_size=self.batch_size, num_workers=self.num_workers
        )

    def _names(self, part: str) -> list[str]:
        """The modality of every picture."""
        pictures = self.parts[part]
        assert isinstance(pictures, Pictures)
        return [picture.modality for picture in pictures.pictures]


class ModalitySampler(EpochSampler):
    """Every batch of one modality, the batches of all modalities in random order.

    Each image is drawn once an epoch but for those that fill no batch; which they are changes with
    the epoch. A modality with fewer images than a batch fills one by repeating them.

    Args:
        modalities: That of every image.
        batch_size: Images of a batch in one process.
        seed: The run's seed.
        rank: As for `EpochSampler`.
        world: As for `EpochSampler`.
    """

    def __init__(
        self,
        modalities: list[str],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        super().__init__(len(modalities), seed=seed, rank=rank, world=world)
        self.block = batch_size * self.world  # draws are dealt out to the processes in turn
        names = np.array(modalities)
        self.groups = [np.flatnonzero(names == name) for name in dict.fromkeys(modalities)]
        self.total = sum(max(len(g) // self.block, 1) * self.block for g in self.groups)

    def _order(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = []
        for group in self.groups:
            count = max(len(group) // self.block, 1) * self.block
            rounds = -(-count // len(group))
            drawn = np.concatenate([rng.permutation(group) for _ in range(rounds)])[:count]
            blocks += list(drawn.reshape(-1, self.block))
        return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])


def _natural(
    folder: Path | None,
    val: float,
    size: int,
    normalization: Normalization,
    epoch_images: int,
) -> dict[str, Dataset[dict[str, Any]]]:
    """Unlabelled images for training, and others for validation and test."""
    if folder is None:
        held: Dataset[dict[str, Any]] = PhotoParts(size, normalization, 32, (0.7, 1.0))
        train = PhotoParts(size, normalization, epoch_images, (0.0, 0.7))
        return {"train": train, "val": held, "test": held}
    files = image_files(folder) if folder.is_dir() else []
    if len(files) < 2:
        raise InputError(f"{folder}: {len(files)} images; the common stage needs two or more")
    last = max(1, round(val * len(files)))
    first, held = (
        Pictures([Picture(p.name, "", p, None) for p in paths], size, normalization)
        for paths in (files[:-last], files[-last:])
    )
    return {"train": first, "val": held, "test": held}


class PhotoParts(Dataset[dict[str, Any]]):
    """Square parts of the two photographs; which part follows from the draw.

    Args:
        size: Side of the image.
        normalization: As for `ImageData`.
        count: Number of parts.
        across: Share of the photographs' width that is used, so that parts held out are unseen.
    """

    def __init__(
        self, size: int, normalization: Normalization, count: int, across: tuple[float, float]
    ) -> None:
        self.size, self.normalization, self.count, self.across = size, normalization, count, across

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([getattr(index, "seed", 0), int(index)])
        photo = synthetic.photographs()[int(index) % 2]
        left, right = (round(share * photo.shape[1]) for share in self.across)
        side = int(rng.integers(96, min(photo.shape[0], right - left) + 1))
        y = int(rng.integers(0, photo.shape[0] - side + 1))
        x = int(rng.integers(left, right - side + 1))
        part = photo[y : y + side, x : x + side]
        if rng.random() < 0.5:
            part = part[:, ::-1]
        return {"image": prepare(part, self.size, self.normalization)[0]}


def _check_size(size: int) -> None:
    if size < PATCH or size % PATCH:
        raise InputError(f"data.image_size: {size} is not divisible by {PATCH}")

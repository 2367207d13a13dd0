"""Training and evaluation data of detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.detection.boxes import Targets, pad_targets
from cohobate.detection.data import synthetic
from cohobate.detection.data.annotations import Annotated, Category, Picture
from cohobate.detection.data.coco import find_coco, read_coco
from cohobate.detection.data.transforms import Augment, ToInput, multiscale_sizes
from cohobate.detection.data.voc import find_voc, read_voc
from cohobate.detection.data.yolo import find_yolo, read_yolo

Layout = Literal["auto", "coco", "voc", "yolo"]
_AUGMENT = Augment()


@dataclass(frozen=True)
class Batch:
    """Images of one size.

    Attributes:
        images: ``(B, 3, S, S)`` float32 in [0, 1].
        targets: Their objects.
        sizes: ``(B, 2)`` width and height of the original images.
        pictures: The originals, in evaluation.
    """

    images: Tensor
    targets: Targets
    sizes: Tensor
    pictures: list[Picture]

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved = self.images.to(device), self.targets.to(device), self.sizes.to(device)
        return Batch(*moved, self.pictures)


class Sample(NamedTuple):
    """One image as the network takes it, with its draw's seed."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    picture: Picture
    seed: int


class Images(Dataset[Sample]):
    """Pictures, augmented or not.

    Args:
        pictures: The pictures.
        transform: What is done to each.
        longest: Shrink to at most this many pixels a side when read.
        cache: Keep what was read.
    """

    def __init__(
        self, pictures: Sequence[Picture], transform: ToInput, longest: int | None, cache: bool
    ) -> None:
        self.pictures, self.transform, self.longest = pictures, transform, longest
        self._cache: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None
        self.sampler: EpochSampler | None = None
        self.stop_epoch: int | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        seed, place = int(getattr(index, "seed", 0)), int(index)
        pixels, boxes = self._read(place)
        picture = self.pictures[place]
        labels = torch.from_numpy(picture.labels)
        found = self.transform(pixels, boxes, labels, seed, strong=self.first_stage)
        return Sample(*found, picture, seed)

    @property
    def first_stage(self) -> bool:
        """Whether the strong augmentations and the sizes still vary."""
        if self.stop_epoch is None or self.sampler is None:
            return True
        return self.sampler.epoch < self.stop_epoch

    def _read(self, place: int) -> tuple[Tensor, Tensor]:
        if self._cache is not None and place in self._cache:
            return self._cache[place]
        picture = self.pictures[place]
        pixels = torch.from_numpy(np.array(picture.read())).permute(2, 0, 1).contiguous()
        boxes = torch.from_numpy(picture.boxes)
        if self.longest is not None and max(pixels.shape[1:]) > self.longest:
            share = self.longest / max(pixels.shape[1:])
            size = [max(round(n * share), 1) for n in pixels.shape[1:]]
            scale = torch.tensor([size[1] / pixels.shape[2], size[0] / pixels.shape[1]]).repeat(2)
            pixels, boxes = v2.functional.resize(pixels, size, antialias=True), boxes * scale
        if self._cache is not None:
            self._cache[place] = (pixels, boxes)
        return pixels, boxes


class Collate:
    """Joins samples; in the first stage of training to a size drawn for the batch.

    Args:
        images: Knows the stage.
        sizes: What to draw from; None keeps the size.
    """

    def __init__(self, images: Images, sizes: list[int] | None = None) -> None:
        self.images, self.sizes = images, sizes

    def __call__(self, samples: list[Sample]) -> Batch:
        """Join."""
        images = torch.stack([s.image for s in samples])
        if self.sizes and self.images.first_stage:
            size = self.sizes[np.random.default_rng(samples[0].seed).integers(len(self.sizes))]
            images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        targets = pad_targets([s.labels for s in samples], [s.boxes for s in samples])
        pictures = [s.picture for s in samples]
        sizes = torch.tensor([[float(p.width), float(p.height)] for p in pictures])
        return Batch(images, targets, sizes, pictures)


class DetectionData(pl.LightningDataModule):
    """Annotated images.

    Category ids may be any numbers: classes are numbered from 0 here, and the ids and names travel
    with the model. Crowd regions, boxes without area and what lies outside an image are left out.

    Args:
        root: Folder; None is the embedded SYNTHETIC set.
        layout: ``coco`` (``annotations/instances_train*.json``, ``train/_annotations.coco.json``),
            ``voc`` (``Annotations`` or ``annotations`` of XML files with lists), ``yolo`` (a YAML
            with ``names``); ``auto`` takes what is there.
        size: Side S of the square input, a multiple of 32.
        batch_size: Images a step.
        augment: Of training images.
        multiscale: How often the base size stands among the sizes of `multiscale_sizes`; None
            keeps one size.
        stop_epoch: Epoch from which the strong augmentations and the sizes no longer vary; None
            never stops them. The model takes it from here.
        held_out: Share of the training images that are kept for choosing the checkpoint, so that
            the set's own validation part is only tested on; 0 chooses on what is tested. A set
            without a validation part always gives up a fifth.
        epoch_images: Images an epoch; by default each once.
        longest: Shrink images to at most this many pixels a side when they are read.
        num_workers: Processes that read and augment.
        cache: Keep all images in memory.
        seed: Seed of order and augmentation; the command sets it to the run's.

    Raises:
        InputError: The folder or a file in it is not as described.
    """

    def __init__(
        self,
        root: Path | None = None,
        layout: Layout = "auto",
        size: int = 640,
        batch_size: int = 32,
        augment: Augment = _AUGMENT,
        multiscale: int | None = None,
        stop_epoch: int | None = None,
        held_out: float = 0.0,
        epoch_images: int | None = None,
        longest: int | None = None,
        num_workers: int = 0,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size % 32 or size < 32:
            raise InputError(f"data.size: needs a multiple of 32, got {size}")
        self.root, self.size = None if root is None else Path(root), size
        self.batch_size, self.augment, self.multiscale = batch_size, augment, multiscale
        self.stop_epoch, self.epoch_images, self.longest = stop_epoch, epoch_images, longest
        self.num_workers, self.cache, self.seed = num_workers, cache, seed
        if self.root is None:
            parts = {
                "train": synthetic.shapes(synthetic.TRAIN, 1),
                "val": synthetic.shapes(synthetic.VAL, 2),
                "test": synthetic.shapes(synthetic.TEST, 3),
            }
        else:
            parts = _split(_read(self.root, layout), held_out)
        self.parts = parts
        self.categories: list[Category] = list(parts["train"].categories)
        if not self.categories or not parts["train"].pictures:
            raise InputError(f"{self.root}: no annotated images for training")

    def describe(self) -> str:
        """What the data is, in one line."""
        if self.root is None:
            return synthetic.DESCRIPTION
        train, val, test = (self.parts[n].pictures for n in ("train", "val", "test"))
        held = f"{len(val)} held out" if val is test else f"{len(val)} val, {len(test)} test"
        names = ", ".join(c.name for c in self.categories[:8])
        more = f" and {len(self.categories) - 8} more" if len(self.categories) > 8 else ""
        return f"{self.root.name}: {len(train)} train, {held} images, classes {names}{more}"

    def train_dataloader(self) -> ResumableLoader:
        """Augmented batches."""
        images = self._images("train", ToInput(self.size, self.augment))
        sampler = EpochSampler(len(images), seed=self.seed, num_samples=self.epoch_images)
        images.sampler, images.stop_epoch = sampler, self.stop_epoch
        sizes = None if self.multiscale is None else multiscale_sizes(self.size, self.multiscale)
        # workers start anew each epoch: they must learn of the stop
        return ResumableLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=Collate(images, sizes),
            drop_last=len(images) >= self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches as they are."""
        return self._evaluated("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches as they are."""
        return self._evaluated("test")

    def _evaluated(self, part: str) -> DataLoader[Any]:
        images = self._images(part, ToInput(self.size))
        return DataLoader(
            images,
            batch_size=self.batch_size,
            collate_fn=Collate(images),
            num_workers=self.num_workers,
        )

    def _images(self, part: str, transform: ToInput) -> Images:
        return Images(self.parts[part].pictures, transform, self.longest, self.cache)


def _read(root: Path, layout: Layout) -> dict[str, Annotated]:
    """All parts of a folder; classes are those of the training part."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    parts: dict[str, Annotated] = {}
    known: list[Category] | None = None
    if layout in ("auto", "coco") and (coco := find_coco(root)):
        for part, (file, folder) in coco.items():
            parts[part] = read_coco(file, folder, known)
            known = known or list(parts[part].categories)
    elif layout in ("auto", "yolo") and (yolo := find_yolo(root)):
        parts = {part: read_yolo(folder, yolo[1]) for part, folder in yolo[0].items()}
    elif layout in ("auto", "voc") and (voc := find_voc(root)):
        for part, (files, folder) in voc.items():
            parts[part] = read_voc(files, folder, known)
            known = known or list(parts[part].categories)
    if "train" not in parts:
        kinds = "COCO JSON, VOC XML or a YOLO YAML" if layout == "auto" else layout.upper()
        raise InputError(f"{root}: no {kinds} with a training part found")
    return parts


def _split(parts: dict[str, Annotated], held_out: float) -> dict[str, Annotated]:
    """Training, validation and test part of what a folder has."""
    if not 0 <= held_out < 1:
        raise InputError(f"data.held_out: needs a share in [0, 1), got {held_out}")
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    if val is None and not held_out:
        held_out = 0.2
    if held_out:
        order = np.random.default_rng(0).permutation(len(train.pictures))
        count = max(round(held_out * len(order)), 1)
        kept = [train.pictures[n] for n in sorted(order[count:])]
        chosen = [train.pictures[n] for n in sorted(order[:count])]
        test = test or val
        val, train = replace(train, pictures=chosen), replace(train, pictures=kept)
    assert val is not None
    return {"train": train, "val": val, "test": test or val}

"""Ultrasound images on one canvas: folds by patient, boxes that are hidden and perturbed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cohobate.core.errors import InputError
from cohobate.core.training.data import Draw, EpochSampler, ResumableLoader
from cohobate.medseg.tsddnet import synthetic
from cohobate.medseg.tsddnet.audit import read_audit
from cohobate.medseg.tsddnet.readers import Lesion, Samples, duplicates, groups, read

SMALLEST_BOX = 2.0  # pixels; a perturbed box is never smaller


class Batch(TypedDict):
    """A batch of images.

    Attributes:
        image: (B, 1, S, S) in [0, 1], zero beyond the image.
        size: (B, 2), height and width on the canvas.
        box: (B, 4), x1 y1 x2 y2 on the canvas; not a number without a box.
        label: (B,).
        index: (B,), place in the part of the data.
        jitter: (B, 4), shares of the box's size by which C-Net's crop is moved, side by side.
        chance: (B,), uniform in [0, 1), drawn with the augmentation.
    """

    image: Tensor
    size: Tensor
    box: Tensor
    label: Tensor
    index: Tensor
    jitter: Tensor
    chance: Tensor


@dataclass(frozen=True)
class Split:
    """Stratified folds that keep a patient's images together.

    Attributes:
        fold: 1 … ``folds``, the one held out for the test.
        folds: Number of folds.
        val: Share of the other folds that is held out for choosing the checkpoint.
        seed: Seed of the shuffling.
    """

    fold: int = 1
    folds: int = 5
    val: float = 0.15
    seed: int = 0

    def apply(self, labels: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, ...]:
        """Places of training, validation and test.

        Args:
            labels: (M,) classes.
            group: (M,) patients.

        Raises:
            InputError: There is no such fold, or too few patients of a class.
        """
        if not 1 <= self.fold <= self.folds or not 0 < self.val <= 0.5:
            raise InputError(f"data.split: no fold {self.fold} of {self.folds} with val {self.val}")
        test = inner_folds(labels, group, self.folds, self.seed) == self.fold - 1
        rest = np.flatnonzero(~test)
        blocks = max(round(1 / self.val), 2)
        held = inner_folds(labels[rest], group[rest], blocks, self.seed) == 0
        return rest[~held], rest[held], np.flatnonzero(test)


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images; nothing vertical: shadows have a direction.

    Attributes:
        flip: Probability of a horizontal flip.
        brightness: Largest change of brightness and of contrast.
        jitter: Largest shift of each side of C-Net's crop, as a share of the box's size.
    """

    flip: float = 0.5
    brightness: float = 0.2
    jitter: float = 0.05


class Lesions(Dataset[dict[str, Tensor]]):
    """One part of the data on canvases.

    Args:
        samples: The images.
        image_size: Side S of the canvas; the longer side of an image is scaled to it.
        augment: Augmentation; ``None`` for none.

    Attributes:
        samples: The images, boxes as read.
        canvas: (M, S, S) 8-bit.
        scale: (M,), canvas pixels per pixel.
        size: (M, 2), height and width on the canvas.
        boxes: (M, 4), boxes in use, on the canvas.
        fold: (M,), inner fold of each image for cross-fitting.
    """

    def __init__(self, samples: Samples, image_size: int, augment: Augment | None) -> None:
        self.samples, self.augment = samples, augment
        placed = [place(image, image_size) for image in samples.images]
        self.canvas = np.stack([canvas for canvas, _, _ in placed])
        self.scale = np.array([scale for _, scale, _ in placed], dtype=np.float32)
        self.size = np.array([size for _, _, size in placed], dtype=np.float32)
        self.boxes = samples.boxes * self.scale[:, None]
        self.fold = np.zeros(len(samples), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One image; augmented by the draw's seed."""
        rng = np.random.default_rng(getattr(index, "seed", 0))
        image, box = self.canvas[index].astype(np.float32) / 255, self.boxes[index].copy()
        flip, change, jitter = rng.random(), rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 4)
        chance = rng.random()
        if self.augment is None:
            jitter[:] = 0
        else:
            height, width = self.size[index].astype(int)
            inside = image[:height, :width]
            if flip < self.augment.flip:
                inside[:] = inside[:, ::-1].copy()
                box[[0, 2]] = width - box[[2, 0]]
            shift, contrast = self.augment.brightness * change
            mean = inside.mean()
            inside[:] = np.clip((inside - mean) * (1 + contrast) + mean + shift, 0, 1)
            jitter *= self.augment.jitter
        return {
            "image": torch.from_numpy(image)[None],
            "size": torch.from_numpy(self.size[index]),
            "box": torch.from_numpy(box),
            "label": torch.tensor(self.samples.labels[index]),
            "index": torch.tensor(int(index)),
            "jitter": torch.from_numpy(jitter).float(),
            "chance": torch.tensor(chance, dtype=torch.float32),
        }

    def original(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (M, 4) on the canvas in pixels of the images, and inside them."""
        # A canvas has whole pixels, so an image's edge on it may lie beyond the image's own.
        sizes = np.array([image.shape[::-1] * 2 for image in self.samples.images])
        return np.minimum(boxes / self.scale[:, None], sizes)


class UltrasoundData(pl.LightningDataModule):
    """Lesions in ultrasound: a class for every image, a box for some.

    Args:
        root: BUSI folder, manifest CSV, or a folder with ``manifest.csv``; ``None`` generates
            SYNTHETIC images.
        class_names: The two classes, the positive one second; see `readers.read`.
        lesion: From masks: one box around all (``union``) or the ``largest`` part.
        image_size: Side of the canvas in pixels, a multiple of 32.
        split: Folds.
        hidden: Share of the training boxes that is hidden, in each class.
        coarse: Training and validation boxes are perturbed by up to this share of their width and
            height per side; the test boxes never are.
        duplicates: Near-identical images stay in one fold (``together``), only the first is used
            (``drop``), or they are not looked for (``ignore``).
        hash_distance: Differing bits, of 256, up to which images are duplicates.
        cross_fit: Number of inner folds for candidate selection; 0 for none.
        audit: Table of chosen boxes to apply instead of selecting.
        train_on: Training images: those with a box in use (``boxed``) or ``all``.
        balance: Draw each class equally often.
        augment: Augmentation of the training images.
        batch_size: Images a step.
        synthetic_images: Number of generated images.
        num_workers: Processes that read.
        seed: Seed of order, augmentation, hiding and perturbing; the command sets it to the run's.

    Raises:
        InputError: The data or an option is at fault.
    """

    def __init__(
        self,
        root: Path | None = None,
        class_names: list[str] | None = None,
        lesion: Lesion = "union",
        image_size: int = 128,
        split: Split = Split(),
        hidden: float = 0.0,
        coarse: float = 0.0,
        duplicates: Literal["together", "drop", "ignore"] = "together",
        hash_distance: int = 6,
        cross_fit: int = 2,
        audit: Path | None = None,
        train_on: Literal["boxed", "all"] = "all",
        balance: bool = False,
        augment: Augment = Augment(),
        batch_size: int = 4,
        synthetic_images: int = 400,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= hidden < 1 or not 0 <= coarse < 0.5:
            raise InputError(f"data: hidden {hidden} or coarse {coarse} is out of range")
        if cross_fit == 1 or cross_fit < 0:
            raise InputError(f"data.cross_fit {cross_fit}: 0, or at least 2 folds")
        self.root, self.image_size, self.cross_fit, self.seed = root, image_size, cross_fit, seed
        self.hidden, self.coarse, self.audit = hidden, coarse, audit
        self.train_on, self.balance = train_on, balance
        self.batch_size, self.num_workers = batch_size, num_workers
        samples = (
            synthetic.samples(synthetic_images)
            if root is None
            else read(Path(root), class_names, lesion)
        )
        samples = _first_of_each(samples, hash_distance) if duplicates == "drop" else samples
        together = groups(samples, hash_distance if duplicates == "together" else None)
        self.class_names = samples.class_names
        train, val, test = split.apply(samples.labels, together)
        self.train, self.val, self.test = (
            Lesions(samples.take(places), image_size, augment if places is train else None)
            for places in (train, val, test)
        )
        if cross_fit:
            self.train.fold = inner_folds(self.train.samples.labels, together[train], cross_fit, 0)
        self._make_coarse()
        if audit is not None:
            read_audit(Path(audit), self.train.samples)  # a fault in it shows before a run starts

    def describe(self) -> str:
        """What the data is, in one line."""
        name = synthetic.DESCRIPTION if self.root is None else Path(self.root).name
        drawn = int(np.isfinite(self.drawn).all(1).sum())
        told = f"{name}: {len(self.train)} train ({drawn} with a box), {len(self.val)} val"
        told += f", {len(self.test)} test images"
        return told + f", drawn boxes perturbed by {self.coarse:.0%}" * (self.coarse > 0)

    def apply(self, boxes: np.ndarray) -> None:
        """Use these boxes for training from now on.

        Args:
            boxes: (M, 4) in pixels of the training images; not a number for none.
        """
        self.train.boxes = (boxes * self.train.scale[:, None]).astype(np.float32)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of training images."""
        places = np.arange(len(self.train))
        if self.train_on == "boxed":
            places = places[np.isfinite(self.train.boxes).all(1)]
        if self.balance:
            places = balanced(places, self.train.samples.labels)
        if not len(places):
            raise InputError("no training image has a box: draw some, or lower data.hidden")
        sampler = EpochSampler(len(places), seed=self.seed)
        return ResumableLoader(
            _Chosen(self.train, places),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(places) > self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All validation images in order."""
        return self.whole(self.val)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All test images in order."""
        return self.whole(self.test)

    def whole(self, part: Lesions, batch_size: int = 32) -> DataLoader[dict[str, Tensor]]:
        """All images of a part in order, as they are."""
        plain = part
        if part.augment is not None:
            plain = Lesions.__new__(Lesions)
            plain.__dict__.update(part.__dict__, augment=None)
        return DataLoader(plain, batch_size=batch_size)

    def _make_coarse(self) -> None:
        """Perturb and hide drawn boxes; what was read stays in ``samples.boxes``."""
        rng = np.random.default_rng([self.seed, 2306])
        for part in (self.train, self.val):
            part.boxes = perturb(part.boxes, part.size, self.coarse, rng)
        labels, drawn = self.train.samples.labels, np.isfinite(self.train.boxes).all(1)
        for label in np.unique(labels):
            places = np.flatnonzero(drawn & (labels == label))
            taken = rng.permutation(places)[: round(self.hidden * len(places))]
            self.train.boxes[taken] = np.nan
        self.drawn = self.train.boxes.copy()


def place(image: np.ndarray, side: int) -> tuple[np.ndarray, float, tuple[int, int]]:
    """Scale an image (H, W) so that its longer side fits a canvas, and put it in the corner.

    Returns:
        The canvas (side, side), its pixels per pixel, height and width of the image on it.
    """
    scale = side / max(image.shape)
    height, width = (max(1, round(n * scale)) for n in image.shape)
    resized = image
    if image.shape != (height, width):
        kind = Image.Resampling.BILINEAR
        resized = np.asarray(Image.fromarray(image).resize((width, height), kind))
    canvas = np.zeros((side, side), dtype=np.uint8)
    canvas[:height, :width] = resized
    return canvas, scale, (height, width)


def perturb(
    boxes: np.ndarray, size: np.ndarray, amount: float, rng: np.random.Generator
) -> np.ndarray:
    """Move each side of each box by an independent uniform share of its width or height.

    Args:
        boxes: (M, 4); not a number stays.
        size: (M, 2), height and width of the images.
        amount: Largest share.
        rng: Random numbers.
    """
    noise = rng.uniform(-amount, amount, boxes.shape)
    if amount == 0:
        return boxes
    sides = boxes[:, 2:] - boxes[:, :2]
    moved = np.maximum(boxes + noise * np.tile(sides, 2), 0)
    moved = np.minimum(moved, np.tile(size[:, ::-1], 2))
    too_small = (moved[:, 2:] - moved[:, :2] < SMALLEST_BOX).any(1)
    return np.where(too_small[:, None], boxes, moved).astype(np.float32)


def inner_folds(labels: np.ndarray, group: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(M,), number of the stratified fold that each image is in; a group is in one.

    Raises:
        InputError: There are fewer groups than folds, or too few images of a class.
    """
    smallest = min(np.bincount(labels, minlength=2))
    if len(np.unique(group)) < folds or smallest < folds:
        raise InputError(
            f"data.split: {len(np.unique(group))} patients, {smallest} images in the smaller class:"
            f" too few for {folds} folds"
        )
    numbers = np.empty(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(labels, labels, group)):
        numbers[held] = number
    return numbers


def balanced(places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Repeat the places of the rarer class until both occur equally often.

    Example:
        >>> balanced(np.array([0, 1, 2, 3]), np.array([0, 0, 0, 1])).tolist()
        [0, 1, 2, 3, 3, 3]
    """
    by_class = [places[labels[places] == label] for label in np.unique(labels[places])]
    most = max((len(p) for p in by_class), default=0)
    return np.concatenate([np.resize(p, most) for p in by_class]) if by_class else places


class _Chosen(Dataset[dict[str, Tensor]]):
    """Some images of a part, perhaps several times, each draw with its own seed."""

    def __init__(self, part: Lesions, places: np.ndarray) -> None:
        self.part, self.places = part, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.part[Draw(int(self.places[index]), getattr(index, "seed", 0))]


def _first_of_each(samples: Samples, distance: int) -> Samples:
    """Samples without those that are near-identical to an earlier one."""
    same = np.tril(duplicates(samples.images, distance), -1)
    return samples.take(np.flatnonzero(~same.any(1)))

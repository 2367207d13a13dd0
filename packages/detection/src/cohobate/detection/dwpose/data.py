"""Training and evaluation data: one crop a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.detection.dwpose import synthetic
from cohobate.detection.dwpose.keypoints import KeypointSet
from cohobate.detection.dwpose.people import People, join, read_boxes, read_people
from cohobate.detection.dwpose.transforms import (
    LATE,
    Augment,
    Crop,
    batched,
    crop_of,
    cut,
    moved,
    normalised,
)

_AUGMENT = Augment()
_OTHER = ("instances", "captions", "panoptic", "stuff", "image_info")  # COCO's other files


@dataclass(frozen=True)
class Batch:
    """Crops of people.

    Attributes:
        images: ``(B, 3, height, width)`` float32, normalised.
        points: ``(B, K, 2)`` x and y in pixels of the input.
        visible: ``(B, K)`` 1 where a point is annotated, hidden or not, else 0.
        rows: ``(B,)`` which people they are.
        crops: ``(B, 4)`` centre and extent in pixels of the pictures.
    """

    images: Tensor
    points: Tensor
    visible: Tensor
    rows: Tensor
    crops: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, n).to(device) for n in self.__dataclass_fields__))


class Sample(NamedTuple):
    """One crop."""

    image: np.ndarray
    points: np.ndarray
    visible: np.ndarray
    row: int
    crop: np.ndarray


def collate(samples: Sequence[Sample]) -> Batch:
    """Join crops."""
    images, points, visible, rows, crops = zip(*samples, strict=True)
    return Batch(
        batched(images),
        torch.from_numpy(np.stack(points).astype(np.float32)),
        torch.from_numpy(np.stack(visible).astype(np.float32)),
        torch.tensor(rows),
        torch.from_numpy(np.stack(crops)),
    )


class Crops(Dataset[Sample]):
    """The crops of people.

    Args:
        people: The people; boxes without area are not allowed.
        kinds: Their key points.
        size: Width and height of the input.
        augment: What training changes; None changes nothing.
        cache: Keep the pictures.
    """

    def __init__(
        self, people: People, kinds: KeypointSet, size: Sequence[int],
        augment: Augment | None = None, cache: bool = False,
    ) -> None:  # fmt: skip
        self.people, self.kinds, self.size, self.augment = people, kinds, tuple(size), augment
        self.sampler: EpochSampler | None = None
        self.late_epoch: int | None = None
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> Sample:
        row = int(index)
        pixels = self._read(int(self.people.photo[row]))
        box, points = self.people.boxes[row], self.people.points[row]
        if self.augment is None:
            crop = crop_of(box, self.size)
            image = cut(pixels, crop, self.size)
        else:
            rng = np.random.default_rng(int(getattr(index, "seed", 0)))
            late = self.late_epoch is not None and self._epoch >= self.late_epoch
            augment = LATE if late else self.augment
            crop, points = augment.place(box, points, self.kinds, pixels.shape[1], self.size, rng)
            image = augment.paint(cut(pixels, crop, self.size), rng)
        places = moved(points[:, :2], crop.matrix(self.size, pixels.shape[1]))
        return Sample(
            normalised(image), places, points[:, 2] > 0, row,
            np.concatenate([crop.centre, crop.extent]),
        )  # fmt: skip

    @property
    def _epoch(self) -> int:
        return 0 if self.sampler is None else self.sampler.epoch

    def _read(self, place: int) -> np.ndarray:
        if self._cache is None:
            return self.people.photos[place].read()
        if place not in self._cache:
            self._cache[place] = self.people.photos[place].read()
        return self._cache[place]


class PoseData(pl.LightningDataModule):
    """People with key points.

    People without an annotated point, crowds and boxes without area are not trained on. A point
    with v = 0 or outside the crop has no label.

    Args:
        root: Folder in COCO's layout (``annotations/coco_wholebody_train_v1.0.json`` or
            ``person_keypoints_train2017.json`` or any ``*train*.json`` with ``keypoints``, images
            in ``train2017``), or with one JSON and ``images``; None is the embedded SYNTHETIC set.
        ubody: UBody's folder (``annotations/<scene>/keypoint_annotation.json``, images in
            ``images/<scene>``): all scenes are added to the training people.
        boxes: JSON list of detected people for the test; by default the annotated boxes, on which
            the checkpoint is always chosen.
        size: Width and height of the input, multiples of 32.
        batch_size: People a step.
        augment: Of training crops; None changes nothing.
        late_epoch: Epoch from which the milder augmentation of the last tenth of training is used;
            None keeps the first.
        held_out: Share of the training images kept for choosing the checkpoint, so that the set's
            own validation part is only tested on; 0 chooses on what is tested. A set without a
            validation part always gives up a fifth.
        num_workers: Processes that read and augment.
        cache: Keep all pictures in memory.
        seed: Seed of order and augmentation; the command sets it to the run's.

    Raises:
        InputError: A folder or a file in it is not as described.
    """

    def __init__(
        self,
        root: Path | None = None,
        ubody: Path | None = None,
        boxes: Path | None = None,
        size: tuple[int, int] = (192, 256),
        batch_size: int = 64,
        augment: Augment | None = _AUGMENT,
        late_epoch: int | None = None,
        held_out: float = 0.0,
        num_workers: int = 0,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= held_out < 1:
            raise InputError(f"data.held_out: needs a share in [0, 1), got {held_out}")
        self.root, self.size, self.batch_size = root, (size[0], size[1]), batch_size
        self.augment, self.late_epoch = augment, late_epoch
        self.num_workers, self.cache, self.seed = num_workers, cache, seed
        self.keypoints: KeypointSet = synthetic.KINDS
        if root is None:
            self.parts = {
                "train": synthetic.figures(synthetic.TRAIN, 1),
                "val": synthetic.figures(synthetic.VAL, 2),
                "test": synthetic.figures(synthetic.TEST, 3),
            }
        else:
            read, self.keypoints = _read(Path(root))
            self.parts = _split(read, held_out)
        if ubody is not None:
            self.parts["train"] = join([self.parts["train"], *_read_ubody(ubody, self.keypoints)])
        self.boxed = {"val": _boxed(self.parts["val"]), "test": _boxed(self.parts["test"], boxes)}
        self._train = self.parts["train"].trainable()
        if not len(self._train):
            raise InputError(f"{root}: nobody with a key point and a box for training")

    def describe(self) -> str:
        """What the data is, in one line."""
        if self.root is None:
            return synthetic.DESCRIPTION
        val, test = self.parts["val"], self.parts["test"]
        held = f"{len(val)} held out" if val is test else f"{len(val)} val, {len(test)} test"
        return (
            f"{Path(self.root).name}: {len(self._train)} train, {held} people, "
            f"{len(self.keypoints.names)} key points"
        )

    def train_dataloader(self) -> ResumableLoader:
        """Augmented crops."""
        crops = Crops(self._train, self.keypoints, self.size, self.augment, self.cache)
        sampler = EpochSampler(len(crops), seed=self.seed)
        crops.sampler, crops.late_epoch = sampler, self.late_epoch
        return ResumableLoader(
            crops,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=len(crops) >= self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Crops as they are."""
        return self._evaluated("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Crops as they are."""
        return self._evaluated("test")

    def _evaluated(self, part: str) -> DataLoader[Any]:
        crops = Crops(self.boxed[part], self.keypoints, self.size, cache=self.cache)
        return DataLoader(
            crops, batch_size=self.batch_size, collate_fn=collate, num_workers=self.num_workers
        )


def _boxed(truth: People, boxes: Path | None = None) -> People:
    """Whose crops are looked at."""
    if boxes is not None:
        return read_boxes(boxes, truth)
    return truth.take(np.flatnonzero(truth.boxed & ~truth.crowd))


def _read(root: Path) -> tuple[dict[str, People], KeypointSet]:
    """All parts of a folder."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    files = [
        f
        for f in (*sorted(root.glob("annotations/*.json")), *sorted(root.glob("*.json")))
        if not f.stem.startswith(_OTHER)
    ]
    # the 133 points of an image before its 17, and those before anything else
    files.sort(key=lambda f: ("wholebody" not in f.stem, "keypoints" not in f.stem))
    chosen: dict[str, Path] = {}
    for part in ("train", "val", "test"):
        if named := [f for f in files if part in f.stem]:
            chosen[part] = named[0]
    if not chosen and files:
        chosen["train"] = files[0]
    if "train" not in chosen:
        raise InputError(f"{root}: no JSON of people with a training part found")
    found: dict[str, People] = {}
    kinds: KeypointSet | None = None
    for part, file in chosen.items():
        found[part], own = read_people(file, _images(root, part))
        if kinds is not None and own.names != kinds.names:
            raise InputError(f"{file}: has other key points than {chosen['train'].name}")
        kinds = own
    assert kinds is not None
    return found, kinds


def _images(root: Path, part: str) -> Path:
    places = [
        *root.glob(f"{part}20*"), *root.glob(f"images/{part}20*"), root / part,
        root / "images" / part, root / "images",
    ]  # fmt: skip
    return next((p for p in places if p.is_dir()), root)


def _read_ubody(root: Path, kinds: KeypointSet) -> list[People]:
    files = sorted(root.glob("annotations/*/keypoint_annotation.json"))
    if not files:
        raise InputError(f"{root}: no annotations/<scene>/keypoint_annotation.json")
    found = []
    for file in files:
        people, own = read_people(file, root / "images" / file.parent.name)
        if own.names != kinds.names:
            raise InputError(f"{file}: has other key points than the training set")
        found.append(people)
    return found


def _split(parts: dict[str, People], held_out: float) -> dict[str, People]:
    """Training, validation and test part of what a folder has."""
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    if val is None and not held_out:
        held_out = 0.2
    if held_out:
        test = test or val
        train, val = train.parted(held_out)
    assert val is not None
    return {"train": train, "val": val, "test": test or val}


__all__ = ["Augment", "Batch", "Crop", "Crops", "PoseData", "collate"]

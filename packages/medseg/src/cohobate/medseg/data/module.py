# ruff: noqa: B008 (the defaults are frozen dataclasses)
"""The data module: an image folder, or the embedded data set, as patches and volumes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.medseg.data import brain
from cohobate.medseg.data.nifti import (
    Case,
    Layout,
    channels,
    class_names_in,
    find_cases,
    read_label,
)
from cohobate.medseg.data.preprocess import Preprocess
from cohobate.medseg.data.volumes import Augment, Patches, Sample, Volumes, join, single


@dataclass(frozen=True)
class Split:
    """Which cases are for training, validation and test.

    The last of the sorted cases are the test; the others are shuffled with Python's generator
    (seed 0) and their last are for validation. With a fold, blocks of the sorted order are held out
    instead.

    Args:
        test: Number of test cases, or a share below 1.
        val: Number of validation cases, or a share below 1.
        fold: 1 … ``folds``: hold out this block for validation *and* test, as the cross-validation
            of MM-WHS does. The best checkpoint is then chosen on the cases it is reported on.
        folds: Number of blocks.
    """

    test: float = 0.2
    val: float = 0.1
    fold: int | None = None
    folds: int = 5

    def apply(self, cases: list[Case]) -> tuple[list[Case], list[Case], list[Case]]:
        """Split sorted cases into training, validation and test.

        Raises:
            InputError: A part would be empty.
        """
        if self.fold is not None:
            if not 1 <= self.fold <= self.folds <= len(cases):
                raise InputError(
                    f"split: fold {self.fold} of {self.folds} does not exist for {len(cases)} cases"
                )
            start, stop = (len(cases) * k // self.folds for k in (self.fold - 1, self.fold))
            return cases[:start] + cases[stop:], cases[start:stop], cases[start:stop]
        test, val = (round(n * len(cases)) if n < 1 else round(n) for n in (self.test, self.val))
        if min(test, val) < 1 or test + val >= len(cases):
            raise InputError(
                f"split: {len(cases)} cases do not give {test} for test, {val} for validation and "
                "at least one for training"
            )
        rest = cases[:-test]
        random.Random(0).shuffle(rest)
        return rest[:-val], rest[-val:], cases[-test:]


class SegmentationData(pl.LightningDataModule):
    """Labelled volumes for 3-D segmentation.

    Args:
        root: Folder with NIfTI images and labels; ``None`` is the embedded data set (synthetic
            subjects from one averaged brain, see `cohobate.medseg.data.brain`).
        layout: Names of the two folders: ``msd`` (imagesTr, labelsTr), ``mmwhs`` (imagesTraining,
            labelsTraining), ``brats`` (Images.Training, Labels.Training), ``generic`` (images,
            labels); ``auto`` takes what is there.
        class_names: Names of the classes with the background first; default those in
            ``dataset.json``, else as many as the labels hold.
        label_map: Value in the label files → class id; default as they are.
        roi_size: Size of a training patch and of the sliding window.
        preprocess: What is done to every image.
        augment: Cropping and augmentation of training patches.
        split: Which cases are for what.
        batch_size: Volumes a step; each gives ``augment.crops`` patches.
        epoch_volumes: Volumes an epoch; default each once.
        num_workers: Processes that read and crop.
        cache: Keep all volumes in memory.
        seed: Seed of order and augmentation; the command sets it to the run's.

    Raises:
        InputError: The folder or a file in it is not as described.
    """

    def __init__(
        self,
        root: Path | None = None,
        layout: Layout = "auto",
        class_names: list[str] | None = None,
        label_map: dict[int, int] | None = None,
        roi_size: tuple[int, int, int] = (96, 96, 96),
        preprocess: Preprocess = Preprocess(),
        augment: Augment = Augment(),
        split: Split = Split(),
        batch_size: int = 1,
        epoch_volumes: int | None = None,
        num_workers: int = 0,
        cache: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.label_map = None if root is None else Path(root), label_map
        self.roi_size, self.preprocess, self.augment = tuple(roi_size), preprocess, augment
        self.batch_size, self.epoch_volumes = batch_size, epoch_volumes
        self.num_workers, self.cache, self.seed = num_workers, cache, seed
        self._parts: tuple[list[Any], list[Any], list[Any]] | None = None
        if self.root is None:
            self.class_names, self.in_channels = list(brain.CLASSES), 1
        else:
            cases = find_cases(self.root, layout)
            self._parts = split.apply(cases)
            self.class_names = class_names or class_names_in(self.root) or self._found(cases)
            self.in_channels = channels(cases[0].image)
        self.num_classes = len(self.class_names)
        self._volumes: dict[str, Volumes] = {}

    def describe(self) -> str:
        """What the data is, in one line."""
        if self.root is None:
            return brain.DESCRIPTION
        assert self._parts is not None
        train, val, test = self._parts
        held_out = f"{len(val)} held out" if val == test else f"{len(val)} val, {len(test)} test"
        return (
            f"{self.root.name}: {len(train)} train, {held_out} cases, {self.in_channels} "
            f"channel{'s' * (self.in_channels > 1)}, classes {', '.join(self.class_names)}"
        )

    def setup(self, stage: str) -> None:
        """Read the volumes, into memory unless ``cache`` is off."""
        if self._volumes:
            return
        if self._parts is None:
            self._parts = (
                list(brain.subjects("back", brain.TRAIN_SEEDS)),
                list(brain.subjects("back", brain.VAL_SEEDS)),
                list(brain.subjects("front", brain.TEST_SEEDS)),
            )
        for name, cases in zip(("train", "val", "test"), self._parts, strict=True):
            self._volumes[name] = Volumes(
                cases,
                self.preprocess,
                self.num_classes,
                self.in_channels,
                self.label_map,
                self.cache,
            )
        if self.cache:
            everything = [(v, i) for v in self._volumes.values() for i in range(len(v))]
            hidden = self.root is None
            for volumes, index in tqdm(everything, desc="reading volumes", disable=hidden):
                volumes[index]  # read now, with a bar, and kept

    def train_dataloader(self) -> ResumableLoader:
        """Patches: ``image`` ``(B, C, *roi)``, ``label`` ``(B, 1, *roi)``."""
        patches = Patches(self._volumes["train"], self.augment, self.roi_size)
        sampler = EpochSampler(len(patches), seed=self.seed, num_samples=self.epoch_volumes)
        return ResumableLoader(
            patches,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=join,
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Whole volumes, one at a time."""
        return self._whole("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Whole volumes, one at a time."""
        return self._whole("test")

    def _whole(self, part: str) -> DataLoader[Sample]:
        return DataLoader(self._volumes[part], batch_size=1, collate_fn=single)

    def _found(self, cases: list[Case]) -> list[str]:
        """Name classes by their values, from all labels: nothing else says how many there are."""
        bar = tqdm(cases, desc="looking for classes")
        highest = max(
            int(read_label(case.label, label_map=self.label_map).array.max()) for case in bar
        )
        return ["background", *(f"class {value}" for value in range(1, highest + 1))]

# ruff: noqa: B008 (the defaults are frozen dataclasses)
"""The data modules: clouds with images to pre-train on, clouds with labels to segment."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler, ResumableLoader
from cohobate.lidar.data import kitti, nuscenes
from cohobate.lidar.data.nuscenes import CHANNELS, Frame, NuScenes
from cohobate.lidar.data.sets import (
    Batch,
    Intensity,
    Labelled,
    Pairs,
    Prepare,
    PreparePillars,
    PrepareVoxels,
    collate_labelled,
    collate_pairs,
    read_scene,
)
from cohobate.lidar.data.simulator import Simulator
from cohobate.lidar.data.superpixels import Slic, Superpixels, compute
from cohobate.lidar.data.transforms import Augment, fit_size
from cohobate.lidar.data.voxels import Voxels

Layout = Literal["nuscenes", "semantic-kitti", "kitti-object"]
Form = Literal["voxels", "pillars"]


def cache_folder() -> Path:
    """Where simulated scenes are kept: ``$COHOBATE_CACHE``, else ``~/.cache/cohobate``."""
    given = os.environ.get("COHOBATE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "cohobate"


class _LidarData(pl.LightningDataModule):
    """What both data modules share; they differ in their samples."""

    root: Path | None
    layout: Layout

    def __init__(
        self,
        root: Path | None,
        layout: Layout,
        version: str | None,
        simulator: Simulator,
        form: Form,
        voxels: Voxels,
        intensity: Intensity | None,
        workers: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.layout, self.simulator, self.version = layout, simulator, version
        self.embedded = root is None
        self.root = Path(root) if root else cache_folder() / "lidar" / simulator.folder_name()
        self.form, self.voxels = form, voxels
        if intensity is None:
            # as in the released networks: nuScenes raw, remission + 1 of KITTI
            intensity = Intensity() if layout == "nuscenes" else Intensity(1.0, 1.0)
        self.intensity = intensity
        self.workers, self.batch_size, self.seed = workers, batch_size, seed
        if self.embedded and layout != "nuscenes":
            raise InputError(f"data.layout {layout}: the embedded scenes have the layout nuscenes")
        self.class_names = list(kitti.CLASSES if layout == "semantic-kitti" else nuscenes.CLASSES)

    @property
    def prepare(self) -> Prepare:
        """From points to what the network takes."""
        if self.form == "pillars":
            return PreparePillars(self.intensity)
        return PrepareVoxels(self.voxels, self.intensity)

    def prepare_data(self) -> None:
        """Simulate the embedded scenes, once."""
        if self.embedded:
            assert self.root is not None
            self.simulator.write(self.root, jobs=self.simulator.jobs())

    def read_frames(self, split: str, every: int, *, cameras: bool) -> list[Frame]:
        """Frames of a split."""
        assert self.root is not None
        if self.layout == "semantic-kitti":
            return kitti.semantic_frames(self.root, split, every)
        if self.layout == "kitti-object":
            return kitti.object_frames(self.root)[::every]
        reader = self._reader
        return reader.frames(reader.scenes(split, every), cameras=cameras)

    @cached_property
    def _reader(self) -> NuScenes:
        assert self.root is not None
        return NuScenes(self.root, self.version)

    def origin(self) -> str:
        """Name of the data set."""
        if self.embedded:
            sim = self.simulator
            return f"SYNTHETIC street scenes, {sim.train} to learn from, {sim.val} to evaluate on"
        assert self.root is not None
        return f"{self.root.name} ({self.layout})"


class ImageCloudData(_LidarData):
    """Sweeps with camera images and superpixels, without labels.

    Args:
        root: Folder in the layout; ``None`` are the embedded SYNTHETIC scenes.
        layout: ``nuscenes``, ``semantic-kitti`` (sequences with ``image_2``), ``kitti-object``.
        version: nuScenes: folder of the tables, where there are several.
        train_split: Scenes to train on; nuScenes: ``train``, ``parametrize``, ``mini_train``, ...
        val_split: Scenes whose loss is watched.
        every: Keep every so many-th scene (SemanticKITTI: sweep) of both.
        cameras: nuScenes: channels, in order.
        superpixels: Where the superpixels come from, by default SLIC with the paper's settings;
            missing ones are made before training.
        superpixel_root: Where they are kept; by default in ``root``.
        crop: Height and width of the images in training.
        augment: What is done to clouds and images.
        form: ``voxels`` for U-Nets, ``pillars`` for VoxelNet.
        voxels: Shape of the voxels.
        intensity: What becomes of the intensity; the default is that of the released networks.
        simulator: The embedded scenes.
        batch_size: Clouds a step; each has all its images.
        workers: Processes that read, and that make superpixels.
        seed: Seed of order and augmentation; the command sets it to the run's.

    Raises:
        InputError: A file or table is missing or damaged.
    """

    def __init__(
        self,
        root: Path | None = None,
        layout: Layout = "nuscenes",
        version: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        every: int = 1,
        cameras: tuple[str, ...] = CHANNELS,
        superpixels: Superpixels | None = None,
        superpixel_root: Path | None = None,
        crop: tuple[int, int] = (224, 416),
        augment: Augment = Augment(),
        form: Form = "voxels",
        voxels: Voxels = Voxels(),
        intensity: Intensity | None = None,
        simulator: Simulator = Simulator(),
        batch_size: int = 4,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root, layout, version, simulator, form, voxels, intensity, workers, batch_size, seed
        )
        self.splits, self.every, self.cameras = (train_split, val_split), every, tuple(cameras)
        self.superpixels = superpixels or Slic()
        self.superpixel_root = superpixel_root or self.root
        self.crop, self.augment = (crop[0], crop[1]), augment
        self._frames: dict[str, list[Frame]] = {}

    @cached_property
    def _reader(self) -> NuScenes:
        assert self.root is not None
        return NuScenes(self.root, self.version, self.cameras)

    def describe(self) -> str:
        """What the data is, in one line."""
        return f"{self.origin()}; {len(self.cameras)} cameras, {self.superpixels.folder}"

    def prepare_data(self) -> None:
        """Simulate the embedded scenes and make missing superpixels."""
        super().prepare_data()
        self.setup("fit")
        cameras = [c for frames in self._frames.values() for f in frames for c in f.cameras]
        jobs = self.simulator.jobs() if self.embedded else max(self.workers, 1)
        assert self.superpixel_root is not None
        compute(cameras, self.superpixels, self.superpixel_root, jobs)

    def setup(self, stage: str) -> None:
        """Read the tables."""
        for name, split in zip(("train", "val"), self.splits, strict=True):
            if name not in self._frames:
                self._frames[name] = self.read_frames(split, self.every, cameras=True)

    def calibration_images(self, frames: int = 16) -> Tensor:
        """Resized images of the first training frames, for statistics of a random teacher.

        Args:
            frames: How many.

        Returns:
            (I, 3, H, W).
        """
        self.setup("fit")
        assert self.superpixel_root is not None
        scenes = [
            fit_size(read_scene(frame, self.superpixels, self.superpixel_root), self.crop)
            for frame in self._frames["train"][:frames]
        ]
        return torch.cat([scene.images for scene in scenes])

    def train_dataloader(self) -> ResumableLoader:
        """Augmented clouds and images, joined by `cohobate.lidar.data.sets.collate_pairs`."""
        pairs = self._pairs("train", self.augment)
        return ResumableLoader(
            pairs,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(pairs), seed=self.seed),
            drop_last=len(pairs) >= self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=collate_pairs,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Whole images, resized."""
        return DataLoader(
            self._pairs("val", None),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=collate_pairs,
        )

    def _pairs(self, name: str, how: Augment | None) -> Pairs:
        assert self.superpixel_root is not None
        return Pairs(
            self._frames[name], self.prepare, self.superpixels, self.superpixel_root, self.crop, how
        )


class LabelledCloudData(_LidarData):
    """Sweeps with a label for each point.

    Args:
        root: Folder in the layout; ``None`` are the embedded SYNTHETIC scenes.
        layout: ``nuscenes`` (with lidarseg) or ``semantic-kitti``.
        version: nuScenes: folder of the tables, where there are several.
        train_split: Scenes to train on.
        val_split: Scenes to validate on.
        test_split: Scenes to test on.
        every: Keep every so many-th training scene (SemanticKITTI: sweep): 100 for 1 % of labels.
        augment: What is done to training clouds.
        voxels: Shape of the voxels; that of the pre-trained network.
        intensity: What becomes of the intensity; the default is that of the released networks.
        simulator: The embedded scenes.
        batch_size: Clouds a step.
        epoch_clouds: Clouds an epoch; by default each once.
        workers: Processes that read.
        seed: Seed of order and augmentation; the command sets it to the run's.

    Raises:
        InputError: A file or table is missing or damaged.
    """

    def __init__(
        self,
        root: Path | None = None,
        layout: Layout = "nuscenes",
        version: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        every: int = 1,
        augment: Augment = Augment(),
        voxels: Voxels = Voxels(),
        intensity: Intensity | None = None,
        simulator: Simulator = Simulator(),
        batch_size: int = 16,
        epoch_clouds: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root, layout, version, simulator, "voxels", voxels, intensity, workers, batch_size, seed
        )
        if layout == "kitti-object":
            raise InputError("data.layout kitti-object: these sweeps have no point labels")
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.every, self.augment, self.epoch_clouds = every, augment, epoch_clouds
        self._frames: dict[str, list[Frame]] = {}
        self.lookup = label_lookup(layout)

    def describe(self) -> str:
        """What the data is, in one line."""
        share = "" if self.every == 1 else f"; labels of every {self.every}th training scene"
        return self.origin() + share

    def setup(self, stage: str) -> None:
        """Read the tables."""
        for name, split in self.splits.items():
            if name not in self._frames:
                every = self.every if name == "train" else 1
                self._frames[name] = self.read_frames(split, every, cameras=False)

    def train_dataloader(self) -> ResumableLoader:
        """Augmented clouds, joined by `cohobate.lidar.data.sets.collate_labelled`."""
        clouds = self._labelled("train", self.augment)
        sampler = EpochSampler(len(clouds), seed=self.seed, num_samples=self.epoch_clouds)
        return ResumableLoader(
            clouds,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=collate_labelled,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Clouds as they are."""
        return self._whole("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Clouds as they are."""
        return self._whole("test")

    def frames(self, name: str) -> list[Frame]:
        """Frames of ``train``, ``val`` or ``test``."""
        return self._frames[name]

    def _whole(self, name: str) -> DataLoader[Batch]:
        return DataLoader(
            self._labelled(name, None),
            batch_size=min(self.batch_size, 4),
            num_workers=self.workers,
            collate_fn=collate_labelled,
        )

    def _labelled(self, name: str, how: Augment | None) -> Labelled:
        return Labelled(self._frames[name], self.prepare, self.lookup, how)


def label_lookup(layout: Layout) -> np.ndarray:
    """Raw label id → class; −1 for ids that do not exist (nuScenes has 0 to 31)."""
    if layout == "semantic-kitti":
        lookup = np.full(260, -1)
        for raw, label in kitti.TO_CLASS.items():
            lookup[raw] = label
        return lookup
    lookup = np.zeros(32, np.int64)
    for raw, label in nuscenes.TO_CLASS.items():
        lookup[raw] = label
    return lookup

"""Samples and batches: clouds paired with images, clouds with labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cohobate.core.errors import InputError
from cohobate.lidar.data.files import read_image, read_labels, read_sweep
from cohobate.lidar.data.nuscenes import Frame
from cohobate.lidar.data.projection import pair
from cohobate.lidar.data.superpixels import Superpixels
from cohobate.lidar.data.transforms import Augment, Scene, augment, fit_size, turn
from cohobate.lidar.data.voxels import Voxels, voxelize, voxelize_box

Batch = dict[str, Any]


@dataclass(frozen=True)
class Intensity:
    """What becomes of a point's intensity before it is a feature: ``scale · value + shift``."""

    scale: float = 1.0
    shift: float = 0.0


class Prepare(Protocol):
    """From points to what a network takes."""

    def __call__(self, points: np.ndarray) -> Prepared:
        """Points x, y, z, intensity (N, 4) → inputs."""


@dataclass(frozen=True)
class Prepared:
    """A cloud as a network takes it.

    Attributes:
        inputs: The network's arguments, without batch index.
        rows: Row of the network's output for each point (N,); −1 where it has none.
        kept: Point that represents each output row.
    """

    inputs: tuple[Tensor, ...]
    rows: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class PrepareVoxels:
    """For `cohobate.lidar.nets.ResUNet`: coordinates and intensity of voxels."""

    voxels: Voxels
    intensity: Intensity

    def __call__(self, points: np.ndarray) -> Prepared:
        """A row for each voxel."""
        found = voxelize(points, self.voxels)
        features = points[found.kept, 3:4] * self.intensity.scale + self.intensity.shift
        inputs = torch.from_numpy(found.coordinates), torch.from_numpy(features.astype(np.float32))
        return Prepared(inputs, found.inverse, found.kept)


@dataclass(frozen=True)
class PreparePillars:
    """For `cohobate.lidar.nets.VoxelNet`: voxels of a fixed grid, and the points inside it."""

    intensity: Intensity

    def __call__(self, points: np.ndarray) -> Prepared:
        """A row for each point inside the grid."""
        points = points.copy()
        points[:, 3] = points[:, 3] * self.intensity.scale + self.intensity.shift
        found = voxelize_box(points)
        rows = np.full(len(points), -1)
        rows[found.inside] = np.arange(len(found.inside))
        inputs = (
            torch.from_numpy(found.coordinates),
            torch.from_numpy(found.features),
            torch.from_numpy(points[found.inside, :3]),
        )
        return Prepared(inputs, rows, found.inside)


def read_scene(frame: Frame, source: Superpixels, superpixel_root: Path) -> Scene:
    """A frame's points, images, superpixels and pairs.

    Args:
        frame: The frame.
        source: Whose superpixels.
        superpixel_root: Where they are kept.

    Raises:
        InputError: A file is missing or damaged, or the images have no pair at all.
    """
    points = read_sweep(frame.sweep)
    images = [read_image(camera.file, camera.size) for camera in frame.cameras]
    regions = [source.read(superpixel_root, camera) for camera in frame.cameras]
    if not images:
        raise InputError(f"{frame.sweep}: no image belongs to this sweep")
    pairing = pair(points, frame.cameras)
    if not len(pairing.points):
        raise InputError(f"{frame.sweep}: no point falls into any image; wrong calibration?")
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255
    return Scene(points, stacked, torch.from_numpy(np.stack(regions)), pairing)


class Pairs(Dataset[Batch]):
    """Clouds with images, superpixels and pairs.

    Args:
        frames: The frames.
        prepare: What the network takes.
        source: Whose superpixels.
        superpixel_root: Where they are kept.
        crop: Height and width of the images afterwards.
        how: Augmentation; without, images are resized as a whole.
    """

    def __init__(
        self,
        frames: list[Frame],
        prepare: Prepare,
        source: Superpixels,
        superpixel_root: Path,
        crop: tuple[int, int],
        how: Augment | None,
    ) -> None:
        self.frames, self.prepare, self.source = frames, prepare, source
        self.superpixel_root, self.crop, self.how = superpixel_root, crop, how

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Batch:
        frame = self.frames[index]
        scene = read_scene(frame, self.source, self.superpixel_root)
        if self.how is None:
            scene = fit_size(scene, self.crop)
        else:
            rng = np.random.default_rng(getattr(index, "seed", 0))
            scene = augment(scene, self.how, self.crop, rng)
        prepared = self.prepare(scene.points)
        rows = prepared.rows[scene.pairing.points]
        used = rows >= 0
        return {
            "inputs": prepared.inputs,
            "images": scene.images,
            "superpixels": scene.superpixels,
            "pairing_points": torch.from_numpy(rows[used]),
            "pairing_pixels": torch.from_numpy(scene.pairing.pixels[used]),
        }


def collate_pairs(samples: list[Batch]) -> Batch:
    """Join samples: batch indices in front, pairs shifted to their rows and images."""
    sizes = [_rows(sample["inputs"]) for sample in samples]
    images = [len(sample["images"]) for sample in samples]
    starts, firsts = np.cumsum([0, *sizes]), np.cumsum([0, *images])
    pixels = []
    for sample, first in zip(samples, firsts, strict=False):
        shifted = sample["pairing_pixels"].clone()
        shifted[:, 0] += int(first)
        pixels.append(shifted)
    points = [s["pairing_points"] + int(start) for s, start in zip(samples, starts, strict=False)]
    return {
        "inputs": join_inputs([sample["inputs"] for sample in samples]),
        "images": torch.cat([sample["images"] for sample in samples]),
        "superpixels": torch.cat([sample["superpixels"] for sample in samples]),
        "pairing_points": torch.cat(points),
        "pairing_pixels": torch.cat(pixels),
    }


class Labelled(Dataset[Batch]):
    """Clouds with labels.

    Args:
        frames: The frames.
        prepare: What the network takes.
        lookup: Raw label id → class.
        how: Augmentation of the cloud; its parts for images do nothing here.
    """

    def __init__(
        self, frames: list[Frame], prepare: Prepare, lookup: np.ndarray, how: Augment | None
    ) -> None:
        self.frames, self.prepare, self.lookup, self.how = frames, prepare, lookup, how

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Batch:
        frame = self.frames[index]
        points = read_sweep(frame.sweep)
        if frame.labels is None:
            raise InputError(f"{frame.sweep}: no labels belong to this sweep")
        labels = read_labels(frame.labels, len(points), self.lookup)
        if self.how is not None:
            points = turn(points, self.how, np.random.default_rng(getattr(index, "seed", 0)))
        prepared = self.prepare(points)
        return {
            "inputs": prepared.inputs,
            "labels": torch.from_numpy(labels[prepared.kept]),
            "rows": torch.from_numpy(prepared.rows),
            "point_labels": torch.from_numpy(labels),
            "points": torch.from_numpy(points),
        }


def collate_labelled(samples: list[Batch]) -> Batch:
    """Join samples: batch indices in front, rows of points shifted."""
    starts = np.cumsum([0, *(_rows(sample["inputs"]) for sample in samples)])
    rows = [
        torch.where(s["rows"] < 0, -1, s["rows"] + int(start))
        for s, start in zip(samples, starts, strict=False)
    ]
    return {
        "inputs": join_inputs([sample["inputs"] for sample in samples]),
        "labels": torch.cat([sample["labels"] for sample in samples]),
        "rows": torch.cat(rows),
        "point_labels": torch.cat([sample["point_labels"] for sample in samples]),
        "clouds": [sample["points"] for sample in samples],
    }


def join_inputs(inputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The network's arguments of several clouds: places get the batch index in front."""

    def numbered(place: int) -> Tensor:
        parts = [sample[place] for sample in inputs]
        return torch.cat([torch.nn.functional.pad(p, (1, 0), value=i) for i, p in enumerate(parts)])

    features = torch.cat([sample[1] for sample in inputs])
    joined: tuple[Tensor, ...] = (numbered(0), features)
    return (*joined, numbered(2)) if len(inputs[0]) > 2 else joined


def _rows(inputs: tuple[Tensor, ...]) -> int:
    return len(inputs[-1])

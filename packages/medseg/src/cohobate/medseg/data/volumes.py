"""Whole volumes for evaluation and random patches for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandShiftIntensityd,
    SpatialPadd,
    map_binary_to_indices,
)
from torch import Tensor
from torch.utils.data import Dataset

from cohobate.core.errors import InputError
from cohobate.medseg.data.nifti import Case, read_image, read_label
from cohobate.medseg.data.preprocess import Preprocess


class Sample(TypedDict):
    """One preprocessed volume.

    Attributes:
        image: ``(C, X, Y, Z)`` float32.
        label: ``(1, X, Y, Z)`` uint8.
        affine: 4×4 of the preprocessed grid; an array, so that it stays on the CPU.
        name: Name of the case.
    """

    image: Tensor
    label: Tensor
    affine: np.ndarray
    name: str


class Batch(TypedDict):
    """Patches of a training step.

    Attributes:
        image: ``(B, C, *roi)`` float32.
        label: ``(B, 1, *roi)`` uint8.
    """

    image: Tensor
    label: Tensor


@dataclass(frozen=True)
class Augment:
    """Random part of the training patches; all of it follows from a draw's seed.

    Args:
        crops: Patches per volume and step.
        pos: Weight of centres on foreground.
        neg: Weight of centres on background where the image is above 0.
        pad: How a volume smaller than a patch is filled up.
        flip: Probability of a flip, for each axis.
        rotate90: Probability of a rotation by 90, 180 or 270 degrees in the first two axes.
        shift: Largest intensity shift, either way.
        shift_prob: Probability of a shift.
    """

    crops: int = 2
    pos: float = 1.0
    neg: float = 0.0
    pad: Literal["constant", "edge", "reflect"] = "constant"
    flip: float = 0.1
    rotate90: float = 0.1
    shift: float = 0.1
    shift_prob: float = 0.5

    def transform(self, roi_size: Sequence[int]) -> Compose:
        """The MONAI transforms from a padded volume to its patches.

        Args:
            roi_size: Size of a patch.

        Raises:
            InputError: Patches that are not square in the first two axes cannot be rotated.
        """
        both = ["image", "label"]
        if self.rotate90 > 0 and roi_size[0] != roi_size[1]:
            raise InputError(
                f"augment.rotate90 needs patches with equal first sizes, roi_size is {roi_size}"
            )
        return Compose(
            [
                RandCropByPosNegLabeld(
                    both,
                    label_key="label",
                    spatial_size=roi_size,
                    pos=self.pos,
                    neg=self.neg,
                    num_samples=self.crops,
                    fg_indices_key="foreground",
                    bg_indices_key="background",
                ),
                *(RandFlipd(both, prob=self.flip, spatial_axis=axis) for axis in range(3)),
                RandRotate90d(both, prob=self.rotate90, max_k=3),
                RandShiftIntensityd(["image"], offsets=self.shift, prob=self.shift_prob),
            ]
        )


class Volumes(Dataset[Sample]):
    """Preprocessed volumes.

    Args:
        cases: NIfTI pairs, or anything with a ``name`` whose ``image`` and ``label`` are already
            `cohobate.medseg.data.nifti.Volume`.
        preprocess: Deterministic preprocessing.
        num_classes: K, against which labels are checked.
        in_channels: C, against which images are checked.
        label_map: Value in a label file → class id.
        cache: Keep volumes in memory once read.
    """

    def __init__(
        self,
        cases: Sequence[Any],
        preprocess: Preprocess,
        num_classes: int,
        in_channels: int,
        label_map: dict[int, int] | None = None,
        cache: bool = True,
    ) -> None:
        self.cases, self.preprocess = list(cases), preprocess
        self.num_classes, self.in_channels, self.label_map = num_classes, in_channels, label_map
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Sample:
        index = int(index)
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            self._cache[index] = self._read(index)
        return self._cache[index]

    def _read(self, index: int) -> Sample:
        case = self.cases[index]
        image, label = case.image, case.label
        if isinstance(case, Case):
            image = read_image(case.image)
            label = read_label(case.label, self.num_classes, self.label_map)
            if image.array.shape[0] != self.in_channels:
                raise InputError(
                    f"{case.image}: {image.array.shape[0]} channels, expected {self.in_channels}"
                )
            if image.array.shape[1:] != label.array.shape[1:]:
                raise InputError(
                    f"{case.label}: size {label.array.shape[1:]} differs from its image's "
                    f"{image.array.shape[1:]}"
                )
        processed = self.preprocess.image(image)
        return {
            "image": processed.as_tensor().contiguous(),
            "label": self.preprocess.label(label).as_tensor().contiguous(),
            "affine": processed.affine.numpy(),
            "name": case.name,
        }


class Patches(Dataset[Batch]):
    """Random patches of volumes.

    Args:
        volumes: Preprocessed volumes.
        augment: Cropping and augmentation.
        roi_size: Size of a patch.
    """

    def __init__(self, volumes: Volumes, augment: Augment, roi_size: Sequence[int]) -> None:
        self.volumes = volumes
        self._pad = SpatialPadd(["image", "label"], roi_size, mode=augment.pad)
        self._random = augment.transform(roi_size)
        self._ready: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, draw: int) -> Batch:
        """All patches of one draw; the same draw gives the same patches."""
        volume = self._volume(int(draw))
        with _plain_tensors():
            self._random.set_random_state(seed=getattr(draw, "seed", 0) % 2**32)
            patches: Any = self._random(volume)
        return {
            "image": torch.stack([patch["image"] for patch in patches]),
            "label": torch.stack([patch["label"] for patch in patches]),
        }

    def _volume(self, index: int) -> Any:
        """A padded volume with the places where a patch may be centred."""
        if index in self._ready:
            return self._ready[index]
        sample = self.volumes[index]
        with _plain_tensors():
            volume: Any = self._pad({"image": sample["image"], "label": sample["label"]})
        centres = map_binary_to_indices(volume["label"], volume["image"])
        for name, indices in zip(("foreground", "background"), centres, strict=True):
            volume[name] = torch.as_tensor(indices, dtype=torch.int32)
        if self.volumes._cache is not None:
            self._ready[index] = volume
        return volume


def join(draws: Sequence[Batch]) -> Batch:
    """Make one batch of the patches of several draws."""
    return {
        "image": torch.cat([draw["image"] for draw in draws]),
        "label": torch.cat([draw["label"] for draw in draws]),
    }


def single(samples: Sequence[Sample]) -> Sample:
    """A batch of one volume: a batch axis is added, sizes may differ from volume to volume."""
    (sample,) = samples
    return {**sample, "image": sample["image"][None], "label": sample["label"][None]}


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """MONAI transforms without meta data, three times as fast."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)

"""What is done to every image before the network sees it, in training and prediction alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    NormalizeIntensity,
    Orientation,
    ScaleIntensity,
    ScaleIntensityRange,
    Spacing,
    SpatialResample,
)
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.medseg.data.nifti import Volume


@dataclass(frozen=True)
class Preprocess:
    """Deterministic preprocessing.

    Args:
        spacing: Voxel size to resample to, in mm along the file's axes; ``None`` keeps the file's.
        orientation: Anatomical axis order after the resampling, such as ``RAS``; ``None`` keeps
            the file's.
        clip: Range to clip to before scaling it to [0, 1], such as -175 to 250 HU for cardiac CT.
        intensity: ``zscore`` per channel over the voxels that are not 0, ``minmax`` to [0, 1] over
            the image, or ``none``.

    Raises:
        InputError: A value is impossible.
    """

    spacing: tuple[float, float, float] | None = None
    orientation: str | None = "RAS"
    clip: tuple[float, float] | None = None
    intensity: Literal["zscore", "minmax", "none"] = "zscore"

    def __post_init__(self) -> None:
        if self.spacing is not None and min(self.spacing) <= 0:
            raise InputError(f"preprocess.spacing {self.spacing}: must be positive")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise InputError(f"preprocess.clip {self.clip}: must rise")
        axes = [set("RL"), set("AP"), set("SI")]
        code = set(self.orientation or "RAS")
        if len(self.orientation or "RAS") != 3 or not all(len(code & pair) == 1 for pair in axes):
            raise InputError(f"preprocess.orientation {self.orientation}: not a code such as RAS")

    def image(self, volume: Volume) -> MetaTensor:
        """Resample, orient and scale an image.

        Args:
            volume: As read from a file.

        Returns:
            ``(C, X, Y, Z)`` float32 with its affine.
        """
        out: Any = self._grid(volume, "bilinear")  # MONAI's types are wider than what it returns
        if self.clip is not None:
            out = ScaleIntensityRange(*self.clip, 0.0, 1.0, clip=True)(out)
        if self.intensity == "zscore":
            out = NormalizeIntensity(nonzero=True, channel_wise=True)(out)
        elif self.intensity == "minmax":
            out = ScaleIntensity(0.0, 1.0)(out)
        result: MetaTensor = out
        return result

    def label(self, volume: Volume) -> MetaTensor:
        """Resample (nearest neighbour) and orient a label.

        Args:
            volume: Class ids.

        Returns:
            ``(1, X, Y, Z)`` uint8 with its affine.
        """
        ids: Any = self._grid(volume, "nearest").to(torch.uint8)
        result: MetaTensor = ids
        return result

    def restore(self, scores: Tensor, processed: MetaTensor, volume: Volume) -> np.ndarray:
        """Bring class scores back to the grid of the file.

        Args:
            scores: Probabilities ``(K, *S)`` on the preprocessed grid.
            processed: What `image` returned for the file.
            volume: The file's content.

        Returns:
            Class ids ``(X, Y, Z)`` on the file's grid.
        """
        plain = torch.from_numpy(scores.detach().cpu().float().numpy())  # drops scores' own affine
        grid = MetaTensor(plain, affine=processed.affine)
        size = volume.array.shape[1:]
        back = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)
        out = back(grid, dst_affine=torch.as_tensor(volume.affine), spatial_size=size)
        return out.argmax(0).numpy().astype(np.uint8)

    def _grid(self, volume: Volume, mode: str) -> MetaTensor:
        out: Any = MetaTensor(
            torch.as_tensor(volume.array, dtype=torch.float32),
            affine=torch.as_tensor(volume.affine),
        )
        if self.spacing is not None:
            out = Spacing(self.spacing, mode=mode, padding_mode="border")(out)
        if self.orientation is not None:
            out = Orientation(self.orientation, labels=None)(out)
        result: MetaTensor = out
        return result


def voxel_size(affine: np.ndarray) -> tuple[float, ...]:
    """Edge lengths of a voxel in mm.

    Args:
        affine: 4×4.

    Example:
        >>> voxel_size(np.diag([2.0, -1.5, 1.0, 1.0]))
        (2.0, 1.5, 1.0)
    """
    return tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())

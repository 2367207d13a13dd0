"""What the tests of this package share: NIfTI files made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

MakeNifti = Callable[..., Path]


@pytest.fixture
def make_nifti() -> MakeNifti:
    """Write a NIfTI file: ``make(path, array, affine)``."""

    def make(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return make


@pytest.fixture
def make_cases(make_nifti: MakeNifti) -> Callable[..., Path]:
    """Write a folder of image and label pairs: a bright ball in noise, one class inside another."""

    def make(
        root: Path,
        count: int = 6,
        size: tuple[int, ...] = (40, 36, 34),
        folders: tuple[str, str] = ("images", "labels"),
        values: tuple[int, ...] = (0, 1, 2),
        channels: int = 1,
    ) -> Path:
        for number in range(count):
            rng = np.random.default_rng(number)
            grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1)
            centre = np.array(size) / 2 + rng.uniform(-3, 3, 3)
            radius = np.linalg.norm(grid - centre, axis=-1)
            ids = (radius < 11).astype(np.uint8) + (radius < 6)
            shape = (*size, channels) if channels > 1 else size
            image = 100 + 20 * ids.reshape(*size, *(1,) * (channels > 1)) + rng.normal(0, 5, shape)
            name = f"case_{number:03d}.nii.gz"
            make_nifti(root / folders[0] / name, image.astype(np.float32))
            make_nifti(root / folders[1] / name, np.array(values, dtype=np.int16)[ids])
        return root

    return make

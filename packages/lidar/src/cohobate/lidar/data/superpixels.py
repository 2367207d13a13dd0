"""Superpixels: made once for each image and kept, or taken from another segmenter's files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.segmentation import slic
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.lidar.data.files import read_image
from cohobate.lidar.data.projection import Camera


class Superpixels:
    """Where the superpixels of an image come from."""

    @property
    @abstractmethod
    def folder(self) -> str:
        """Folder of the label images, below the data set; other settings, other folder."""

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Labels (H, W) of an image (H, W, 3); only for sources that compute them."""
        raise InputError(f"{self.folder}: superpixels of this source cannot be computed here")

    def file(self, root: Path, camera: Camera) -> Path:
        """Where the labels of an image are kept.

        Args:
            root: Folder of the data set, or another for the superpixels.
            camera: The image.
        """
        return root / self.folder / f"{camera.token}.png"

    def read(self, root: Path, camera: Camera) -> np.ndarray:
        """Labels of an image (H, W), int32.

        Args:
            root: As for `file`.
            camera: The image.

        Raises:
            InputError: The file is missing, damaged, of another size, or has a negative label.
        """
        path = self.file(root, camera)
        labels = read_label_image(path)
        if labels.shape != tuple(camera.size):
            raise InputError(f"{path}: {labels.shape} pixels, the image has {tuple(camera.size)}")
        return labels


@dataclass(frozen=True)
class Slic(Superpixels):
    """SLIC of scikit-image.

    Args:
        segments: About how many an image.
        compactness: Weight of nearness against colour.
        sigma: Smoothing beforehand, pixels.
    """

    segments: int = 150
    compactness: float = 6.0
    sigma: float = 3.0

    @property
    def folder(self) -> str:
        """``superpixels_slic_150_6_3`` for the paper's settings."""
        return f"superpixels_slic_{self.segments}_{self.compactness:g}_{self.sigma:g}"

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Labels (H, W) of an image (H, W, 3)."""
        return slic(
            image,
            n_segments=self.segments,
            compactness=self.compactness,
            sigma=self.sigma,
            start_label=0,
        )


@dataclass(frozen=True)
class Precomputed(Superpixels):
    """Label images of any segmenter: SAM masks flattened to one label a pixel, the official SLIC.

    Args:
        name: Folder with ``<token of the image>.png`` (8 or 16 bit) or ``.npy``.
    """

    name: str = "superpixels_slic"

    @property
    def folder(self) -> str:
        """As given."""
        return self.name

    def file(self, root: Path, camera: Camera) -> Path:
        """The ``.png``, or the ``.npy`` where there is none."""
        png = super().file(root, camera)
        npy = png.with_suffix(".npy")
        return npy if npy.exists() and not png.exists() else png


def read_label_image(path: Path) -> np.ndarray:
    """Labels of a ``.png`` or ``.npy`` (H, W), int32.

    Raises:
        InputError: The file is missing, damaged, no label image, or has a negative label.
    """
    try:
        if path.suffix == ".npy":
            labels = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                labels = np.asarray(image)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no superpixels of this image; `cohobate-lidar superpixels` makes them"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged label image: {error}") from None
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise InputError(
            f"{path}: {labels.shape} {labels.dtype}, expected one whole number a pixel"
        )
    if labels.size and labels.min() < 0:
        raise InputError(f"{path}: label {labels.min()} is negative")
    if labels.size and labels.max() >= labels.size:
        raise InputError(f"{path}: label {labels.max()} in an image of {labels.size} pixels")
    return labels.astype(np.int32)


def write_label_image(path: Path, labels: np.ndarray) -> None:
    """Write labels (H, W) as PNG, 16 bit where 8 are too few.

    Raises:
        InputError: More labels than 16 bit hold.
    """
    if labels.max() > 0xFFFF:
        raise InputError(f"{path}: {labels.max()} labels do not fit a PNG")
    kind = np.uint8 if labels.max() < 256 else np.uint16
    with save_atomic(path) as temporary:
        Image.fromarray(labels.astype(kind)).save(temporary)


def compute(cameras: Sequence[Camera], source: Superpixels, root: Path, jobs: int = 1) -> int:
    """Make the superpixels that are missing; a call that was stopped goes on.

    Args:
        cameras: The images.
        source: What makes them.
        root: Where they are kept.
        jobs: Processes.

    Returns:
        How many were made.

    Raises:
        InputError: An image cannot be read.
    """
    missing = [camera for camera in cameras if not source.file(root, camera).exists()]
    if not missing:
        return 0
    if isinstance(source, Precomputed):
        raise InputError(f"{source.file(root, missing[0])}: no superpixels of this image")
    work = partial(_make, source, root)
    for _ in tqdm(_each(work, missing, jobs), total=len(missing), desc=source.folder, unit="image"):
        pass
    return len(missing)


def _make(source: Superpixels, root: Path, camera: Camera) -> None:
    labels = source.segment(read_image(camera.file, camera.size))
    write_label_image(source.file(root, camera), labels)


def _each(work: Any, items: Sequence[Camera], jobs: int) -> Iterable[Any]:
    if jobs <= 1 or len(items) < 2:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, items, chunksize=4)

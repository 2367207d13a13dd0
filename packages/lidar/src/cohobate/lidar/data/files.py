"""Sweeps, labels and images from files; a fault names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cohobate.core.errors import InputError


def read_sweep(path: Path, columns: int | None = None) -> np.ndarray:
    """Points of a raw float32 file.

    Args:
        path: ``.pcd.bin`` (nuScenes, 5 numbers a point) or ``.bin`` (KITTI, 4).
        columns: Numbers a point; by default told from the name.

    Returns:
        x, y, z in metres and intensity (N, 4), float32.

    Raises:
        InputError: The file is missing, empty, cut off, or holds a number that is not finite.
    """
    columns = columns or (5 if path.name.endswith(".pcd.bin") else 4)
    numbers = np.frombuffer(_bytes(path), np.uint8)
    if numbers.size % (4 * columns):
        raise InputError(
            f"{path}: {numbers.size} bytes are no multiple of {columns} float32; cut off?"
        )
    points = numbers.view(np.float32).reshape(-1, columns)[:, :4].copy()
    if not len(points):
        raise InputError(f"{path}: no points")
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        raise InputError(
            f"{path}: point {bad.argmax()} is not finite ({bad.sum()} of {len(points)})"
        )
    return points


def read_labels(path: Path, points: int, lookup: np.ndarray) -> np.ndarray:
    """Classes of a label file.

    Args:
        path: ``.bin`` with a uint8 a point (nuScenes), or ``.label`` with a uint32 of which the
            lower half is the class (SemanticKITTI).
        points: How many the sweep has.
        lookup: Raw id → class; −1 for ids that do not exist.

    Returns:
        (N,), int64.

    Raises:
        InputError: The file is missing, of another length, or holds an id outside the map.
    """
    content = np.frombuffer(_bytes(path), np.uint8)
    wide = path.suffix == ".label"
    if content.size != points * (4 if wide else 1):
        count = content.size / (4 if wide else 1)
        raise InputError(f"{path}: {count:g} labels for {points} points")
    raw = (content.view(np.uint32) & 0xFFFF if wide else content).astype(np.int64)
    outside = (raw >= len(lookup)) | (lookup[np.minimum(raw, len(lookup) - 1)] < 0)
    if outside.any():
        raise InputError(f"{path}: label id {raw[outside.argmax()]} is not in the map of classes")
    return lookup[raw]


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image as RGB.

    Args:
        path: A file that Pillow reads.
        size: Height and width it must have.

    Returns:
        (H, W, 3), uint8.

    Raises:
        InputError: The file is missing, damaged, or of another size.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))  # a copy that may be written to
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path}: damaged image: {error}") from None
    if size is not None and pixels.shape[:2] != tuple(size):
        raise InputError(f"{path}: {pixels.shape[:2]} pixels, its calibration is for {tuple(size)}")
    return pixels


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None

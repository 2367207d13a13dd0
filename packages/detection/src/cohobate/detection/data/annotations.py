"""Pictures with boxes, whatever file they were read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cohobate.core.errors import InputError

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Category:
    """A class of objects as the annotation files know it.

    Attributes:
        id: Number in the files: any, not necessarily from 0.
        name: Its name.
    """

    id: int
    name: str


def read_sized(path: Path, width: int, height: int) -> np.ndarray:
    """The pixels ``(H, W, 3)`` of an annotated picture, uint8 RGB.

    Raises:
        InputError: The file is missing or damaged, or has another size than annotated.
    """
    pixels = read_picture(path)
    if pixels.shape[:2] != (height, width):
        raise InputError(
            f"{path}: is {pixels.shape[1]} × {pixels.shape[0]} pixels, its annotation says "
            f"{width} × {height}"
        )
    return pixels


@dataclass(frozen=True)
class Picture:
    """An image with its objects.

    Attributes:
        name: File name, for messages and results.
        width: In pixels.
        height: In pixels.
        boxes: ``(n, 4)`` float32 xyxy in pixels, inside the image and not empty.
        labels: ``(n,)`` int64 class indices from 0.
        path: The file; None when ``pixels`` are held.
        pixels: ``(H, W, 3)`` uint8 RGB.
        crowd: ``(m, 4)`` xyxy of regions that are not annotated one by one: detections there
            count as neither right nor wrong.
        crowd_labels: ``(m,)``.
    """

    name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    path: Path | None = None
    pixels: np.ndarray | None = None
    crowd: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    crowd_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def read(self) -> np.ndarray:
        """The pixels ``(H, W, 3)``, uint8 RGB.

        Raises:
            InputError: The file is missing or damaged, or has another size than annotated.
        """
        if self.pixels is not None:
            return self.pixels
        assert self.path is not None
        return read_sized(self.path, self.width, self.height)


@dataclass(frozen=True)
class Annotated:
    """A set of pictures.

    Attributes:
        pictures: The pictures.
        categories: All classes in order of their indices.
    """

    pictures: Sequence[Picture]
    categories: Sequence[Category]


def read_picture(path: Path) -> np.ndarray:
    """Read an image as ``(H, W, 3)`` uint8 RGB.

    Raises:
        InputError: The file is missing or damaged, or has a pixel that is no number.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode == "F" and not np.isfinite(np.asarray(picture)).all():
                raise ValueError("a pixel is no finite number")
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a picture that can be read: {reason}") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height from the header.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        with Image.open(path) as picture:
            return picture.size
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a picture that can be read: {reason}") from None


def inside(
    boxes: np.ndarray, width: int, height: int, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to the image.

    Args:
        boxes: ``(n, 4)`` xyxy in pixels.
        width: Of the image.
        height: Of the image.
        source: File and image, for the message.

    Returns:
        The boxes of more than no area, and which of the given ones they are.

    Raises:
        InputError: A coordinate is no finite number.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise InputError(f"{source}: a box has a coordinate that is no number")
    clipped = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    kept: np.ndarray = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    return clipped[kept], kept


def index_of(categories: Sequence[Category]) -> Mapping[int, int]:
    """Category id → class index from 0."""
    return {category.id: index for index, category in enumerate(categories)}

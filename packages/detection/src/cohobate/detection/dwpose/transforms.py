"""From an image and a box to the network's input: the crop, and what training changes about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy.special import ndtr, ndtri
from torch import Tensor

from cohobate.detection.dwpose.keypoints import KeypointSet

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
PADDING = 1.25  # of the box
_HALF_PADDING, _HALF_POINTS, _HALF_UPPER, _HALF_LOWER = 1.5, 9, 2, 3


@dataclass(frozen=True)
class Crop:
    """A turned rectangle of an image that becomes the input.

    Attributes:
        centre: x, y in pixels of the image.
        extent: Width and height in pixels of the image.
        angle: By which the image is turned, in degrees.
        mirrored: Whether the image was mirrored first; the centre is that in the mirror.
    """

    centre: np.ndarray
    extent: np.ndarray
    angle: float = 0.0
    mirrored: bool = False

    def matrix(self, size: Sequence[int], width: int) -> np.ndarray:
        """``(2, 3)``: pixels of the image → pixels of the input.

        Args:
            size: Width and height of the input.
            width: Of the image.
        """
        scale = size[0] / self.extent[0]
        turn = np.deg2rad(self.angle)
        linear = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        shift = np.array(size) / 2 - linear @ self.centre
        found = np.concatenate([linear, shift[:, None]], 1)
        if self.mirrored:
            found = found @ np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
        return found

    def back(self, points: np.ndarray, size: Sequence[int]) -> np.ndarray:
        """Pixels of the input ``(..., 2)`` → pixels of the image, for a crop that is not turned."""
        return points / np.array(size) * self.extent + self.centre - self.extent / 2


def crop_of(box: np.ndarray, size: Sequence[int], padding: float = PADDING) -> Crop:
    """The crop of a box (x, y, width, height), extended to the input's shape.

    Args:
        box: In pixels of the image.
        size: Width and height of the input.
        padding: Factor of the box's sides.

    Example:
        >>> crop_of(np.array([0.0, 0, 30, 30]), (192, 256)).extent.tolist()
        [37.5, 50.0]
    """
    return Crop(box[:2] + box[2:] / 2, _shaped(box[2:] * padding, size))


def _shaped(extent: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The smallest rectangle of the input's shape around one."""
    ratio = size[0] / size[1]
    width = max(float(extent[0]), float(extent[1]) * ratio, 1e-3)
    return np.array([width, width / ratio])


def cut(pixels: np.ndarray, crop: Crop, size: Sequence[int]) -> np.ndarray:
    """The crop of an image, bilinear, black outside.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB.
        crop: The crop.
        size: Width and height of the input.

    Returns:
        ``(height, width, 3)`` uint8.
    """
    matrix = np.vstack([crop.matrix(size, pixels.shape[1]), [0, 0, 1]])
    inverse = np.linalg.inv(matrix)[:2]
    # pillow counts from the corner of a pixel, key points from its middle
    inverse[:, 2] += 0.5 - inverse[:, :2] @ [0.5, 0.5]
    made = Image.fromarray(pixels).transform(
        (size[0], size[1]), Image.Transform.AFFINE, tuple(inverse.ravel().tolist()),
        Image.Resampling.BILINEAR,
    )  # fmt: skip
    return np.asarray(made)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """``(height, width, 3)`` uint8 RGB → float32 of the same shape as the network takes it."""
    return (pixels.astype(np.float32) - MEAN) / STD


def batched(images: Sequence[np.ndarray]) -> Tensor:
    """Images ``(height, width, 3)`` → ``(B, 3, height, width)``, channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points ``(K, 2)`` under a ``(2, 3)`` matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


@dataclass(frozen=True)
class Augment:
    """Changes of a training crop; the defaults are the released settings.

    Attributes:
        flip: Probability of a mirror image.
        half_body: Probability of cropping to the upper or lower body.
        shift: Largest shift in shares of the box.
        shift_chance: Its probability.
        scale: Smallest and largest factor of the box.
        rotate: Largest angle in degrees.
        rotate_chance: Its probability.
        colour: Largest change of hue (of 180), saturation and value (of 255).
        blur: Probability of a box blur, and of a median blur.
        dropout: Probability of a hole of 0.2 to 0.4 of each side.
    """

    flip: float = 0.5
    half_body: float = 0.3
    shift: float = 0.16
    shift_chance: float = 0.3
    scale: tuple[float, float] = (0.6, 1.4)
    rotate: float = 80.0
    rotate_chance: float = 0.6
    colour: tuple[int, int, int] = (5, 30, 30)
    blur: float = 0.1
    dropout: float = 1.0

    def place(
        self, box: np.ndarray, points: np.ndarray, kinds: KeypointSet, width: int,
        size: Sequence[int], rng: np.random.Generator,
    ) -> tuple[Crop, np.ndarray]:  # fmt: skip
        """Draw a crop.

        Args:
            box: x, y, width, height.
            points: ``(K, 3)`` x, y, v.
            kinds: What the points are.
            width: Of the image.
            size: Of the input.
            rng: The draw's.

        Returns:
            The crop, and the points with left and right exchanged where the image is mirrored; they
            are still in pixels of the image.
        """
        centre, extent = box[:2] + box[2:] / 2, box[2:] * PADDING
        mirrored = rng.random() < self.flip
        order = kinds.flip if mirrored else slice(None)
        points, in_mirror = points[order], points[order].copy()
        if mirrored:
            centre = np.array([width - 1 - centre[0], centre[1]])
            in_mirror[:, 0] = width - 1 - in_mirror[:, 0]
        if rng.random() < self.half_body:
            half = _half_body(in_mirror, kinds, rng)
            centre, extent = half or (centre, extent)
        bell = _bell(rng, 4)
        if rng.random() < self.shift_chance:
            centre = centre + bell[:2] * self.shift * extent
        low, high = self.scale
        extent = extent * ((low + high) / 2 + bell[2] * (high - low) / 2)
        angle = bell[3] * self.rotate if rng.random() < self.rotate_chance else 0.0
        return Crop(centre, _shaped(extent, size), float(angle), mirrored), points

    def paint(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw changes of the colours, a blur and a hole."""
        image = Image.fromarray(pixels)
        change = rng.uniform(-1, 1, 3) * self.colour * rng.integers(0, 2, 3)
        if change.astype(int).any():
            bands = np.asarray(image.convert("HSV")).astype(np.int16)
            bands[..., 0] = (bands[..., 0] + round(change[0] * 256 / 180)) % 256
            bands[..., 1:] += change[1:].astype(np.int16)
            planes = bands.clip(0, 255).astype(np.uint8)
            layers = [Image.fromarray(np.ascontiguousarray(planes[..., n])) for n in range(3)]
            image = Image.merge("HSV", layers).convert("RGB")
        if rng.random() < self.blur:
            image = image.filter(ImageFilter.BoxBlur(int(rng.integers(1, 4))))
        if rng.random() < self.blur:
            image = image.filter(ImageFilter.MedianFilter(int(rng.integers(1, 4)) * 2 + 1))
        found = np.array(image)
        if rng.random() < self.dropout:
            h, w = (int(n * rng.uniform(0.2, 0.4)) for n in found.shape[:2])
            top, left = (int(rng.integers(0, n)) for n in (found.shape[0] - h, found.shape[1] - w))
            found[top : top + h, left : left + w] = 0
        return found


LATE = Augment(shift=0.0, scale=(0.75, 1.25), rotate=60.0, dropout=0.5)
"""The released settings of the last tenth of training."""


def _bell(rng: np.random.Generator, count: int) -> np.ndarray:
    """Normal numbers within [-1, 1]."""
    low = ndtr(-1.0)
    return ndtri(low + rng.random(count) * (1 - 2 * low))


def _half_body(
    points: np.ndarray, kinds: KeypointSet, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Centre and extent of the upper or lower body, if there are enough points."""
    seen = points[:, 2] > 0
    upper, lower = ([p for p in half if seen[p]] for half in (kinds.upper, kinds.lower))
    prefer = rng.random() < 0.7
    enough = len(upper) >= _HALF_UPPER, len(lower) >= _HALF_LOWER
    if seen.sum() < _HALF_POINTS or not any(enough):
        return None
    chosen = upper if enough[0] and (prefer or not enough[1]) else lower
    low, high = points[chosen, :2].min(0), points[chosen, :2].max(0)
    return (low + high) / 2, (high - low) * _HALF_PADDING

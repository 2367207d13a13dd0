"""SYNTHETIC pictures of plain shapes with exact boxes: no dependency ships annotated images."""

from __future__ import annotations

import numpy as np

from cohobate.detection.data.annotations import Annotated, Category, Picture

# ids that are not 0, 1, 2, as real files have them
CATEGORIES = (Category(1, "disc"), Category(7, "box"), Category(90, "triangle"))
TRAIN, VAL, TEST = 256, 32, 96
DESCRIPTION = (
    f"SYNTHETIC discs, boxes and triangles on a noisy ground: {TRAIN} train, {VAL} val, "
    f"{TEST} test pictures of 96 × 96 pixels"
)


def shapes(count: int, seed: int, size: int = 96) -> Annotated:
    """Draw pictures of one to six shapes that may hide each other in part.

    Args:
        count: Number of pictures.
        seed: They are a function of it.
        size: Side in pixels.

    Example:
        >>> made = shapes(2, seed=0)
        >>> made.pictures[0].pixels.shape, made.pictures[0].boxes.shape[1]
        ((96, 96, 3), 4)
    """
    rng = np.random.default_rng(seed)
    return Annotated([_picture(rng, f"{n:04d}.png", size) for n in range(count)], CATEGORIES)


def _picture(rng: np.random.Generator, name: str, size: int) -> Picture:
    y, x = np.mgrid[:size, :size] + 0.5
    wave = np.sin(x * rng.uniform(0.02, 0.2) + y * rng.uniform(0.02, 0.2))
    ground = rng.uniform(60, 190, 3)
    image = ground + 25 * wave[..., None] + rng.normal(0, 12, (size, size, 3))
    masks: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, 7)):
        label = int(rng.integers(len(CATEGORIES)))
        half = rng.uniform(0.07, 0.22, 2) * size
        cx, cy = rng.uniform(0.12, 0.88, 2) * size
        u, v = (x - cx) / half[0], (y - cy) / half[1]
        mask = [u**2 + v**2 < 1, np.maximum(abs(u), abs(v)) < 1,
                (v < 1) & (v > 2 * abs(u) - 1)][label]  # fmt: skip
        colour = (ground + rng.uniform(80, 176, 3)) % 256  # never near that of the ground
        image[mask] = colour + rng.normal(0, 12, (int(mask.sum()), 3))
        masks = [m & ~mask for m in masks] + [mask]
        labels.append(label)
    seen = [n for n, m in enumerate(masks) if m.sum() >= 12]
    boxes = np.array([_bounds(masks[n]) for n in seen], np.float32).reshape(-1, 4)
    pixels = image.clip(0, 255).astype(np.uint8)
    return Picture(name, size, size, boxes, np.array(labels, np.int64)[seen], pixels=pixels)


def _bounds(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]

"""The embedded data: SYNTHETIC pictures of three modalities, and two real photographs.

Every picture is drawn from a seed: a pigmented lesion on skin with hairs (dermoscopy), a dark mass
in speckle with a shadow (ultrasound), and bright nuclei in fluorescence among debris (microscopy).
They stand for nothing but three appearances with a different idea of what the target is. The
photographs, for the common stage, come inside scikit-learn's wheel and are read from there.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.ndimage import gaussian_filter

from cohobate.medseg.esp_medsam.pictures import PARTS, Found, Picture

MODALITIES = ("dermoscopy", "ultrasound", "microscopy")
COUNTS = {"train": 48, "val": 12, "test": 30}
DESCRIPTION = (
    f"SYNTHETIC pictures of {', '.join(MODALITIES)}: {COUNTS['train']} train, {COUNTS['val']} "
    f"validation and {COUNTS['test']} test pictures of each"
)
PHOTOS = "random parts of two photographs (china, flower) that come with scikit-learn"


def pictures(size: int) -> Found:
    """All pictures of the data set at a given size; the same at every call.

    Args:
        size: Side in pixels.
    """
    drawers = {"dermoscopy": _lesion, "ultrasound": _mass, "microscopy": _nuclei}
    found: Found = {part: [] for part in PARTS}
    for number, (modality, draw) in enumerate(drawers.items()):
        for place, part in enumerate(PARTS):
            for index in range(COUNTS[part]):
                rng = np.random.default_rng([number, place, index])
                image, mask = draw(size, rng)
                rgb = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
                found[part].append(Picture(f"{modality}-{part}-{index}", modality, rgb, mask))
    return found


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """Two photographs, RGB ``(427, 640, 3)`` uint8."""
    from sklearn.datasets import load_sample_images  # half a second: only when they are used

    return tuple(load_sample_images().images)


def _lesion(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A brown lesion with an irregular border on skin, under hairs and uneven light."""
    mask = _blob(size, rng, 0.16, 0.32)
    skin = np.array([0.86, 0.66, 0.56]) + rng.normal(0, 0.05, 3)
    brown = np.array([0.45, 0.27, 0.20]) + rng.normal(0, 0.05, 3)
    edge = gaussian_filter(mask.astype(float), rng.uniform(0.5, 2.5) * size / 128)
    share = (rng.uniform(0.35, 1.0) * edge)[..., None]
    pattern = 1 + 0.12 * _texture(size, rng, 3)[..., None]
    image = (skin * (1 - share) + brown * share) * pattern
    image *= 1 + 0.2 * _texture(size, rng, size / 3)[..., None]
    for _ in range(rng.integers(0, 12)):
        image[_line(size, rng)] *= 0.45
    return image + rng.normal(0, 0.02, image.shape), mask


def _mass(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A dark mass in layered tissue with speckle; shadows are dark as well."""
    mask = _blob(size, rng, 0.10, 0.26, flat=0.6)
    depth = np.linspace(0, 1, size)[:, None]
    layers = 0.45 + 0.18 * np.sin(depth * rng.uniform(8, 20) + 2 * _texture(size, rng, size / 5))
    tissue = layers * (1 - 0.35 * depth)
    soft = gaussian_filter(mask.astype(float), 1.5 * size / 128)
    tissue *= 1 - rng.uniform(0.45, 0.85) * soft
    for _ in range(rng.integers(1, 4)):  # shadows run down from some depth
        middle, half = rng.uniform(0, size), rng.uniform(0.02, 0.06) * size
        band = np.exp(-(((np.arange(size) - middle) / half) ** 2))[None]
        tissue *= 1 - 0.6 * band * (depth > rng.uniform(0.2, 0.7))
    speckle = gaussian_filter(rng.rayleigh(1.0, (size, size)), [0.6, 1.0]) / 1.25
    grey = tissue * speckle
    return np.repeat(grey[..., None], 3, -1), mask


def _nuclei(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bright nuclei of uneven brightness on a dark ground, with thin bright debris."""
    mask = np.zeros((size, size), dtype=bool)
    light = np.zeros((size, size))
    for _ in range(rng.integers(3, 9)):
        one = _blob(size, rng, 0.06, 0.12)
        mask |= one
        light = np.maximum(light, one * rng.uniform(0.3, 0.9))
    ground = 0.08 + 0.10 * np.abs(_texture(size, rng, size / 4))
    image = ground + gaussian_filter(light, 1.2 * size / 128) * (1 + 0.2 * _texture(size, rng, 2))
    for _ in range(rng.integers(2, 7)):
        image[_line(size, rng)] += rng.uniform(0.2, 0.6)
    tint = np.array([0.35, 0.55, 1.0]) + rng.normal(0, 0.05, 3)
    return image[..., None] * tint + rng.normal(0, 0.03, (size, size, 3)), mask


def _blob(
    size: int, rng: np.random.Generator, smallest: float, largest: float, flat: float = 1.0
) -> np.ndarray:
    """A filled shape whose radius changes smoothly with the angle; radii over ``size``."""
    radius = rng.uniform(smallest, largest)
    y, x = (rng.uniform(radius * 0.8, 1 - radius * 0.8) for _ in range(2))
    grid = (np.arange(size) + 0.5) / size
    dy, dx = (grid[:, None] - y) / rng.uniform(flat, 1.0), grid[None] - x
    angle = np.arctan2(dy, dx)
    border = np.ones_like(angle)
    for wave in range(2, 6):
        border += rng.normal(0, 0.22 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(dy, dx) < radius * border


def _line(size: int, rng: np.random.Generator) -> np.ndarray:
    """A thin line across a part of the picture, as a mask."""
    start, stop = rng.uniform(0, size, (2, 2))
    steps = np.linspace(0, 1, 2 * size)[:, None]
    bend = rng.normal(0, size / 10, 2) * np.sin(np.pi * steps)
    points = (start + (stop - start) * steps + bend).astype(int).clip(0, size - 1)
    line = np.zeros((size, size), dtype=bool)
    line[points[:, 0], points[:, 1]] = True
    return line


def _texture(size: int, rng: np.random.Generator, grain: float) -> np.ndarray:
    """Smooth noise of mean 0 and unit variance; ``grain`` in pixels."""
    noise = gaussian_filter(rng.normal(size=(size, size)), grain, mode="wrap", truncate=2.0)
    return (noise - noise.mean()) / noise.std()

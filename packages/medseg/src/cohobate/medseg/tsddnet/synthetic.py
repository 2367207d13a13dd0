"""SYNTHETIC breast ultrasound: speckle over layered tissue with one lesion, from a seed.

Fully developed speckle (the magnitude of a complex Gaussian field smoothed along the beam and
across it) over tissue layers with attenuation in depth, log-compressed to 50 dB. A benign lesion is
a smooth ellipse, wider than tall, with a bright band behind; a malignant one is darker, has a
spiculated outline, is taller than wide, and throws a shadow. Both are drawn from overlapping
ranges and a share of lesions lacks the band or the shadow, so no single sign decides.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from cohobate.medseg.tsddnet.readers import Samples

SIDE = 128
CLASSES = ["benign", "malignant"]
DESCRIPTION = "SYNTHETIC breast ultrasound (generated speckle, 128 × 128)"


def samples(count: int, seed: int = 2306) -> Samples:
    """Images of both classes in turn, each with the tight box of its lesion.

    Args:
        count: Number of images.
        seed: What they are made from; image i does not depend on ``count``.
    """
    labels = np.arange(count) % 2
    made = [_image(np.random.default_rng([seed, i]), bool(labels[i])) for i in range(count)]
    return Samples(
        names=[f"synthetic_{i:04d}" for i in range(count)],
        images=[image for image, _ in made],
        labels=labels,
        boxes=np.array([box for _, box in made], dtype=np.float32),
        patients=[f"{i:04d}" for i in range(count)],
        class_names=list(CLASSES),
    )


def _image(rng: np.random.Generator, malignant: bool) -> tuple[np.ndarray, np.ndarray]:
    """One image (128, 128) of 8 bits and its lesion's box."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    inside, centre, radii = _lesion(rng, malignant, x, y)
    echo = _tissue(rng, y, x)
    dark = rng.uniform(0.1, 0.32) if malignant else rng.uniform(0.16, 0.42)
    echo = np.where(inside, echo * dark, echo)
    # Behind the lesion: enhancement or shadow, fading with depth.
    behind = np.exp(-(((x - centre[0]) / (0.8 * radii[0])) ** 4)) * (y > centre[1] + 0.6 * radii[1])
    behind *= np.exp(-np.clip(y - centre[1] - radii[1], 0, None) / 45.0)
    sign = rng.uniform(-0.15, 0.1) if rng.random() < 0.3 else rng.uniform(0.1, 0.6)
    gain = 1.0 - 0.8 * behind * sign if malignant else 1.0 + 1.0 * behind * sign
    echo = echo * np.where(inside, 1.0, gain) * np.exp(-y / rng.uniform(150, 300))
    noise = gaussian_filter(rng.standard_normal((2, SIDE, SIDE)), (0, 0.7, 1.3))
    envelope = np.hypot(*noise) / noise.std() * echo
    decibel = 20 * np.log10(np.maximum(envelope, 1e-6) / np.percentile(envelope, 99.5))
    image = np.clip((decibel + 50) / 50, 0, 1)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
    return np.round(255 * image).astype(np.uint8), box


def _lesion(
    rng: np.random.Generator, malignant: bool, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size = rng.uniform(9, 21)
    ratio = rng.uniform(0.8, 1.3) if malignant else rng.uniform(0.6, 1.1)  # height by width
    radii = size * np.array([ratio**-0.5, ratio**0.5])
    centre = np.array([rng.uniform(28, SIDE - 28), rng.uniform(34, SIDE - 44)])
    angle = np.arctan2(y - centre[1], x - centre[0])
    rough = rng.uniform(0.06, 0.2) if malignant else rng.uniform(0.0, 0.05)
    orders = np.arange(3, 9)
    amplitude = rough * rng.standard_normal(6) / np.sqrt(orders / 3)
    phase = rng.uniform(0, 2 * np.pi, 6)
    outline = 1 + (amplitude * np.cos(orders * angle[..., None] + phase)).sum(-1)
    distance = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
    return distance < outline, centre, radii


def _tissue(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mean echo of skin, fat, gland and muscle, with borders that wave, and dark patches of fat."""
    wave = 4 * np.sin(x / rng.uniform(15, 35) + rng.uniform(0, 6)) + rng.uniform(-4, 4)
    borders = np.array([6, 30, 95]) + rng.uniform(-4, 4, 3)
    levels = np.array([1.3, 0.5, 0.9, 0.65]) * rng.uniform(0.8, 1.2, 4)
    layer = (y[..., None] + wave[..., None] > borders).sum(-1)
    patches = gaussian_filter(rng.standard_normal((SIDE, SIDE)), (4, 9))
    return levels[layer] * np.exp(0.35 * patches / patches.std())

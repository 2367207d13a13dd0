"""The embedded data set: synthetic subjects from one averaged brain.

The MNI152 template (ICBM 2009a, the average of 152 scans) and its grey- and white-matter maps come
inside nilearn's wheel and are read from there; nothing is downloaded or copied. "Subjects" are made
from it by smooth deformation, bias field, gamma and noise, with fixed seeds, so that an experiment
with few labelled volumes runs anywhere in minutes. It is no cohort: all subjects share one anatomy.

The template is exactly mirror-symmetric, so left against right would show the test labels in
training. Training and validation take the back half of the head, the test takes the front half, and
the slab between them belongs to neither. Each half is cut out before it is deformed, so nothing
crosses the gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from cohobate.medseg.data.nifti import Volume

CLASSES = ["background", "other brain", "grey matter", "white matter"]
VOXEL = 2.0  # mm
GAP = 12.0  # mm between the halves

TRAIN_SEEDS = (0, 1, 2)
VAL_SEEDS = (100, 101)
TEST_SEEDS = (200, 201, 202, 203)

DESCRIPTION = (
    "SYNTHETIC subjects from one averaged brain (MNI152 T1, 2 mm): "
    f"{len(TRAIN_SEEDS)} train and {len(VAL_SEEDS)} validation subjects from the back half, "
    f"{len(TEST_SEEDS)} test subjects from the front half"
)

Half = Literal["back", "front"]


@dataclass(frozen=True)
class Subject:
    """A labelled volume.

    Attributes:
        name: Half and seed.
        image: T1 intensities, ``(1, X, Y, Z)`` float32.
        label: Class ids, ``(1, X, Y, Z)`` uint8.
    """

    name: str
    image: Volume
    label: Volume


def subjects(half: Half, seeds: tuple[int, ...]) -> list[Subject]:
    """Synthesise subjects from one half of the template.

    Args:
        half: Back or front of the head.
        seeds: One per subject.
    """
    return [_subject(half, seed) for seed in seeds]


def _subject(half: Half, seed: int) -> Subject:
    maps, affine = _half(half)
    rng = torch.Generator().manual_seed(seed)
    warped = _deform(maps, rng)
    t1, grey, white, inside = warped
    label = torch.zeros(t1.shape, dtype=torch.uint8)
    for value, tissue in enumerate((inside, grey, white), start=1):
        label[tissue > 0.5] = value
    bias = torch.exp(0.2 * _smooth_field(1, t1.shape, rng)[0])
    gamma = float(torch.exp(0.2 * torch.randn((), generator=rng)))
    clean = t1.clamp_min(0) ** gamma * bias
    noise = 0.08 * torch.randn((2, *t1.shape), generator=rng)
    image = ((clean + noise[0]) ** 2 + noise[1] ** 2).sqrt()  # Rician, as magnitude images are
    return Subject(
        f"{half}-{seed}",
        Volume(image[None].numpy(), affine),
        Volume(label[None].numpy(), affine),
    )


def _deform(maps: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Pull ``(M, X, Y, Z)`` maps through a smooth random displacement of about 4 mm."""
    size = maps.shape[1:]
    displacement = _smooth_field(3, size, rng) * (4.0 / VOXEL)  # voxels
    axes = [torch.arange(n, dtype=torch.float32) for n in size]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement
    scale = torch.tensor(size, dtype=torch.float32)[:, None, None, None] - 1
    grid = (2 * place / scale - 1).flip(0).movedim(0, -1)  # grid_sample wants the last axis first
    return F.grid_sample(maps[None], grid[None], padding_mode="border", align_corners=True)[0]


def _smooth_field(fields: int, size: torch.Size, rng: torch.Generator) -> torch.Tensor:
    """Random fields of unit variance at their knots, which lie about 24 mm apart."""
    knots = [max(4, round(n * VOXEL / 24)) for n in size]
    coarse = torch.randn((1, fields, *knots), generator=rng)
    return F.interpolate(coarse, tuple(size), mode="trilinear", align_corners=True)[0]


@cache
def _half(half: Half) -> tuple[torch.Tensor, np.ndarray]:
    """T1, grey, white and brain maps of one half, cut to the head, and the affine."""
    maps, affine = _template()
    middle = maps.shape[2] // 2
    gap = round(GAP / VOXEL / 2)
    start, stop = (0, middle - gap) if half == "back" else (middle + gap, maps.shape[2])
    part = maps[:, :, start:stop]
    low = np.array([0, start, 0])
    brain = part[3] > 0.5
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        occupied = brain.any(dim=others[1]).any(dim=others[0]).nonzero()
        first = max(int(occupied.min()) - 2, 0)
        last = min(int(occupied.max()) + 3, part.shape[axis + 1])
        part = part.narrow(axis + 1, first, last - first)
        low[axis] += first
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ low
    return part.contiguous(), moved


def _template() -> tuple[torch.Tensor, np.ndarray]:
    """T1 and the grey-, white-matter and brain shares at 2 mm, by averaging blocks of 1 mm."""
    from nilearn.datasets import (  # half a second to import: only when this data set is used
        load_mni152_gm_template,
        load_mni152_template,
        load_mni152_wm_template,
    )

    images = [
        load(resolution=1)
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    ]
    arrays = [torch.from_numpy(image.get_fdata(dtype=np.float32)) for image in images]
    fine = torch.stack([*arrays, (arrays[0] > 0).float()])
    coarse = F.avg_pool3d(fine[None], 2)[0]
    affine = images[0].affine.astype(np.float64)
    affine[:3, 3] += affine[:3, :3] @ np.full(3, 0.5)
    affine[:3, :3] *= 2
    return coarse, affine

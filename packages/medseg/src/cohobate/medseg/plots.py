"""Pictures of segmentations: three slices with the outlines of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cohobate.core.io import save_atomic
from cohobate.medseg.data.preprocess import voxel_size

_VIEWS = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal"}


def overlay(
    path: Path,
    image: np.ndarray,
    masks: dict[str, np.ndarray],
    class_names: Sequence[str],
    affine: np.ndarray,
    title: str = "",
) -> Path:
    """Draw three slices of a volume, a row per mask, with a coloured outline per class.

    Args:
        path: PNG to write.
        image: ``(X, Y, Z)`` intensities.
        masks: Row title → class ids ``(X, Y, Z)``.
        class_names: Names of all classes, the background first.
        affine: 4×4, for the proportions and the names of the views.
        title: Title of the picture.

    Returns:
        ``path``.
    """
    centre = _centre(next(iter(masks.values())))
    spacing = voxel_size(affine)
    views = [_VIEWS.get(code, "axial") for code in nib.aff2axcodes(affine)]
    figure = Figure(figsize=(9, 3.2 * len(masks) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    low, high = np.percentile(image, (1, 99))
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    axes = figure.subplots(len(masks), 3, squeeze=False)
    for row, (name, mask) in zip(axes, masks.items(), strict=True):
        for axis, view in enumerate(views):
            place: Axes = row[axis]
            across, up = (a for a in range(3) if a != axis)
            slab = image.take(centre[axis], axis).T
            aspect = spacing[up] / spacing[across]
            place.imshow(slab, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=aspect)
            ids = mask.take(centre[axis], axis).T
            for value in range(1, len(class_names)):
                inside = ids == value
                if inside.any() and not inside.all():
                    colour = colours[(value - 1) % 10]
                    place.contour(inside, levels=[0.5], colors=[colour], linewidths=1)
            place.set_title(f"{name}, {view}", fontsize=9)
            place.set_axis_off()
    handles = [
        Line2D([], [], color=colours[(value - 1) % 10], label=class_names[value])
        for value in range(1, len(class_names))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    with save_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def _centre(mask: np.ndarray) -> tuple[int, ...]:
    """The slice through the middle of the foreground, per axis."""
    occupied = np.argwhere(mask > 0)
    if len(occupied) == 0:
        return tuple(n // 2 for n in mask.shape)
    return tuple(int(n) for n in np.median(occupied, axis=0))

"""Pictures: clouds from above and in the image, superpixels with their points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from skimage.segmentation import mark_boundaries

from cohobate.core.io import save_atomic
from cohobate.lidar.data.projection import Pairing

_FAMILIES = {
    "car": (0.0, 0.45, 0.9), "truck": (0.35, 0.2, 0.8), "bus": (0.95, 0.75, 0.1),
    "pedestrian": (0.9, 0.1, 0.15), "person": (0.9, 0.1, 0.15), "bicycle": (0.95, 0.4, 0.6),
    "motorcycle": (0.75, 0.2, 0.45), "barrier": (0.95, 0.5, 0.1), "traffic_cone": (0.6, 0.3, 0.0),
    "driveable_surface": (0.55, 0.55, 0.58), "road": (0.55, 0.55, 0.58),
    "sidewalk": (0.75, 0.45, 0.75), "terrain": (0.65, 0.8, 0.4), "manmade": (0.55, 0.35, 0.25),
    "building": (0.55, 0.35, 0.25), "vegetation": (0.1, 0.55, 0.2), "ignored": (0.85, 0.85, 0.85),
}  # fmt: skip


def palette(names: Sequence[str]) -> np.ndarray:
    """A colour for each class (C, 3), the same for classes that mean the same.

    Args:
        names: Names of the classes.
    """
    others = mpl.colormaps["tab20"]
    return np.array(
        [_FAMILIES.get(name, others(place % 20)[:3]) for place, name in enumerate(names)]
    )


def bird_eye(
    points: np.ndarray,
    panels: Mapping[str, np.ndarray],
    names: Sequence[str],
    path: Path,
    reach: float = 50.0,
) -> None:
    """Draw a cloud from above, once for each set of labels.

    Args:
        points: x, y, z in metres (N, ≥ 3).
        panels: Title → class of each point (N,).
        names: Names of the classes.
        path: The PNG.
        reach: Half the width shown, metres.
    """
    colours = palette(names)
    figure = Figure(figsize=(6.2 * len(panels), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    order = points[:, 2].argsort()  # what is higher covers what is lower
    for place, (title, labels) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.scatter(
            points[order, 0], points[order, 1], c=colours[labels[order]], s=1.2, linewidths=0
        )
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
        axes.set(xlabel="x (m)", ylabel="y (m)")
    present = np.unique(np.concatenate(list(panels.values())))
    handles = [Patch(color=colours[c], label=names[c].replace("_", " ")) for c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    _save(figure, path)


def camera_view(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    pairing: Pairing,
    labels: np.ndarray,
    names: Sequence[str],
    path: Path,
) -> None:
    """Draw the points of a cloud over its images, coloured by class.

    Args:
        images: RGB (H, W, 3).
        titles: One for each image.
        pairing: Points and their pixels.
        labels: Class of each point (N,).
        names: Names of the classes.
        path: The PNG.
    """
    _over_images(images, titles, pairing, palette(names)[labels], path)


def depth_view(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    pairing: Pairing,
    distance: np.ndarray,
    path: Path,
) -> None:
    """Draw the points of a cloud over its images, from red (near) to blue (40 m and more).

    Args:
        images: RGB (H, W, 3).
        titles: One for each image.
        pairing: Points and their pixels.
        distance: Of each point (N,), metres.
        path: The PNG.
    """
    colours = mpl.colormaps["turbo_r"](np.minimum(distance / 40, 1))[:, :3]
    _over_images(images, titles, pairing, colours, path)


def _over_images(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    pairing: Pairing,
    colours: np.ndarray,
    path: Path,
) -> None:
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    height, width = images[0].shape[:2]
    figure = Figure(figsize=(5 * columns, 5 * rows * height / width + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(image)
        own = pairing.pixels[:, 0] == place
        row, column = pairing.pixels[own, 1:].T
        axes.scatter(column, row, c=colours[pairing.points[own]], s=1.5, linewidths=0)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    _save(figure, path)


def superpixel_picture(batch: Mapping[str, Any], path: Path, images: int = 6) -> None:
    """Draw the superpixels of a batch's first images and the points that fall into them.

    Args:
        batch: Of `cohobate.lidar.data.sets.collate_pairs`.
        path: The PNG.
        images: How many.
    """
    shown = batch["images"][:images].permute(0, 2, 3, 1).cpu().numpy()
    regions = batch["superpixels"][:images].cpu().numpy()
    pixels = batch["pairing_pixels"].cpu().numpy()
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    height, width = shown.shape[1:3]
    figure = Figure(figsize=(5 * columns, 5 * rows * height / width + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (image, labels) in enumerate(zip(shown, regions, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(mark_boundaries(image, labels, color=(1, 1, 0)))
        row, column = pixels[pixels[:, 0] == place, 1:].T
        axes.scatter(column, row, c=labels[row, column], s=2, linewidths=0, cmap="prism")
        axes.set_axis_off()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with save_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")

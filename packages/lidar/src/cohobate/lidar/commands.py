"""Commands of this package beside the common ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cohobate.core.errors import InputError
from cohobate.lidar.data.module import Layout


def superpixels(
    root: Path,
    layout: Layout = "nuscenes",
    version: str | None = None,
    split: str = "train",
    segments: int = 150,
    compactness: float = 6.0,
    sigma: float = 3.0,
    out: Path | None = None,
    jobs: int = 1,
) -> int | None:
    """Make the superpixels of a data set's images; a call that was stopped goes on.

    Args:
        root: Folder of the data set.
        layout: nuscenes, semantic-kitti or kitti-object.
        version: nuScenes: folder of the tables, where there are several.
        split: Which scenes.
        segments: About how many superpixels an image.
        compactness: Weight of nearness against colour.
        sigma: Smoothing beforehand, pixels.
        out: Where they are kept; by default in root.
        jobs: Processes.
    """
    from cohobate.lidar.data.module import ImageCloudData
    from cohobate.lidar.data.superpixels import Slic, compute

    source = Slic(segments, compactness, sigma)
    data = ImageCloudData(root, layout, version)
    cameras = [c for f in data.read_frames(split, 1, cameras=True) for c in f.cameras]
    made = compute(cameras, source, out or root, jobs)
    print(f"{(out or root) / source.folder}: {made} made, {len(cameras) - made} were there")
    return None


def simulate(
    out: Path, train: int = 120, val: int = 30, azimuths: int = 360, jobs: int = 1
) -> int | None:
    """Write SYNTHETIC street scenes in the layout of nuScenes.

    Args:
        out: Folder for the data set.
        train: Scenes to learn from.
        val: Scenes to evaluate on.
        azimuths: Lidar columns a turn; 1080 is the density of a real sensor.
        jobs: Processes.
    """
    from cohobate.lidar.data.simulator import Simulator

    print(Simulator(train, val, azimuths).write(out, jobs))
    return None


def pairs(
    root: Path,
    out: Path,
    layout: Layout = "nuscenes",
    version: str | None = None,
    split: str = "all",
    frames: int = 1,
) -> int | None:
    """Draw the points of sweeps over their images, coloured by depth, and count the pairs.

    Wrong calibration shows at once.

    Args:
        root: Folder of the data set.
        out: Folder for the pictures.
        layout: nuscenes, semantic-kitti or kitti-object.
        version: nuScenes: folder of the tables, where there are several.
        split: Which scenes.
        frames: How many frames.
    """
    from cohobate.lidar.data.files import read_image, read_sweep
    from cohobate.lidar.data.module import ImageCloudData
    from cohobate.lidar.data.projection import pair
    from cohobate.lidar.plots import depth_view

    data = ImageCloudData(root, layout, version)
    found = data.read_frames(split, 1, cameras=True)[:frames]
    if not found or not found[0].cameras:
        raise InputError(f"{root}: no frame with images")
    for frame in found:
        points = read_sweep(frame.sweep)
        pairing = pair(points, frame.cameras)
        counts = np.bincount(pairing.pixels[:, 0], minlength=len(frame.cameras))
        images = [read_image(camera.file, camera.size) for camera in frame.cameras]
        path = out / f"{frame.token}_pairs.png"
        titles = [f"{c.name}: {n} points" for c, n in zip(frame.cameras, counts, strict=True)]
        depth_view(images, titles, pairing, np.linalg.norm(points[:, :3], axis=1), path)
        seen = len(np.unique(pairing.points))
        print(f"{path}: {'; '.join(titles)}; {seen} of {len(points)} points in an image")
    return None


COMMANDS: tuple[Callable[..., int | None], ...] = (superpixels, simulate, pairs)

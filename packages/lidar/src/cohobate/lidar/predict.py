"""Labels for sweeps, in the official formats, with pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.lidar.data import Frame, Intensity, NuScenes, Voxels, kitti, pair
from cohobate.lidar.data.files import read_image, read_sweep
from cohobate.lidar.data.sets import PrepareVoxels, join_inputs
from cohobate.lidar.plots import bird_eye, camera_view


@dataclass(frozen=True)
class Segmenter:
    """A trained network with everything that prediction needs.

    Attributes:
        network: Voxels → logits.
        class_names: Names of the classes, the ignored one first.
        voxels: Shape of the voxels.
        intensity: What becomes of the intensity.
        layout: Whose label files are written: ``nuscenes`` or ``semantic-kitti``.
    """

    network: nn.Module
    class_names: list[str]
    voxels: Voxels
    intensity: Intensity
    layout: str

    def label(self, points: np.ndarray) -> np.ndarray:
        """Class of every point (N,), never the ignored one.

        Args:
            points: x, y, z, intensity (N, 4).
        """
        prepared = PrepareVoxels(self.voxels, self.intensity)(points)
        device = next(self.network.parameters()).device
        inputs = tuple(x.to(device) for x in join_inputs([prepared.inputs]))
        with torch.no_grad():
            best = self.network(*inputs)[:, 1:].argmax(1) + 1
        return best.cpu().numpy()[prepared.rows]

    def predict(
        self,
        inputs: list[Path],
        out: Path,
        *,
        root: Path | None,
        version: str | None,
        columns: int | None,
        pictures: bool,
    ) -> list[Path]:
        """Write labels and pictures of sweeps.

        Args:
            inputs: Sweeps or folders of them.
            out: Folder for the results.
            root: nuScenes folder that knows their cameras.
            version: Its folder of tables.
            columns: Numbers a point in the files.
            pictures: Whether to draw.

        Returns:
            The files written.

        Raises:
            InputError: No sweep, or a damaged file.
        """
        sweeps = sweeps_in(inputs)
        find = frames_of(root, version)
        written = []
        for sweep in tqdm(sweeps, desc="sweeps", disable=len(sweeps) < 3):
            points = read_sweep(sweep, columns)
            labels = self.label(points)
            stem = sweep.name.removesuffix(".bin").removesuffix(".pcd")
            written.append(self._write(out, stem, labels))
            if not pictures:
                continue
            written.append(out / f"{stem}_bev.png")
            bird_eye(points, {stem: labels}, self.class_names, written[-1])
            frame = find(sweep)
            if frame is not None and frame.cameras:
                images = [read_image(camera.file, camera.size) for camera in frame.cameras]
                written.append(out / f"{stem}_cameras.png")
                titles = [camera.name for camera in frame.cameras]
                pairing = pair(points, frame.cameras)
                camera_view(images, titles, pairing, labels, self.class_names, written[-1])
        return written

    def _write(self, out: Path, stem: str, labels: np.ndarray) -> Path:
        if self.layout == "semantic-kitti":
            path, content = out / f"{stem}.label", np.array(kitti.TO_RAW, np.uint32)[labels]
        else:  # the benchmark takes classes 1 to 16, not raw ids
            path, content = out / f"{stem}_lidarseg.bin", labels.astype(np.uint8)
        with save_atomic(path) as temporary:
            temporary.write_bytes(content.tobytes())
        return path


def sweeps_in(inputs: list[Path]) -> list[Path]:
    """Sweeps among files and in folders.

    Raises:
        InputError: There is none.
    """
    found: list[Path] = []
    for path in inputs:
        found += sorted(path.rglob("*.bin")) if path.is_dir() else [path]
    sweeps = [path for path in found if not path.name.endswith("_lidarseg.bin")]
    if not sweeps:
        raise InputError(f"{inputs[0]}: no sweep (*.bin)")
    return sweeps


def frames_of(root: Path | None, version: str | None) -> Callable[[Path], Frame | None]:
    """Something that finds the frame a sweep belongs to, with its cameras.

    Args:
        root: nuScenes folder; without, only KITTI's images beside the sweep are found.
        version: Its folder of tables.
    """
    if root is not None:
        reader = NuScenes(root, version)
        frames = {f.sweep.name: f for f in reader.frames(reader.scenes("all"))}
        return lambda sweep: frames.get(sweep.name)
    return _kitti_frame


def _kitti_frame(sweep: Path) -> Frame | None:
    folder = sweep.parent.parent
    if (folder / "calib" / f"{sweep.stem}.txt").exists():
        return kitti.object_frame(sweep)
    if (folder / "calib.txt").exists():
        return kitti.semantic_frame(sweep)
    return None

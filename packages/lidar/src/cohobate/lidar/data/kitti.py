"""SemanticKITTI for labelled sweeps, KITTI object for sweeps with images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.lidar.data.nuscenes import Frame
from cohobate.lidar.data.projection import Camera

CLASSES = (
    "ignored", "car", "bicycle", "motorcycle", "truck", "other_vehicle", "person", "bicyclist",
    "motorcyclist", "road", "parking", "sidewalk", "other_ground", "building", "fence",
    "vegetation", "trunk", "terrain", "pole", "traffic_sign",
)  # fmt: skip
TO_CLASS: dict[int, int] = {
    0: 0, 1: 0, 52: 0, 99: 0, 10: 1, 11: 2, 15: 3, 18: 4, 13: 5, 16: 5, 20: 5, 30: 6, 31: 7, 32: 8,
    40: 9, 60: 9, 44: 10, 48: 11, 49: 12, 50: 13, 51: 14, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19,
    252: 1, 253: 7, 254: 6, 255: 8, 256: 5, 257: 5, 259: 5, 258: 4,
}  # fmt: skip
"""Raw label id → class; 0 is ignored."""
TO_RAW = (0, 10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81)
"""Class → raw label id."""
SEQUENCES = {
    "train": (0, 1, 2, 3, 4, 5, 6, 7, 9, 10),
    "val": (8,),
    "test": tuple(range(11, 22)),
    "all": tuple(range(22)),
}


def semantic_frames(root: Path, split: str, every: int = 1) -> list[Frame]:
    """Sweeps of SemanticKITTI, with their image where ``image_2`` and ``calib.txt`` are there.

    Args:
        root: With ``sequences/NN/velodyne`` and ``labels`` (or ``dataset/sequences``).
        split: ``train``, ``val``, ``test`` or ``all``.
        every: Keep the first sweep and then each so many-th, over all sequences together.

    Raises:
        InputError: No sweep of the split.
    """
    base = root / "dataset" if (root / "dataset").is_dir() else root
    if split not in SEQUENCES:
        raise InputError(f"{root}: unknown split '{split}'; there is {', '.join(SEQUENCES)}")
    folders = [base / "sequences" / f"{number:02d}" for number in SEQUENCES[split]]
    sweeps = [path for folder in folders for path in sorted((folder / "velodyne").glob("*.bin"))]
    if not sweeps:
        raise InputError(f"{base / 'sequences'}: no velodyne/*.bin of the split '{split}'")
    return [semantic_frame(path) for path in sweeps[::every]]


def semantic_frame(sweep: Path) -> Frame:
    """The frame of a sweep of SemanticKITTI.

    Args:
        sweep: ``…/NN/velodyne/NNNNNN.bin``.
    """
    folder, name = sweep.parent.parent, sweep.stem
    labels, image = folder / "labels" / f"{name}.label", folder / "image_2" / f"{name}.png"
    cameras: tuple[Camera, ...] = ()
    if image.exists():
        matrices = read_calibration(folder / "calib.txt", "P2", "Tr")
        cameras = (_camera(f"{folder.name}-{name}", image, matrices["P2"], matrices["Tr"]),)
    exists = labels if (folder / "labels").is_dir() else None
    return Frame(f"{folder.name}-{name}", folder.name, sweep, exists, cameras)


def object_frames(root: Path, split: str = "training") -> list[Frame]:
    """Frames of KITTI object: a full sweep and the left colour image.

    Args:
        root: With ``training/velodyne``, ``image_2``, ``calib``.
        split: ``training`` or ``testing``.

    Raises:
        InputError: No sweep, or one without image or calibration.
    """
    folder = root / split
    sweeps = sorted((folder / "velodyne").glob("*.bin"))
    if not sweeps:
        raise InputError(f"{folder / 'velodyne'}: no *.bin")
    return [object_frame(sweep) for sweep in sweeps]


def object_frame(sweep: Path) -> Frame:
    """The frame of a sweep of KITTI object.

    Args:
        sweep: ``…/training/velodyne/NNNNNN.bin``.

    Raises:
        InputError: Its image or calibration is missing.
    """
    folder, name = sweep.parent.parent, sweep.stem
    found = read_calibration(folder / "calib" / f"{name}.txt", "P2", "R0_rect", "Tr_velo_to_cam")
    rectify = np.eye(4)
    rectify[:3, :3] = found["R0_rect"]
    to_camera = rectify @ np.vstack([found["Tr_velo_to_cam"], [0, 0, 0, 1]])
    camera = _camera(name, folder / "image_2" / f"{name}.png", found["P2"], to_camera)
    return Frame(name, name, sweep, None, (camera,))


def read_calibration(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Matrices of a KITTI calibration file.

    Args:
        path: Lines ``NAME: numbers``.
        *names: The matrices needed; with 9 numbers 3 × 3, with 12 3 × 4.

    Raises:
        InputError: The file or a matrix is missing or damaged.
    """
    try:
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        return {name: np.array(lines[name].split(), np.float64).reshape(3, -1) for name in names}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except KeyError as error:
        raise InputError(f"{path}: no matrix {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _camera(token: str, file: Path, projection: np.ndarray, to_camera: np.ndarray) -> Camera:
    if to_camera.shape == (3, 4):
        to_camera = np.vstack([to_camera, [0, 0, 0, 1]])
    try:
        with Image.open(file) as image:  # reads the header only
            size = (image.height, image.width)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    return Camera("image_2", token, file, to_camera, projection, size)

"""NIfTI folders: which image belongs to which label, and what a file holds."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic

Layout = Literal["auto", "msd", "mmwhs", "brats", "generic"]

FOLDERS: dict[str, tuple[str, str]] = {
    "msd": ("imagesTr", "labelsTr"),
    "mmwhs": ("imagesTraining", "labelsTraining"),
    "brats": ("Images.Training", "Labels.Training"),
    "generic": ("images", "labels"),
}

SUFFIXES = (".nii.gz", ".nii")
_ROLES = ("_image", "_img", "_label", "_seg", "_mask", "_gt")


@dataclass(frozen=True)
class Case:
    """An image file and its label file.

    Attributes:
        name: What the two file names have in common.
        image: The image.
        label: The label.
    """

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Volume:
    """The content of one NIfTI file.

    Attributes:
        array: ``(C, X, Y, Z)``.
        affine: 4×4, voxel index to millimetres.
    """

    array: np.ndarray
    affine: np.ndarray


def find_cases(root: Path, layout: Layout = "auto") -> list[Case]:
    """Pair images and labels by name, sorted by name.

    Both ``case.nii`` and ``case.nii.gz`` are found, names may end in ``_image`` and ``_label`` (as
    in MM-WHS), and files that start with a dot (macOS resource forks in MSD archives) are ignored.

    Args:
        root: The data set's folder, or one that holds it alone.
        layout: Which two folders to look for; ``auto`` takes those that are there.

    Raises:
        InputError: No such folders, no files, or a file without its partner.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    wanted = list(FOLDERS.values()) if layout == "auto" else [FOLDERS[layout]]
    places = [root, *sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".")]
    found = [
        (place / images, place / labels)
        for place in places
        for images, labels in wanted
        if (place / images).is_dir()
    ]
    if not found:
        names = " or ".join(f"{images}/ + {labels}/" for images, labels in wanted)
        raise InputError(f"{root}: expected the folders {names}")
    images, labels = found[0]
    if not labels.is_dir():
        raise InputError(f"{labels}: no such folder (images are in {images})")
    by_name, label_by_name = _named(images), _named(labels)
    for name, path in by_name.items():
        if name not in label_by_name:
            raise InputError(f"{path}: no label of the same name in {labels}")
    for name, path in label_by_name.items():
        if name not in by_name:
            raise InputError(f"{path}: no image of the same name in {images}")
    if not by_name:
        raise InputError(f"{images}: no NIfTI files (.nii or .nii.gz)")
    return [Case(name, by_name[name], label_by_name[name]) for name in sorted(by_name)]


def case_name(path: Path) -> str:
    """A file's name without the NIfTI ending and the words for image or label.

    Example:
        >>> case_name(Path("ct_train_1001_image.nii.gz"))
        'ct_train_1001'
    """
    name = path.name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    for role in _ROLES:
        name = name.removesuffix(role)
    return name


def nifti_files(folder: Path) -> list[Path]:
    """The NIfTI files in a folder, sorted, without dot-files."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(SUFFIXES) and not path.name.startswith(".")
    )


def class_names_in(root: Path) -> list[str] | None:
    """Class names by label value from a Decathlon ``dataset.json``; nothing when there is none.

    Raises:
        InputError: The file is there but not as the Decathlon writes it.
    """
    files = sorted([*root.glob("dataset.json"), *root.glob("*/dataset.json")])
    if not files:
        return None
    try:
        labels = {int(k): str(v) for k, v in json.loads(files[0].read_text())["labels"].items()}
        return [labels[value] for value in range(len(labels))]
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise InputError(f"{files[0]}: no table of labels 0 to K - 1 in it ({error})") from None


def channels(path: Path) -> int:
    """Number of channels of an image, from its header alone.

    Raises:
        InputError: The file is not a readable NIfTI image.
    """
    return _channel_first(_load(path).shape, path)[0]


def read_image(path: Path) -> Volume:
    """Read an image as float32.

    A fourth axis holds channels: the last one as NIfTI and MSD have it, or the first one where
    that is the shorter of the two (files written channel-first).

    Args:
        path: ``.nii`` or ``.nii.gz``, 3-D or 4-D.

    Raises:
        InputError: The file is not a readable NIfTI image, has another number of axes, or holds
            values that are not finite.
    """
    volume = _read(path)
    array = np.ascontiguousarray(volume.array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: holds values that are not finite")
    return Volume(array, volume.affine)


def read_label(
    path: Path, num_classes: int | None = None, label_map: Mapping[int, int] | None = None
) -> Volume:
    """Read a label as uint8 class ids.

    Args:
        path: The file.
        num_classes: K; values must lie below. Without it only the rest is checked.
        label_map: Value in the file → class id; other values are an error. ``None`` takes values
            as they are.

    Raises:
        InputError: As `read_image`, or a value is not a whole number, not in ``label_map``, or
            not below K.
    """
    volume = _read(path)
    if volume.array.shape[0] != 1:
        raise InputError(f"{path}: a label has one channel, found {volume.array.shape[0]}")
    values, inverse = np.unique(volume.array, return_inverse=True)
    if not np.array_equal(values, np.round(values)):
        value = values[values != np.round(values)][0]
        raise InputError(f"{path}: value {value:g} is not a whole number")
    if label_map is not None:
        for value in values:
            if int(value) not in label_map:
                raise InputError(f"{path}: value {value:g} is not in the label map {label_map}")
        values = np.array([label_map[int(value)] for value in values])
    limit = 256 if num_classes is None else num_classes
    if values.min() < 0 or values.max() >= limit:
        value = values.min() if values.min() < 0 else values.max()
        raise InputError(
            f"{path}: value {value:g} is not one of the {limit} classes 0 to {limit - 1}"
        )
    array = values.astype(np.uint8)[inverse].reshape(volume.array.shape)
    return Volume(array, volume.affine)


def write_label(path: Path, label: np.ndarray, like: Path) -> None:
    """Write class ids on the grid of another file, whole or not at all.

    Args:
        path: Ends in ``.nii.gz``.
        label: ``(X, Y, Z)`` class ids.
        like: The image whose affine, codes and units are taken over.

    Raises:
        InputError: The disk is full or the folder cannot be written.
    """
    source = _load(like)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_xyzt_units(*source.header.get_xyzt_units())
    image = nib.Nifti1Image(label.astype(np.uint8), source.affine, header)
    image.set_sform(source.affine, int(source.header["sform_code"]) or 1)
    image.set_qform(source.affine, int(source.header["qform_code"]))
    with save_atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def _named(folder: Path) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in nifti_files(folder):
        name = case_name(path)
        if name in named:
            raise InputError(f"{path}: the same case as {named[name].name}")
        named[name] = path
    return named


def _load(path: Path) -> Any:
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: not a NIfTI file (.nii or .nii.gz)")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return nib.load(path)
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_reason(error)})") from None


def _read(path: Path) -> Volume:
    image = _load(path)
    shape = _channel_first(image.shape, path)
    try:
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: damaged NIfTI file ({_reason(error)})") from None
    if array.ndim > 3 and array.shape != shape:
        array = np.moveaxis(array.reshape(*array.shape[:3], -1), -1, 0)
    return Volume(array.reshape(shape), np.asarray(image.affine, dtype=np.float64))


def _channel_first(shape: tuple[int, ...], path: Path) -> tuple[int, int, int, int]:
    """The shape as ``(C, X, Y, Z)``."""
    if len(shape) == 5 and shape[3] == 1:  # NIfTI's vector images: (X, Y, Z, 1, C)
        shape = (*shape[:3], shape[4])
    if len(shape) not in (3, 4) or 0 in shape:
        raise InputError(f"{path}: expected a 3-D or 4-D image, found shape {shape}")
    if len(shape) == 3:
        shape = (1, *shape)
    elif shape[0] >= shape[3]:
        shape = (shape[3], *shape[:3])
    c, x, y, z = shape
    return c, x, y, z


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

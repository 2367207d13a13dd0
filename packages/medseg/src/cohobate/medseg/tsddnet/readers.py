"""Ultrasound images with a class each and a box for some: BUSI folders and manifest CSVs."""

from __future__ import annotations

import csv
import glob
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from cohobate.core.errors import InputError

Lesion = Literal["union", "largest"]
COLUMNS = ("image", "class", "x1", "y1", "x2", "y2")
SMALLEST = 32  # pixels a side
_BUSI = re.compile(r"^(.+) \((\d+)\)$")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Samples:
    """Images with what is known of each.

    Attributes:
        names: Names, unique.
        images: 8-bit grey (H, W) each.
        labels: (M,) class ids.
        boxes: (M, 4), x1 y1 x2 y2 in pixels; not a number where none is drawn.
        patients: Patient of each image; the image's own name where unknown.
        class_names: Names of the classes; the second is the positive one (malignant).
    """

    names: list[str]
    images: list[np.ndarray]
    labels: np.ndarray
    boxes: np.ndarray
    patients: list[str]
    class_names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, places: np.ndarray) -> Samples:
        """Those at some places."""
        return replace(
            self,
            names=[self.names[i] for i in places],
            images=[self.images[i] for i in places],
            labels=self.labels[places],
            boxes=self.boxes[places],
            patients=[self.patients[i] for i in places],
        )


def read(root: Path, class_names: list[str] | None = None, lesion: Lesion = "union") -> Samples:
    """Read a manifest CSV, a folder with ``manifest.csv``, or a folder as BUSI comes.

    Args:
        root: File or folder.
        class_names: Classes in order, the second is the positive one. Default for BUSI ``benign``,
            ``malignant``; for a manifest its two names in alphabetical order.
        lesion: For masks: one box around them all, or around the largest connected part.

    Raises:
        InputError: Nothing like it is there, or a file in it is at fault.
    """
    if not root.exists():
        raise InputError(f"{root}: no such file or folder")
    if root.is_dir() and not (root / "manifest.csv").exists():
        return read_busi(root, class_names or ["benign", "malignant"], lesion)
    return read_manifest(root / "manifest.csv" if root.is_dir() else root, class_names)


def read_busi(root: Path, class_names: list[str], lesion: Lesion = "union") -> Samples:
    """Read a folder as BUSI comes: ``<class>/<class> (n).png`` with ``_mask.png``, ``_mask_1.png``.

    Only the named classes are read: ``normal`` has no lesion to diagnose.

    Args:
        root: Folder with a folder for each class.
        class_names: Folders to read.
        lesion: One box around all masks, or around the largest connected part.

    Raises:
        InputError: A folder or a mask is missing, empty, or does not fit its image.
    """
    found: list[tuple[str, Path]] = []
    for name in class_names:
        folder = root / name
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder (BUSI has one for each class)")
        paths = [p for p in folder.glob("*.png") if "_mask" not in p.stem]
        found += [(name, path) for path in sorted(paths, key=_number)]
    if not found:
        raise InputError(f"{root}: no images in {', '.join(class_names)}")
    images, boxes = [], []
    for _, path in tqdm(found, desc="reading images", disable=len(found) < 200):
        image = read_image(path)
        images.append(image)
        boxes.append(_mask_box(path, image.shape, lesion))
    return Samples(
        names=[path.stem for _, path in found],
        images=images,
        labels=np.array([class_names.index(name) for name, _ in found]),
        boxes=np.array(boxes, dtype=np.float32),
        patients=[path.stem for _, path in found],
        class_names=list(class_names),
    )


def read_manifest(path: Path, class_names: list[str] | None = None) -> Samples:
    """Read a CSV with the columns ``image,class,x1,y1,x2,y2`` and perhaps ``patient``.

    Images are named relative to the file. Four empty box cells mean that no box was drawn.

    Args:
        path: The CSV.
        class_names: Classes in order; default the two that occur, in alphabetical order.

    Raises:
        InputError: A column, a file or a number is missing or at fault; the line is named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path}: no column '{missing[0]}'")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise InputError(f"{path}: no images")
    names = class_names or sorted({row["class"] for row in rows})
    if len(names) != 2:
        raise InputError(f"{path}: {len(names)} classes ({', '.join(names)}), two are needed")
    images, boxes, ids = [], [], []
    for line, row in enumerate(tqdm(rows, desc="reading images", disable=len(rows) < 200), 2):
        if row["class"] not in names:
            raise InputError(f"{path} line {line}: class '{row['class']}' is not in {names}")
        if not (path.parent / row["image"]).is_file():
            raise InputError(f"{path} line {line}: no image {row['image']}")
        image = read_image(path.parent / row["image"])
        images.append(image)
        ids.append(names.index(row["class"]))
        cells = [(row[c] or "").strip() for c in COLUMNS[2:]]
        boxes.append(parse_box(cells, image.shape, f"{path} line {line}"))
    labels = [row["image"] for row in rows]
    if twice := next((n for n in labels if labels.count(n) > 1), None):
        raise InputError(f"{path}: {twice} stands on two lines")
    return Samples(
        names=labels,
        images=images,
        labels=np.array(ids),
        boxes=np.array(boxes, dtype=np.float32),
        patients=[(row.get("patient") or "").strip() or row["image"] for row in rows],
        class_names=list(names),
    )


def parse_box(cells: list[str], shape: tuple[int, ...], where: str) -> list[float]:
    """Four numbers as a box in an image; four empty cells are no box.

    Args:
        cells: x1, y1, x2, y2 as text.
        shape: Height and width of the image.
        where: File and line, for the message.

    Raises:
        InputError: A cell is no number, or the box is empty or not in the image.
    """
    if not any(cells):
        return [float("nan")] * 4
    try:
        box = [float(cell) for cell in cells]
    except ValueError:
        raise InputError(f"{where}: box {', '.join(cells)}: not four numbers") from None
    text = ", ".join(f"{v:g}" for v in box)
    if not np.isfinite(box).all():
        raise InputError(f"{where}: box {text}: not four numbers")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise InputError(f"{where}: box {text}: has no area")
    if min(box) < 0 or box[2] > shape[1] or box[3] > shape[0]:
        raise InputError(f"{where}: box {text}: outside the image ({shape[1]} × {shape[0]})")
    return box


def read_image(path: Path) -> np.ndarray:
    """An image as 8-bit grey (H, W).

    Raises:
        InputError: The file is no image, or smaller than 32 pixels.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I;16"):  # convert() would cut off, not scale
                array = np.asarray(file, dtype=np.uint16) >> 8
            else:
                array = np.asarray(file.convert("L"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        raise InputError(f"{path}: not a readable image") from None
    if min(array.shape) < SMALLEST:
        raise InputError(
            f"{path}: {array.shape[1]} × {array.shape[0]} pixels, at least {SMALLEST} are needed"
        )
    return array.astype(np.uint8)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, sorted; masks are left out."""
    return sorted(filter(_is_image, folder.iterdir()))


def difference_hash(image: np.ndarray) -> np.ndarray:
    """256 bits that near-identical images share: is each cell brighter than the one to its left.

    Args:
        image: (H, W) grey.
    """
    small = Image.fromarray(image).resize((17, 16), Image.Resampling.BOX)
    cells = np.asarray(small, dtype=np.int16)
    return (cells[:, 1:] > cells[:, :-1]).ravel()


def groups(samples: Samples, distance: int | None) -> np.ndarray:
    """Which images must stay together: those of one patient, and duplicates of each other.

    Args:
        samples: Images.
        distance: Most differing bits of 256 at which two images count as duplicates; ``None`` looks
            at patients only.

    Returns:
        (M,) numbers of groups, in order of first appearance.
    """
    count = len(samples)
    _, patient = np.unique(samples.patients, return_inverse=True)
    same = patient[:, None] == patient[None]
    if distance is not None:
        same |= duplicates(samples.images, distance)
    _, found = connected_components(coo_array(same), directed=False)
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=int)
    rank[np.argsort(first)] = np.arange(len(first))
    assert len(inverse) == count
    return rank[inverse]


def duplicates(images: list[np.ndarray], distance: int) -> np.ndarray:
    """(M, M), whether two images differ in at most ``distance`` of 256 bits."""
    bits = np.array([difference_hash(image) for image in images], dtype=np.float32) * 2 - 1
    return (bits.shape[1] - bits @ bits.T) / 2 <= distance


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and "_mask" not in path.stem


def _number(path: Path) -> tuple[str, int]:
    match = _BUSI.match(path.stem)
    return (match[1], int(match[2])) if match else (path.stem, 0)


def _mask_box(path: Path, shape: tuple[int, ...], lesion: Lesion) -> list[float]:
    paths = [path.with_name(f"{path.stem}_mask.png")]
    if not paths[0].exists():
        raise InputError(f"{paths[0]}: no such mask")
    paths += sorted(path.parent.glob(f"{glob.escape(path.stem)}_mask_*.png"))
    mask = np.zeros(shape, dtype=bool)
    for file in paths:
        part = read_image(file)
        if part.shape != shape:
            raise InputError(f"{file}: {part.shape} pixels, its image has {tuple(shape)}")
        mask |= part > 127
    if not mask.any():
        raise InputError(f"{paths[0]}: the mask is empty")
    if lesion == "largest":
        parts, _ = ndimage.label(mask)
        mask = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]

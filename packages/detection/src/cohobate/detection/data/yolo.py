"""YOLO folders: one text file an image, boxes as shares of the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cohobate.core.errors import InputError
from cohobate.detection.data.annotations import (
    PICTURES,
    Annotated,
    Category,
    Picture,
    index_of,
    inside,
    picture_size,
)


def read_yolo(folder: Path, categories: Sequence[Category]) -> Annotated:
    """Read a folder of images; labels stand in the folder of the same name under ``labels``.

    Args:
        folder: With ``images`` in its path; an image without a text file has no objects.
        categories: All classes.

    Raises:
        InputError: A line is not ``class cx cy w h``, or its class is unknown.
    """
    parts = folder.parts
    if "images" not in parts:
        raise InputError(f"{folder}: a YOLO folder of images has 'images' in its path")
    place = len(parts) - 1 - parts[::-1].index("images")
    labels = Path(*parts[:place], "labels", *parts[place + 1 :])
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    number = index_of(categories)
    return Annotated([_picture(f, labels / f"{f.stem}.txt", number) for f in files], categories)


def find_yolo(root: Path) -> tuple[dict[str, Path], list[Category]] | None:
    """Image folder of each part and the classes, from the YAML in a folder.

    Args:
        root: With a YAML that has ``names``.

    Raises:
        InputError: A part's folder does not exist, or there is no training part.
    """
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            content: Any = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or "names" not in content:
            continue
        names = content["names"]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        categories = [Category(int(key), str(name)) for key, name in sorted(pairs)]
        parts = {}
        for part in ("train", "val", "test"):
            if content.get(part):
                parts[part] = _folder(root, file, str(content[part]))
        if "train" not in parts:
            raise InputError(f"{file}: has no 'train'")
        return parts, categories
    return None


def _folder(root: Path, file: Path, given: str) -> Path:
    # such files are passed on with paths of another machine: the end of the path is what counts
    ends = [Path(given), *(Path(*Path(given).parts[n:]) for n in range(len(Path(given).parts)))]
    for end in ends:
        for path in (root / end, root / end / "images"):
            if path.is_dir() and "images" in path.parts:
                return path
    raise InputError(f"{file}: there is no folder {given} with images")


def _picture(image: Path, file: Path, number: Any) -> Picture:
    width, height = picture_size(image)
    boxes, labels = [], []
    lines = file.read_text().splitlines() if file.exists() else []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, cx, cy, w, h = (float(word) for word in line.split())
        except ValueError:
            raise InputError(f"{file}:{place}: not 'class cx cy width height'") from None
        if label not in number:
            raise InputError(f"{file}:{place}: class {label:g} is not among the names")
        labels.append(number[int(label)])
        boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    scale = np.array([width, height, width, height])
    found, kept = inside(np.array(boxes).reshape(-1, 4) * scale, width, height, str(file))
    return Picture(image.name, width, height, found, np.array(labels, np.int64)[kept], path=image)

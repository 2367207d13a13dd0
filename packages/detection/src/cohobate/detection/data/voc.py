"""Pascal VOC: one XML an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cohobate.core.errors import InputError
from cohobate.detection.data.annotations import PICTURES, Annotated, Category, Picture, inside


def read_voc(
    files: Sequence[Path], folder: Path, categories: Sequence[Category] | None = None
) -> Annotated:
    """Read XML files.

    Args:
        files: One an image.
        folder: Where the images are; they are found by the XML's own name, then by its
            ``filename``.
        categories: Those of the training set; by default the names found, in alphabetical order.

    Raises:
        InputError: A file is no such XML, its image is missing, or it names an unknown class.
    """
    parsed = [_parse(file) for file in files]
    if categories is None:
        names = sorted({name for *_, objects in parsed for name, _ in objects})
        categories = [Category(number, name) for number, name in enumerate(names, 1)]
    number = {category.name: index for index, category in enumerate(categories)}
    pictures = []
    for file, (written, width, height, objects) in zip(files, parsed, strict=True):
        unknown = next((name for name, _ in objects if name not in number), None)
        if unknown is not None:
            raise InputError(f"{file}: class '{unknown}' is not among {', '.join(number)}")
        path = _image(file, written, folder)
        boxes, kept = inside(np.array([box for _, box in objects]), width, height, str(file))
        labels = np.array([number[name] for name, _ in objects], np.int64)[kept]
        pictures.append(Picture(path.name, width, height, boxes, labels, path=path))
    return Annotated(pictures, categories)


def find_voc(root: Path) -> dict[str, tuple[list[Path], Path]]:
    """XML files and image folder of each part.

    Parts are listed in ``train.txt`` and ``val.txt``, in the root or in ``ImageSets/Main``; without
    lists all files are ``train``.

    Args:
        root: With ``Annotations`` and ``JPEGImages``, or ``annotations`` and ``images``.

    Raises:
        InputError: A list names a file that is not there.
    """
    names = (("Annotations", "JPEGImages"), ("annotations", "images"))
    present = [pair for pair in names if any((root / pair[0]).glob("*.xml"))]
    if not present:
        return {}
    labels, images = present[0]
    found: dict[str, tuple[list[Path], Path]] = {}
    for part in ("train", "val", "test"):
        for place in (root / f"{part}.txt", root / "ImageSets" / "Main" / f"{part}.txt"):
            if place.exists():
                listed = [Path(line.split()[0]).stem for line in place.read_text().splitlines()
                          if line.strip()]  # fmt: skip
                files = [root / labels / f"{stem}.xml" for stem in listed]
                missing = next((f for f in files if not f.exists()), None)
                if missing is not None:
                    raise InputError(f"{place}: lists {missing.stem}, {missing} does not exist")
                found.setdefault(part, (files, root / images))
    return found or {"train": (sorted((root / labels).glob("*.xml")), root / images)}


def _parse(file: Path) -> tuple[str, int, int, list[tuple[str, list[float]]]]:
    try:
        tree = ElementTree.parse(file).getroot()
        width, height = int(tree.findtext("size/width", "")), int(tree.findtext("size/height", ""))
        objects = [
            (
                str(one.findtext("name", "")).strip(),
                [float(one.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")],
            )
            for one in tree.iter("object")
        ]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{file}: not a VOC annotation: {error}") from None
    return str(tree.findtext("filename", "")), width, height, objects


def _image(file: Path, written: str, folder: Path) -> Path:
    for suffix in sorted(PICTURES):
        path = folder / f"{file.stem}{suffix}"
        if path.exists():
            return path
    path = folder / written
    if not written or not path.is_file():
        raise InputError(f"{file}: its image is not in {folder}")
    return path

"""COCO's JSON: ``images``, ``annotations``, ``categories``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cohobate.core.errors import InputError
from cohobate.detection.data.annotations import Annotated, Category, Picture, index_of, inside


def read_coco(file: Path, folder: Path, categories: Sequence[Category] | None = None) -> Annotated:
    """Read a set in COCO's format.

    Ids of categories may be any numbers: classes are numbered from 0 in the order of the ids.

    Args:
        file: The JSON.
        folder: Where the images are.
        categories: Those of the training set, so that a validation set is numbered alike; by
            default the file's own.

    Raises:
        InputError: The file is no such JSON, lacks a key, or uses an id that it does not list.
    """
    content = read_object(file)
    if categories is None:
        listed = [Category(int(member(c, "id", file)), str(member(c, "name", file)))
                  for c in member(content, "categories", file)]  # fmt: skip
        categories = sorted(listed, key=lambda c: c.id)
    number = index_of(categories)
    if len(number) < len(categories):
        raise InputError(f"{file}: two categories have the same id")
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in member(content, "annotations", file):
        by_image.setdefault(member(annotation, "image_id", file), []).append(annotation)
    pictures = [
        _picture(image, by_image.pop(member(image, "id", file), []), number, file, folder)
        for image in member(content, "images", file)
    ]
    if by_image:
        raise InputError(f"{file}: an annotation is of image {next(iter(by_image))}, not listed")
    return Annotated(pictures, categories)


def _picture(
    image: dict[str, Any], objects: list[dict[str, Any]], number: Any, file: Path, folder: Path
) -> Picture:
    name = str(member(image, "file_name", file))
    width, height = int(member(image, "width", file)), int(member(image, "height", file))
    source = f"{file}: image {name}"
    boxes, labels, crowds = [], [], []
    for one in objects:
        box, category = member(one, "bbox", file), member(one, "category_id", file)
        if category not in number:
            raise InputError(f"{source}: category_id {category} is not among the categories")
        if not isinstance(box, list) or len(box) != 4:
            raise InputError(f"{source}: bbox {box} is not [x, y, width, height]")
        boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
        labels.append(number[category])
        crowds.append(bool(one.get("iscrowd", 0)))
    kept_boxes, kept = inside(np.array(boxes), width, height, source)
    label, crowd = np.array(labels, np.int64)[kept], np.array(crowds, bool)[kept]
    return Picture(
        name, width, height, kept_boxes[~crowd], label[~crowd], path=folder / name,
        crowd=kept_boxes[crowd], crowd_labels=label[crowd],
    )  # fmt: skip


def find_coco(root: Path) -> dict[str, tuple[Path, Path]]:
    """Annotation file and image folder of each part, ``train``, ``val``, ``test``.

    Known layouts: COCO's own (``annotations/instances_train2017.json`` with ``train2017/``,
    ``images/train2017/`` or ``images/``) and Roboflow's (``train/_annotations.coco.json``).

    Args:
        root: The folder.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for part, others in (("train", ("train",)), ("val", ("val", "valid")), ("test", ("test",))):
        for other in others:
            for file in sorted(root.glob(f"annotations/*{other}*.json")):
                name = file.stem.removeprefix("instances_")
                places = [root / name, root / "images" / name, root / other,
                          root / "images" / other, root / "images"]  # fmt: skip
                folder = next((p for p in places if p.is_dir()), root)
                found.setdefault(part, (file, folder))
            file = root / other / "_annotations.coco.json"
            if file.exists():
                found.setdefault(part, (file, file.parent))
    return found


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file of COCO's format is.

    Raises:
        InputError: The file cannot be read, or is something else.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not COCO's format: expected an object")
    return content


def member(entry: Any, key: str, file: Path) -> Any:
    """A member of an object in such a file.

    Raises:
        InputError: There is none of this name.
    """
    if not isinstance(entry, dict) or key not in entry:
        raise InputError(f"{file}: not COCO's format: '{key}' is missing")
    return entry[key]


_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,-,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,-,"
    "backpack,umbrella,-,-,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,-,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,"
    "couch,potted plant,bed,-,dining table,-,-,toilet,-,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,-,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush"
)
COCO_CATEGORIES = tuple(
    Category(number, name) for number, name in enumerate(_COCO_NAMES.split(","), 1) if name != "-"
)
"""COCO's 80 classes with their sparse ids, in the order of released detectors' outputs."""

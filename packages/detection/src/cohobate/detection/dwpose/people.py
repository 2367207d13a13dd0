"""People with key points, whatever file they were read from: COCO, COCO-WholeBody, UBody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cohobate.core.errors import InputError
from cohobate.detection.data.annotations import read_sized
from cohobate.detection.data.coco import member, read_object
from cohobate.detection.dwpose.keypoints import WHOLEBODY, KeypointSet, by_names

_PARTS = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
_COUNTS = (17, 6, 68, 21, 21)


@dataclass(frozen=True)
class Photo:
    """An image.

    Attributes:
        id: In its file.
        name: File name.
        width: In pixels.
        height: In pixels.
        path: The file; None when ``pixels`` are held.
        pixels: ``(H, W, 3)`` uint8 RGB.
    """

    id: int
    name: str
    width: int
    height: int
    path: Path | None = None
    pixels: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """The pixels ``(H, W, 3)``, uint8 RGB.

        Raises:
            InputError: The file is missing or damaged, or has another size than annotated.
        """
        if self.pixels is not None:
            return self.pixels
        assert self.path is not None
        return read_sized(self.path, self.width, self.height)


@dataclass(frozen=True)
class People:
    """Annotated people, n of them.

    Attributes:
        photos: The images.
        photo: ``(n,)`` place of each person's image.
        boxes: ``(n, 4)`` x, y, width, height in pixels.
        points: ``(n, K, 3)`` x, y in pixels and v: 0 not annotated, 1 hidden, 2 visible.
        areas: ``(n,)`` area of the person in pixels, as OKS takes it.
        crowd: ``(n,)`` whether it is a crowd and not one person.
        scores: ``(n,)`` of the boxes; 1 where they are annotated.
    """

    photos: Sequence[Photo]
    photo: np.ndarray
    boxes: np.ndarray
    points: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.photo)

    def take(self, rows: np.ndarray) -> People:
        """Some of the people; all images stay."""
        names = ("photo", "boxes", "points", "areas", "crowd", "scores")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def trainable(self) -> People:
        """Those with a point and a box that has an area, no crowds."""
        seen = (self.points[..., 2] > 0).any(1)
        return self.take(np.flatnonzero(seen & ~self.crowd & self.boxed))

    @property
    def boxed(self) -> np.ndarray:
        """``(n,)``: whose box has an area."""
        return np.asarray((self.boxes[:, 2:] > 0).all(1))

    def parted(self, share: float) -> tuple[People, People]:
        """Parted by images: the first gets all but a share of them, drawn once and for all."""
        order = np.random.default_rng(0).permutation(len(self.photos))
        held = order[: max(round(share * len(order)), 1)]
        inside = np.isin(self.photo, held)
        return self.take(np.flatnonzero(~inside)), self.only(np.flatnonzero(inside), held)

    def only(self, rows: np.ndarray, photos: np.ndarray) -> People:
        """Some of the people and of the images."""
        photos = np.sort(photos)
        kept = self.take(rows)
        return replace(
            kept,
            photos=[self.photos[n] for n in photos],
            photo=np.searchsorted(photos, kept.photo),
        )


def join(parts: Sequence[People]) -> People:
    """Several sets as one.

    Args:
        parts: At least one, all with the same key points.
    """
    starts = np.cumsum([0, *(len(p.photos) for p in parts)])
    names = ("boxes", "points", "areas", "crowd", "scores")
    return People(
        photos=[photo for part in parts for photo in part.photos],
        photo=np.concatenate([p.photo + s for p, s in zip(parts, starts, strict=False)]),
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in names},
    )


def read_people(file: Path, folder: Path) -> tuple[People, KeypointSet]:
    """Read people in COCO's format, with 17, 133 or any other points.

    Args:
        file: The JSON; annotations with ``foot_kpts``, ``face_kpts``, ``lefthand_kpts`` and
            ``righthand_kpts`` have COCO-WholeBody's 133 points, others those that ``categories``
            names.
        folder: Where the images are.

    Returns:
        All people, also those without points, and their key points.

    Raises:
        InputError: The file is no such JSON, lacks a key, or an entry has a wrong length.
    """
    content = read_object(file)
    listed = member(content, "images", file)
    annotations = [a for a in member(content, "annotations", file) if isinstance(a, dict)]
    place = {member(image, "id", file): n for n, image in enumerate(listed)}
    photos = [
        Photo(
            int(image["id"]), str(member(image, "file_name", file)),
            int(member(image, "width", file)), int(member(image, "height", file)),
            folder / str(image["file_name"]),
        )
        for image in listed
    ]  # fmt: skip
    whole = any("face_kpts" in a for a in annotations)
    kinds = WHOLEBODY if whole else _named(content, file)
    keys = _PARTS if whole else _PARTS[:1]
    counts = _COUNTS if whole else (len(kinds.names),)
    rows = [_person(a, keys, counts, place, file) for a in annotations]
    count = len(rows)
    photo, boxes, points, areas, crowd = zip(*rows, strict=True) if rows else ((),) * 5
    people = People(
        photos,
        np.array(photo, np.int64),
        np.array(boxes, np.float64).reshape(count, 4),
        np.array(points, np.float64).reshape(count, len(kinds.names), 3),
        np.array(areas, np.float64),
        np.array(crowd, bool),
        np.ones(count),
    )
    _check(people, file)
    return people, kinds


def read_boxes(file: Path, people: People) -> People:
    """Detected people instead of annotated ones, without points.

    Args:
        file: A JSON list of ``image_id``, ``bbox`` and ``score``; entries of another
            ``category_id`` than 1 are left out, as are those of other images.
        people: Whose images they are of.

    Raises:
        InputError: The file is no such list.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, list):
        raise InputError(f"{file}: not a list of detections")
    place = {photo.id: n for n, photo in enumerate(people.photos)}
    rows = [
        (place[d["image_id"]], _box(d, file), float(member(d, "score", file)))
        for d in content
        if member(d, "image_id", file) in place and d.get("category_id", 1) == 1
    ]
    photo, boxes, scores = zip(*rows, strict=True) if rows else ((),) * 3
    wide = np.array(boxes, np.float64).reshape(len(rows), 4)
    none = np.zeros((len(rows), people.points.shape[1], 3))
    found = People(
        people.photos, np.array(photo, np.int64), wide, none, wide[:, 2] * wide[:, 3],
        np.zeros(len(rows), bool), np.array(scores, np.float64),
    )  # fmt: skip
    return found.take(np.flatnonzero(found.boxed))


def _person(
    entry: dict[str, Any], keys: Sequence[str], counts: Sequence[int], place: dict[Any, int],
    file: Path,
) -> tuple[int, list[float], np.ndarray, float, bool]:  # fmt: skip
    source = f"{file}: annotation {entry.get('id', '?')}"
    image = member(entry, "image_id", file)
    if image not in place:
        raise InputError(f"{source} is of image {image}, not listed")
    box = _box(entry, file)
    parts = []
    for key, count in zip(keys, counts, strict=True):
        values = entry.get(key) if "keypoints" in entry else [0.0] * (3 * count)
        if values is None:
            raise InputError(f"{source}: '{key}' is missing")
        if not isinstance(values, list) or len(values) != 3 * count:
            raise InputError(f"{source}: {key} needs {3 * count} numbers (x, y, v)")
        parts.append(np.array(values, np.float64).reshape(count, 3))
    points = np.concatenate(parts)
    area = float(entry.get("area", box[2] * box[3]))
    return place[image], box, points, area, bool(entry.get("iscrowd", 0))


def _box(entry: Any, file: Path) -> list[float]:
    box = member(entry, "bbox", file)
    if not isinstance(box, list) or len(box) != 4:
        raise InputError(f"{file}: bbox {box} is not [x, y, width, height]")
    return [float(v) for v in box]


def _check(people: People, file: Path) -> None:
    """Refuse numbers that are none; what is not annotated may have any place."""
    for name, values in (("box", people.boxes), ("key point", people.points)):
        if not np.isfinite(values).all():
            bad = int(np.argwhere(~np.isfinite(values))[0][0])
            photo = people.photos[people.photo[bad]].name
            raise InputError(f"{file}: image {photo}: a {name} is not a number")


def _named(content: dict[str, Any], file: Path) -> KeypointSet:
    categories = [c for c in member(content, "categories", file) if isinstance(c, dict)]
    named = [c for c in categories if c.get("keypoints")]
    if len(named) != 1:
        raise InputError(f"{file}: {len(named)} categories name key points, needs one")
    bones = [(a - 1, b - 1) for a, b in named[0].get("skeleton", [])]
    try:
        return by_names([str(n) for n in named[0]["keypoints"]], bones)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None

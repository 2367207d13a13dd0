"""A trained pose network used on pictures and clips: JSON and drawings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.runs import load_run
from cohobate.detection.dwpose.codec import decode
from cohobate.detection.dwpose.keypoints import KeypointSet, to_openpose
from cohobate.detection.dwpose.losses import SimCC
from cohobate.detection.dwpose.plots import draw_people
from cohobate.detection.dwpose.transforms import batched, crop_of, cut, normalised
from cohobate.detection.media import Found, look_through

Where = Callable[[Path, Sequence[np.ndarray]], list[np.ndarray]]
"""File and its pictures → people's boxes ``(n, 5)`` of each: x, y, width, height, score."""


@dataclass
class Poser:
    """A network with what it takes to use it on files.

    Args:
        network: Normalised crops ``(B, 3, height, width)`` → logits.
        size: Width and height of its input.
        kinds: Its key points.
        threshold: Lowest score of a point that is drawn.
        black: Draw on black.
        openpose: Write points in the order of ControlNet's preprocessors.
        chunk: Crops a pass.
    """

    network: Callable[[Tensor], SimCC]
    size: tuple[int, int]
    kinds: KeypointSet
    threshold: float = 0.3
    black: bool = False
    openpose: bool = False
    chunk: int = 16

    @torch.no_grad()
    def find(self, pixels: np.ndarray, boxes: np.ndarray, device: torch.device) -> np.ndarray:
        """Key points of people in a picture.

        Args:
            pixels: ``(H, W, 3)`` uint8 RGB.
            boxes: ``(n, 4)`` x, y, width, height.
            device: Where the network is.

        Returns:
            ``(n, K, 3)`` x, y in pixels of the picture, and score.
        """
        return self.find_all([pixels], [boxes], device)[0]

    @torch.no_grad()
    def find_all(
        self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray], device: torch.device
    ) -> list[np.ndarray]:
        """As `find`, of several pictures at once."""
        counts = [len(b) for b in boxes]
        crops = [[crop_of(box[:4], self.size) for box in own] for own in boxes]
        images = [
            normalised(cut(pixels, crop, self.size))
            for pixels, own in zip(pictures, crops, strict=True)
            for crop in own
        ]
        rows = []
        for start in range(0, len(images), self.chunk):
            batch = batched(images[start : start + self.chunk])
            points, scores = decode(self.network(batch.to(device)))
            rows.append(torch.cat([points, scores[..., None]], -1).double().cpu().numpy())
        if not rows:
            return [np.zeros((0, len(self.kinds.names), 3)) for _ in pictures]
        found = np.concatenate(rows)
        for person, crop in zip(found, (c for own in crops for c in own), strict=True):
            person[:, :2] = crop.back(person[:, :2], self.size)
        return np.split(found, np.cumsum(counts)[:-1])

    def files(
        self, inputs: Sequence[Path], out: Path, device: torch.device, where: Where, *,
        picture: bool = True, batch: int = 8,
    ) -> list[Path]:  # fmt: skip
        """Find people's key points in pictures and clips.

        ``poses.json`` lists the people of every picture by file name; of a clip ``<name>.json``
        lists them frame by frame.

        Args:
            inputs: Pictures, clips, or folders of them.
            out: Folder for the results.
            device: Where the network is.
            where: Whose key points.
            picture: Whether to draw.
            batch: Frames a pass.

        Returns:
            The files written.

        Raises:
            InputError: There is nothing to look at or a file cannot be read; the others are done
                all the same.
        """
        if self.openpose and len(self.kinds.names) != 133:
            raise InputError(
                f"openpose: needs the 133 whole-body points, there are {len(self.kinds.names)}"
            )

        def look(path: Path, pictures: Sequence[np.ndarray]) -> list[Found]:
            boxes = where(path, pictures)
            points = self.find_all(pictures, boxes, device)
            return [
                Found(self._listed(b, people), partial(self._drawn, pixels, people))
                for pixels, b, people in zip(pictures, boxes, points, strict=True)
            ]

        return look_through(
            inputs, out, look, doing="posing", results="poses.json",
            ending="_pose.png" if picture else None, batch=batch, about={"names": self._names()},
            key="people",
        )  # fmt: skip

    def _names(self) -> list[str]:
        if not self.openpose:
            return self.kinds.names
        places = np.stack([np.arange(133.0)] * 2, -1)[None]
        order = to_openpose(places, np.zeros((1, 133)))[0][0, :, 0]
        names = [self.kinds.names[int(n)] for n in order]
        names[1] = "neck"
        return names

    def _listed(self, boxes: np.ndarray, found: np.ndarray) -> list[dict[str, Any]]:
        if self.openpose:
            places, scores = to_openpose(found[..., :2], found[..., 2])
            found = np.concatenate([places, scores[..., None]], -1)
        return [
            {
                "bbox": [round(v, 2) for v in box[:4].tolist()],
                "score": round(float(box[4]), 4) if len(box) > 4 else 1.0,
                "keypoints": [[round(v, 3) for v in point] for point in person.tolist()],
            }
            for box, person in zip(boxes, found, strict=True)
        ]

    def _drawn(self, pixels: np.ndarray, found: np.ndarray) -> np.ndarray:
        ground = np.zeros_like(pixels) if self.black else pixels
        return draw_people(ground, found, self.kinds, self.threshold)


def boxes_from(
    detector: Path | None, boxes: Path | None, sure: float, device: torch.device
) -> Where:
    """Where to look for people.

    Args:
        detector: Run folder of a detector.
        boxes: JSON of file name → list of [x, y, width, height].
        sure: Lowest score of a detected person.
        device: Where the detector shall run.

    Returns:
        By the detector, by the file, or, without either, the whole picture.

    Raises:
        InputError: Both are given, or one cannot be used.
    """
    if detector is not None and boxes is not None:
        raise InputError("detector and boxes: give one of them")
    if boxes is not None:
        return _from_file(boxes)
    if detector is None:
        return lambda _, pictures: [
            np.array([[0.0, 0, p.shape[1], p.shape[0], 1]]) for p in pictures
        ]
    model: Any = load_run(detector).to(device)
    if not hasattr(model, "detector"):
        raise InputError(f"{detector}: not a run of a detector")
    finds = model.detector()
    named = any(c.name == "person" for c in finds.categories)

    def look(_: Path, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            np.array(
                [[*one["bbox"], one["score"]] for one in found
                 if (not named or one["category"] == "person") and min(one["bbox"][2:]) > 0]
            ).reshape(-1, 5)
            for found in finds.detect(pictures, device, sure)
        ]  # fmt: skip

    return look


def _from_file(file: Path) -> Where:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not file names with lists of boxes")
    known: dict[str, np.ndarray] = {}
    for name, rows in content.items():
        try:
            found = np.array(rows, np.float64).reshape(-1, 4)
        except (ValueError, TypeError):
            raise InputError(f"{file}: {name}: not a list of [x, y, width, height]") from None
        if not np.isfinite(found).all():
            raise InputError(f"{file}: {name}: a box is not a number")
        known[Path(name).name] = found[(found[:, 2:] > 0).all(1)]

    def look(path: Path, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        if path.name not in known:
            raise InputError(f"{file}: has no boxes of {path.name}")
        own = known[path.name]
        scored = np.concatenate([own, np.ones((len(own), 1))], 1)
        return [scored for _ in pictures]

    return look

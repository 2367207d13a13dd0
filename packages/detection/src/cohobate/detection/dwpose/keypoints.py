"""Sets of key points: names, mirror images, sigmas, parts and bones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cohobate.core.errors import InputError

_SIGMA = 0.05  # of points that nobody has measured; COCO's lie between 0.025 and 0.107


@dataclass(frozen=True)
class KeypointSet:
    """The key points that a network predicts.

    Attributes:
        names: K names.
        flip: For each point the one it becomes in a mirror.
        sigmas: Spread of each point's annotation, as COCO's OKS takes it.
        skeleton: Pairs of points to draw.
        parts: Points scored by themselves, by name; ``wholebody`` is all of them.
        upper: Points of the upper body, for the half-body augmentation; none turns it off.
        lower: Points of the lower body.
    """

    names: list[str]
    flip: list[int]
    sigmas: list[float]
    skeleton: list[list[int]] = field(default_factory=list)
    parts: dict[str, list[int]] = field(default_factory=dict)
    upper: list[int] = field(default_factory=list)
    lower: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.names)
        if len(self.flip) != count or len(self.sigmas) != count:
            raise InputError(
                f"key points: {count} names, {len(self.flip)} mirror images, "
                f"{len(self.sigmas)} sigmas"
            )
        if sorted(self.flip) != list(range(count)):
            raise InputError("key points: the mirror images are no permutation")

    def subset(self, places: Sequence[int]) -> KeypointSet:
        """Some of the points, in the given order.

        Args:
            places: Their places; with a point also its mirror image.
        """
        new = {old: n for n, old in enumerate(places)}

        def kept(points: Sequence[int]) -> list[int]:
            return [new[p] for p in points if p in new]

        return KeypointSet(
            [self.names[p] for p in places],
            [new[self.flip[p]] for p in places],
            [self.sigmas[p] for p in places],
            [kept(bone) for bone in self.skeleton if len(kept(bone)) == 2],
            {name: kept(part) for name, part in self.parts.items() if kept(part)},
            kept(self.upper),
            kept(self.lower),
        )


def _wholebody() -> KeypointSet:
    content = json.loads(Path(__file__).with_name("wholebody.json").read_text())
    bounds = {
        "body": (0, 17), "foot": (17, 23), "face": (23, 91), "lefthand": (91, 112),
        "righthand": (112, 133), "wholebody": (0, 133),
    }  # fmt: skip
    parts = {name: list(range(*ends)) for name, ends in bounds.items()}
    return KeypointSet(**content, parts=parts, upper=list(range(11)), lower=list(range(11, 23)))


WHOLEBODY = _wholebody()
"""COCO-WholeBody's 133 points: body, feet, face, left hand, right hand."""

BODY = WHOLEBODY.subset(range(17))
"""COCO's 17 points."""


def by_names(names: Sequence[str], skeleton: Sequence[Sequence[int]]) -> KeypointSet:
    """A set of any points: mirror images by ``left`` and ``right`` in the names.

    COCO's own names give COCO's sigmas; others 0.05.

    Args:
        names: As in the annotation file.
        skeleton: Pairs, counted from 0.

    Example:
        >>> by_names(["left_ear", "tail", "right_ear"], []).flip
        [2, 1, 0]
    """
    if list(names) == BODY.names:
        return BODY
    place = {name: n for n, name in enumerate(names)}
    if len(place) < len(names):
        raise InputError("key points: two have the same name")
    flip = []
    for name in names:
        other = name.replace("left", "\0").replace("right", "left").replace("\0", "right")
        flip.append(place.get(other, place[name]))
    every = list(range(len(names)))
    bones = [[int(a), int(b)] for a, b in skeleton]
    return KeypointSet(list(names), flip, [_SIGMA] * len(every), bones, {"wholebody": every})


def to_openpose(points: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 133 points in the order of ControlNet's preprocessors: OpenPose's 18 body points first.

    Args:
        points: ``(n, 133, 2)``.
        scores: ``(n, 133)``.

    Returns:
        ``(n, 134, 2)`` and ``(n, 134)``: the neck, the middle of the shoulders, is new. Its score
        is 1 where both shoulders have more than 0.3, else 0.
    """
    neck = points[:, 5:7].mean(1, keepdims=True)
    sure = (scores[:, 5:7] > 0.3).all(1, keepdims=True).astype(scores.dtype)
    return (
        np.concatenate([points, neck], 1)[:, _OPENPOSE],
        np.concatenate([scores, sure], 1)[:, _OPENPOSE],
    )


_NECK = 133
_OPENPOSE = [0, _NECK, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, *range(17, 133)]

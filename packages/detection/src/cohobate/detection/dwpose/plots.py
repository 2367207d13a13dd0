"""People drawn as OpenPose draws them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from cohobate.detection.dwpose.keypoints import BODY, KeypointSet

_NECK = 17
# limbs of OpenPose's body over COCO's points and the neck, in the order of the colours
_LIMBS = (
    (17, 6), (17, 5), (6, 8), (8, 10), (5, 7), (7, 9), (17, 12), (12, 14), (14, 16), (17, 11),
    (11, 13), (13, 15), (17, 0), (0, 2), (2, 4), (0, 1), (1, 3),
)  # fmt: skip


def hue(place: int, count: int) -> tuple[int, int, int]:
    """A full colour of the wheel.

    Example:
        >>> hue(1, 18)
        (255, 85, 0)
    """
    red, green, blue = colorsys.hsv_to_rgb(place / count, 1.0, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_people(
    pixels: np.ndarray, points: np.ndarray, kinds: KeypointSet, threshold: float = 0.3
) -> np.ndarray:
    """Draw skeletons: OpenPose's body where there are COCO's 17 points, all other bones by parts.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB; not changed.
        points: ``(n, K, 3)`` x, y in pixels and score.
        kinds: What the points are.
        threshold: Points with no more than this score are left out.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    human = kinds.names[:17] == BODY.names
    for person in points:
        side = float(np.ptp(person[:, :2], 0).max()) if len(person) else 0.0
        width = max(1, round(side / 80))
        if human:
            neck = person[5:7].mean(0)
            neck[2] = person[5:7, 2].min()
            _draw_lines(canvas, np.vstack([person[:17], neck]), _LIMBS, 18, threshold, 2 * width)
        rest = [b for b in kinds.skeleton if not human or max(b) > 16]
        _draw_lines(canvas, person, rest, max(len(rest), 1), threshold, width)
        first = 17 if human else 0
        for x, y, score in person[first:]:
            if score > threshold:
                radius = max(width / 2, 1.0)
                canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill="white")
    return np.asarray(picture)


def _draw_lines(
    canvas: ImageDraw.ImageDraw, points: np.ndarray, bones: Sequence[Sequence[int]], colours: int,
    threshold: float, width: int,
) -> None:  # fmt: skip
    for n, (a, b) in enumerate(bones):
        if min(points[a, 2], points[b, 2]) > threshold:
            ends = [*points[a, :2].tolist(), *points[b, :2].tolist()]
            canvas.line(ends, fill=hue(n, colours), width=width)

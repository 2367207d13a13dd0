"""Pictures with boxes drawn on them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cohobate.core.io import save_atomic

Box = tuple[float, float, float, float]


def colour(label: int) -> tuple[int, int, int]:
    """A class's colour: neighbours differ, a class keeps its own."""
    hue = (label * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(
    pixels: np.ndarray, boxes: Sequence[Box], labels: Sequence[int], texts: Sequence[str]
) -> np.ndarray:
    """Draw boxes with their names.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB; not changed.
        boxes: xyxy in pixels.
        labels: Class indices, for the colours.
        texts: What stands at each box.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    side = max(picture.size)
    width, font = max(1, round(side / 400)), ImageFont.load_default(max(9, side / 50))
    for box, label, text in zip(boxes, labels, texts, strict=True):
        low, high = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])
        paint = colour(label)
        canvas.rectangle([*low.tolist(), *high.tolist()], outline=paint, width=width)
        if text:
            left, top, right, bottom = canvas.textbbox((float(low[0]), 0), text, font=font)
            edge = max(float(low[1]) - (bottom - top) - 2, 0.0)
            canvas.rectangle([left, edge, right, edge + bottom - top + 2], fill=paint)
            canvas.text((float(low[0]), edge - top + 1), text, fill=(0, 0, 0), font=font)
    return np.asarray(picture)


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    """Write ``(H, W, 3)`` uint8 RGB; the suffix chooses the format."""
    with save_atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary)
    return path


def side_by_side(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> Path:
    """Write a grid of pictures of one size.

    Args:
        path: The file.
        rows: ``(H, W, 3)`` uint8 RGB each.
    """
    return write_picture(path, np.concatenate([np.concatenate(row, 1) for row in rows], 0))

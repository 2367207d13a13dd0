"""Pictures: pairs beside their frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from cohobate.core.io import save_atomic


def label(picture: np.ndarray, text: str) -> np.ndarray:
    """Write a title into the upper left corner, size following the picture's.

    Args:
        picture: ``(H, W, 3)``, uint8.
        text: The title.
    """
    size = max(10, picture.shape[0] // 28)
    drawn = Image.fromarray(picture)
    draw = ImageDraw.Draw(drawn)
    draw.text((size // 2, size // 3), text, "white", font_size=size, stroke_width=2,
              stroke_fill="black")  # fmt: skip
    return np.asarray(drawn)


def overview(
    path: Path,
    images: np.ndarray,
    frames: np.ndarray,
    times: Sequence[float],
    truth: np.ndarray | None = None,
    most: int = 5,
) -> None:
    """Draw the inputs and frames, below them what is to be seen in their differences.

    The second row has the difference of both inputs, and of each frame to the first one drawn; with
    truth, each frame's error. Grey is none, and differences are shown four times as large.

    Args:
        path: The PNG.
        images: t2b and b2t, ``(2, H, W, 3)``, uint8.
        frames: ``(N, H, W, 3)``.
        times: Of the frames.
        truth: True frames, ``(N, H, W, 3)``.
        most: Frames drawn, spread evenly.
    """
    chosen = sorted({round(k) for k in np.linspace(0, len(frames) - 1, min(most, len(frames)))})
    top = [(images[0], "input t2b"), (images[1], "input b2t")]
    top += [(frames[k], f"frame at {times[k]:.3g}") for k in chosen]
    below = [(None, ""), (_difference(images[1], images[0]), "b2t − t2b")]
    for k in chosen:
        if truth is not None:
            below.append((_difference(frames[k], truth[k]), "error"))
        elif k == chosen[0]:
            below.append((None, ""))
        else:
            below.append((_difference(frames[k], frames[chosen[0]]), "change since the first"))
    height, width = images.shape[1:3]
    columns = len(top)
    figure = Figure(figsize=(2.6 * columns, 5.6 * height / width + 0.8), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for row, content in enumerate((top, below)):
        for axis, (picture, title) in zip(axes[row], content, strict=True):
            axis.axis("off")
            if picture is not None:
                axis.imshow(picture, interpolation="nearest")
                axis.set_title(title, fontsize=9)
    with save_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.clip(128 + 4 * (one.astype(np.int16) - other), 0, 255).astype(np.uint8)

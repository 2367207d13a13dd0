"""Lesions in image files: boxes and probabilities as CSV, a picture with the box for each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from cohobate.core.io import save_atomic
from cohobate.core.predict import each_file, files_in
from cohobate.medseg.tsddnet.data import place
from cohobate.medseg.tsddnet.network import Diagnoser
from cohobate.medseg.tsddnet.readers import SUFFIXES, image_files, read_image

TRUTH, FOUND = (255, 196, 0), (0, 210, 255)


def predict(
    net: Diagnoser,
    inputs: list[Path],
    out: Path,
    class_names: Sequence[str],
    image_size: int,
    picture: bool = True,
) -> list[Path]:
    """Find and diagnose the lesion of each image.

    ``lesions.csv`` has a row for each image: box in its own pixels, detector score, probability of
    each class, the class, and ``whole image`` where nothing was found and the whole was diagnosed.

    Args:
        net: The trained network, in eval mode.
        inputs: Files, or folders whose images are all taken.
        out: Folder for the results.
        class_names: Names of the classes.
        image_size: Side of the canvas in training.
        picture: Whether to draw.

    Returns:
        The files written.

    Raises:
        InputError: There is no image, or a file is none; the others are done all the same.
    """
    rows: list[list[str]] = []

    def work(path: Path) -> list[Path]:
        image = read_image(path)
        box, score, p = _look(net, image, image_size)
        name = class_names[int(p.argmax())]
        rows.append([path.name, *(f"{v:.1f}" for v in box), f"{score:.4f}",
                     *(f"{v:.4f}" for v in p), name, "" if score else "whole image"])  # fmt: skip
        if not picture:
            return []
        drawn = out / f"{path.stem}_lesion.png"
        title = f"{name} {p.max():.2f}" + ("" if score else ", no lesion found")
        with save_atomic(drawn) as temporary:
            boxed(image, {FOUND: box} if score else {}, title).save(temporary, "png")
        return [drawn]

    def finish() -> list[Path]:
        if not rows:
            return []
        table = out / "lesions.csv"
        header = ["image", "x1", "y1", "x2", "y2", "score", *(f"p_{n}" for n in class_names)]
        with save_atomic(table) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([[*header, "class", "note"], *rows])
        return [table]

    paths = files_in(inputs, image_files, f"images ({', '.join(SUFFIXES)})")
    return each_file(paths, out, work, "looking for lesions", finish)


def boxed(
    image: np.ndarray, boxes: dict[tuple[int, int, int], np.ndarray], title: str = ""
) -> Image.Image:
    """A picture of an image (H, W) with boxes by colour and a line of text.

    Args:
        image: 8-bit grey.
        boxes: Colour → x1 y1 x2 y2 in pixels.
        title: Text in the corner.
    """
    scale = max(1, round(384 / max(image.shape)))
    picture = Image.fromarray(image).convert("RGB")
    picture = picture.resize((image.shape[1] * scale, image.shape[0] * scale))
    draw = ImageDraw.Draw(picture)
    for colour, box in boxes.items():
        if np.isfinite(box).all():
            draw.rectangle([float(v) * scale for v in box], outline=colour, width=2)
    draw.text((4, 4), title, fill=FOUND)
    return picture


def grid(path: Path, pictures: list[Image.Image], columns: int = 4) -> Path:
    """Pictures side by side in one file."""
    width, height = (max(p.size[axis] for p in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    with save_atomic(path) as temporary:
        sheet.save(temporary, "png")
    return path


@torch.no_grad()
def _look(net: Diagnoser, image: np.ndarray, side: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Box in pixels of the image, its score, and the probability of each class."""
    canvas, scale, size = place(image, side)
    device = net.mean.device
    pixels = torch.from_numpy(canvas.astype(np.float32) / 255).to(device).expand(1, 3, -1, -1)
    box, score, logits = net(pixels, torch.tensor([size], dtype=torch.float32, device=device))
    limit = np.array([image.shape[1], image.shape[0]] * 2)
    in_pixels = np.minimum(box[0].cpu().numpy() / scale, limit)
    return in_pixels, float(score[0]), logits[0].float().softmax(0).cpu().numpy()

"""The audit table: which box every training image had, which it got, and why."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.medseg.tsddnet.readers import Samples, parse_box
from cohobate.medseg.tsddnet.selection import Decision

SIDES = ("x1", "y1", "x2", "y2")
COLUMNS = (
    "image", "class", *(f"old_{s}" for s in SIDES), *(f"new_{s}" for s in SIDES),
    "p_old", "p_new", "iou", "decision",
)  # fmt: skip
DRAWN, NEW = (255, 196, 0), (0, 210, 255)


@dataclass(frozen=True)
class Audit:
    """What candidate selection did to every training image.

    Attributes:
        names: Names of the images.
        classes: Name of each image's class.
        old: (M, 4), drawn boxes in pixels of the image; not a number for none.
        new: (M, 4), boxes from now on.
        p_old: (M,), C-Net's probability of the image's class on the drawn box.
        p_new: (M,), the same on the best candidate.
        iou: (M,), of old and new.
        decisions: What was decided.
    """

    names: list[str]
    classes: list[str]
    old: np.ndarray
    new: np.ndarray
    p_old: np.ndarray
    p_new: np.ndarray
    iou: np.ndarray
    decisions: list[Decision]

    def summary(self) -> str:
        """How many boxes were kept, replaced, accepted, ..., in one line."""
        counts = Counter(self.decisions)
        return ", ".join(f"{counts[d]} {d}" for d in Decision if counts[d])

    def write_csv(self, path: Path) -> None:
        """Write the table; numbers are in full precision, so it can be applied again."""
        with save_atomic(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            numbers = np.column_stack([self.old, self.new, self.p_old, self.p_new, self.iou])
            for name, kind, row, decision in zip(
                self.names, self.classes, numbers, self.decisions, strict=True
            ):
                cells = ["" if np.isnan(v) else repr(float(v)) for v in row]
                writer.writerow([name, kind, *cells, str(decision)])

    def write_html(self, path: Path, images: list[np.ndarray]) -> None:
        """Write one page with a picture of every image whose box is new, for review by eye.

        Args:
            path: The page; it holds its pictures and needs no other file.
            images: 8-bit grey (H, W) each.
        """
        new = (Decision.REPLACED, Decision.ACCEPTED)
        shown = [i for i, decision in enumerate(self.decisions) if decision in new]
        # The largest changes first: those are the ones to look at.
        shown.sort(key=lambda i: (self.decisions[i], np.nan_to_num(self.iou[i], nan=1.0)))
        cards = "\n".join(self._card(i, images[i]) for i in shown)
        text = _PAGE.format(summary=html.escape(self.summary()), count=len(shown), cards=cards)
        with save_atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _card(self, i: int, image: np.ndarray) -> str:
        picture = base64.b64encode(_thumbnail(image, self.old[i], self.new[i])).decode()
        told = [
            f"class {html.escape(self.classes[i])}",
            f"p {self.p_old[i]:.2f} → {self.p_new[i]:.2f}",
        ]
        told += [f"IoU {self.iou[i]:.2f}"] if np.isfinite(self.iou[i]) else ["no box was drawn"]
        name = html.escape(self.names[i])
        return (
            f'<figure><img alt="{name}" src="data:image/png;base64,{picture}">'
            f"<figcaption><b>{name}</b> {self.decisions[i]}<br>{', '.join(told)}</figcaption>"
            "</figure>"
        )


def read_audit(path: Path, samples: Samples) -> np.ndarray:
    """The new boxes of a table, for the images they were chosen for.

    Args:
        path: A table that `Audit.write_csv` wrote, perhaps corrected by hand.
        samples: The training images.

    Returns:
        (M, 4) in pixels; not a number for images without a box.

    Raises:
        InputError: The file is no such table, a box is at fault, or it is about other images.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path}: no column '{missing[0]}': not an audit table")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    places = {name: i for i, name in enumerate(samples.names)}
    boxes = np.full((len(samples), 4), np.nan)
    for line, row in enumerate(rows, 2):
        if row["image"] not in places:
            raise InputError(
                f"{path} line {line}: {row['image']} is no training image of this fold"
            )
        i = places.pop(row["image"])
        cells = [(row[f"new_{s}"] or "").strip() for s in SIDES]
        boxes[i] = parse_box(cells, samples.images[i].shape, f"{path} line {line}")
    if places:
        raise InputError(f"{path}: has no line for training image {next(iter(places))}")
    return boxes


def _thumbnail(image: np.ndarray, old: np.ndarray, new: np.ndarray, side: int = 256) -> bytes:
    scale = side / max(image.shape)
    picture = Image.fromarray(image).convert("RGB")
    picture = picture.resize((round(image.shape[1] * scale), round(image.shape[0] * scale)))
    draw = ImageDraw.Draw(picture)
    for box, colour in ((old, DRAWN), (new, NEW)):
        if np.isfinite(box).all():
            draw.rectangle([float(v * scale) for v in box], outline=colour, width=2)
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Changed boxes</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 2rem; background: #fff; color: #111; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(256px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} img {{ max-width: 100%; background: #000; }}
.drawn {{ color: #a67c00; }} .new {{ color: #007a94; }}
</style></head><body>
<h1>Changed boxes</h1>
<p>{summary}. Below are the {count} training images whose box is new, the largest changes first:
<b class="drawn">yellow</b> is the drawn box, <b class="new">blue</b> the new one; p is the
classifier's probability of the image's class on either. To correct a box, edit its new_x1 … new_y2
in audit.csv beside this page (empty cells for no box) and train again from that table.</p>
<main>
{cards}
</main></body></html>
"""

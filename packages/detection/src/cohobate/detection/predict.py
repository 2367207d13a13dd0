"""A trained detector used on pictures and clips: JSON and drawings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.detection.data.annotations import PICTURES, Category, read_picture
from cohobate.detection.data.transforms import ToInput
from cohobate.detection.plots import draw, write_picture

CLIPS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv"}
Found = list[dict[str, Any]]


@dataclass(frozen=True)
class Detector:
    """A network with what it takes to use it on files.

    Args:
        network: Images ``(B, 3, S, S)`` and sizes ``(B, 2)`` → labels, boxes, scores.
        size: S.
        categories: All classes: results carry their own ids and names.
    """

    network: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | nn.Module
    size: int
    categories: Sequence[Category]

    @torch.no_grad()
    def detect(
        self, pictures: Sequence[np.ndarray], device: torch.device, threshold: float = 0.0
    ) -> list[Found]:
        """Detect in pictures of any size.

        Args:
            pictures: ``(H, W, 3)`` uint8 RGB.
            device: Where the network is.
            threshold: Lowest score.

        Returns:
            For each picture its objects, the surest first: ``category_id``, ``category``, ``bbox``
            (x, y, width, height in pixels, as COCO) and ``score``.
        """
        none, zero = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        prepare = ToInput(self.size)
        images = [
            prepare(torch.from_numpy(p.copy()).permute(2, 0, 1), none, zero, 0, strong=False)[0]
            for p in pictures
        ]
        sizes = torch.tensor([[p.shape[1], p.shape[0]] for p in pictures], dtype=torch.float32)
        found = self.network(torch.stack(images).to(device), sizes.to(device))
        rows = (x.float().cpu() for x in found)
        return [
            self._listed(label.long(), box, score, threshold)
            for label, box, score in zip(*rows, strict=True)
        ]

    def _listed(self, labels: Tensor, boxes: Tensor, scores: Tensor, threshold: float) -> Found:
        found: Found = []
        for label, box, score in zip(labels.tolist(), boxes.tolist(), scores.tolist(), strict=True):
            if score < threshold:
                continue
            category = self.categories[label]
            x1, y1, x2, y2 = (round(v, 2) for v in box)
            found.append({
                "category_id": category.id, "category": category.name,
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)], "score": round(score, 4),
            })  # fmt: skip
        return found

    def files(
        self,
        inputs: Sequence[Path],
        out: Path,
        device: torch.device,
        threshold: float = 0.4,
        picture: bool = True,
        batch: int = 8,
    ) -> list[Path]:
        """Detect in pictures and clips.

        ``detections.json`` lists the objects of every picture by file name; of a clip
        ``<name>.json`` lists them frame by frame. With ``picture`` each gets a drawn copy.

        Args:
            inputs: Pictures, clips, or folders of them.
            out: Folder for the results.
            device: Where the network is.
            threshold: Lowest score.
            picture: Whether to draw.
            batch: Pictures or frames a pass.

        Returns:
            The files written.

        Raises:
            InputError: There is nothing to look at or a file cannot be read; the others are done
                all the same.
        """
        paths = _paths(inputs)
        written: list[Path] = []
        faults: list[str] = []
        listed: dict[str, Found] = {}
        for path in tqdm(paths, desc="detecting", disable=len(paths) < 2):
            try:
                if path.suffix.lower() in CLIPS:
                    written += self._clip(path, out, device, threshold, picture, batch)
                    continue
                pixels = read_picture(path)
                found = self.detect([pixels], device, threshold)[0]
                listed[str(path)] = found
                if picture:
                    drawn = out / f"{path.stem}_detected.jpg"
                    written.append(write_picture(drawn, self.drawn(pixels, found)))
            except InputError as error:
                faults.append(str(error))
        if listed:
            written.insert(0, _json(out / "detections.json", listed))
        if faults:
            more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
            done = len(paths) - len(faults)
            rest = f"; the other {done} are in {out}" if done else ""
            raise InputError(f"{faults[0]}{more}{rest}")
        return written

    def drawn(self, pixels: np.ndarray, found: Found) -> np.ndarray:
        """A copy of a picture with its objects drawn on it."""
        index = {c.id: n for n, c in enumerate(self.categories)}
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in found)]
        labels = [index[one["category_id"]] for one in found]
        return draw(pixels, boxes, labels, [f"{o['category']} {o['score']:.2f}" for o in found])

    def _clip(
        self, path: Path, out: Path, device: torch.device, threshold: float, picture: bool,
        batch: int,
    ) -> list[Path]:  # fmt: skip
        result, drawn = out / f"{path.stem}.json", out / f"{path.stem}_detected.mp4"
        frames: list[Found] = []
        if not picture:
            for group, _ in _frames(path, batch):
                frames += self.detect(group, device, threshold)
            return [_json(result, {"file": str(path), "frames": frames})]
        with save_atomic(drawn) as temporary, av.open(str(temporary), "w") as container:
            stream: Any = None
            for group, rate in _frames(path, batch):
                stream = stream or _stream(container, group[0], rate)
                found = self.detect(group, device, threshold)
                frames += found
                for pixels, objects in zip(group, found, strict=True):
                    frame = _even(self.drawn(pixels, objects))
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            if stream is None:
                raise InputError(f"{path}: has no pictures")
            container.mux(stream.encode())
        return [_json(result, {"file": str(path), "frames": frames}), drawn]


def _paths(inputs: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for entry in inputs:
        if not entry.is_dir():
            found.append(entry)
            continue
        inside = sorted(p for p in entry.iterdir() if p.suffix.lower() in PICTURES | CLIPS)
        if not inside:
            raise InputError(f"{entry}: no pictures or clips in this folder")
        found += inside
    results: dict[str, Path] = {}
    for path in found:
        other = results.setdefault(path.stem, path)
        if other != path:
            raise InputError(f"{path}: its result would overwrite that of {other}")
    return found


def _frames(path: Path, batch: int) -> Iterator[tuple[list[np.ndarray], Fraction]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: has no pictures")
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            group: list[np.ndarray] = []
            for frame in container.decode(video=0):
                group.append(frame.to_ndarray(format="rgb24"))
                if len(group) == batch:
                    yield group, rate
                    group = []
            if group:
                yield group, rate
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path}: not a video that can be read: {reason}") from None


def _stream(container: Any, pixels: np.ndarray, rate: Fraction) -> Any:
    stream = container.add_stream("libx264", rate=rate.limit_denominator(1001))
    stream.height, stream.width = _even(pixels).shape[:2]
    stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
    return stream


def _even(pixels: np.ndarray) -> np.ndarray:
    """The format needs even sides: an odd last row or column is repeated."""
    h, w = pixels.shape[:2]
    return np.ascontiguousarray(np.pad(pixels, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge"))


def _json(path: Path, content: Any) -> Path:
    with save_atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path

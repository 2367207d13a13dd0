"""From a pair to frames at any times, and from files to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.video.data.media import CLIPS, Clip, ClipWriter, clip_writer, write_picture
from cohobate.video.data.module import to_tensor
from cohobate.video.data.pairs import DualPair, check_pair, find_pairs, order
from cohobate.video.plots import label, overview
from cohobate.video.selfdrsc.network import CorrectionNet
from cohobate.video.timing import encoding, row_times


def times_of(frames: int, times: Sequence[float] | None) -> list[float]:
    """Times of the frames asked for: a list, or a number of them spread evenly.

    Raises:
        InputError: A time is outside the readout, or there is none.
    """
    if times is None:
        if frames < 1:
            raise InputError(f"frames {frames}: ask for at least one")
        return [k / (frames - 1) for k in range(frames)] if frames > 1 else [0.5]
    if not times:
        raise InputError("times: give at least one")
    for time in times:
        if not 0 <= time <= 1:
            raise InputError(
                f"times {time:g}: outside the exposure, which is 0 (first row) to 1 (last row)"
            )
    return list(times)


def frames_at(network: CorrectionNet, images: Tensor, times: Sequence[float]) -> Tensor:
    """Global-shutter frames of one pair at any times.

    Images of any size are padded to what the network needs by repeating their edge, the row times
    going on. One pass gives the frames at 0, t and 1: those at 0 and 1 are of the first and last
    pass.

    Args:
        network: In eval mode.
        images: t2b and b2t, ``(2, 3, H, W)`` in [0, 1].
        times: In [0, 1].

    Returns:
        ``(len(times), 3, H, W)``.
    """
    height, width = images.shape[-2:]
    padded = tuple(-(-size // network.multiple) * network.multiple for size in (height, width))
    padding = (0, padded[1] - width, 0, padded[0] - height)
    inputs = F.pad(images, padding, mode="replicate")[None]
    rows = row_times(height, 0, padded[0]).to(images)
    inner = sorted({time for time in times if 0 < time < 1}) or [0.5]
    found: dict[float, Tensor] = {}
    for time in inner:
        out = network(inputs, encoding(rows, torch.tensor([time])))[0, ..., :height, :width]
        found.setdefault(0.0, out[0])
        found[time], found[1.0] = out[1], out[2]
    return torch.stack([found[float(time)] for time in times])


Correct = Callable[[Tensor, Sequence[float]], Tensor]
"""From a pair ``(2, 3, H, W)`` and times to frames, as `frames_at`."""


@dataclass(frozen=True)
class Task:
    """What is asked of a pair of files.

    Attributes:
        correct: The network with its padding.
        times: In [0, 1].
        fps: Frames a second of the clips written.
        side_by_side: Also write a clip with t2b, result and b2t beside each other.
        out: Folder of the results.
    """

    correct: Correct
    times: list[float]
    fps: float
    side_by_side: bool
    out: Path

    def run(self, inputs: Sequence[Path]) -> list[Path]:
        """Correct two clips, two pictures, or the pairs of a folder.

        Raises:
            InputError: The inputs are no pair.
        """
        if len(inputs) == 1 and inputs[0].is_dir():
            pairs = find_pairs(inputs[0])
            bar = tqdm(pairs, desc="pairs", disable=len(pairs) < 2)
            return [path for pair in bar for path in self._pictures(pair)]
        t2b, b2t = order(inputs)
        kinds = [path.suffix.lower() in CLIPS for path in (t2b, b2t)]
        if kinds[0] != kinds[1]:
            raise InputError(f"{b2t}: a clip needs a clip as its partner, a picture a picture")
        if kinds[0]:
            return self._clips(t2b, b2t)
        return self._pictures(DualPair(_stem(t2b), t2b, b2t))

    def _pictures(self, pair: DualPair) -> list[Path]:
        images = pair.load()
        frames = self._frames(images)
        folder, name = self.out, pair.name.replace("/", "_")
        written = [
            write_picture(folder / f"{name}_{k:03d}.png", frame) for k, frame in enumerate(frames)
        ]
        drawn = folder / f"{name}.png"
        overview(drawn, images, frames, self.times)
        with ExitStack() as stack:
            add, clips = self._writers(stack, name)
            for frame in frames:
                add(images, frame)
        return [*written, drawn, *clips]

    def _clips(self, t2b: Path, b2t: Path) -> list[Path]:
        first, second = Clip(t2b), Clip(b2t)
        if first.frames and second.frames and first.frames != second.frames:
            raise InputError(
                f"{b2t}: {second.frames} frames, but its partner {t2b} has {first.frames}"
            )
        with ExitStack() as stack:
            add, written = self._writers(stack, _stem(t2b))
            pairs = _together(first, second)
            for images in tqdm(pairs, total=first.frames or None, desc="frames", unit="pair"):
                for frame in self._frames(images):
                    add(images, frame)
        return written

    def _frames(self, images: np.ndarray) -> np.ndarray:
        frames = self.correct(to_tensor(images), self.times)
        return (frames * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()

    def _writers(
        self, stack: ExitStack, name: str
    ) -> tuple[Callable[[np.ndarray, np.ndarray], None], list[Path]]:
        """What appends to the clips, and their paths."""
        paths = [self.out / f"{name}.mp4"]
        paths += [self.out / f"{name}_side_by_side.mp4"] * self.side_by_side
        writers: list[ClipWriter] = [
            stack.enter_context(clip_writer(path, self.fps)) for path in paths
        ]

        def add(images: np.ndarray, frame: np.ndarray) -> None:
            writers[0].add(frame)
            if self.side_by_side:
                titles = ("t2b", "global shutter", "b2t")
                shown = (images[0], frame, images[1])
                beside = [label(x, title) for x, title in zip(shown, titles, strict=True)]
                writers[1].add(np.concatenate(beside, 1))

        return add, paths


def _together(first: Clip, second: Clip) -> Iterator[np.ndarray]:
    """Frames of both clips, checked; the first pair's rows too."""
    count = 0
    for t2b, b2t in zip_longest(first, second):
        if t2b is None or b2t is None:
            short = first if t2b is None else second
            raise InputError(f"{short.path}: ends after {count} frames, its partner goes on")
        if t2b.shape != b2t.shape or count == 0:
            check_pair(t2b, b2t, str(first.path), str(second.path))
        count += 1
        yield np.stack((t2b, b2t))
    if count == 0:
        raise InputError(f"{first.path}: has no frame")


def _stem(path: Path) -> str:
    """A pair's name: that of t2b without the mark."""
    name = path.stem
    for mark in ("_rs_t2b", "_t2b", "-t2b", ".t2b"):
        name = name.removesuffix(mark)
    return name or "pair"

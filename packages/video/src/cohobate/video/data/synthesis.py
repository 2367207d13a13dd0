"""Dual reversed rolling-shutter pairs from any clip, as they are made from high-speed video.

Row r of t2b is the mean of row r over the source frames ``[r g, r g + e)``, for row gap g and
exposure e; b2t reads the rows in the opposite order over the same frames. A global-shutter frame is
the mean of e whole source frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cohobate.core.errors import InputError
from cohobate.video.flow.lucas_kanade import LucasKanade
from cohobate.video.warp import intermediate_flows, masked_warp

_GAMMA = 2.2


class Synthesised(NamedTuple):
    """One dual pair and its truth.

    Attributes:
        t2b: Read from the top, ``(H, W, 3)`` float64, not rounded (uint8 with gamma).
        b2t: Read from the bottom, stored upright.
        frames: Global-shutter frames at evenly spaced times, ``(N, H, W, 3)``.
    """

    t2b: np.ndarray
    b2t: np.ndarray
    frames: np.ndarray


def frames_needed(rows: int, row_gap: int = 1, exposure: int = 1) -> int:
    """Source frames of one pair: ``(rows - 1) g + e``.

    Example:
        >>> frames_needed(540, 1, 10)
        549
    """
    return (rows - 1) * row_gap + exposure


def synthesise(
    source: np.ndarray, *, row_gap: int = 1, exposure: int = 1, frames: int = 9, gamma: bool = False
) -> Synthesised:
    """Read a dual pair and its global-shutter frames out of consecutive source frames.

    Args:
        source: ``(n, H, W, 3)`` with at least `frames_needed`; what is more is dead time.
        row_gap: g, source frames from one row to the next.
        exposure: e, source frames averaged.
        frames: Global-shutter frames N, from the first row's exposure to the last row's.
        gamma: Average light instead of grey values: uint8 tables of 1/2.2 and 2.2, truncating, as
            in the released generator.

    Raises:
        InputError: There are too few source frames.

    References:
        The generator of RS-GOPRO (Zhong et al., ECCV 2022, arXiv 2203.06451).

    Example:
        >>> clip = np.arange(3.0).reshape(3, 1, 1, 1) * np.ones((3, 3, 1, 3))
        >>> pair = synthesise(clip, frames=2)
        >>> pair.t2b[:, 0, 0], pair.b2t[:, 0, 0], pair.frames[:, 0, 0, 0]
        (array([0., 1., 2.]), array([2., 1., 0.]), array([0., 2.]))
    """
    rows = source.shape[1]
    need = frames_needed(rows, row_gap, exposure)
    if row_gap < 1 or exposure < 1 or rows < 2 or frames < 2:
        raise InputError(
            f"row gap {row_gap}, exposure {exposure}, {rows} rows, {frames} frames: too few"
        )
    if len(source) < need:
        raise InputError(f"{len(source)} source frames, {rows} rows need {need}")
    source = source[:need]
    if gamma:
        source = _table(1 / _GAMMA)[source]
    # The mean over a window is a difference of running sums: no loop over rows.
    sums = np.concatenate((np.zeros_like(source[:1], np.float64), source.cumsum(0, np.float64)))
    start, row = np.arange(rows) * row_gap, np.arange(rows)
    t2b = (sums[start + exposure, row] - sums[start, row]) / exposure
    start = start[::-1]
    b2t = (sums[start + exposure, row] - sums[start, row]) / exposure
    first = np.linspace(0, need - exposure, frames).astype(int)
    whole = (sums[first + exposure] - sums[first]) / exposure
    if gamma:
        back = _table(_GAMMA)
        t2b, b2t, whole = (back[x.astype(np.uint8)] for x in (t2b, b2t, whole))
    return Synthesised(t2b, b2t, whole)


@dataclass(frozen=True)
class Readout:
    """How a clip is turned into pairs.

    Args:
        height: Rows of the pairs; the clip is scaled to it, keeping its aspect. Its own by default.
        row_gap: Source frames from one row to the next, after upsampling.
        exposure: Source frames averaged for a row, after upsampling.
        upsample: Frames made of one by motion-compensated interpolation; 1 takes them as they are.
        stride: Frames of the clip from one pair to the next; by default no frame is used twice.
        frames: Global-shutter frames of each pair.
        gamma: Average light instead of grey values.
        cut: A pair is left out when two neighbouring frames differ by more than this on average, of
            255: the scene was cut.
    """

    height: int | None = None
    row_gap: int = 1
    exposure: int = 1
    upsample: int = 1
    stride: int | None = None
    frames: int = 9
    gamma: bool = False
    cut: float = 40.0

    def source_frames(self, rows: int) -> int:
        """Frames of the clip that one pair takes."""
        return -(-(frames_needed(rows, self.row_gap, self.exposure) - 1) // self.upsample) + 1


def pairs_of_clip(clip: Iterable[np.ndarray], readout: Readout) -> Iterator[Synthesised]:
    """Pairs of a clip, one after the other; only the frames of one are held.

    Args:
        clip: Frames ``(H, W, 3)`` RGB, uint8.
        readout: Timing.

    Raises:
        InputError: The clip is shorter than one readout.
    """
    window: list[tuple[np.ndarray, bool]] = []  # after upsampling; whether a cut lies before it
    seen = made = need = step = skip = 0
    before: np.ndarray | None = None
    for picture in clip:
        seen += 1
        picture = _scale(picture, readout.height)
        if before is None:
            need = frames_needed(len(picture), readout.row_gap, readout.exposure)
            step = (readout.stride or readout.source_frames(len(picture))) * readout.upsample
            new, cut = [picture], False
        else:
            cut = bool(np.abs(picture.astype(np.int16) - before).mean() > readout.cut)
            new = [*between(before, picture, readout.upsample), picture]
        before = picture
        window += [(frame, cut) for frame in new]
        while len(window) - skip >= need:
            window = window[skip:]
            made += 1
            if not any(cut for _, cut in window[1:need]):
                yield synthesise(
                    np.stack([frame for frame, _ in window[:need]]),
                    row_gap=readout.row_gap,
                    exposure=readout.exposure,
                    frames=readout.frames,
                    gamma=readout.gamma,
                )
            skip = step
        if skip >= len(window):  # dead time is not kept
            window, skip = [], skip - len(window)
    if not made:
        raise InputError(
            f"{seen} frames of {seen and len(picture)} rows, but one readout takes "
            f"{readout.source_frames(len(picture)) if seen else 2}"
        )


@torch.no_grad()
def between(first: np.ndarray, second: np.ndarray, factor: int) -> list[np.ndarray]:
    """Frames between two, by motion-compensated interpolation.

    Args:
        first: ``(H, W, 3)``, uint8.
        second: The same.
        factor: Into how many steps the time between them is cut.

    Returns:
        ``factor - 1`` frames, uint8.
    """
    if factor == 1:
        return []
    pair = torch.from_numpy(np.stack((first, second))).permute(0, 3, 1, 2).float()[None] / 255
    flows = LucasKanade().pairs(pair, ((0, 1), (1, 0))).expand(factor - 1, -1, -1, -1, -1)
    a, b = pair.expand(factor - 1, -1, -1, -1, -1).unbind(1)
    s = torch.arange(1, factor).view(-1, 1, 1, 1) / factor
    found = intermediate_flows(flows[:, 0], flows[:, 1], s)
    warped_a, inside_a = masked_warp(a, found.first)
    warped_b, inside_b = masked_warp(b, found.second)
    share = (1 - s) * inside_a + s * inside_b
    blend = ((1 - s) * warped_a + s * warped_b) / share.clamp_min(1e-6)
    out = torch.where(share > 0, blend, (1 - s) * a + s * b)
    return list((out * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def _scale(picture: np.ndarray, height: int | None) -> np.ndarray:
    if height is None or height == len(picture):
        return picture
    width = max(2, round(picture.shape[1] * height / len(picture)))
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def _table(power: float) -> np.ndarray:
    return ((np.arange(256) / 255) ** (1 / power) * 255).astype(np.uint8)

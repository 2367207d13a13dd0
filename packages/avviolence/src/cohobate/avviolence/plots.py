"""Pictures: the timeline of a scored video, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cohobate.avviolence.data.features import SNIPPET_SECONDS
from cohobate.avviolence.features.logmel import HOP, WINDOW, log_mel
from cohobate.avviolence.features.media import SAMPLE_RATE
from cohobate.core.io import save_atomic

_RED, _BLUE = "#b2182b", "#2166ac"


def timeline(
    path: Path,
    scores: np.ndarray,
    intervals: Sequence[tuple[float, float]],
    *,
    title: str,
    threshold: float,
    thumbnails: dict[int, np.ndarray] | None = None,
    waveform: np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> None:
    """Draw score curve, intervals and, where they are known, thumbnails and spectrogram.

    Args:
        path: The PNG.
        scores: Score of each snippet, ``(T,)``.
        intervals: Violent spans in seconds.
        title: Heading.
        threshold: Drawn as a line.
        thumbnails: Pictures by snippet number.
        waveform: Sound at 16 kHz.
        truth: Truth of each snippet, ``(T,)``; shown as a band.
    """
    has_sound = waveform is not None and len(waveform) >= WINDOW
    heights = [0.7] * bool(thumbnails) + [2.0] + [1.0] * has_sound
    figure = Figure(figsize=(10, 1.4 * sum(heights)), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    seconds = len(scores) * SNIPPET_SECONDS
    if thumbnails:
        _film(axes.pop(0), thumbnails, seconds)
    score = axes.pop(0)
    edges = np.arange(len(scores) + 1) * SNIPPET_SECONDS
    score.stairs(scores, edges, color=_BLUE, baseline=None, linewidth=1.5)
    score.axhline(threshold, color="grey", linewidth=0.8, linestyle="--")
    for start, end in intervals:
        score.axvspan(start, end, color=_RED, alpha=0.2, linewidth=0)
    if truth is not None:
        score.fill_between(edges[:-1], 1.02, 1.06, where=truth > 0, color="k", step="post")
    score.set(xlim=(0, seconds), ylim=(0, 1.08), ylabel="violence score", xlabel="time (s)")
    if has_sound:
        assert waveform is not None
        _spectrogram(axes.pop(0), waveform, seconds)
    figure.suptitle(title, fontsize=10)
    with save_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _film(axis: Axes, thumbnails: dict[int, np.ndarray], seconds: float) -> None:
    """Some pictures in their order in time, as many as fit side by side."""
    numbers = sorted(thumbnails)
    height, width = next(iter(thumbnails.values())).shape[:2]
    places = max(1, round(10 / 0.98 * height / width))
    chosen = [
        numbers[i] for i in np.linspace(0, len(numbers) - 1, min(places, len(numbers))).astype(int)
    ]
    step = seconds / len(chosen)
    for place, number in enumerate(chosen):
        axis.imshow(
            thumbnails[number], extent=(place * step, (place + 0.97) * step, 0, 1), aspect="auto"
        )
    axis.set(xlim=(0, seconds), ylim=(0, 1))
    axis.axis("off")


def _spectrogram(axis: Axes, waveform: np.ndarray, seconds: float) -> None:
    """VGGish's log-mel, thinned out to about 2000 columns."""
    step = max(1, len(waveform) // (2000 * HOP))
    frames = torch.from_numpy(waveform).unfold(0, WINDOW, HOP * step)
    mel = log_mel(frames.contiguous())[:, 0].T.numpy()
    end = len(waveform) / SAMPLE_RATE
    axis.imshow(mel, origin="lower", aspect="auto", extent=(0, end, 0, mel.shape[0]), cmap="magma")
    axis.set(xlim=(0, seconds), ylabel="mel band")


def curves(path: Path, rows: Sequence[dict[str, str]], names: Sequence[str]) -> None:
    """Draw columns of ``metrics.csv`` over the training steps.

    Args:
        path: The PNG.
        rows: Rows of the file.
        names: Columns; those that never appear are left out.
    """
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
    axis.set(xlabel="step")
    axis.legend()
    axis.grid(alpha=0.3)
    with save_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)

"""Pictures: calibration, scaling curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from cohobate.core.io import save_atomic


def _save(figure: Figure, path: Path) -> Path:
    with save_atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    return path


def calibration_plot(table: Tensor, path: Path) -> Path:
    """Draw mean label over mean prediction; the area of a dot is its share of the rows.

    Args:
        table: (bins, 3) from :func:`~cohobate.ctr.metrics.reliability`.
        path: the PNG.
    """
    count, predicted, clicked = table[table[:, 0] > 0].numpy().T
    figure = Figure(figsize=(4, 4))
    axes = figure.add_subplot()
    limit = max(float(predicted.max()), float(clicked.max())) * 1.05
    axes.plot([0, limit], [0, limit], color="0.7", linewidth=1)
    axes.plot(predicted, clicked, color="C0", linewidth=1)
    axes.scatter(predicted, clicked, s=8 + 300 * count / count.sum(), color="C0", alpha=0.7)
    axes.set(
        xlabel="predicted click probability",
        ylabel="share of clicks",
        title="Calibration on the test part",
        xlim=(0, limit),
        ylim=(0, limit),
    )
    return _save(figure, path)


def scaling_plot(
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]],
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: Path,
    *,
    best: float | None = None,
) -> Path:
    """Draw AUC against size, one panel for each kind of size.

    Args:
        panels: label of the x axis, and points (x, AUC) by name of the series.
        curves: fitted curves (x, AUC) by panel and series.
        path: the PNG.
        best: best reachable AUC, drawn as a line.
    """
    figure = Figure(figsize=(5 * len(panels), 4))
    for number, (label, series) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for i, (name, (x, y)) in enumerate(series.items()):
            axes.plot(x, y, "o", color=f"C{i}", label=name)
            if name in curves.get(label, {}):
                axes.plot(*map(np.asarray, curves[label][name]), color=f"C{i}", linewidth=1)
        if best is not None:
            axes.axhline(best, color="0.6", linestyle="--", linewidth=1, label="best reachable")
        axes.set(xscale="log", xlabel=label, ylabel="test AUC")
        axes.legend(fontsize=8)
    return _save(figure, path)

"""Overlap and surface distances of segmentations, by MONAI, without silent NaN."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
)
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Scores:
    """Dice and surface distances, collected volume by volume.

    Args:
        class_names: Names of all K classes, the background first; it is not scored.
        distances: Whether surface distances are computed too.
        in_voxels: Distances in voxels of the grid instead of millimetres, as the official DSD code
            reports them.
    """

    class_names: Sequence[str]
    distances: bool = True
    in_voxels: bool = False
    _found: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, prediction: Tensor, label: Tensor, spacing: Sequence[float]) -> None:
        """Score one volume.

        Args:
            prediction: Class ids ``(X, Y, Z)``.
            label: Class ids ``(X, Y, Z)``.
            spacing: Voxel size in mm.
        """
        found = _one_hot(prediction, len(self.class_names))
        truth = _one_hot(label, len(self.class_names))
        self._keep("dice", compute_dice(found, truth, include_background=False))
        if not self.distances:
            return
        size = [1.0] * 3 if self.in_voxels else list(spacing)
        with warnings.catch_warnings():
            # MONAI warns of classes that are absent, which are counted here, and of itself
            warnings.filterwarnings("ignore", message=".*is all 0.*")
            warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
            hd = compute_hausdorff_distance(found, truth, percentile=95, spacing=size)
            surface = compute_average_surface_distance(found, truth, spacing=size)
        self._keep("hd95", hd)
        self._keep("msd", surface)

    def summary(self) -> dict[str, float]:
        """Mean over volumes and classes, per-class means, and what could not be scored.

        A class absent from a label has no Dice; one absent from label or prediction has no surface
        distance. Such pairs are left out of the means and counted as ``<metric>_excluded``.

        Returns:
            ``dice``, ``dice/<class>``, ``hd95`` and ``msd`` (95th percentile of the Hausdorff
            distance and mean surface distance from the prediction, in mm), …; a mean over nothing
            is NaN with all pairs counted.
        """
        out: dict[str, float] = {}
        for metric, rows in self._found.items():
            values = torch.cat(rows)  # (volumes, K - 1)
            valid = values.isfinite()
            kept = values.where(valid, torch.nan)
            out[metric] = kept.nanmean().item()
            out[f"{metric}_excluded"] = float((~valid).sum())
            for name, mean in zip(self.class_names[1:], kept.nanmean(0).tolist(), strict=True):
                out[f"{metric}/{name.replace(' ', '_')}"] = mean
        return out

    def _keep(self, metric: str, values: Tensor) -> None:
        self._found.setdefault(metric, []).append(values.cpu().double())


def _one_hot(ids: Tensor, classes: int) -> Tensor:
    """Class ids ``(X, Y, Z)`` → ``(1, K, X, Y, Z)``."""
    return F.one_hot(ids.long(), classes).movedim(-1, 0)[None]

"""Metrics of masks, image by image as the official evaluation has them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from monai.metrics import compute_hausdorff_distance
from torch import Tensor

NAMES = ("dice", "iou", "accuracy", "precision", "recall")


def overlap(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Overlap of each image's mask with the truth, smoothed by 1.

    ``Dice = (2I + 1) / (P + G + 1)``, ``IoU = (I + 1) / (P + G − I + 1)``, and likewise
    ``precision = (I + 1) / (P + 1)``, ``recall = (I + 1) / (G + 1)``: an empty mask that is found
    empty scores 1. Accuracy is the share of pixels that are right.

    Args:
        prediction: Foreground, bool ``(B, ...)``.
        target: Foreground, bool of the same shape.

    Returns:
        ``(B,)`` in float64 for each of ``dice``, ``iou``, ``accuracy``, ``precision``, ``recall``.

    Example:
        >>> found = overlap(torch.tensor([[True, False]]), torch.tensor([[True, True]]))
        >>> round(found["dice"].item(), 3), round(found["iou"].item(), 3)
        (0.75, 0.667)
    """
    p, g = prediction.bool().flatten(1), target.bool().flatten(1)
    both, found, there = ((x.sum(1)).double() for x in (p & g, p, g))
    return {
        "dice": (2 * both + 1) / (found + there + 1),
        "iou": (both + 1) / (found + there - both + 1),
        "accuracy": (p == g).double().mean(1),
        "precision": (both + 1) / (found + 1),
        "recall": (both + 1) / (there + 1),
    }


def hausdorff(prediction: Tensor, target: Tensor) -> Tensor:
    """Largest Hausdorff distance of each image in pixels, by MONAI; NaN where a mask is empty.

    Args:
        prediction: Foreground, bool ``(B, 1, H, W)``.
        target: Foreground, bool of the same shape.
    """
    with warnings.catch_warnings():
        # MONAI warns of empty masks, which are counted here, and of itself
        warnings.filterwarnings("ignore", message=".*is all 0.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        found = compute_hausdorff_distance(
            prediction.float(), target.float(), include_background=True
        )
    values = found[:, 0].double().cpu()
    return values.where(values.isfinite(), torch.nan)


@dataclass
class Scores:
    """Metrics collected over images."""

    _found: dict[str, list[Tensor]] = field(default_factory=dict)
    _modality: list[str] = field(default_factory=list)

    def add(
        self, prediction: Tensor, target: Tensor, modality: list[str], *, distances: bool
    ) -> None:
        """Score a batch.

        Args:
            prediction: Foreground, bool ``(B, 1, H, W)``.
            target: Foreground, bool of the same shape.
            modality: Of each image.
            distances: Whether the Hausdorff distance is computed too.
        """
        found = overlap(prediction, target)
        if distances:
            found["hausdorff"] = hausdorff(prediction, target)
        for name, values in found.items():
            self._found.setdefault(name, []).append(values.cpu())
        self._modality += modality

    def summary(self) -> dict[str, float]:
        """Mean and standard deviation over images, Dice of each modality, F1.

        Images whose Hausdorff distance is not finite are left out of its mean and counted as
        ``hausdorff_excluded``. F1 is that of the mean precision and recall.
        """
        out: dict[str, float] = {}
        for name, parts in self._found.items():
            values = torch.cat(parts)
            kept = values[values.isfinite()]
            out[name] = kept.mean().item() if len(kept) else float("nan")
            if name in ("dice", "iou", "hausdorff"):
                out[f"{name}_sd"] = kept.std().item() if len(kept) > 1 else 0.0
            if name == "hausdorff":
                out["hausdorff_excluded"] = float(len(values) - len(kept))
        precision, recall = out["precision"], out["recall"]
        out["f1"] = 2 * precision * recall / (precision + recall)
        dice = torch.cat(self._found["dice"])
        for modality in dict.fromkeys(self._modality):
            chosen = torch.tensor([m == modality for m in self._modality])
            out[f"dice/{modality}"] = dice[chosen].mean().item()
        return out

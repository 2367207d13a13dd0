"""A trained detector used on pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cohobate.detection.data.annotations import Category
from cohobate.detection.data.transforms import ToInput
from cohobate.detection.plots import draw

Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Detector:
    """A network with what it takes to use it on pictures.

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
    ) -> list[Objects]:
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

    def _listed(self, labels: Tensor, boxes: Tensor, scores: Tensor, threshold: float) -> Objects:
        found: Objects = []
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

    def drawn(self, pixels: np.ndarray, found: Objects) -> np.ndarray:
        """A copy of a picture with its objects drawn on it."""
        index = {c.id: n for n, c in enumerate(self.categories)}
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in found)]
        labels = [index[one["category_id"]] for one in found]
        return draw(pixels, boxes, labels, [f"{o['category']} {o['score']:.2f}" for o in found])

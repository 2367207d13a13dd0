"""Fine-grained distribution refinement, as it runs through the layers of any decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cohobate.detection.d_fine.denoising import inverse_sigmoid
from cohobate.detection.d_fine.losses import decode, expected_offsets


class Refined(NamedTuple):
    """Boxes of a decoder with refined distributions, all layers stacked.

    Attributes:
        boxes: ``(L, B, Q, 4)`` cxcywh, normalised.
        edges: ``(L, B, Q, 4, N + 1)`` edge logits.
        initial: b⁰ ``(B, Q, 4)``, with gradient.
    """

    boxes: Tensor
    edges: Tensor
    initial: Tensor


class Refinement:
    """Called with the content of one layer after the other, gives the boxes the next one looks at.

    Args:
        head: Has ``pre_branch``, ``reg_branches``, ``bins`` and ``reg_scale``.
        reference: Where the queries begin: boxes ``(B, Q, 4)`` cxcywh or centres ``(B, Q, 2)``.

    References:
        Peng et al. D-FINE. ICLR 2025, arXiv 2410.13842, equations 1 and 2.
    """

    def __init__(self, head: Any, reference: Tensor) -> None:
        self._head, self._reference = head, reference
        self._boxes: list[Tensor] = []
        self._edges: list[Tensor] = []
        self._content: Tensor | float = 0.0

    def __call__(self, content: Tensor) -> Tensor:
        """Boxes ``(B, Q, 4)`` without gradient, from a layer's output ``(B, Q, D)``."""
        layer = len(self._boxes)
        if layer == 0:
            start = inverse_sigmoid(self._reference)
            start = F.pad(start, (0, 4 - start.shape[-1]))
            self._initial = (self._head.pre_branch(content) + start).sigmoid()
        edges = self._head.reg_branches[layer](content + self._content).unflatten(-1, (4, -1))
        if self._edges:
            edges = edges + self._edges[-1]
        offsets = expected_offsets(edges, self._head.bins)
        boxes = decode(self._initial.detach(), offsets, self._head.reg_scale)
        self._content = content.detach()
        self._edges.append(edges)
        self._boxes.append(boxes)
        return boxes.detach()

    @property
    def result(self) -> Refined:
        """What all layers gave."""
        return Refined(torch.stack(self._boxes), torch.stack(self._edges), self._initial)

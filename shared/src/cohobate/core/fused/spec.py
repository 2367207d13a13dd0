"""What a fused divergence computes, in plain values an operator's schema can carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cohobate.core.losses.divergences import Kind

Source = Literal["none", "hidden", "logits", "probabilities", "topk"]


class Probabilities(NamedTuple):
    """A teacher given by the probabilities of all classes.

    Attributes:
        values: (..., V), taken as they are: already at the temperature of the divergence.
    """

    values: Tensor


class TopK(NamedTuple):
    """A teacher given by its k likeliest classes and the mass of all others.

    The divergence is then exactly the one between the distributions over k + 1 buckets: the k
    classes and "any other class".

    Attributes:
        ids: Distinct class indices (..., k).
        log_probs: Their log-probabilities (..., k), already at the temperature of the divergence.
        log_tail: Logarithm of the mass of the other classes (...).
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


@dataclass(frozen=True)
class Spec:
    """The constants of one call; pairs are (student, teacher)."""

    kind: Kind
    source: Source
    beta: float
    tau: float
    factor: float  # of the divergence: τ² or 1
    ce_weight: float
    scales: Sequence[float]
    softcaps: Sequence[float]  # 0 for none

    def activate(self, raw: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
        """Logits scale·raw, soft-capped to cap·tanh(·/cap), and the slope of the cap."""
        scale, cap = self.scales[side], self.softcaps[side]
        z = raw if scale == 1 else raw * scale
        if not cap:
            return z, None
        bent = (z / cap).tanh()
        return bent * cap, 1 - bent.square()


def low_precision(dtype: torch.dtype) -> bool:
    """Whether matrices of this type are multiplied with sums in float32."""
    return dtype in (torch.bfloat16, torch.float16)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of logits and sums: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32

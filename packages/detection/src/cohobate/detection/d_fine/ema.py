"""The moving average of the weights, which is what is evaluated and kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cohobate.core.teachers import EMATeacher


class WarmEMA(EMATeacher):
    """Moving average with d(t) = decay · (1 − exp(−t / warm-up)); running statistics take part.

    Args:
        student: The network to follow.
        decay: The decay reached in the end.
        warmup: Updates until about two thirds of it; 0 starts with it.
    """

    def __init__(self, student: nn.Module, decay: float = 0.9999, warmup: int = 1000) -> None:
        super().__init__(student)
        self.final, self.warmup, self.updates = decay, warmup, 0

    @property
    def network(self) -> nn.Module:
        """The averaged network."""
        return self._held[0]

    def after_step(self, progress: float) -> None:
        """Average in the weights of a step."""
        self.updates += 1
        share = 1.0 - math.exp(-self.updates / self.warmup) if self.warmup else 1.0
        self.update(self.final * share)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Average in all floating tensors, one call for each dtype; copy the others."""
        averages, currents = self.network.state_dict(), self._student[0].state_dict()
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for name, average in averages.items():
            if average.is_floating_point():
                own, new = by_dtype.setdefault(average.dtype, ([], []))
                own.append(average)
                new.append(currents[name])
            else:
                average.copy_(currents[name])
        for own, new in by_dtype.values():
            torch._foreach_lerp_(own, new, 1.0 - decay)

    def changing_state(self) -> dict[str, Any]:
        """Updates done and decay; the weights are the checkpoint's own."""
        return {"updates": self.updates, "decay": self.final}

    def load_changing_state(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.updates, self.final = int(state["updates"]), float(state["decay"])

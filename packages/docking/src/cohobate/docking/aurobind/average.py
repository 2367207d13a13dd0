"""The moving average of the weights, with which poses are sampled."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """Lightning's average of the weights: validation and checkpoints have it, training does not.

    At step k the old average keeps ``min(decay, (1 + k) / (10 + k))``.

    Args:
        decay: Of the long run.
    """

    def __init__(self, decay: float) -> None:
        def mean(averages: list[Tensor], currents: list[Tensor], count: Tensor | int) -> None:
            kept = min(decay, (1 + int(count)) / (10 + int(count)))
            torch._foreach_lerp_(averages, currents, 1 - kept)

        super().__init__(use_buffers=False, multi_avg_fn=mean)

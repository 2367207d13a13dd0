"""What a run costs: time of a step and peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

_WARM_UP = 3


class StepTimer(Callback):
    """Times training steps; the median of all but the first few is reported.

    From the start of the forward pass to the end of the optimiser's step, without waiting for data.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._started = _now(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop the clock."""
        self._seconds.append(_now(pl_module.device) - self._started)

    @property
    def step_seconds(self) -> float | None:
        """Median seconds a step; nothing when too few steps were run."""
        timed = self._seconds[_WARM_UP:]
        return statistics.median(timed) if timed else None


def peak_memory(device: torch.device) -> int | None:
    """Largest memory this process has used so far, in bytes.

    Args:
        device: On CUDA the device's memory counts, otherwise the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

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

    From the start of the forward pass to the end of the optimiser's step, without waiting for data:
    by the wall clock, on CUDA when the device is done, and by the CPU time of this process, all its
    threads together. Other programs on the machine slow the wall clock far more than the CPU time,
    so on a CPU that is the one to compare; more threads make it no shorter.
    """

    def __init__(self) -> None:
        self._started = (0.0, 0.0)
        self._steps: list[tuple[float, float]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clocks."""
        self._started = _now(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop the clocks."""
        wall, cpu = _now(pl_module.device)
        self._steps.append((wall - self._started[0], cpu - self._started[1]))

    @property
    def step_seconds(self) -> float | None:
        """Median seconds a step by the wall clock; None when too few steps were run."""
        return self._median(0)

    @property
    def step_cpu_seconds(self) -> float | None:
        """Median CPU seconds a step; None when too few steps were run."""
        return self._median(1)

    def _median(self, clock: int) -> float | None:
        timed = [step[clock] for step in self._steps[_WARM_UP:]]
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


def _now(device: torch.device) -> tuple[float, float]:
    """The wall clock and the CPU time of the process, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()

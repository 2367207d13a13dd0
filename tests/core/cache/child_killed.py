"""Run by test_cache.py: write a cache while being killed again and again.

Every attempt is a fork that an alarm ends at a random moment. Prints how many attempts it ended.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from cohobate.core.cache import write_cache

SIZE, CLASSES = 240, 500


class Numbers:
    """Samples that are their own index."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        if index >= SIZE:
            raise IndexError(index)
        return int(index)

    def sample_key(self, index: int) -> tuple[str, str]:
        return str(int(index)), ""


def ask(batch: torch.Tensor) -> torch.Tensor:
    return torch.sin(batch[:, None] * torch.linspace(1, 3, CLASSES)) * 5


def write(folder: Path) -> None:
    write_cache(
        folder, dataset=Numbers(), ask=ask, teacher="t", transform="", top_k=16, shard_samples=8,
        batch_size=4, progress=False,
    )  # fmt: skip


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    write(folder / "whole")
    duration = time.perf_counter() - began
    moments = random.Random(0)
    ended = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            # the default action of the alarm is to end the process on the spot
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.05, 1) * duration / kills * 2)
            write(folder / "killed")
            os._exit(0)
        moments.random()  # the parent's numbers move on with the child's
        _, status = os.waitpid(child, 0)
        ended += os.WIFSIGNALED(status)
    write(folder / "killed")
    print(ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

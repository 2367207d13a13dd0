"""Run by test_cache.py: write a cache while being killed again and again.

Every attempt is a fork that an alarm ends at a random moment. Prints how many attempts it ended,
and how many shards there were after the last of them.
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

SIZE, CLASSES = 1000, 2000


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
        folder, dataset=Numbers(), ask=ask, teacher="t", transform="", top_k=16, shard_samples=20,
        batch_size=4, progress=False,
    )  # fmt: skip


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    write(folder / "warm")  # what is imported and allocated once is no part of the measure
    began = time.process_time()
    write(folder / "whole")
    needed = time.process_time() - began
    moments = random.Random(0)
    ended = 0
    for _ in range(kills):
        moment = moments.uniform(0, 1.2) * needed / kills
        child = os.fork()
        if child == 0:
            # the default action of this alarm, on processor time, is to end the process on the spot
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, moment)
            write(folder / "killed")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended += os.WIFSIGNALED(status)
    done = len(list((folder / "killed").glob("[0-9]*.safetensors")))
    write(folder / "killed")
    print(ended, done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

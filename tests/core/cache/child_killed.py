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


class Numbers:
    """Samples that are their own index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index >= self.size:
            raise IndexError(index)
        return int(index)

    def sample_key(self, index: int) -> tuple[str, str]:
        return str(int(index)), ""


def write(folder: Path, size: int, classes: int, top_k: int) -> None:
    waves = torch.linspace(1, 3, classes)
    write_cache(
        folder, dataset=Numbers(size), ask=lambda batch: torch.sin(batch[:, None] * waves) * 5,
        teacher="t", transform="", top_k=top_k, shard_samples=max(1, size // 50), batch_size=32,
        progress=False,
    )  # fmt: skip


def main(folder: Path, kills: int, *problem: int) -> None:
    torch.set_num_threads(1)
    write(folder / "warm", 64, *problem[1:])  # what is loaded once is no part of the measure
    began = time.process_time()
    write(folder / "whole", *problem)
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
            write(folder / "killed", *problem)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended += os.WIFSIGNALED(status)
    done = len(list((folder / "killed").glob("[0-9]*.safetensors")))
    write(folder / "killed", *problem)
    print(ended, done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:]))

"""Run by test_cache.py: write a cache while being killed again and again.

Every attempt is a fork that answers a random number of batches, up to two shards, and is ended by
an alarm at a random moment of the next shard. Prints how many attempts were ended, and how many
shards there were after the last of them.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cohobate.core.cache import write_cache

SHARDS = 50
BATCH = 32


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


def answers(batch: Tensor, classes: int) -> Tensor:
    return torch.sin(batch[:, None] * torch.linspace(1, 3, classes)) * 5


def write(folder: Path, size: int, classes: int, top_k: int, ask=None) -> None:
    write_cache(
        folder, dataset=Numbers(size), ask=ask or partial(answers, classes=classes), teacher="t",
        transform="", top_k=top_k, shard_samples=max(1, size // SHARDS), batch_size=BATCH,
        progress=False,
    )  # fmt: skip


def attempt(folder: Path, size: int, classes: int, top_k: int, count: int, moment: float) -> None:
    """Write until so many batches are answered, and some seconds of processor time longer."""
    asked = itertools.count()

    def ask(batch: Tensor) -> Tensor:
        if next(asked) == count:
            # the default action of this alarm is to end the process on the spot
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, moment)
        return answers(batch, classes)

    write(folder, size, classes, top_k, ask)


def main(folder: Path, kills: int, *problem: int) -> None:
    torch.set_num_threads(1)
    write(folder / "warm", SHARDS, *problem[1:])  # what is loaded once is no part of the measure
    began = time.process_time()
    write(folder / "whole", *problem)
    one_shard = (time.process_time() - began) / SHARDS
    batches = math.ceil(problem[0] / SHARDS / BATCH)
    chance = random.Random(0)
    ended = 0
    for _ in range(kills):
        count, moment = chance.randint(1, 2 * batches), chance.uniform(0, one_shard)
        child = os.fork()
        if child == 0:
            attempt(folder / "killed", *problem, count, moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended += os.WIFSIGNALED(status)
    done = len(list((folder / "killed").glob("[0-9]*.safetensors")))
    write(folder / "killed", *problem)
    print(ended, done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:]))

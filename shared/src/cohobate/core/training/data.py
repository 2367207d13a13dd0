"""Data order and augmentation as pure functions of (seed, epoch, position).

Lightning saves no random state and a plain `DataLoader` cannot start in the middle of an epoch.
Here nothing needs saving: every draw carries its own seed, so a run resumed at batch 17, a run with
another number of workers and the other arm of a comparison all see the same crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler


class Draw(int):
    """A sample's index that also carries the seed for its augmentation.

    Any map-style data set takes it as the plain index it is; one that augments reads ``seed``.

    Attributes:
        seed: 64-bit seed, a function of the run's seed, the epoch and the place in the epoch.

    Example:
        >>> Draw(3, seed=9) + 0, Draw(3, seed=9).seed
        (3, 9)
    """

    seed: int

    def __new__(cls, index: int, seed: int = 0) -> Draw:
        """Make an index with a seed."""
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __getnewargs__(self) -> Any:  # workers receive draws by pickle
        return int(self), self.seed


class EpochSampler(Sampler[Draw]):
    """Draws in an order that depends on seed and epoch alone, shared out over processes.

    Args:
        size: Number of samples in the data set.
        seed: The run's seed.
        shuffle: Permute anew each epoch; otherwise in order.
        num_samples: Draws an epoch over all processes; default ``size``. More than ``size`` goes
            through several permutations, so that an epoch may be a number of steps.
        rank: This process; default from ``torch.distributed``.
        world: Number of processes; default from ``torch.distributed``.

    Differences:
        ``DistributedSampler`` pads by repeating samples; here every process draws the same number
        and what does not divide evenly is dropped (at most ``world - 1`` draws), so no sample
        counts twice. Draw ``i`` goes to process ``i % world``: ``n`` processes with batch ``b``
        see the same global batches as one process with batch ``n * b``.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_samples: int | None = None,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if size < 1:
            raise ValueError("EpochSampler: the data set is empty")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.total = size if num_samples is None else num_samples
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.world = world or (torch.distributed.get_world_size() if distributed else 1)
        self.rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total // self.world

    def __iter__(self) -> Iterator[Draw]:
        order = self._order()
        seeds = np.random.SeedSequence([self.seed, self.epoch, 1]).generate_state(
            self.total, np.uint64
        )
        for place in range(self.rank, len(self) * self.world, self.world):
            yield Draw(int(order[place]), int(seeds[place]))

    def _order(self) -> np.ndarray:
        rounds = -(-self.total // self.size)
        if not self.shuffle:
            return np.tile(np.arange(self.size), rounds)[: self.total]
        rng = np.random.default_rng([self.seed, self.epoch])
        return np.concatenate([rng.permutation(self.size) for _ in range(rounds)])[: self.total]


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` that can start in the middle of an epoch.

    Lightning saves and restores it through ``state_dict``. Skipped batches are not read.

    Args:
        dataset: A map-style data set.
        batch_size: Samples a batch in this process.
        sampler: The order; skipping is exact because it is a pure function of the epoch.
        drop_last: Leave out an incomplete last batch.
        **kwargs: As for `torch.utils.data.DataLoader` (``num_workers``, ``collate_fn``, ...).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        sampler: EpochSampler,
        drop_last: bool = False,
        **kwargs: Any,
    ) -> None:
        batches = _SkippingBatches(sampler, batch_size, drop_last)
        # Its own generator: the worker seeds must not be drawn from the global random state, which
        # dropout uses and which a resumed run restores.
        generator = torch.Generator().manual_seed(sampler.seed)
        super().__init__(dataset, batch_sampler=batches, generator=generator, **kwargs)
        self._batches = batches
        self._order = sampler
        self._served = 0
        self._resume = {"epoch": -1, "served": 0}

    def __iter__(self) -> Any:
        # A generator: Lightning makes the iterator before it sets the epoch, the body runs after.
        if self._resume["epoch"] == self._order.epoch:
            self._batches.skip = self._resume["served"]
        self._resume = {"epoch": -1, "served": 0}
        self._served = self._batches.skip
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches already given out."""
        return {"epoch": self._order.epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the served batches when the next pass is of the same epoch."""
        self._resume = dict(state)


class _SkippingBatches(BatchSampler):
    """A batch sampler whose next pass leaves out the first ``skip`` batches."""

    def __init__(self, sampler: EpochSampler, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                yield batch

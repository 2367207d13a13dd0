from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from cohobate.core.training.data import Draw, EpochSampler, ResumableLoader


class Noise(Dataset):
    """Each sample is its index and a random number from the draw's seed."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: Draw) -> tuple[int, float]:
        return int(index), float(np.random.default_rng(index.seed).random())


def loader(workers: int = 0, **kwargs) -> ResumableLoader:
    sampler = EpochSampler(10, seed=3)
    return ResumableLoader(Noise(), batch_size=3, sampler=sampler, num_workers=workers, **kwargs)


def epoch(data: ResumableLoader, number: int) -> list[list[float]]:
    data._order.set_epoch(number)
    return [torch.stack([x.double() for x in batch]).tolist() for batch in data]


def test_a_draw_survives_pickling() -> None:
    draw = pickle.loads(pickle.dumps(Draw(4, seed=2**63)))
    assert (draw, draw.seed) == (4, 2**63)


def test_each_epoch_is_another_permutation_and_repeats_itself() -> None:
    sampler = EpochSampler(20, seed=1)
    first = [(int(d), d.seed) for d in sampler]
    assert sorted(i for i, _ in first) == list(range(20))
    assert first == [(int(d), d.seed) for d in EpochSampler(20, seed=1)]
    sampler.set_epoch(1)
    second = [(int(d), d.seed) for d in sampler]
    assert second != first
    assert len({s for _, s in first + second}) == 40
    assert first != [(int(d), d.seed) for d in EpochSampler(20, seed=2)]


def test_an_epoch_may_be_longer_or_shorter_than_the_data() -> None:
    long = [int(d) for d in EpochSampler(4, num_samples=10)]
    assert sorted(long[:4]) == sorted(long[4:8]) == [0, 1, 2, 3]
    assert len(long) == len(EpochSampler(4, num_samples=10)) == 10
    assert [int(d) for d in EpochSampler(4, num_samples=3, shuffle=False)] == [0, 1, 2]


@pytest.mark.parametrize("size", [12, 13])
def test_processes_share_the_global_batches_of_one(size: int) -> None:
    alone = [int(d) for d in EpochSampler(size, seed=5)]
    ranks = [[int(d) for d in EpochSampler(size, seed=5, rank=r, world=2)] for r in range(2)]
    together = [d for pair in zip(*ranks, strict=True) for d in pair]
    assert together == alone[: size // 2 * 2]


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        EpochSampler(0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("served", [1, 3])
def test_a_pass_goes_on_where_it_stopped(workers: int, served: int) -> None:
    whole = epoch(loader(), 2)
    data = loader()
    data._order.set_epoch(2)
    batches = iter(data)
    for _ in range(served):
        next(batches)
    resumed = loader(workers)
    resumed.load_state_dict(data.state_dict())
    assert epoch(resumed, 2) == whole[served:]
    assert epoch(resumed, 3) == epoch(loader(), 3)


def test_a_state_of_a_finished_epoch_does_not_touch_the_next() -> None:
    data = loader()
    epoch(data, 0)
    resumed = loader()
    resumed.load_state_dict(data.state_dict())
    assert epoch(resumed, 1) == epoch(loader(), 1)


def test_making_a_pass_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    epoch(loader(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_incomplete_batch_can_be_left_out() -> None:
    assert len(epoch(loader(drop_last=True), 0)) == 3
    assert len(epoch(loader(), 0)) == 4

"""Two ranks with unequal shares of a batch come to the gradient of the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cohobate.core.losses import forward_kl, info_nce

SHARES = (slice(0, 3), slice(3, 10))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    x, y, weight_x, weight_y = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((10, 4), (10, 4), (4, 5), (4, 5))
    )
    return x, y, weight_x, weight_y, torch.arange(10) % 3 != 0


@pytest.fixture(scope="module")
def gradients(batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(batch, folder / "batch.pt")
    script = str(Path(__file__).with_name("child_rank.py"))
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)]) for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    return torch.load(folder / "gradients.pt", weights_only=True)


def whole(batch, loss):
    x, y, weight_x, weight_y, keep = batch
    weights = [weight_x.clone().requires_grad_(), weight_y.clone().requires_grad_()]
    return list(torch.autograd.grad(loss(x @ weights[0], y @ weights[1], keep), weights))


def test_global_count(batch, gradients):
    expected = whole(batch, lambda s, t, keep: forward_kl(s, t, weight=keep))
    torch.testing.assert_close(gradients[0], expected)


def test_gathered_rows_of_the_teacher(batch, gradients):
    expected = whole(batch, lambda s, t, keep: info_nce(s, t, weight=keep))
    torch.testing.assert_close(gradients[1], expected)


def test_gathered_negatives(batch, gradients):
    def loss(s, t, keep):
        negatives = torch.cat([t[share].roll(1, 0) for share in SHARES])
        return info_nce(s, t, negatives, weight=keep)

    torch.testing.assert_close(gradients[2], whole(batch, loss))

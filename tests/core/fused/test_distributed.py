"""Two ranks with unequal numbers of tokens, under DDP, learn what one process would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from cohobate.core.fused import linear_divergence


def test_unequal_ranks_average_to_the_whole_batch(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, x_t, body, head, w_t = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((10, 4), (10, 3), (4, 4), (6, 4), (6, 3))
    )
    keep = torch.arange(10) % 3 != 0
    torch.save((x, x_t, body, head, w_t, keep), tmp_path / "batch.pt")
    script = str(Path(__file__).with_name("child_rank.py"))
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    weights = [body.requires_grad_(), head.requires_grad_()]
    linear_divergence(x @ body, head, x_t, w_t, weight=keep).backward()
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    torch.testing.assert_close(gradients, [weight.grad for weight in weights])

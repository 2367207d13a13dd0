"""What the losses cost beside the formulas as everyone writes them first.

    python tests/benchmarks/core/bench_losses.py [--out docs/results/bench-losses.json]

Both are run in turn in one process, forward and backward; seconds are those the process got, the
best of the repetitions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cohobate.core.losses import forward_kl, gram_relation, segment_mean, value_relation
from cohobate.core.testing.bench import in_turn, write_rows

ROOT = Path(__file__).parents[3]
Loss = Callable[..., Tensor]


def plain_kl(s: Tensor, t: Tensor, dim: int) -> Tensor:
    """T² KL with whole maps of log-probabilities."""
    log_q, log_p = (s / 3).log_softmax(dim), (t / 3).log_softmax(dim)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim).mean() * 9


def plain_gram(s: Tensor, t: Tensor) -> Tensor:
    """All inner products between positions."""
    s, t = (F.normalize(x.flatten(2).mT, dim=-1) for x in (s, t))
    return (s @ s.mT - t @ t.mT).square().mean()


def plain_values(s: Tensor, t: Tensor) -> Tensor:
    """All value relations of all heads."""
    log_q, log_p = ((v @ v.mT / v.shape[-1] ** 0.5).log_softmax(-1) for v in (s, t))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def one_hot_mean(x: Tensor, index: Tensor) -> Tensor:
    """Region means as a product with a matrix of zeros and ones."""
    member = F.one_hot(index, 600).to(x.dtype).t()
    return (member @ x / member.sum(1, keepdim=True)).square().sum()


def cases() -> dict[str, tuple[Loss, Loss, list[Tensor]]]:
    """Ours, the plain formula, and their arguments; tensors with a gradient are asked for it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    voxels, last = (1, 8, 96, 96, 96), (1, 96, 96, 96, 8)
    index = torch.randint(0, 600, (131072,), generator=generator)
    return {
        "forward KL, 8 classes, 96³ voxels": (
            lambda s, t: forward_kl(s, t, temperature=3.0),
            lambda s, t: plain_kl(s, t, 1),
            [draw(*voxels, grad=True), draw(*voxels)],
        ),
        "the same, the teacher learns too": (
            lambda s, t: forward_kl(s, t, temperature=3.0),
            lambda s, t: plain_kl(s, t, 1),
            [draw(*voxels, grad=True), draw(*voxels, grad=True)],
        ),
        "the same, classes on the last axis": (
            lambda s, t: forward_kl(s, t, temperature=3.0, class_dim=-1),
            lambda s, t: plain_kl(s, t, -1),
            [draw(*last, grad=True), draw(*last)],
        ),
        "Gram relation, 64 channels, 64² positions": (
            gram_relation,
            plain_gram,
            [draw(1, 64, 64, 64, grad=True), draw(1, 64, 64, 64)],
        ),
        "value relation, 8 heads, 1024 tokens": (
            value_relation,
            plain_values,
            [draw(1, 8, 1024, 64, grad=True), draw(1, 8, 1024, 64)],
        ),
        "region mean, 131072 pixels, 600 regions": (
            lambda x: segment_mean(x, index, 600)[0].square().sum(),
            lambda x: one_hot_mean(x, index),
            [draw(131072, 64, grad=True)],
        ),
    }


def row(name: str, pair: tuple[Loss, Loss], inputs: list[Tensor], repeat: int) -> dict[str, Any]:
    """Seconds of both and their ratio."""
    values = {}

    def run(which: str, loss: Loss) -> None:
        for tensor in inputs:
            tensor.grad = None
        value = loss(*inputs)
        value.backward()
        values[which] = value.item()

    runs = {w: partial(run, w, loss) for w, loss in zip(("ours", "plain"), pair, strict=True)}
    best = {which: min(seconds) for which, seconds in in_turn(runs, repeat, name).items()}
    assert abs(values["ours"] - values["plain"]) <= 1e-4 * abs(values["plain"]), (name, values)
    return {
        "loss": name,
        "seconds": round(best["ours"], 4),
        "plain PyTorch": round(best["plain"], 4),
        "ratio": round(best["ours"] / best["plain"], 3),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-losses.json")
    parser.add_argument("--repeat", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row(name, (ours, plain), inputs, asked.repeat)
        for name, (ours, plain, inputs) in cases().items()
    ]
    packages = ("torch", "cohobate-core")
    write_rows(asked.out, "tests/benchmarks/core/bench_losses.py", packages, rows)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()

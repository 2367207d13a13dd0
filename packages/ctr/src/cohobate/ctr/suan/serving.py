"""A trained network in a service: ways to score a request, and their latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cohobate.ctr.nets.inputs import Features, Layout
from cohobate.ctr.suan.network import SUAN


@dataclass(frozen=True)
class Latency:
    """Time of a request in milliseconds.

    Args:
        p50: median.
        p99: 99th percentile.
    """

    p50: float
    p99: float


def measure(request: Callable[[], object], repeats: int, warmup: int = 5) -> Latency:
    """Time a request, warm.

    Args:
        request: what to time.
        repeats: number of timed calls.
        warmup: calls before them.
    """
    for _ in range(warmup):
        request()
    times = np.empty(repeats)
    for i in range(repeats):
        start = time.perf_counter()
        request()
        times[i] = time.perf_counter() - start
    return Latency(*(float(1e3 * np.percentile(times, q)) for q in (50, 99)))


def one_user(layout: Layout, candidates: int) -> tuple[Features, Tensor]:
    """A request: features of one user (batch 1) and candidate ids (1, m, C)."""
    user = Features(*(x[:1] for x in layout.example(2)))
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, layout.ids, (1, candidates, layout.candidate), generator=rng)
    return user, ids


@torch.inference_mode()
def score_one_by_one(network: nn.Module, user: Features, candidates: Tensor) -> Tensor:
    """Logits (1, m) by one forward pass for each candidate."""
    each = candidates.unbind(1)
    return torch.stack([network(*user._replace(candidate=c)) for c in each], 1)


@torch.inference_mode()
def score_repeated(network: nn.Module, user: Features, candidates: Tensor) -> Tensor:
    """Logits (1, m) by one batch in which the user is repeated for each candidate."""
    m = candidates.shape[1]
    rows = Features(*(x.expand(m, *x.shape[1:]) for x in user))
    return network(*rows._replace(candidate=candidates[0]))[None]


@torch.inference_mode()
def score_parallel(network: SUAN, user: Features, candidates: Tensor) -> Tensor:
    """Logits (1, m) by one encoding of the user and one pass over all candidates."""
    return network.score(network.encode_user(user), candidates, user.time)

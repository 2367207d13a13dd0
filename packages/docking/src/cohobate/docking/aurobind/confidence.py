"""Confidence of a structure from binned errors: PAE, PDE, pLDDT, pTM, ipTM.

References:
    AlphaFold 3 supplement 5.9; Zhang and Skolnick, Proteins 2004 (TM-score).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ERROR = 31.0
"""Å, above which all errors share the last bin."""


def error_centres(bins: int = 64, top: float = MAX_ERROR) -> Tensor:
    """Centres of the error bins (bins,), Å."""
    edges = torch.linspace(0, top, bins - 1)
    step = edges[1] - edges[0]
    return torch.cat((edges + step / 2, edges[-1:] + 3 * step / 2))


def expected_error(logits: Tensor) -> Tensor:
    """Expected error in Å from logits (..., bins)."""
    return logits.softmax(-1) @ error_centres(logits.shape[-1]).to(logits)


def plddt(logits: Tensor) -> Tensor:
    """Expected lDDT, from 0 to 1, from logits (..., bins).

    Example:
        >>> round(plddt(torch.zeros(50)).item(), 4)
        0.5
    """
    bins = logits.shape[-1]
    return logits.softmax(-1) @ ((torch.arange(bins).to(logits) + 0.5) / bins)


def tm_weights(logits: Tensor, frames: Tensor) -> Tensor:
    """Expected TM term of every pair (B, N, N) from PAE logits (B, N, N, bins).

    ``1 / (1 + (e / d₀)²)`` with ``d₀ = 1.24 (max(n, 19) - 15)^(1/3) - 1.8`` for n frames.
    """
    n = frames.sum(-1).clamp(min=19).to(logits)
    d0 = 1.24 * (n - 15) ** (1 / 3) - 1.8
    centres = error_centres(logits.shape[-1]).to(logits)
    terms = 1 / (1 + (centres / d0[:, None]).square())
    return torch.einsum("bijk,bk->bij", logits.softmax(-1), terms)


def best_frame(terms: Tensor, frames: Tensor, pair: Tensor) -> Tensor:
    """Largest over frames i of the mean over j of what ``pair`` keeps (B,)."""
    kept = pair.to(terms)
    mean = (terms * kept).sum(-1) / kept.sum(-1).clamp(min=1e-8)
    return mean.masked_fill(~frames.bool(), 0.0).amax(-1)


@dataclass(frozen=True)
class Scores:
    """TM scores of complexes; chains in order of their ids.

    Attributes:
        ptm: (B,).
        iptm: (B,).
        chain_ptm: (B, C).
        chain_iptm: Mean over a chain's pairs, both orders (B, C).
        chain_pair_iptm: (B, C, C); a chain with itself is its pTM.
        ranking: ``0.8 ipTM + 0.2 pTM`` (B,).
    """

    ptm: Tensor
    iptm: Tensor
    chain_ptm: Tensor
    chain_iptm: Tensor
    chain_pair_iptm: Tensor
    ranking: Tensor


def tm_scores(logits: Tensor, chain: Tensor, frames: Tensor, mask: Tensor) -> Scores:
    """The scores pTM and ipTM, also of chains and pairs of chains; only frames count.

    Args:
        logits: PAE logits (B, N, N, bins).
        chain: Id of each token's chain (B, N), from 1; 0 is padding.
        frames: Which tokens have a frame (B, N).
        mask: Which tokens there are (B, N).
    """
    frames, mask = frames.bool(), mask.bool()
    terms = tm_weights(logits, frames & mask)
    frames = frames & mask
    both = frames[:, :, None] & frames[:, None, :]
    other = both & (chain[:, :, None] != chain[:, None, :])
    count = int(chain.max())
    of = torch.stack([(chain == c + 1) & frames for c in range(count)], 1)  # (B, C, N)
    ptm = best_frame(terms, frames, both)
    iptm = best_frame(terms, frames, other)
    pairs = terms.new_zeros(len(terms), count, count)
    for a, b in itertools.combinations_with_replacement(range(count), 2):
        union = of[:, a] | of[:, b]
        inside = union[:, None, :] & union[:, :, None]
        # Their own d₀: a small chain is judged as a small chain.
        own = tm_weights(logits, union)
        pairs[:, a, b] = pairs[:, b, a] = best_frame(
            own, union, inside if a == b else inside & other
        )
    outside = pairs * (1 - torch.eye(count, device=pairs.device))
    mean = (outside.sum(1) + outside.sum(2)) / max(2 * (count - 1), 1)
    return Scores(ptm, iptm, pairs.diagonal(dim1=1, dim2=2), mean, pairs, 0.8 * iptm + 0.2 * ptm)


def distance_bins(x: Tensor, low: float = 3.25, high: float = 50.75, bins: int = 39) -> Tensor:
    """One-hot distances (B, N, N, bins) of points (B, N, 3); below ``low`` all are zero."""
    lower = torch.linspace(low, high, bins, device=x.device).square()
    upper = torch.cat((lower[1:], lower.new_full((1,), 1e8)))
    squared = (x[:, :, None] - x[:, None]).square().sum(-1, keepdim=True)
    return ((squared > lower) & (squared <= upper)).to(x.dtype)

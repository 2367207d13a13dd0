"""Losses of MACIL-SD (arXiv 2207.05500): top-k MIL, contrast between semi-bags, weight merge."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cohobate.core.losses import info_nce


def bag_logits(logits: Tensor, lengths: Tensor) -> Tensor:
    """Logit of each bag: the mean of its ``k = n // 16 + 1`` largest snippet logits.

    Args:
        logits: Snippet logits, ``(B, T)``.
        lengths: Snippets ``n`` of each bag, ``(B,)``, from 1 to ``T``.

    Returns:
        ``(B,)``; the bag's probability is the sigmoid of it.

    Raises:
        ValueError: A bag is empty or longer than ``T``.

    Example:
        >>> bag_logits(torch.tensor([[1.0, 5.0, 9.0]]), torch.tensor([2]))
        tensor([5.])
    """
    _check_lengths(lengths, logits.shape[1])
    k = _top_count(lengths)
    inside = _inside(lengths, logits.shape[1])
    top = logits.masked_fill(~inside, -torch.inf).topk(_most(logits.shape[1]), dim=1).values
    return top.masked_fill(~_inside(k, top.shape[1]), 0.0).sum(1) / k


class Contrast(NamedTuple):
    """The four contrastive terms, each a scalar: whose queries, and which negatives.

    Attributes:
        a2v_background: Audio queries against visual backgrounds.
        a2v_normal: Audio queries against visual normals.
        v2a_background: Visual queries against audio backgrounds.
        v2a_normal: Visual queries against audio normals.
    """

    a2v_background: Tensor
    a2v_normal: Tensor
    v2a_background: Tensor
    v2a_normal: Tensor


def contrast_semi_bags(
    violent: Tensor,
    audio_scores: Tensor,
    visual_scores: Tensor,
    lengths: Tensor,
    audio_rep: Tensor,
    visual_rep: Tensor,
    *,
    temperature: float = 0.1,
) -> Contrast:
    """Modality-aware contrastive instance learning over a batch of bags.

    Each modality ranks its snippets by its own scores. A violent bag gives the mean of its ``k``
    highest as a violent semi-bag, a normal bag its ``k`` highest as normal snippets; every bag
    gives its ``k`` lowest as background. Audio semi-bags are drawn to the visual ones of the same
    bag and pushed from all visual backgrounds and normals of the batch, and the other way round. As
    ranks are independent, sound and picture of one event need not coincide.

    Args:
        violent: Which bags count as violent, boolean ``(B,)``; the paper takes the prediction.
        audio_scores: Ranking scores of the audio stream, ``(B, T)``; no gradient goes through them.
        visual_scores: Ranking scores of the visual stream, ``(B, T)``.
        lengths: Snippets of each bag, ``(B,)``.
        audio_rep: ``(B, T, D)``.
        visual_rep: ``(B, T, D)``.
        temperature: tau of InfoNCE.

    Returns:
        The four terms; all 0 when the batch has no violent or no normal bag.

    References:
        Yu et al., Modality-Aware Contrastive Instance Learning with Self-Distillation for
        Weakly-Supervised Audio-Visual Violence Detection, ACM MM 2022, arXiv 2207.05500.

    Differences:
        The released code repeats a violent semi-bag's mean k times; here the mean is weighted by k,
        which is the same number.

    Example:
        >>> rep = torch.eye(2)[:, None]  # two bags of one snippet: orthogonal representations
        >>> violent, score, n = torch.tensor([True, False]), torch.zeros(2, 1), torch.ones(2).int()
        >>> contrast_semi_bags(violent, score, score, n, rep, rep).a2v_normal < 1e-4
        tensor(True)
    """
    if not bool(violent.any()) or bool(violent.all()):
        return Contrast(*audio_rep.new_zeros(4))
    k = _top_count(lengths)
    audio = _SemiBags.of(audio_scores, audio_rep, k, lengths)
    visual = _SemiBags.of(visual_scores, visual_rep, k, lengths)
    background = _inside(k, audio.top.shape[1])
    normal = background & ~violent[:, None]

    def term(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        return info_nce(
            query[violent],
            positive[violent],
            negatives,
            temperature=temperature,
            weight=k[violent],
            num_items=k[violent].sum(),
        )

    return Contrast(
        term(audio.mean, visual.mean, visual.bottom[background]),
        term(audio.mean, visual.mean, visual.top[normal]),
        term(visual.mean, audio.mean, audio.bottom[background]),
        term(visual.mean, audio.mean, audio.top[normal]),
    )


def contrast_weight(tick: float, slope: float = 0.1, most: float = 1.5) -> float:
    """Weight lambda of the contrastive terms: ``min(most, slope * tick)``.

    Args:
        tick: Epochs (or the user's unit) done.
        slope: Growth a tick.
        most: Upper limit.

    Example:
        >>> contrast_weight(5)
        0.5
    """
    return min(most, slope * tick)


def merge_coefficient(tick: int, ticks: int = 50, start: float = 0.91) -> float:
    """Share m of its own weights that the audio-visual network keeps in a merge.

    Args:
        tick: Merges done before this one.
        ticks: After this many m is 1 and merging has ended.
        start: m at the first merge.

    Returns:
        ``1 - (1 - start) (1 + cos(pi tick / ticks)) / 2``.

    Example:
        >>> round(merge_coefficient(25), 4)
        0.955
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * min(tick, ticks) / ticks)) / 2


@torch.no_grad()
def merge_(network: nn.Module, partner: nn.Module, m: float) -> list[str]:
    """Pull a network towards its partner: ``theta <- m theta + (1 - m) theta_partner``, in place.

    Args:
        network: Changed where the partner has a parameter of the same name and shape.
        partner: Unchanged.
        m: Share kept.

    Returns:
        Names of the merged parameters.
    """
    theirs = dict(partner.named_parameters())
    names = [n for n, p in network.named_parameters() if n in theirs and p.shape == theirs[n].shape]
    own: list[Tensor] = [network.get_parameter(name) for name in names]
    torch._foreach_lerp_(own, [theirs[name] for name in names], 1 - m)
    return names


class _SemiBags(NamedTuple):
    """Each bag's highest and lowest snippets; past the bag's k they mean nothing.

    Attributes:
        top: ``(B, k_max, D)``.
        bottom: ``(B, k_max, D)``.
        mean: Mean of the k highest, ``(B, D)``.
    """

    top: Tensor
    bottom: Tensor
    mean: Tensor

    @classmethod
    def of(cls, scores: Tensor, rep: Tensor, k: Tensor, lengths: Tensor) -> _SemiBags:
        """Rank within each bag's length."""
        most = _most(scores.shape[1])
        outside = ~_inside(lengths, scores.shape[1])
        scores = scores.detach()
        top = scores.masked_fill(outside, -torch.inf).topk(most, dim=1).indices
        bottom = scores.masked_fill(outside, torch.inf).topk(most, dim=1, largest=False).indices
        places = torch.cat((top, bottom), 1)[..., None].expand(-1, -1, rep.shape[-1])
        high, low = rep.gather(1, places).chunk(2, dim=1)
        return cls(high, low, (high * _inside(k, most)[..., None]).sum(1) / k[:, None])


def _top_count(lengths: Tensor) -> Tensor:
    return lengths // 16 + 1


def _most(snippets: int) -> int:
    """The largest k that a batch of this padded length can have."""
    return snippets // 16 + 1


def _inside(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _check_lengths(lengths: Tensor, snippets: int) -> None:
    if not torch.compiler.is_compiling() and bool(((lengths < 1) | (lengths > snippets)).any()):
        raise ValueError(f"bag lengths must lie in 1..{snippets}, got {lengths.tolist()}")

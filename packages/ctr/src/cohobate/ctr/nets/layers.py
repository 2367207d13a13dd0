"""Layers that the sequence networks share: activation, head, relative bias, target attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

MASKED = -1e9
"""Added to the score of a key that must not be seen; finite, so a row of masked keys has no NaN."""

TIME_STEP = 0.301
"""Width of a bucket of the relative time bias, in natural logarithms of seconds (log10 of 2)."""


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off where it is on, for the parts that must stay in float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Dice(nn.Module):
    """Data-adaptive activation ``alpha (1 - p) h + p h`` with ``p = sigmoid((h - mean) / std)``.

    Args:
        features: size of the last dimension.
        eps: added to the variance inside the root and to the standard deviation.
        decay: share of the old running statistic kept at each training step.

    References:
        Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018,
        arXiv:1706.06978, equation 3.
    """

    def __init__(self, features: int, eps: float = 1e-9, decay: float = 0.999) -> None:
        super().__init__()
        self.eps, self.decay = eps, decay
        self.alpha = nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.mean: Tensor
        self.std: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Activate ``x`` (B, features); batch statistics in training, running ones otherwise."""
        h = x.float()
        mean, std = self.mean, self.std
        if self.training:
            mean = h.mean(0)
            std = ((h - mean).square() + self.eps).mean(0).sqrt()
            with torch.no_grad():
                self.mean.lerp_(mean.detach(), 1 - self.decay)
                self.std.lerp_(std.detach(), 1 - self.decay)
        p = torch.sigmoid((h - mean) / (std + self.eps))
        return (h * (self.alpha + (1 - self.alpha) * p)).to(x.dtype)


def batch_norm(features: int) -> nn.BatchNorm1d:
    """Batch normalisation with the constants of the released SUAN code (momentum 0.99 there)."""
    return nn.BatchNorm1d(features, eps=1e-3, momentum=0.01)


class Head(nn.Module):
    """Tower from the concatenated features to the logit: (dense, BN, Dice)*, dense to 1, BN.

    Args:
        features: width of the input.
        hidden: widths of the hidden layers.
    """

    def __init__(self, features: int, hidden: Sequence[int] = (1024, 512, 256)) -> None:
        super().__init__()
        widths = [features, *hidden]
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), batch_norm(b), Dice(b)) for a, b in pairwise(widths)
        )
        self.out = nn.Linear(widths[-1], 1)
        self.norm = batch_norm(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit (...,), float32, of ``x`` (..., features)."""
        shape, x = x.shape[:-1], x.flatten(0, -2)
        for layer in self.hidden:
            x = layer(x)
        return self.norm(self.out(x).float()).reshape(shape)


class DenseFeatures(nn.Module):
    """Batch normalisation of the real-valued features.

    Args:
        features: number of features; with none the layer passes an empty tensor on.
        zero_is_missing: learn a value per feature for zeros, ``[x = 0] w1 + x w2``, then
            normalise and squash by tanh, as the released code does for its industrial data.
    """

    def __init__(self, features: int, zero_is_missing: bool = False) -> None:
        super().__init__()
        self.norm = batch_norm(features) if features else None
        self.missing = nn.Parameter(torch.zeros(features)) if zero_is_missing else None
        self.scale = nn.Parameter(torch.ones(features)) if zero_is_missing else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, features)."""
        if self.norm is None:
            return x
        if self.missing is None or self.scale is None:
            return self.norm(x)
        return torch.tanh(self.norm((x == 0) * self.missing + x * self.scale))


def time_bucket(seconds: Tensor, buckets: int) -> Tensor:
    """Bucket of a time difference: ``clip(int(ln(max(|seconds|, 1)) / 0.301), 0, buckets)``.

    Example:
        >>> time_bucket(torch.tensor([0, 1, 2, 60, -3600]), 128).tolist()
        [0, 0, 2, 13, 27]
    """
    logs = seconds.abs().clamp(min=1).float().log() / TIME_STEP
    return logs.long().clamp(0, buckets)


class RelativeBias(nn.Module):
    """Learned bias of attention scores by distance in positions and in time.

    ``R[i, j] = position[j - i + tokens - 1] + time[bucket(|t_i - t_j|)]``, one for all heads and
    blocks.

    Args:
        tokens: longest sequence, candidate included.
        buckets: largest time bucket.

    References:
        Zhai et al., Actions Speak Louder than Words, ICML 2024, arXiv:2402.17152, section 3.2;
        used without that paper's shift of the time stamps by one step.
    """

    def __init__(self, tokens: int, buckets: int = 128) -> None:
        super().__init__()
        self.tokens, self.buckets = tokens, buckets
        self.position = nn.Parameter(torch.randn(2 * tokens - 1) * 0.02)
        self.time = nn.Parameter(torch.randn(buckets + 1) * 0.02)

    def forward(self, query_time: Tensor, key_time: Tensor, offset: Tensor) -> Tensor:
        """Return the bias (..., Q, K).

        Args:
            query_time: (..., Q) seconds.
            key_time: (..., K) seconds.
            offset: key index minus query index, int64, broadcastable to (..., Q, K).
        """
        bucket = time_bucket(query_time.unsqueeze(-1) - key_time.unsqueeze(-2), self.buckets)
        # embedding() has a backward pass far quicker than that of advanced indexing
        time = nn.functional.embedding(bucket, self.time[:, None]).squeeze(-1)
        return time + self.position[offset + self.tokens - 1]


def causal_scores(valid: Tensor) -> Tensor:
    """Additive mask (B, 1, N, N): ``MASKED`` on later keys and on keys that are padding.

    Args:
        valid: (B, N) bool, False on padding.
    """
    n = valid.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
    return torch.where(earlier & valid[:, None, :], 0.0, MASKED)[:, None]

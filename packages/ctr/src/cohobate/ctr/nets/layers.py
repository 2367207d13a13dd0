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


class _Running(nn.Module):
    """Batch statistics in training, running ones in evaluation.

    The running values average the last tenth of the batches seen, with weights that fall off
    smoothly; past ``10 / (1 - decay)`` batches the average is exponential. So a short training is
    left neither with the initial zeros and ones nor with the statistics of its first batches, when
    the weights still moved far.
    """

    def __init__(self, features: int, decay: float, second: str) -> None:
        super().__init__()
        self.decay, self.second = decay, second
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer(second, torch.ones(features))
        self.register_buffer("batches", torch.zeros(()))
        self.mean: Tensor
        self.batches: Tensor

    @torch.no_grad()
    def follow(self, mean: Tensor, second: Tensor) -> None:
        """Take up the statistics of a batch."""
        self.batches += 1
        share = torch.clamp(10 / (self.batches + 9), min=1 - self.decay)
        self.mean.lerp_(mean, share)
        getattr(self, self.second).lerp_(second, share)


class Dice(_Running):
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
        super().__init__(features, decay, "std")
        self.eps = eps
        self.alpha = nn.Parameter(torch.zeros(features))
        self.std: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Activate ``x`` (B, features); batch statistics in training, running ones otherwise."""
        h = x.float()
        mean, std = self.mean, self.std
        if self.training:
            mean = h.mean(0)
            std = ((h - mean).square() + self.eps).mean(0).sqrt()
            self.follow(mean, std)
        p = torch.sigmoid((h - mean) / (std + self.eps))
        return (h * (self.alpha + (1 - self.alpha) * p)).to(x.dtype)


class BatchNorm(_Running):
    """Batch normalisation over the first dimension, biased variance, in float32.

    Args:
        features: size of the last dimension.
        eps: added to the variance.
        decay: share of the old running statistic kept at each training step.
    """

    def __init__(self, features: int, eps: float = 1e-3, decay: float = 0.99) -> None:
        super().__init__(features, decay, "var")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, features).

        Raises:
            ValueError: a single row in training has no variance.
        """
        h = x.float()
        if not self.training:
            return nn.functional.batch_norm(
                h, self.mean, self.var, self.weight, self.bias, eps=self.eps
            )
        if len(h) < 2:
            raise ValueError("batch normalisation in training needs two rows")
        with torch.no_grad():
            var, mean = torch.var_mean(h, 0, correction=0)
            self.follow(mean, var)
        return nn.functional.batch_norm(
            h, None, None, self.weight, self.bias, training=True, eps=self.eps
        )


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
            nn.Sequential(nn.Linear(a, b), BatchNorm(b), Dice(b)) for a, b in pairwise(widths)
        )
        self.out = nn.Linear(widths[-1], 1)
        self.norm = BatchNorm(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit (...,), float32, of ``x`` (..., features)."""
        shape, x = x.shape[:-1], x.flatten(0, -2)
        for layer in self.hidden:
            x = layer(x)
        return self.norm(self.out(x)).reshape(shape)


class DenseFeatures(nn.Module):
    """Batch normalisation of the real-valued features.

    Args:
        features: number of features; with none the layer passes an empty tensor on.
        zero_is_missing: learn a value per feature for zeros, ``[x = 0] w1 + x w2``, then
            normalise and squash by tanh, as the released code does for its industrial data.
    """

    def __init__(self, features: int, zero_is_missing: bool = False) -> None:
        super().__init__()
        self.norm = BatchNorm(features) if features else None
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
        # the backward pass of index_select is four times quicker than that of indexing
        time = self.time.index_select(0, bucket.flatten()).view(bucket.shape)
        return time + self.position[offset + self.tokens - 1]


def causal_scores(valid: Tensor) -> Tensor:
    """Additive mask (B, 1, N, N): ``MASKED`` on later keys and on keys that are padding.

    Args:
        valid: (B, N) bool, False on padding.
    """
    n = valid.shape[1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
    return torch.where(earlier & valid[:, None, :], 0.0, MASKED)[:, None]

"""The unified attention block and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from cohobate.ctr.nets.layers import full_precision

Compat = Literal["fixed", "official"]
"""``official`` repeats three slips of the released code, to compare with it; see paper.yaml."""

Pool = Callable[[Tensor], Tensor]
"""Mean of tokens (B, N, D) -> (B, G, D); the last G - 1 tokens have a mean of their own."""


class Reach(Protocol):
    """Attention of every token to the keys it may see."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return (B, H, N, dh) for q, k, v of that shape."""
        ...


class RMSNorm(nn.Module):
    """``gamma x / (sqrt(mean(x^2)) + eps)``: eps stands outside the root, unlike in torch.

    Args:
        features: size of the last dimension.
        eps: added to the root mean square.
    """

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., features) in float32."""
        with full_precision(x.device):
            # the norm has a subgradient of zero at a row of zeros, where a bare root has NaN
            root = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True) * x.shape[-1] ** -0.5
            return self.gamma * x.float() / (root + self.eps)


class SwiGLU(nn.Module):
    """``W3 (silu(W1 x) * W2 x)``, hidden width three times the input's.

    Args:
        features: width D.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, 6 * features)  # W1 and W2 side by side
        self.down = nn.Linear(3 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (..., D)."""
        gate, value = self.up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * value)


class SelfAttention(nn.Module):
    """Multi-head attention of a token to the keys of its reach; no biases.

    Args:
        features: width D.
        heads: number of heads, a divisor of D.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor, reach: Reach) -> Tensor:
        """Mix ``x`` (B, N, D); scores, bias and softmax stay in float32."""
        qkv = self.qkv(x).float().unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with full_precision(x.device):
            mixed = reach.attend(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from the sequence to the profile tokens; no biases, no mask.

    Args:
        features: width D of the sequence.
        profile: width d of a profile token.
        heads: number of heads.
        compat: ``official`` divides the scores by the root of the number of profile tokens instead
            of that of the head width.
    """

    def __init__(self, features: int, profile: int, heads: int, compat: Compat = "fixed") -> None:
        super().__init__()
        self.heads, self.compat = heads, compat
        self.query = nn.Linear(features, features, bias=False)
        self.keys_values = nn.Linear(profile, 2 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor, profile: Tensor) -> Tensor:
        """Describe every token of ``x`` (B, N, D) by the profile (B, P, d)."""
        q, kv = self.query(x).float(), self.keys_values(profile).float()
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        size = profile.shape[1] if self.compat == "official" else q.shape[-1]
        with full_precision(x.device):  # so few keys that the fused kernel is slower
            mixed = (q * size**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class DualAlignment(nn.Module):
    """Gate between self- and cross-attention, per channel, from the mean over tokens.

    Args:
        features: width D.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(features, features // 4, bias=False)
        self.gate = nn.Linear(features // 4, 2 * features, bias=False)

    def forward(self, own: Tensor, cross: Tensor, pool: Pool) -> Tensor:
        """Mix ``own`` and ``cross``, both (B, N, D)."""
        mean = pool(own + cross)
        a, b = self.gate(torch.relu(self.reduce(mean))).chunk(2, -1)
        weight = torch.sigmoid(a - b)  # the softmax over the two sources
        apart = weight.shape[1] - 1
        if 0 < apart < own.shape[1] - 1:
            shared = weight[:, :1].expand(-1, own.shape[1] - apart, -1)
            weight = torch.cat([shared, weight[:, 1:]], 1)
        return torch.lerp(cross.to(own.dtype), own, weight.to(own.dtype))


class UAB(nn.Module):
    """Unified attention block: self-attention, cross-attention with dual alignment, SwiGLU.

    The residuals add the *normalised* input, as in the released code.

    Args:
        features: width D.
        profile: width d of a profile token.
        heads: number of heads.
        dropout: dropout after each of the three parts.
        compat: see :class:`CrossAttention`.
    """

    def __init__(
        self,
        features: int,
        profile: int,
        heads: int,
        dropout: float = 0.0,
        compat: Compat = "fixed",
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(features) for _ in range(3))
        self.attention = SelfAttention(features, heads)
        self.cross = CrossAttention(features, profile, heads, compat)
        self.align = DualAlignment(features)
        self.feed = SwiGLU(features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, profile: Tensor, reach: Reach, pool: Pool) -> Tensor:
        """Encode ``x`` (B, N, D) with the profile (B, P, d)."""
        x0 = self.norms[0](x)
        x1 = self.norms[1](self.dropout(self.attention(x0, reach)) + x0)
        aligned = self.align(x1, self.cross(x1, profile), pool)
        x2 = self.norms[2](self.dropout(aligned) + x1)
        return self.dropout(self.feed(x2)) + x2

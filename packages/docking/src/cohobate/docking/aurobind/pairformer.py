"""Pairformer blocks: triangle updates and attention with a bias from pairs.

Parameter names are those of released checkpoints.

References:
    Abramson et al., AlphaFold 3, Nature 2024, supplement algorithms 12-15, 17 and 24.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention (..., heads, N, C) with an additive bias (..., heads, N, N).

    On a CPU in training PyTorch has no fused kernel for a bias that needs a gradient, and what it
    does instead looks for rows without any key; a bias is finite here.
    """
    if q.device.type == "cpu" and bias.requires_grad:
        return ((q / q.shape[-1] ** 0.5) @ k.mT + bias).softmax(-1) @ v
    shape, bias = (*q.shape[:-1], v.shape[-1]), bias.expand(*q.shape[:-1], k.shape[-2])
    # Four axes: with more, PyTorch's fused kernels are passed over.
    q, k, v, bias = (x.flatten(0, -4) for x in (q, k, v, bias))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).view(shape)


class TriangleMultiplication(nn.Module):
    """Update of each pair from the pairs it makes a triangle with, by products.

    Args:
        width: Channels of the pairs.
        inner: Channels of the products.
        outgoing: Whether edges i→k, j→k are multiplied, else k→j, k→i.
    """

    def __init__(self, width: int, inner: int, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.layer_norm_in = nn.LayerNorm(width)
        self.layer_norm_out = nn.LayerNorm(inner)
        self.linear_ab_p, self.linear_ab_g = _linear(width, 2 * inner), _linear(width, 2 * inner)
        self.linear_g, self.linear_z = _linear(width, width), _linear(inner, width)

    def forward(self, z: Tensor, pair: Tensor) -> Tensor:
        """Update (B, N, N, C) of pairs (B, N, N, C) with mask (B, N, N)."""
        z = self.layer_norm_in(z)
        both = self.linear_ab_p(z) * pair[..., None] * torch.sigmoid(self.linear_ab_g(z))
        # Channels alternate between the two factors, as in released weights.
        a, b = both.unflatten(-1, (-1, 2)).permute(4, 0, 3, 1, 2)
        product = a @ b.mT if self.outgoing else b.mT @ a
        return self.linear_z(self.layer_norm_out(product.permute(0, 2, 3, 1))) * torch.sigmoid(
            self.linear_g(z)
        )


class _Attention(nn.Module):
    """Gated multi-head attention (B, ..., N, C) with an additive bias."""

    def __init__(
        self, width: int, heads: int, inner: int | None = None, query_bias: bool = False
    ) -> None:
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.linear_q = _linear(width, inner, query_bias)
        self.linear_k, self.linear_v = _linear(width, inner), _linear(width, inner)
        self.linear_o, self.linear_g = _linear(inner, width), _linear(width, inner)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        found = attention(q, k, v, bias)
        return self.linear_o(found.transpose(-2, -3).flatten(-2) * torch.sigmoid(self.linear_g(x)))


class TriangleAttention(nn.Module):
    """Update of each pair by attention along its row, or along its column.

    Args:
        width: Channels of the pairs.
        heads: Attention heads.
        starting: Whether along the row (starting node), else along the column.
        inner: Channels of all heads together; default those of the pairs.

    Differences:
        For the column the bias is taken before the transposition, as released code does: the pair
        (i, k) biases where AlphaFold's text has (k, i).
    """

    def __init__(self, width: int, heads: int, starting: bool, inner: int | None = None) -> None:
        super().__init__()
        self.starting = starting
        self.layer_norm = nn.LayerNorm(width)
        self.linear = _linear(width, heads)
        self.mha = _Attention(width, heads, inner)

    def forward(self, z: Tensor, pair: Tensor) -> Tensor:
        """Update (B, N, N, C) of pairs (B, N, N, C) with mask (B, N, N)."""
        z = self.layer_norm(z)
        bias = self.linear(z).permute(0, 3, 1, 2)[:, None]  # (B, 1, heads, N, N)
        if not self.starting:
            z, pair = z.transpose(1, 2), pair.transpose(1, 2)
        found = self.mha(z, bias + 1e9 * (pair - 1)[:, :, None, None, :])
        return found if self.starting else found.transpose(1, 2)


class Transition(nn.Module):
    """Gated two-layer network.

    Args:
        width: Channels.
        factor: Hidden channels over channels.
    """

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.linear = _linear(width, 2 * factor * width)
        self.linear_o = _linear(factor * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Update (..., C) with mask (...)."""
        gate, value = self.linear(self.layer_norm(x)).chunk(2, -1)
        return self.linear_o(F.silu(gate) * value) * mask[..., None]


class AttentionPairBias(nn.Module):
    """Attention between tokens, biased by their pairs.

    Args:
        single: Channels of the tokens.
        pair: Channels of the pairs.
        heads: Attention heads.
    """

    def __init__(self, single: int, pair: int, heads: int) -> None:
        super().__init__()
        self.layer_norm, self.layer_norm_z = nn.LayerNorm(single), nn.LayerNorm(pair)
        self.linear_z = _linear(pair, heads)
        self.mha = _Attention(single, heads, query_bias=True)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """Update (B, N, C_s) of tokens with pairs (B, N, N, C_z) and mask (B, N)."""
        bias = self.linear_z(self.layer_norm_z(z)).permute(0, 3, 1, 2)
        found = self.mha(self.layer_norm(s), bias + 1e9 * (mask - 1)[:, None, None, :])
        return found * mask[..., None]


class PairStack(nn.Module):
    """The updates of the pairs in a block.

    Args:
        pair: Channels of the pairs.
        inner: Channels of the triangle products.
        heads: Attention heads.
        factor: Of the transition.
        attention: Channels of all heads together; default those of the pairs.
    """

    def __init__(
        self, pair: int, inner: int, heads: int, factor: int, attention: int | None = None
    ) -> None:
        super().__init__()
        self.tri_mul_out = TriangleMultiplication(pair, inner, outgoing=True)
        self.tri_mul_in = TriangleMultiplication(pair, inner, outgoing=False)
        self.tri_att_start = TriangleAttention(pair, heads, starting=True, inner=attention)
        self.tri_att_end = TriangleAttention(pair, heads, starting=False, inner=attention)
        self.pair_transition = Transition(pair, factor)

    def forward(self, z: Tensor, pair: Tensor) -> Tensor:
        """Pairs (B, N, N, C) with mask (B, N, N)."""
        z = z + self.tri_mul_out(z, pair)
        z = z + self.tri_mul_in(z, pair)
        z = z + self.tri_att_start(z, pair)
        z = z + self.tri_att_end(z, pair)
        return z + self.pair_transition(z, pair)


class PairformerBlock(nn.Module):
    """One block: pairs first, then tokens with the pairs as bias.

    Args:
        single: Channels of the tokens.
        pair: Channels of the pairs.
        inner: Channels of the triangle products; default those of the pairs.
        heads: Attention heads of the tokens.
        pair_heads: Attention heads of the pairs.
        factor: Of the transitions.
        attention: Channels of all heads of the pairs together; default those of the pairs.
    """

    def __init__(
        self,
        single: int,
        pair: int,
        inner: int | None = None,
        heads: int = 4,
        pair_heads: int = 2,
        factor: int = 2,
        attention: int | None = None,
    ) -> None:
        super().__init__()
        self.pair_stack = PairStack(pair, inner or pair, pair_heads, factor, attention)
        self.attention_pair_bias = AttentionPairBias(single, pair, heads)
        self.single_transition = Transition(single, factor)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C_s) and pairs (B, N, N, C_z) after the block; mask (B, N), 0 or 1."""
        mask = mask.to(s.dtype)
        z = self.pair_stack(z, mask[:, :, None] * mask[:, None, :])
        s = s + self.attention_pair_bias(s, z, mask)
        return s + self.single_transition(s, mask), z


class PairformerStack(nn.Module):
    """Several blocks.

    Args:
        blocks: How many; the other arguments are those of `PairformerBlock`.
        single: Channels of the tokens.
        pair: Channels of the pairs.
        inner: Channels of the triangle products.
        heads: Attention heads of the tokens.
        pair_heads: Attention heads of the pairs.
        factor: Of the transitions.
        attention: Channels of all heads of the pairs together; default those of the pairs.
    """

    def __init__(
        self,
        blocks: int,
        single: int,
        pair: int,
        inner: int | None = None,
        heads: int = 4,
        pair_heads: int = 2,
        factor: int = 2,
        attention: int | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PairformerBlock(single, pair, inner, heads, pair_heads, factor, attention)
            for _ in range(blocks)
        )

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As for a block."""
        for block in self.blocks:
            s, z = block(s, z, mask)
        return s, z

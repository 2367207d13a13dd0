"""Well-known click networks in the same harness, to be seen beside a paper's: MLP to HSTU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from cohobate.ctr.nets.inputs import ClickNetwork, Common, Features, Layout
from cohobate.ctr.nets.layers import (
    MASKED,
    Dice,
    RelativeBias,
    causal_scores,
    full_precision,
    time_bucket,
)

COMMON = Common()


def _valid(features: Features) -> Tensor:
    """Mask (B, L): True where there is a behaviour."""
    return features.history[..., 0] != 0


class MeanMLP(ClickNetwork):
    """The plain baseline: the mean of the behaviours and the head, no attention.

    Args:
        layout: sizes of the data.
        common: embedding width, head and the like.
    """

    def __init__(
        self,
        layout: Layout,
        common: Common = COMMON,
    ) -> None:
        super().__init__(layout, common.width(layout), common)

    def interest(self, features: Features) -> Tensor:
        """Average the behaviours; zeros for a user without any."""
        valid = _valid(features)
        # padding is embedded as zeros, so the sum needs no mask
        return self.tokens(features.history).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


class DIN(ClickNetwork):
    """Deep Interest Network: a small network weighs each behaviour against the candidate.

    Args:
        layout: sizes of the data.
        common: embedding width, head and the like.
        attention: hidden widths of the activation unit.

    References:
        Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018,
        arXiv:1706.06978, equation 2 (weights are not normalised by softmax).
    """

    def __init__(
        self,
        layout: Layout,
        common: Common = COMMON,
        *,
        attention: Sequence[int] = (80, 40),
    ) -> None:
        width = common.width(layout)
        super().__init__(layout, width, common)
        # the first layer of [q, k, q - k, q * k] is linear: W_q q is computed once per row
        self.query = nn.Linear(width, attention[0])
        self.key = nn.Linear(width, attention[0], bias=False)
        self.product = nn.Linear(width, attention[0], bias=False)
        self.first = Dice(attention[0], decay=0.99)
        self.rest = nn.Sequential(
            *(nn.Sequential(nn.Linear(a, b), Dice(b, decay=0.99)) for a, b in pairwise(attention)),
            nn.Linear(attention[-1], 1),
        )

    def interest(self, features: Features) -> Tensor:
        """Sum the behaviours by their weights; only real behaviours are ever looked at."""
        keys, query = self.tokens(features.history), self.paired(features.candidate)
        hidden = self.query(query)[:, None] + self.key(keys) + self.product(keys * query[:, None])
        valid = _valid(features)
        if not self.training:
            return (self.rest(self.first(hidden)) * valid[..., None] * keys).sum(1)
        # the statistics of Dice must not see padding; a batch without any behaviour keeps one slot
        seen = valid.clone()
        seen[0, -1] |= ~valid.any()
        rows = seen.flatten().nonzero().squeeze(1)
        weight = self.rest(self.first(hidden.flatten(0, 1)[rows]))
        flat = weight.new_zeros(valid.numel(), 1).index_copy(0, rows, weight)
        return (flat.view(*valid.shape, 1) * keys).sum(1)


class TargetAttention(ClickNetwork):
    """Multi-head softmax attention with the candidate as the query: DIEN's target attention alone.

    Args:
        layout: sizes of the data.
        common: embedding width, head and the like.
        heads: attention heads.
    """

    def __init__(
        self,
        layout: Layout,
        common: Common = COMMON,
        *,
        heads: int = 2,
    ) -> None:
        width = common.width(layout)
        super().__init__(layout, width, common)
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.keys_values = nn.Linear(width, 2 * width)

    def interest(self, features: Features) -> Tensor:
        """Attend from the candidate to the behaviours; zeros for a user without any."""
        valid = _valid(features)
        q = self.query(self.paired(features.candidate))[:, None]
        k, v = self.keys_values(self.tokens(features.history)).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = torch.where(valid, 0.0, MASKED)[:, None, None].to(q.dtype)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(1)) * valid.any(1, keepdim=True)


class BST(ClickNetwork):
    """Behavior Sequence Transformer: one encoder layer over behaviours and candidate, flattened.

    Args:
        layout: sizes of the data.
        common: embedding width, head and the like.
        heads: attention heads.
        blocks: encoder layers.
        dropout: dropout of the encoder layers.

    References:
        Chen et al., Behavior Sequence Transformer for E-commerce Recommendation in Alibaba, 2019,
        arXiv:1905.06874, section 2.2; its position is the bucketed time to the candidate.
    """

    def __init__(
        self,
        layout: Layout,
        common: Common = COMMON,
        *,
        heads: int = 2,
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        width, length = common.width(layout), min(common.length or layout.length, layout.length)
        super().__init__(layout, (length + 1) * width, common)
        self.time = nn.Embedding(129, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="relu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)

    def interest(self, features: Features) -> Tensor:
        """Encode the sequence and lay its tokens side by side, padding as zeros on the left."""
        tokens = torch.cat(
            [self.tokens(features.history), self.paired(features.candidate)[:, None]], 1
        )
        times = torch.cat([features.history_time, features.time[:, None]], 1)
        age = time_bucket(features.time[:, None] - times, 128)
        valid = nn.functional.pad(_valid(features), (0, 1), value=True)
        x = self.encoder(tokens + self.time(age), src_key_padding_mask=~valid)
        x = torch.where(valid[..., None], x, 0.0)
        return nn.functional.pad(x, (0, 0, self.length + 1 - x.shape[1], 0)).flatten(1)


class HSTU(ClickNetwork):
    """Blocks of pointwise SiLU attention with relative bias, the candidate as the last token.

    Args:
        layout: sizes of the data.
        common: embedding width, head and the like.
        blocks: number of blocks.
        heads: attention heads.

    References:
        Zhai et al., Actions Speak Louder than Words, ICML 2024, arXiv:2402.17152, equations 1-3.
    """

    def __init__(
        self,
        layout: Layout,
        common: Common = COMMON,
        *,
        blocks: int = 2,
        heads: int = 2,
    ) -> None:
        width = common.width(layout)
        super().__init__(layout, width, common)
        self.heads = heads
        self.bias = RelativeBias(self.length + 1)
        self.norm_in = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.project = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(blocks))
        self.norm_out = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def interest(self, features: Features) -> Tensor:
        """Return the candidate's token after the last block."""
        x = torch.cat([self.tokens(features.history), self.paired(features.candidate)[:, None]], 1)
        times = torch.cat([features.history_time, features.time[:, None]], 1)
        valid = nn.functional.pad(_valid(features), (0, 1), value=True)
        index = torch.arange(x.shape[1], device=x.device)
        with full_precision(x.device):
            bias = self.bias(times, times, index - index[:, None])[:, None]
            allowed = causal_scores(valid) == 0
        count = allowed.sum(-1).clamp(min=1).transpose(1, 2)  # (B, N, 1) keys a query may see
        for norm_in, project, norm_out, out in zip(
            self.norm_in, self.project, self.norm_out, self.out, strict=True
        ):
            gate, value, query, key = nn.functional.silu(project(norm_in(x))).chunk(4, -1)
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)
            )
            weight = nn.functional.silu(q @ k.transpose(-1, -2) + bias) * allowed
            mixed = (weight.to(v.dtype) @ v).transpose(1, 2).flatten(2) / count
            x = x + out(norm_out(mixed) * gate)
        return x[:, -1]

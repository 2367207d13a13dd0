"""What a click network is given: the batch, its layout, and the embedding of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cohobate.ctr.nets.layers import DenseFeatures, Head


class Features(NamedTuple):
    """Inputs of a network. Every id is a row of the one embedding table; 0 is padding.

    B batch, L behaviours (left-padded, oldest first), P, C, X, n1 numbers of fields, F floats.
    """

    profile: Tensor
    """(B, P) int64."""
    candidate: Tensor
    """(B, C) int64; (B, m, C) where m candidates are scored at once."""
    context: Tensor
    """(B, X) int64."""
    history: Tensor
    """(B, L, n1) int64; a behaviour exists where the first field is not 0."""
    history_time: Tensor
    """(B, L) int64, seconds; 0 on padding."""
    time: Tensor
    """(B,) int64, seconds: when the candidate is shown."""
    dense: Tensor
    """(B, F) float32."""


class Batch(NamedTuple):
    """Features with what training and evaluation need beside them."""

    features: Features
    label: Tensor
    """(B,) float32, 0 or 1."""
    user: Tensor
    """(B,) int64: the group of a row in GAUC."""


@dataclass(frozen=True)
class Layout:
    """Sizes a network must know of its data.

    Args:
        ids: rows of the embedding table, padding included.
        profile: number of profile fields (P).
        candidate: number of candidate fields (C).
        context: number of context fields (X).
        pairs: per behaviour field the index of the candidate field it describes, or -1.
        dense: number of real-valued features (F).
        length: most behaviours kept (L).
    """

    ids: int
    profile: int
    candidate: int
    context: int
    pairs: tuple[int, ...]
    dense: int = 0
    length: int = 50

    def example(self, batch: int = 2) -> Features:
        """Random valid features: to probe shapes and to trace the network for export."""
        rng = torch.Generator().manual_seed(0)

        def ids(*shape: int) -> Tensor:
            return torch.randint(1, self.ids, (batch, *shape), generator=rng)

        steps = torch.randint(1, 10_000, (batch, self.length + 1), generator=rng).cumsum(1)
        times = 1_600_000_000 + steps
        history, history_time = ids(self.length, len(self.pairs)), times[:, :-1].clone()
        history[-1, : self.length // 2] = 0
        history_time[-1, : self.length // 2] = 0
        return Features(
            ids(self.profile),
            ids(self.candidate),
            ids(self.context),
            history,
            history_time,
            times[:, -1],
            torch.randn(batch, self.dense, generator=rng),
        )


@dataclass(frozen=True)
class Common:
    """Settings that every network has.

    Args:
        dim: embedding width (d); None is the network's default, 8 unless a grade says other.
        length: newest behaviours used; None is the grade's, or all that the data has.
        head: hidden widths of the head.
        embedding_std: standard deviation of the initial embeddings.
        sparse: sparse gradients for the embedding table (large vocabularies).
        zero_is_missing: a zero among the dense features means missing, see
            :class:`~cohobate.ctr.nets.layers.DenseFeatures`.
    """

    dim: int | None = None
    length: int | None = None
    head: tuple[int, ...] = (1024, 512, 256)
    embedding_std: float = 0.05
    sparse: bool = False
    zero_is_missing: bool = False

    def width(self, layout: Layout) -> int:
        """Width D of a behaviour token: its field embeddings side by side."""
        return len(layout.pairs) * (self.dim or 8)


class ClickNetwork(nn.Module):
    """Embeddings, an interest vector that a subclass computes, and the head.

    The head sees, in this order: dense features, interest, profile, candidate, context.

    Args:
        layout: sizes of the data.
        interest: width of the interest vector.
        common: embedding width, head and the like.
    """

    def __init__(self, layout: Layout, interest: int, common: Common) -> None:
        super().__init__()
        self.layout, self.dim = layout, common.dim or 8
        self.length = min(common.length or layout.length, layout.length)
        self.table = nn.Embedding(layout.ids, self.dim, padding_idx=0, sparse=common.sparse)
        with torch.no_grad():
            self.table.weight.normal_(0, common.embedding_std)[0] = 0
        self.dense = DenseFeatures(layout.dense, common.zero_is_missing)
        others = (layout.profile + layout.candidate + layout.context) * self.dim
        self.head = Head(layout.dense + interest + others, common.head)

    def tokens(self, history: Tensor) -> Tensor:
        """Embed behaviours (B, L, n1) to tokens (B, L, D) by concatenation of their fields."""
        return self.table(history).flatten(-2)

    def paired(self, candidate: Tensor) -> Tensor:
        """Embed a candidate (..., C) in the fields of a behaviour, (..., D), zeros if unpaired."""
        index = torch.tensor(self.layout.pairs, device=candidate.device)
        ids = candidate[..., index.clamp(min=0)]
        return self.table(torch.where(index >= 0, ids, 0)).flatten(-2)

    def interest(self, features: Features) -> Tensor:
        """Return the vector (B, interest) that describes the user with respect to the candidate."""
        raise NotImplementedError

    def logit(self, features: Features, interest: Tensor) -> Tensor:
        """Run the head; ``interest`` (B, ..., width) may have a dimension of candidates."""
        candidate = self.table(features.candidate).flatten(-2)
        shared = [
            self.dense(features.dense),
            self.table(features.profile).flatten(1),
            self.table(features.context).flatten(1),
        ]
        if candidate.dim() == 3:
            shared = [x[:, None].expand(-1, candidate.shape[1], -1) for x in shared]
        dense, profile, context = shared
        return self.head(torch.cat([dense, interest, profile, candidate, context], -1))

    def forward(
        self,
        profile: Tensor,
        candidate: Tensor,
        context: Tensor,
        history: Tensor,
        history_time: Tensor,
        time: Tensor,
        dense: Tensor,
    ) -> Tensor:
        """Return the logit (B,) in float32; arguments as in :class:`Features`."""
        if history.shape[1] > self.length:
            history, history_time = history[:, -self.length :], history_time[:, -self.length :]
        features = Features(profile, candidate, context, history, history_time, time, dense)
        return self.logit(features, self.interest(features))

    def dense_parameters(self) -> int:
        """Number of parameters without the embedding table: the size that scaling laws use."""
        return sum(p.numel() for p in self.parameters()) - self.table.weight.numel()

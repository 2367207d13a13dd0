"""SUAN and LightSUAN: the encoder, and scoring candidates with a cached user."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.ctr.nets.inputs import ClickNetwork, Common, Features, Layout
from cohobate.ctr.nets.layers import MASKED, RelativeBias, full_precision
from cohobate.ctr.suan.attention import GatheredReach, MaskedReach, sparse_pattern
from cohobate.ctr.suan.blocks import UAB, Compat, Pool, Reach

COMMON = Common()


class User(NamedTuple):
    """What scoring keeps of a user: a candidate needs nothing else. One entry per block."""

    profile: Tensor
    context: Tensor
    dense: Tensor
    behaviours: Tensor
    """(B, 1, 1) number of them."""
    total: Tensor
    """(blocks, B, 1, D) sum over behaviours that the gate pools."""
    key: Tensor
    """(blocks, B, H, A, dh) of the behaviours that a candidate sees."""
    value: Tensor
    key_time: Tensor
    """(B, A) seconds."""
    offset: Tensor
    """(A,) key index minus the candidate's."""
    seen: Tensor
    """(B, A) bool."""


class _Recording:
    """A reach that also keeps the keys and values it is given."""

    def __init__(self, reach: Reach, keep: Tensor) -> None:
        self.reach, self.keep = reach, keep
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k[:, :, self.keep])
        self.values.append(v[:, :, self.keep])
        return self.reach.attend(q, k, v)


class _CandidateReach:
    """Candidates (B, H, m, dh) over one user's cached keys and each over itself."""

    def __init__(self, key: Tensor, value: Tensor, bias: Tensor, own_bias: Tensor) -> None:
        self.key, self.value, self.bias, self.own_bias = key, value, bias, own_bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        scores = q @ self.key.transpose(-1, -2) + self.bias
        own = (q * k).sum(-1, keepdim=True) + self.own_bias
        weight = torch.cat([scores, own], -1).softmax(-1)
        return weight[..., :-1] @ self.value + weight[..., -1:] * v


@dataclass(frozen=True)
class Grade:
    """Model size and behaviour length taken together.

    Args:
        blocks: number of UABs.
        length: behaviours (L).
        dim: embedding width (d).
        heads: attention heads (H).
    """

    blocks: int
    length: int
    dim: int = 8
    heads: int = 2


GRADES = {
    "g1": Grade(1, 50),
    "g2": Grade(2, 100),
    "g3": Grade(4, 200),
    "g4": Grade(8, 400, dim=16),
    "g5": Grade(8, 1000, dim=16),
}
"""Our grades: the paper's table of them is not public."""


class SUAN(ClickNetwork):
    """Stack of UABs over the behaviours and the candidate, which is the last token.

    Args:
        layout: sizes of the data.
        common: embedding width, head and the like.
        grade: one of :data:`GRADES`; sets blocks, heads and, in ``common``, length and width.
        blocks: number of UABs, instead of the grade's.
        heads: attention heads, instead of the grade's.
        window: newest keys a token sees (k); with ``dilation`` None it sees all.
        dilation: and every r-th earlier key (r).
        gathered: compute sparse attention over the seen keys alone; None chooses by length. The
            result is the same, and export uses the masked form.
        dense_target: the candidate sees every behaviour whatever the pattern.
        pooling: what the gate of dual alignment averages: ``all`` tokens, the candidate too, or
            ``split``: behaviours for behaviours; behaviours and itself for a candidate. Only
            ``split`` makes the encoding of a user independent of the candidate.
        candidate: ``project`` all its fields to a token, or ``match`` those that behaviours have.
        dropout: dropout inside the blocks.
        compat: ``official`` repeats the released code's slips.

    Raises:
        InputError: an unknown grade, or heads that do not divide the token width.

    References:
        Lai et al., Exploring Scaling Laws of CTR Model for Online Performance Improvement, RecSys
        2025, arXiv:2508.15326, section 3.
    """

    def __init__(
        self,
        layout: Layout,
        common: Common = COMMON,
        *,
        grade: str = "g1",
        blocks: int | None = None,
        heads: int | None = None,
        window: int = 16,
        dilation: int | None = None,
        gathered: bool | None = None,
        dense_target: bool = False,
        pooling: Literal["all", "split"] = "all",
        candidate: Literal["project", "match"] = "project",
        dropout: float = 0.0,
        compat: Compat = "fixed",
    ) -> None:
        if grade not in GRADES:
            raise InputError(f"grade {grade!r}: one of {', '.join(GRADES)}")
        size = GRADES[grade]
        common = replace(common, dim=common.dim or size.dim, length=common.length or size.length)
        heads, width = heads or size.heads, common.width(layout)
        if width % heads:
            raise InputError(f"heads {heads}: does not divide the token width {width}")
        super().__init__(layout, width, common)
        self.window, self.dilation, self.gathered = window, dilation, gathered
        self.dense_target, self.pooling, self.compat = dense_target, pooling, compat
        self.project = (
            nn.Linear(layout.candidate * self.dim, width) if candidate == "project" else None
        )
        self.hour = nn.Embedding(24, self.dim)
        nn.init.normal_(self.hour.weight, 0, common.embedding_std)
        self.time = nn.Linear(self.dim, width)
        self.position = nn.Parameter(torch.randn(self.length + 1, width) * 0.02)
        self.bias = RelativeBias(self.length + 1)
        self.blocks = nn.ModuleList(
            UAB(width, self.dim, heads, dropout, compat) for _ in range(blocks or size.blocks)
        )

    # -- the encoder -------------------------------------------------------------------------

    def reach(self, times: Tensor, valid: Tensor, *, candidate: bool = True) -> Reach:
        """Attention pattern of N tokens.

        Args:
            times: (B, N) seconds.
            valid: (B, N) bool, False on padding.
            candidate: the last token is the candidate.
        """
        tokens, k, r = times.shape[1], self.window, self.dilation
        if r is None:
            return MaskedReach(self.bias, times, valid, zero_empty=self.compat == "fixed")
        dense_target = candidate and self.dense_target
        # an exported graph has one form for every length; the choice would fix a range of them
        if not dense_target and not torch.compiler.is_exporting():
            # below a third of the keys the gathered form is the quicker one
            fewer = 2 * k + tokens // r < tokens // 3
            if fewer if self.gathered is None else self.gathered:
                return GatheredReach(self.bias, times, valid, k, r)
        pattern = sparse_pattern(tokens, k, r).to(valid.device)
        if dense_target:
            pattern[-1] = True
        return MaskedReach(self.bias, times, valid, pattern)

    def pool(self, valid: Tensor) -> Pool:
        """Mean for the gate of a stack that ends in the candidate; ``valid`` (B, N)."""
        if self.compat == "official":
            return lambda x: x.mean(1, keepdim=True)
        weight = valid[..., None].float()
        if self.pooling == "all":
            return lambda x: (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        count = weight[:, :-1].sum(1, keepdim=True)

        def split(x: Tensor) -> Tensor:
            total = (x[:, :-1] * weight[:, :-1]).sum(1, keepdim=True)
            return torch.cat([total / count.clamp(min=1), (total + x[:, -1:]) / (count + 1)], 1)

        return split

    def encode(self, tokens: Tensor, times: Tensor, valid: Tensor, profile: Tensor) -> Tensor:
        """Run the stack over finished tokens.

        Args:
            tokens: (B, N, D), candidate last.
            times: (B, N) seconds.
            valid: (B, N) bool, False on padding.
            profile: (B, P, d) embedded profile fields.

        Returns:
            (B, N, D).
        """
        with full_precision(tokens.device):
            reach = self.reach(times, valid)
        pool = self.pool(valid)
        for block in self.blocks:
            tokens = block(tokens, profile, reach, pool)
        return tokens

    def place(self, tokens: Tensor, times: Tensor, position: Tensor) -> Tensor:
        """Add the hour of the day and the position to tokens (B, N, D)."""
        return tokens + self.time(self.hour(times // 3600 % 24)) + position

    def target(self, candidate: Tensor) -> Tensor:
        """Token (..., D) of a candidate (..., C)."""
        if self.project is None:
            return self.paired(candidate)
        return self.project(self.table(candidate).flatten(-2))

    def interest(self, features: Features) -> Tensor:
        """Return the candidate's token after the last block, (B, D)."""
        tokens = torch.cat(
            [self.tokens(features.history), self.target(features.candidate)[:, None]], 1
        )
        times = torch.cat([features.history_time, features.time[:, None]], 1)
        valid = torch.cat([features.history[..., 0] != 0, features.candidate[:, :1] != 0], 1)
        if self.compat == "fixed":
            valid = torch.cat([valid[:, :-1], torch.ones_like(valid[:, -1:])], 1)
        # positions count back from the candidate, so padding on the left moves nothing
        slots = torch.arange(tokens.shape[1], device=tokens.device) - tokens.shape[1]
        placed = self.place(tokens, times, self.position[slots + self.position.shape[0]])
        return self.encode(placed, times, valid, self.table(features.profile))[:, -1]

    # -- scoring with a cached user ----------------------------------------------------------

    def encode_user(self, features: Features) -> User:
        """Encode behaviours and profile once; the candidate in ``features`` is not looked at.

        Raises:
            InputError: pooling ``all`` makes behaviours depend on the candidate.
        """
        if self.pooling != "split" or self.compat != "fixed":
            raise InputError("encode_user: needs pooling 'split' and compat 'fixed'")
        history, times = (
            features.history[:, -self.length :],
            features.history_time[:, -self.length :],
        )
        valid, n = history[..., 0] != 0, history.shape[1]
        position = self.position[self.position.shape[0] - 1 - n : -1]
        x = self.place(self.tokens(history), times, position)
        profile = self.table(features.profile)
        offset = torch.arange(-n, 0, device=x.device)
        if self.dilation is not None and not self.dense_target:
            offset = offset[(offset > -self.window) | (offset % self.dilation == 0)]
        keep = offset + n
        reach = _Recording(self.reach(times, valid, candidate=False), keep)
        weight = valid[..., None].float()
        count, totals = weight.sum(1, keepdim=True), []

        def pool(x: Tensor) -> Tensor:
            totals.append((x * weight).sum(1, keepdim=True))
            return totals[-1] / count.clamp(min=1)

        for block in self.blocks:
            x = block(x, profile, reach, pool)
        return User(
            features.profile, features.context, features.dense, count, torch.stack(totals),
            torch.stack(reach.keys), torch.stack(reach.values), times[:, keep], offset,
            valid[:, keep],
        )  # fmt: skip

    def score(self, user: User, candidate: Tensor, time: Tensor) -> Tensor:
        """Score m candidates at once; none sees another, so each gets the score it gets alone.

        Args:
            user: from :meth:`encode_user`, batch B.
            candidate: (B, m, C) ids.
            time: (B,) or (B, m) seconds.

        Returns:
            Logits (B, m).
        """
        times = time[:, None].expand(-1, candidate.shape[1]) if time.dim() == 1 else time
        x = self.place(self.target(candidate), times, self.position[-1])
        profile = self.table(user.profile)
        bias = self.bias(times, user.key_time, user.offset)
        bias = torch.where(user.seen[:, None], bias, MASKED)[:, None]
        own = self.bias.position[self.bias.tokens - 1] + self.bias.time[0]
        for block, key, value, total in zip(
            self.blocks, user.key, user.value, user.total, strict=True
        ):
            reach = _CandidateReach(key, value, bias, own)
            x = block(x, profile, reach, lambda t, s=total: (s + t) / (user.behaviours + 1))
        batch = user.profile.shape[0]
        features = Features(
            user.profile, candidate, user.context, candidate.new_zeros(batch, 0, 1),
            candidate.new_zeros(batch, 0), times[:, 0], user.dense,
        )  # fmt: skip
        return self.logit(features, x)


class LightSUAN(SUAN):
    """SUAN for serving: sparse attention and a user encoding that does not depend on the candidate.

    Args:
        layout: sizes of the data.
        common: embedding width, head and the like.
        grade: one of :data:`GRADES`.
        blocks: number of UABs, instead of the grade's.
        heads: attention heads, instead of the grade's.
        window: newest keys a token sees (k).
        dilation: and every r-th earlier key (r).
        gathered: see :class:`SUAN`.
        dense_target: the candidate sees every behaviour whatever the pattern.
        candidate: see :class:`SUAN`.
        dropout: dropout inside the blocks.

    Differences:
        The gate pools behaviours apart from the candidate; how the paper makes parallel scoring
        exact is not public.
    """

    def __init__(
        self,
        layout: Layout,
        common: Common = COMMON,
        *,
        grade: str = "g1",
        blocks: int | None = None,
        heads: int | None = None,
        window: int = 16,
        dilation: int = 4,
        gathered: bool | None = None,
        dense_target: bool = False,
        candidate: Literal["project", "match"] = "project",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            layout,
            common,
            grade=grade,
            blocks=blocks,
            heads=heads,
            window=window,
            dilation=dilation,
            gathered=gathered,
            dense_target=dense_target,
            pooling="split",
            candidate=candidate,
            dropout=dropout,
        )

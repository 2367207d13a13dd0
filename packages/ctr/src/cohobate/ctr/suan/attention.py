"""Which keys a token sees: everything earlier, or the local and dilated keys of LightSUAN.

A *reach* is made once per forward pass from the time stamps and the mask; every block of the stack
then calls its ``attend``. The relative bias is part of it, so its buckets are computed only once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cohobate.ctr.nets.layers import MASKED, RelativeBias, causal_scores


def sparse_pattern(tokens: int, window: int, dilation: int) -> Tensor:
    """Boolean mask (N, N): i sees j <= i if ``i - j < window`` or ``(i - j) % dilation == 0``.

    Args:
        tokens: N.
        window: number of newest keys, the token itself included (k).
        dilation: every r-th earlier key (r).

    Example:
        >>> sparse_pattern(6, 2, 3)[5].int().tolist()
        [0, 0, 1, 0, 1, 1]
    """
    index = torch.arange(tokens)
    distance = index[:, None] - index
    return (distance >= 0) & ((distance < window) | (distance % dilation == 0))


class MaskedReach:
    """Attention over all N keys with an additive bias: the dense network and the sparse reference.

    Args:
        bias: the relative bias of the stack.
        times: (B, N) seconds.
        valid: (B, N) bool, False on padding.
        pattern: (N, N) bool of :func:`sparse_pattern`; None sees every earlier key.
        zero_empty: return zeros for a token that sees no key (a padding slot), instead of the mean
            over all values, which is what the released code comes to.
    """

    def __init__(
        self,
        bias: RelativeBias,
        times: Tensor,
        valid: Tensor,
        pattern: Tensor | None = None,
        zero_empty: bool = True,
    ) -> None:
        index = torch.arange(times.shape[1], device=times.device)
        mask = causal_scores(valid)
        if pattern is not None:
            mask = mask.masked_fill(~pattern, MASKED)
        self.bias = bias(times, times, index - index[:, None])[:, None] + mask
        self.empty = ~valid[:, None, :, None] if zero_empty else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q, k, v, each (B, H, N, dh), float32; the output has that shape."""
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return out if self.empty is None else out.masked_fill(self.empty, 0.0)


class GatheredReach:
    """The sparse pattern over the keys that are seen alone: 2 k + N / r scores per token, not N.

    The local part cuts the sequence into blocks of ``window``; a block looks at itself and the one
    before. The dilated part sorts tokens by index modulo ``dilation``; each class is a short dense
    sequence. Both are views, so no key is copied per query. A pair in both parts counts once.

    Args:
        bias: the relative bias of the stack.
        times: (B, N) seconds.
        valid: (B, N) bool, False on padding.
        window: newest keys (k).
        dilation: step of the earlier keys (r).
    """

    def __init__(
        self, bias: RelativeBias, times: Tensor, valid: Tensor, window: int, dilation: int
    ) -> None:
        self.tokens, self.window, self.dilation = times.shape[1], window, dilation
        self.empty = ~valid[:, None, :, None]
        n, k, r = self.tokens, window, dilation
        device = times.device

        def scores(query: Tensor, key: Tensor, offset: Tensor, seen: Tensor) -> Tensor:
            return torch.where(seen, bias(query, key, offset), MASKED)[:, None]

        offset = torch.arange(2 * k, device=device) - k - torch.arange(k, device=device)[:, None]
        near = (offset <= 0) & (offset > -k)
        t = self._blocks(times[:, None, :, None])[:, 0, ..., 0]
        ok = self._blocks(valid[:, None, :, None])[:, 0, ..., 0]
        seen = near & self._with_previous(ok, 2)[..., None, :]
        # outside the pattern the offset is masked anyway; clamping keeps it inside the table
        self.local = scores(t, self._with_previous(t, 2), offset.clamp(1 - n, n - 1), seen)

        m = -(-n // r)
        step = torch.arange(m, device=device)
        offset = (step - step[:, None]) * r
        far = offset <= -k
        t = self._classes(times[:, None, :, None])[:, 0, ..., 0]
        ok = self._classes(valid[:, None, :, None])[:, 0, ..., 0]
        self.far = scores(t, t, offset.clamp(1 - n, n - 1), far & ok[..., None, :])

    def _blocks(self, x: Tensor) -> Tensor:
        """Cut (B, H, N, d) into (B, H, blocks, k, d), padded with zeros at the end."""
        x = nn.functional.pad(x, (0, 0, 0, -self.tokens % self.window))
        return x.unflatten(2, (-1, self.window))

    @staticmethod
    def _with_previous(x: Tensor, dim: int) -> Tensor:
        """Join each block with the one before it along ``dim``; the first has zeros before it."""
        first = torch.zeros_like(x.narrow(dim - 1, 0, 1))
        return torch.cat(
            [torch.cat([first, x.narrow(dim - 1, 0, x.shape[dim - 1] - 1)], dim - 1), x], dim
        )

    def _classes(self, x: Tensor) -> Tensor:
        """Sort (B, H, N, d) by index modulo r: (B, H, r, ceil(N / r), d)."""
        x = nn.functional.pad(x, (0, 0, 0, -self.tokens % self.dilation))
        return x.unflatten(2, (-1, self.dilation)).transpose(2, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q, k, v, each (B, H, N, dh), float32; the output has that shape."""
        n = self.tokens
        q = q * q.shape[-1] ** -0.5
        value = self._with_previous(self._blocks(v), 3)
        local = self._blocks(q) @ self._with_previous(self._blocks(k), 3).transpose(-1, -2)
        local = (local + self.local).flatten(2, 3)[:, :, :n]
        far = self._classes(q) @ self._classes(k).transpose(-1, -2) + self.far
        far = far.transpose(2, 3).flatten(2, 3)[:, :, :n]
        weight = torch.cat([local, far], -1).softmax(-1)
        local, far = weight.split([2 * self.window, far.shape[-1]], -1)
        out = (self._blocks(local) @ value).flatten(2, 3)[:, :, :n]
        far = self._classes(far) @ self._classes(v)
        out = out + far.transpose(2, 3).flatten(2, 3)[:, :, :n]
        return out.masked_fill(self.empty, 0.0)

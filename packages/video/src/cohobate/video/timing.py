"""When each row is read: from 0 to 1 over the readout, from the top (t2b) or the bottom (b2t).

Row maps are closed forms of the row's place in the *full* frame, so a crop keeps its times and
every time in [0, 1] gives finite numbers. They are constant along a row: ``(B, K, H, 1)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def row_times(rows: Tensor | int, top: Tensor | int = 0, height: int | None = None) -> Tensor:
    """Times at which the rows of a crop are read, from the top and from the bottom.

    Args:
        rows: Rows of the full frame, at least 2; a number or one for each sample ``(B,)``.
        top: First row of the crop, a number or one for each sample ``(B,)``; rows past the frame
            (padding) go on in time.
        height: Rows of the crop; by default those of the full frame.

    Returns:
        tau of t2b and b2t, ``(B, 2, height, 1)``.

    Example:
        >>> row_times(5, 1, 2)[0, :, :, 0]
        tensor([[0.2500, 0.5000],
                [0.7500, 0.5000]])
    """
    first, last = torch.as_tensor(top).reshape(-1, 1), torch.as_tensor(rows).reshape(-1, 1) - 1
    steps = torch.arange(int(rows) if height is None else height, device=first.device)
    down = (first + steps).float() / last.to(first.device)
    return torch.stack((down, 1 - down), 1)[..., None]


def encoding(times: Tensor, target: Tensor) -> Tensor:
    """What the network is told: time of the row minus time of each of the three frames.

    Args:
        times: Of `row_times`, ``(B, 2, H, 1)``.
        target: t of the middle frame, ``(B,)``.

    Returns:
        ``(B, 6, H, 1)``: t2b less 0, t, 1; b2t less 0, t, 1.

    Example:
        >>> encoding(row_times(3), torch.tensor([0.5]))[0, :, 0, 0]
        tensor([ 0.0000, -0.5000, -1.0000,  1.0000,  0.5000,  0.0000])
    """
    t = target.to(times).reshape(-1, 1).expand(len(times), 1)
    frames = torch.cat((torch.zeros_like(t), t, torch.ones_like(t)), 1)
    return (times[:, :, None] - frames[:, None, :, None, None]).flatten(1, 2)


class RowMaps(NamedTuple):
    """Where a row stands between three frames at 0, t and 1; each ``(B, 1, H, 1)``.

    Attributes:
        whole: Between first and last frame.
        before: Between first and middle frame, 1 from t on.
        after: Between middle and last frame, 0 until t.
        mask: 1 where the row is read until t.
    """

    whole: Tensor
    before: Tensor
    after: Tensor
    mask: Tensor


def row_maps(times: Tensor, target: Tensor) -> RowMaps:
    """Row maps of one direction.

    Args:
        times: tau, ``(B, 1, H, 1)``.
        target: t of the middle frame in [0, 1], ``(B,)``.

    Example:
        >>> row_maps(row_times(5)[:, :1], torch.tensor([0.25])).after.flatten()
        tensor([0.0000, 0.0000, 0.3333, 0.6667, 1.0000])
    """
    t = target.to(times).reshape(-1, 1, 1, 1)
    # At t = 0 or 1 one of the intervals is empty; a tiny width keeps the quotient finite.
    tiny = torch.finfo(times.dtype).tiny
    before = (times / t.clamp_min(tiny)).clamp(0, 1)
    after = ((times - t) / (1 - t).clamp_min(tiny)).clamp(0, 1)
    return RowMaps(times, before, after, (times <= t).to(times.dtype))

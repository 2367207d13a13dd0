"""torchvision's RAFT (small) as a frozen flow estimator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_small

_LEAST = 128  # RAFT's correlation pyramid needs this many pixels


class Raft(nn.Module):
    """Optical flow between two images of any size.

    Args:
        updates: Recurrent updates.

    References:
        Teed, Deng: RAFT, ECCV 2020, arXiv 2003.12039.
    """

    def __init__(self, updates: int = 6) -> None:
        super().__init__()
        self.network, self.updates = raft_small(weights=None), updates

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow ``(B, 2, H, W)`` from the first image ``(B, 3, H, W)`` to the second."""
        h, w = first.shape[-2:]
        height, width = (max(-(-size // 8) * 8, _LEAST) for size in (h, w))
        padding = (0, width - w, 0, height - h)
        both = F.pad(torch.cat((first, second)).float() * 2 - 1, padding, mode="replicate")
        return self.network(*both.chunk(2), num_flow_updates=self.updates)[-1][..., :h, :w]

    def pairs(self, frames: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
        """Flows ``(B, len(pairs), 2, H, W)`` of pairs among frames ``(B, N, 3, H, W)``."""
        sides = [list(side) for side in zip(*pairs, strict=True)]
        first, second = (frames[:, side].flatten(0, 1) for side in sides)
        return self(first, second).unflatten(0, (len(frames), -1))

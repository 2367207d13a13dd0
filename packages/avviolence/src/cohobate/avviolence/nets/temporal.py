"""A plain multiple-instance network: temporal convolutions and a shared head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.avviolence.nets.streams import Streams


class TemporalMIL(nn.Module):
    """Two streams through one residual temporal convolution, scored late.

    No attention and no exchange between the modalities: the network one would write first. It shows
    that losses made for one network work on another.

    Args:
        visual_width: Width of the visual features.
        audio_width: Width of the audio features.
        hidden: Width of the representations.
        kernel: Snippets that the convolution sees, odd.
        dropout: Dropout on the convolution's output.
    """

    def __init__(
        self,
        visual_width: int = 1024,
        audio_width: int = 128,
        *,
        hidden: int = 128,
        kernel: int = 5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.fc_v = nn.Linear(visual_width, hidden)
        self.fc_a = nn.Linear(audio_width, hidden)
        self.body = _Residual(hidden, kernel, dropout)
        self.head = nn.Linear(hidden, 1)

    def forward(self, visual: Tensor, audio: Tensor) -> Streams:
        """Score ``(B, T, V)`` visual and ``(B, T, A)`` audio features."""
        visual_rep, audio_rep = self.body(self.fc_v(visual)), self.body(self.fc_a(audio))
        visual_logits, audio_logits = self.head(visual_rep)[..., 0], self.head(audio_rep)[..., 0]
        logits = visual_logits + audio_logits
        return Streams(logits, audio_logits, visual_logits, audio_rep, visual_rep)


class VisualTemporalMIL(nn.Module):
    """The visual stream of `TemporalMIL` alone, with the same parameter names.

    Args:
        visual_width: Width of the visual features.
        hidden: Width of the representations.
        kernel: Snippets that the convolution sees, odd.
        dropout: Dropout on the convolution's output.
    """

    def __init__(
        self, visual_width: int = 1024, *, hidden: int = 128, kernel: int = 5, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.fc_v = nn.Linear(visual_width, hidden)
        self.body = _Residual(hidden, kernel, dropout)
        self.head = nn.Linear(hidden, 1)

    def forward(self, visual: Tensor) -> Tensor:
        """Logits ``(B, T)`` of ``(B, T, V)`` visual features."""
        logits: Tensor = self.head(self.body(self.fc_v(visual)))[..., 0]
        return logits


class _Residual(nn.Module):
    def __init__(self, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x).mT).mT
        return x + self.dropout(F.relu(y))

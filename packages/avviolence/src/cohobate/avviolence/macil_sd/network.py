"""The two networks of MACIL-SD: audio-visual (kept) and visual-only (trained alongside)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.avviolence.nets import Streams, attend, dropout


class CrossLayer(nn.Module):
    """A transformer layer whose queries come from one stream and keys and values from another.

    Only the queries are normalised; keys and values are projections of the raw input. Padding is
    attended. There are no positions.

    Args:
        hidden: Width of both streams.
        heads: Number of heads, a divisor of ``hidden``.
        ffn: Width inside the feed-forward part.
        dropout: On attention weights, inside the feed-forward part and on both outputs.
    """

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads})")
        self.heads = heads
        # The released code clones one projection four times, so all four start equal.
        self.query = nn.Linear(hidden, hidden)
        self.key, self.value, self.output = (copy.deepcopy(self.query) for _ in range(3))
        self.w_1 = nn.Linear(hidden, ffn)
        self.w_2 = nn.Linear(ffn, hidden)
        self.norm_attention = nn.LayerNorm(hidden)
        self.norm_ffn = nn.LayerNorm(hidden)
        self.dropout = dropout

    def forward(self, stream: Tensor, other: Tensor) -> Tensor:
        """Let ``stream`` attend to ``other``, both ``(B, T, D)``; returns ``(B, T, D)``."""
        query = self.query(self.norm_attention(stream))
        weight = torch.cat((self.key.weight, self.value.weight))
        bias = torch.cat((self.key.bias, self.value.bias))
        drop = self.dropout if self.training else 0.0
        attended = attend(query, F.linear(other, weight, bias), self.heads, drop)
        hidden = dropout(self.output(attended), drop, base=stream)
        inner = dropout(F.relu(self.w_1(self.norm_ffn(hidden))), drop)
        return dropout(self.w_2(inner), drop, base=hidden)


class AudioVisualNet(nn.Module):
    """Two-stream network: each modality attends to the other through one shared layer.

    Args:
        visual_width: Width of the visual features.
        audio_width: Width of the audio features.
        hidden: Width of the representations.
        heads: Attention heads.
        ffn: Width inside the feed-forward part.
        dropout: Dropout everywhere.
    """

    def __init__(
        self,
        visual_width: int = 1024,
        audio_width: int = 128,
        *,
        hidden: int = 128,
        heads: int = 4,
        ffn: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.fc_v = nn.Linear(visual_width, hidden)
        self.fc_a = nn.Linear(audio_width, hidden)
        self.layer = CrossLayer(hidden, heads, ffn, dropout)
        self.head = nn.Linear(hidden, 1)

    def forward(self, visual: Tensor, audio: Tensor) -> Streams:
        """Score ``(B, T, V)`` visual and ``(B, T, A)`` audio features."""
        v, a = self.fc_v(visual), self.fc_a(audio)
        visual_rep, audio_rep = self.layer(v, a), self.layer(a, v)
        visual_logits, audio_logits = self.head(visual_rep)[..., 0], self.head(audio_rep)[..., 0]
        logits = visual_logits + audio_logits
        return Streams(logits, audio_logits, visual_logits, audio_rep, visual_rep)


class VisualNet(nn.Module):
    """The visual-only partner; its parameters are named as in `AudioVisualNet`.

    Args:
        visual_width: Width of the visual features.
        hidden: Width of the representations.
        heads: Attention heads.
        ffn: Width inside the feed-forward part.
        dropout: Dropout everywhere.
    """

    def __init__(
        self,
        visual_width: int = 1024,
        *,
        hidden: int = 128,
        heads: int = 4,
        ffn: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.fc_v = nn.Linear(visual_width, hidden)
        self.layer = CrossLayer(hidden, heads, ffn, dropout)
        self.head = nn.Linear(hidden, 1)

    def forward(self, visual: Tensor) -> Tensor:
        """Logits ``(B, T)`` of ``(B, T, V)`` visual features."""
        v = self.fc_v(visual)
        logits: Tensor = self.head(self.layer(v, v))[..., 0]
        return logits


class VisualOnly(VisualNet):
    """`VisualNet` where a two-stream network is expected: the sound is not used."""

    def forward(self, visual: Tensor, audio: Tensor) -> Streams:  # type: ignore[override]
        """Score ``(B, T, V)`` visual features."""
        v = self.fc_v(visual)
        rep = self.layer(v, v)
        logits = self.head(rep)[..., 0]
        return Streams(logits, logits, logits, rep, rep)

"""What a two-stream network answers, so that the papers' losses work on any of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Streams(NamedTuple):
    """Output of a two-stream network for ``B`` bags of ``T`` snippets.

    Attributes:
        logits: Fused violence logits, ``(B, T)``.
        audio_logits: Logits of the audio stream alone, ``(B, T)``.
        visual_logits: Logits of the visual stream alone, ``(B, T)``.
        audio_rep: Audio representations, ``(B, T, D)``.
        visual_rep: Visual representations, ``(B, T, D)``.
    """

    logits: Tensor
    audio_logits: Tensor
    visual_logits: Tensor
    audio_rep: Tensor
    visual_rep: Tensor


class TwoStream(Protocol):
    """A network over both modalities; any `torch.nn.Module` with this call fits."""

    def __call__(self, visual: Tensor, audio: Tensor) -> Streams:
        """Score ``(B, T, V)`` visual and ``(B, T, A)`` audio features."""
        ...


class VisualStream(Protocol):
    """A network over the visual features alone."""

    def __call__(self, visual: Tensor) -> Tensor:
        """Logits ``(B, T)`` of ``(B, T, V)`` visual features."""
        ...

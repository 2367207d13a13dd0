"""Modality controller: what one modality adds to an attention block of a shared encoder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cohobate.core.catalog import suggestion
from cohobate.core.errors import InputError

# The bound that the official code gives its prompt tokens, whatever the width of the block.
_TOKEN_BOUND = math.sqrt(6 / (3 * 16 * 16 + 16))


class Controller(nn.Module):
    """One block's part of one modality: a prompt token, its bias, and an expert.

    Args:
        dim: Channels C of the block.
        heads: Attention heads.
        expert_ratio: Hidden width of the expert over C.
        separate_kv: A second token for the values, as the paper's figure draws it; the official
            code uses one token as key and as value.

    References:
        Xu et al., arXiv 2407.14153, modality controller.
    """

    def __init__(
        self, dim: int, heads: int, expert_ratio: float = 4.0, separate_kv: bool = False
    ) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(heads, 1, dim // heads))
        self.value_token = nn.Parameter(torch.empty_like(self.token)) if separate_kv else None
        self.bias = nn.Parameter(torch.zeros(1))
        self.expert = Expert(dim, max(1, round(dim * expert_ratio)))
        for token in (self.token, self.value_token):
            if token is not None:
                nn.init.uniform_(token, -_TOKEN_BOUND, _TOKEN_BOUND)

    def extend(self, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the token to keys and values, and its bias to the bias of the scores.

        Args:
            key: ``(B, heads, N, d)``.
            value: ``(B, heads, N, d)``.
            bias: Added to the scores before the softmax, ``(..., heads, Q, N)``.

        Returns:
            Keys and values with N + 1 entries, bias ``(..., heads, Q, N + 1)``.
        """
        batch = key.shape[0]  # len() would fix the batch size of an exported graph
        value_token = self.token if self.value_token is None else self.value_token
        key = torch.cat([key, self.token.expand(batch, -1, -1, -1)], 2)
        value = torch.cat([value, value_token.expand(batch, -1, -1, -1)], 2)
        column = self.bias.to(bias.dtype).expand(*bias.shape[:-1], 1)
        return key, value, torch.cat([bias, column], -1)


class Expert(nn.Module):
    """LayerNorm → linear → GELU → linear, beside the block's own MLP.

    Args:
        dim: Channels C.
        hidden: Channels between the two layers.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C) → (..., C)``."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Controllers(nn.ModuleDict):
    """The controllers of an encoder by modality, each a list with one for every block."""

    def of(self, modality: str | None, blocks: int) -> Iterable[Controller | None]:
        """One controller a block; without a modality the encoder is the shared one alone.

        Raises:
            InputError: There is no such modality.
        """
        if modality is None:
            return [None] * blocks
        if modality not in self:
            raise unknown_modality(modality, self)
        own: Any = self[modality]
        return list(own)


def unknown_modality(modality: str, known: Iterable[str]) -> InputError:
    """The complaint about a modality that a network does not have."""
    names = list(known)
    there = ", ".join(names) or "none"
    return InputError(
        f"unknown modality '{modality}'{suggestion(modality, names)} (there is: {there})"
    )


def check_modalities(names: Iterable[str]) -> list[str]:
    """Names that may stand in files and state dicts.

    Raises:
        InputError: One is none, or there twice.
    """
    found = list(names)
    for name in found:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name) or hasattr(nn.ModuleDict(), name):
            raise InputError(
                f"modality '{name}': a name is lower-case letters, digits, - and _, "
                "and no word of Python's dictionaries"
            )
    if len(set(found)) < len(found):
        raise InputError(f"modalities {', '.join(found)}: one is there twice")
    return found

"""What the tests of this paper share."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cohobate.core.testing import golden
from cohobate.medseg.esp_medsam import (
    DecoderSize,
    MaskDecoder,
    Network,
    PatchPrompt,
    TinyViTEncoder,
    TinyViTSize,
)

FOLDER = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def recorded():
    """Arrays recorded from the official code, by file name without ending."""

    def read(name: str) -> dict[str, Any]:
        return golden(FOLDER / f"{name}.npz")

    return read


@pytest.fixture(scope="session")
def official_state() -> dict[str, torch.Tensor]:
    """A state dict in the released layout whose weights follow from their names."""
    shapes = json.loads((FOLDER / "parameter_names.json").read_text())
    state = {name: torch.from_numpy(_values(name, tuple(shape))) for name, shape in shapes.items()}
    matrix = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    state[matrix] = torch.from_numpy(_stream(matrix, (2, 128)))
    for name in [n for n in state if ".bn.weight" in n]:
        channels = len(state[name])
        stem = name.removesuffix("weight")
        state[f"{stem}running_mean"] = torch.zeros(channels)
        state[f"{stem}running_var"] = torch.ones(channels)
        state[f"{stem}num_batches_tracked"] = torch.tensor(0)
    return state


def _stream(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    v = _stream(name, shape)
    if len(shape) >= 2:
        return v / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    return 1 + 0.1 * v if name.endswith("weight") else 0.1 * v


@pytest.fixture
def small_network():
    """A small student of given modalities, in eval mode."""

    def make(*modalities: str, seed: int = 0, **options: Any) -> Network:
        torch.manual_seed(seed)
        size = TinyViTSize((8, 16, 16, 32), (1, 1, 2, 1), (1, 2, 2, 4), (7, 7, 7, 7))
        encoder = TinyViTEncoder(modalities, 16, size, **options)
        heads = DecoderSize(num_heads=2, mlp_dim=24, patch_dim=8)
        return Network(encoder, PatchPrompt(16, 8), MaskDecoder(modalities, None, 16, heads)).eval()

    return make

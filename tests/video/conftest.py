"""Recorded arrays, and the rule that fills networks without a file of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cohobate.core.testing import golden as read

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "selfdrsc" / "golden"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Arrays recorded from the official code, by name."""
    return lambda name: read(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def hash_fill() -> Callable[[nn.Module], nn.Module]:
    """Fill a network by a rule of tensor number and element number, in state-dict order."""

    def number(tensor: int, size: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            start = np.uint64((tensor * 1442695040888963407 + 1) % 2**64)
            x = np.arange(size, dtype=np.uint64) * np.uint64(6364136223846793005) + start
            x ^= x >> np.uint64(33)
            x *= np.uint64(0xFF51AFD7ED558CCD)
            x ^= x >> np.uint64(33)
        return (x >> np.uint64(40)).astype(np.float64) / 2**24

    first = [0.99734014, 0.36227548, 0.70859218, 0.74036372]
    np.testing.assert_allclose(number(0, 4), first, rtol=0, atol=1e-7)

    def fill(network: nn.Module) -> nn.Module:
        prelu = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.PReLU)}
        with torch.no_grad():
            for j, (name, tensor) in enumerate(network.state_dict().items()):
                values = 2 * number(j, tensor.numel()) - 1
                if tensor.ndim > 1:
                    values *= np.sqrt(3 / np.prod(tensor.shape[1:]))
                elif name in prelu:
                    values[:] = 0.25
                else:
                    values *= 0.05
                tensor.copy_(torch.from_numpy(values).view(tensor.shape))
        return network

    return fill

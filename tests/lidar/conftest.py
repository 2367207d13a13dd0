from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cohobate.core.testing import golden
from cohobate.lidar.data.nuscenes import Frame, NuScenes
from cohobate.lidar.data.simulator import Simulator

GOLDEN = Path(__file__).parent / "slidr" / "golden"


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], dict[str, Any]]:
    """Arrays recorded from the official code, by name."""
    return lambda name: golden(GOLDEN / f"{name}.npz")


def _value(key: str, like: Tensor) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    shape = tuple(like.shape)
    if key.endswith("num_batches_tracked"):
        found = np.zeros(shape)
    elif key.endswith("running_mean"):
        found = 0.1 * rng.standard_normal(shape)
    elif key.endswith("running_var"):
        found = 0.5 + rng.random(shape)
    elif len(shape) == 1 or key.endswith("bias"):
        found = 0.1 * rng.standard_normal(shape) + key.endswith("weight")
    else:
        rows = shape[-1] if key.endswith("kernel") else shape[0]
        size = int(np.prod(shape))
        found = rng.standard_normal(shape) * (np.sqrt(rows / size) if size > rows else 1)
    return torch.as_tensor(found).to(like.dtype)


@pytest.fixture(scope="session")
def fill() -> Callable[[nn.Module], nn.Module]:
    """Fills a network by the rule of the recordings: a value depends on the key alone."""

    def filled(network: nn.Module) -> nn.Module:
        state = network.state_dict()
        network.load_state_dict({key: _value(key, tensor) for key, tensor in state.items()})
        return network

    return filled


@pytest.fixture(scope="session")
def sim() -> Simulator:
    return Simulator(train=6, val=2)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory, sim: Simulator) -> Path:
    """Simulated scenes in the layout of nuScenes."""
    return sim.write(tmp_path_factory.mktemp("scenes") / "root")


@pytest.fixture(scope="session")
def frames(root: Path) -> list[Frame]:
    reader = NuScenes(root)
    return reader.frames(reader.scenes("all"))

"""What the tests of this paper share."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cohobate.core.testing import golden

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("COHOBATE_RECORDINGS", ROOT.parent / "shared/data"))
Record = dict[str, Any]


@pytest.fixture(scope="session")
def mini() -> Path:
    """Four images of COCO-WholeBody, which the project does not ship."""
    folder = DATA / "coco_wholebody_mini"
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not here")
    return folder


@pytest.fixture
def recorded() -> Callable[[str], Record]:
    """Arrays recorded from the official code, by file name without ending."""
    return lambda name: golden(GOLDEN / f"{name}.npz")


@pytest.fixture
def cases(recorded) -> Callable[[str], list[Record]]:
    """The cases of a file, each with its own names."""

    def read(name: str) -> list[Record]:
        record = recorded(name)
        return [
            {k.removeprefix(f"c{n}_"): v for k, v in record.items() if k.startswith(f"c{n}_")}
            for n in range(int(record["n_cases"]))
        ]

    return read


def _value(key: str, like: Tensor, prefix: str) -> Tensor:
    """The weight of a key as the recordings were made with, float32."""
    shape = tuple(like.shape)
    n = np.random.default_rng(zlib.crc32((prefix + key).encode())).standard_normal(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        n = 1 + 0.1 * abs(n)
    elif last == "running_mean":
        n = 0.1 * n
    elif last in ("g", "scale"):
        n = 1 + 0.05 * n
    elif last == "gamma":
        n = 1 + 0.3 * n
    elif last == "beta":
        n = 0.3 * n
    elif n.ndim == 1:
        n = 1 + 0.1 * n if last == "weight" else 0.1 * n
    else:
        n = n / np.sqrt(np.prod(shape[1:]))
        if key.endswith(("cls_x.weight", "cls_y.weight")):
            n = n * 0.001
    return torch.from_numpy(np.asarray(n)).float()


@pytest.fixture
def fill() -> Callable[..., nn.Module]:
    """Give a network the weights that the recordings were made with."""

    def put(network: nn.Module, prefix: str = "") -> nn.Module:
        state = network.state_dict()
        network.load_state_dict(
            {
                k: v if k.endswith("num_batches_tracked") else _value(k, v, prefix).to(v)
                for k, v in state.items()
            }
        )
        return network

    return put

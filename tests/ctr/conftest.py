from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from cohobate.ctr.nets import Common, Features, Layout


@pytest.fixture
def layout() -> Layout:
    return Layout(ids=300, profile=3, candidate=2, context=1, pairs=(0, 1, -1), dense=2, length=40)


@pytest.fixture
def common() -> Common:
    """Embeddings large enough for every path to matter in the output."""
    return Common(head=(16, 8), embedding_std=0.5)


@pytest.fixture
def features(layout: Layout) -> Features:
    return layout.example(5)


@pytest.fixture
def settle():
    """Give running statistics and logit norm non-trivial values, then switch to evaluation."""

    def run(network: torch.nn.Module, features: Features) -> torch.nn.Module:
        network.train()
        with torch.no_grad():
            for _ in range(3):
                network(*features)
        return network.eval()

    return run


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data of the tests go into a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COHOBATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


SCHEMA: dict[str, Any] = {
    "label": "label",
    "user": "user_id",
    "time": "timestamp",
    "profile": ["user_id"],
    "candidate": ["item", "category"],
    "context": ["hour"],
    "dense": ["price"],
    "history": {"hist_item": "item", "hist_category": "category", "hist_action": "action"},
    "history_time": "hist_timestamp",
    "length": 5,
    "fields": {
        "user_id": {"encoding": "hash", "size": 50},
        "item": {"encoding": "hash", "size": 40},
        "category": {"encoding": "identity", "size": 8},
        "hour": {"encoding": "identity", "size": 24},
        "action": {"encoding": "identity", "size": 4},
    },
}
START = 1_600_000_000


@pytest.fixture
def schema_dict() -> dict[str, Any]:
    return copy.deepcopy(SCHEMA)


@pytest.fixture
def make_rows() -> Callable[..., dict[str, list[Any]]]:
    """Columns of a valid click log of ``n`` rows, as Python lists that a test can spoil."""

    def make(n: int = 12, start: int = 0) -> dict[str, list[Any]]:
        rows = range(start, start + n)
        lengths = [i % 8 for i in rows]
        times = [START + 100 * i for i in rows]
        return {
            "label": [i % 3 == 0 for i in rows],
            "user_id": [i // 4 for i in rows],
            "timestamp": times,
            "item": [i * 7 for i in rows],
            "category": [i % 8 for i in rows],
            "hour": [i % 24 for i in rows],
            "price": [i / 10 for i in rows],
            "hist_item": [
                [1000 * i + j for j in range(k)] for i, k in zip(rows, lengths, strict=True)
            ],
            "hist_category": [[j % 8 for j in range(k)] for k in lengths],
            "hist_action": [[j % 4 for j in range(k)] for k in lengths],
            "hist_timestamp": [
                [t - 10 * (k - j) for j in range(k)] for t, k in zip(times, lengths, strict=True)
            ],
        }

    return make


@pytest.fixture
def write_log(make_rows: Callable[..., dict[str, list[Any]]]) -> Callable[..., Path]:
    """Write train, valid and test shards and a schema into a folder."""

    def write(
        root: Path,
        schema: dict[str, Any] | None = None,
        train: dict[str, list[Any]] | None = None,
        group: int = 5,
    ) -> Path:
        for split in ("train", "valid", "test"):
            (root / split).mkdir(parents=True)
            rows = train if split == "train" and train is not None else make_rows()
            pq.write_table(pa.table(rows), root / split / "a.parquet", row_group_size=group)
        (root / "schema.yaml").write_text(yaml.safe_dump(schema or SCHEMA, sort_keys=False))
        return root

    return write

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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
def shifted(layout: Layout):
    """The same layout with room for more padding."""
    return replace(layout, length=layout.length + 64)

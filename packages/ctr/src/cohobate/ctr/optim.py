"""Optimisers for click networks: the embedding tables apart from the dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

EmbeddingOptimizer = Literal["adam", "adagrad"]


class JointOptimizer(Optimizer):
    """Several optimisers that step together, so that Lightning sees one.

    Automatic optimisation, accumulation and precision work as with a single optimiser.

    Args:
        optimizers: each with its own parameters.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([g for o in self.optimizers for g in o.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Evaluate the closure once, then step each optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of each."""
        return {"optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore each, and see its groups again."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [g for o in self.optimizers for g in o.param_groups]


def click_optimizer(
    network: nn.Module,
    *,
    lr: float,
    embedding_lr: float | None = None,
    embedding_optimizer: EmbeddingOptimizer = "adam",
) -> Optimizer:
    """Adam for dense weights; Adam or Adagrad for embedding tables.

    Args:
        network: all trained networks.
        lr: learning rate of the dense weights.
        embedding_lr: learning rate of the tables; default ``lr``.
        embedding_optimizer: of the tables; with sparse gradients Adam is its lazy form, which
            touches only the rows of a batch (Adagrad always does).
    """
    modules = [m for m in network.modules() if isinstance(m, nn.Embedding)]
    tables = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
    sparse = any(m.sparse for m in modules)
    if sparse:  # the optimisers' own sparse tensors are sound: say so, or torch warns
        torch.sparse.check_sparse_tensor_invariants.disable()
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in tables]
    rate = lr if embedding_lr is None else embedding_lr
    if embedding_optimizer == "adagrad":
        return JointOptimizer(
            [torch.optim.Adagrad(list(tables.values()), lr=rate), torch.optim.Adam(rest, lr=lr)]
        )
    if not sparse:
        groups = [{"params": rest, "lr": lr}, {"params": list(tables.values()), "lr": rate}]
        return torch.optim.Adam(groups)
    lazy = {id(m.weight) for m in modules if m.sparse}
    rest += [p for key, p in tables.items() if key not in lazy]
    slow = [p for key, p in tables.items() if key in lazy]
    return JointOptimizer([torch.optim.SparseAdam(slow, lr=rate), torch.optim.Adam(rest, lr=lr)])

"""What the student learns from: the teacher's answers and the nearest centroids' embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cohobate.core.io import load_weights, save_atomic
from cohobate.docking.data.features import centroids
from cohobate.docking.data.sources import by_target


@dataclass(frozen=True)
class Answers:
    """For every complex of the data.

    Attributes:
        fitness: The teacher's, pK (n,).
        hidden: The teacher's pooled trunk tokens (n, H).
        prior: Those of the complex of the nearest centroid with the same target (n, H).
    """

    fitness: Tensor
    hidden: Tensor
    prior: Tensor


@torch.no_grad()
def answers_of(model: Any, data: Any, path: Path) -> Answers:
    """Ask the structure model about every complex once; afterwards read the file.

    Args:
        model: The module, with ``network`` and ``centroids``.
        data: The data module.
        path: Where the answers are kept.
    """
    if not path.exists():
        fitness, hidden = [], []
        for batch in data.batches_of(range(len(data.data))):
            known = model.network.trunk({k: v.to(model.device) for k, v in batch.items()})
            fitness.append(model.network.fitness(*known).cpu())
            hidden.append(known.pooled().cpu())
        states = torch.cat(hidden)
        prior = states[nearest(data, model.centroids)]
        found = {"fitness": torch.cat(fitness), "hidden": states, "prior": prior}
        path.parent.mkdir(parents=True, exist_ok=True)
        with save_atomic(path) as temporary:
            save_file(found, temporary)
    return Answers(**load_weights(path))


def nearest(data: Any, count: int) -> Tensor:
    """Place of each complex's nearest centroid (n,) by Tanimoto, inside its target.

    Centroids are chosen among the training molecules and those without label.
    """
    complexes = data.data.complexes
    open_to = {*data.parts["train"], *data.extra}
    found = torch.zeros(len(complexes), dtype=torch.long)
    for places in by_target(complexes).values():
        own = [i for i in places if i in open_to] or places
        chosen = [own[i] for i in centroids([complexes[i].molecule for i in own], count)]
        bits = torch.stack([data.data[i]["bits"] for i in places])
        found[places] = torch.tensor(chosen)[tanimoto(bits, bits_of(data, chosen)).argmax(1)]
    return found


def bits_of(data: Any, places: list[int]) -> Tensor:
    """Fingerprints (n, bits) of complexes."""
    return torch.stack([data.data[i]["bits"] for i in places])


def tanimoto(a: Tensor, b: Tensor) -> Tensor:
    """Similarity (n, m) of fingerprints (n, bits) and (m, bits).

    Example:
        >>> tanimoto(torch.tensor([[1.0, 1, 0]]), torch.tensor([[1.0, 0, 0]])).item()
        0.5
    """
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)

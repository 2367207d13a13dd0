"""Where the student's targets come from: the structure model of this run, or files of another.

Every teacher gives a fitness in units of pK and a hidden state for each complex: the mean token of
the ligand beside that of the pocket.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import load_weights
from cohobate.docking.data.features import Complex


class Teacher(Protocol):
    """Answers about complexes of the data."""

    def answers(self, data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fitness (n,) in pK and hidden states (n, H)."""
        ...


class CompactTeacher:
    """The structure model in this process.

    Args:
        network: It.
        device: Where it is.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network, self.device = network, device

    @torch.no_grad()
    def answers(self, data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ask it, 16 complexes at a time."""
        fitness, hidden = [], []
        for batch in data.batches_of(places):
            known = self.network.trunk({k: v.to(self.device) for k, v in batch.items()})
            fitness.append(self.network.fitness(*known).cpu())
            hidden.append(known.pooled().cpu())
        return torch.cat(fitness), torch.cat(hidden)


class FilesTeacher:
    """Files of any model: one for each complex, named ``<target>__<molecule>``.

    ``.npz`` or ``.pt`` with tokens ``s`` (N, C), the ligand's tokens last. The fitness is under
    ``fitness``, else in ``<target>__<molecule>_affinity.json`` under ``affinity`` (pK), as the
    released program writes it, or under ``affinity_pred_value``, as Boltz writes it: log10 of the
    IC50 in µM, lower is better, so that pK = 6 - value.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder of teacher files")

    def answers(self, data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read one file for each complex.

        Raises:
            InputError: A file is missing or holds something else.
        """
        found = [self.one(data.data.complexes[i]) for i in places]
        return torch.tensor([f for f, _ in found]), torch.stack([h for _, h in found])

    def one(self, of: Complex) -> tuple[float, Tensor]:
        """Fitness (pK) and hidden state (2 C,) of a complex."""
        stem = self.folder / f"{of.target}__{of.name}"
        path = next((p for e in ("npz", "pt") if (p := Path(f"{stem}.{e}")).exists()), None)
        if path is None:
            raise InputError(f"{stem}.npz: the teacher has no file for this complex")
        arrays = _arrays(path)
        count = of.molecule.GetNumAtoms()
        tokens = arrays.get("s")
        if tokens is None or tokens.ndim != 2 or len(tokens) <= count:
            raise InputError(f"{path}: needs s (N, C) with more tokens than the ligand's {count}")
        hidden = torch.cat((tokens[-count:].mean(0), tokens[:-count].mean(0))).float()
        if "fitness" in arrays:
            return float(arrays["fitness"]), hidden
        return fitness_of(Path(f"{stem}_affinity.json")), hidden


def fitness_of(path: Path) -> float:
    """Fitness in pK from an affinity file of the released program or of Boltz.

    Raises:
        InputError: The file is missing or has neither number.
    """
    try:
        found = json.loads(path.read_text())
        if "affinity_pred_value" in found:
            return 6.0 - float(found["affinity_pred_value"])
        return float(found["affinity"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no number under affinity or affinity_pred_value") from None


def _arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        return load_weights(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None

"""Where the student's targets come from: the structure model of this run, or another's files.

Every teacher gives a fitness in units of pK and a hidden state for each complex: the mean token of
the ligand beside that of the pocket.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rdkit import Chem
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import load_weights
from cohobate.docking.aurobind.network import Embedding
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
        state: What of the trunk's answer is the hidden state (B, H).
    """

    def __init__(
        self,
        network: Any,
        device: torch.device,
        state: Callable[[Embedding], Tensor] = Embedding.pooled,
    ) -> None:
        self.network, self.device, self.state = network, device, state

    @torch.no_grad()
    def answers(self, data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ask it, 16 complexes at a time."""
        fitness, hidden = [], []
        for batch in data.batches_of(places):
            known = self.network.trunk({k: v.to(self.device) for k, v in batch.items()})
            fitness.append(self.network.fitness(*known).cpu())
            hidden.append(self.state(known).cpu())
        return torch.cat(fitness), torch.cat(hidden)


class FolderTeacher(ABC):
    """Answers of another model in a folder, complex by complex."""

    folder: Path

    def answers(self, data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read them; what is missing is asked for first.

        Raises:
            InputError: Something is missing and stays so, or a file holds something else.
        """
        complexes = [data.data.complexes[i] for i in places]
        _apart(complexes)
        found = [self.one(c) for c in complexes]
        missing = [c for c, known in zip(complexes, found, strict=True) if known is None]
        if missing:
            self.ask(missing)
            found = [known or self.one(c) for c, known in zip(complexes, found, strict=True)]
        answered = [known for known in found if known is not None]
        if len(answered) < len(found):
            raise InputError(self.complaint([c for c in missing if self.one(c) is None]))
        return torch.tensor([f for f, _ in answered]), torch.stack([h for _, h in answered])

    @abstractmethod
    def one(self, of: Complex) -> tuple[float, Tensor] | None:
        """Fitness (pK) and hidden state (2 C,) of a complex, if the folder has them."""

    @abstractmethod
    def ask(self, missing: Sequence[Complex]) -> None:
        """See to it that the folder has these."""

    @abstractmethod
    def complaint(self, missing: Sequence[Complex]) -> str:
        """What to say when it has not."""


class FilesTeacher(FolderTeacher):
    """Files of any model: one for each complex, named ``<target>__<molecule>``.

    ``.npz`` or ``.pt`` with tokens ``s`` (N, C), the ligand's tokens last. The fitness is under
    ``fitness``, else in ``<target>__<molecule>_affinity.json`` under ``affinity`` (pK), or under
    ``affinity_pred_value``, as Boltz writes it.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder of teacher files")

    def one(self, of: Complex) -> tuple[float, Tensor] | None:
        """Fitness (pK) and hidden state (2 C,) of a complex, if it has a file."""
        stem = self.folder / name_of(of)
        path = next((p for e in ("npz", "pt") if (p := Path(f"{stem}.{e}")).exists()), None)
        if path is None:
            return None
        arrays = arrays_of(path)
        hidden = pooled(arrays.get("s"), of, path)
        if "fitness" in arrays:
            return float(arrays["fitness"]), hidden
        return fitness_of(Path(f"{stem}_affinity.json")), hidden

    def ask(self, missing: Sequence[Complex]) -> None:
        """Nobody answers."""

    def complaint(self, missing: Sequence[Complex]) -> str:
        """Names the first file that is missing."""
        return f"{self.folder / name_of(missing[0])}.npz: the teacher has no file for this complex"


def name_of(one: Complex) -> str:
    """What a complex is called in files: ``<target>__<molecule>``, other signs as ``_``."""
    return re.sub(r"[^\w.-]", "_", f"{one.target}__{one.name}")


def pooled(tokens: Tensor | None, of: Complex, path: Path) -> Tensor:
    """Mean token of the ligand beside that of the rest (2 C,), from tokens (N, C) or (1, N, C).

    Raises:
        InputError: There are no tokens, or no more than the ligand has atoms.
    """
    count = of.molecule.GetNumAtoms()
    if tokens is not None and tokens.ndim == 3 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens is None or tokens.ndim != 2 or len(tokens) <= count:
        raise InputError(f"{path}: needs s (N, C) with more tokens than the ligand's {count}")
    tokens = tokens.float()  # some are written in half precision
    return torch.cat((tokens[-count:].mean(0), tokens[:-count].mean(0)))


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


def arrays_of(path: Path) -> dict[str, Tensor]:
    """Tokens ``s``, and ``fitness`` where it is given, of a .npz or .pt file."""
    if path.suffix == ".pt":
        return load_weights(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {n: torch.from_numpy(file[n]) for n in ("s", "fitness") if n in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None


def _apart(complexes: Sequence[Complex]) -> None:
    """Different complexes have different files."""
    known: dict[str, tuple[str, str]] = {}
    for one in complexes:
        what = (one.target, Chem.MolToSmiles(one.molecule))
        if known.setdefault(name_of(one), what) != what:
            raise InputError(f"{name_of(one)}: two complexes would have files of this name")

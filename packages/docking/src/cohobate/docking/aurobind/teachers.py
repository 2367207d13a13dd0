"""Where the student's targets come from: the structure model of this run, or files of another.

Every teacher gives a fitness in units of pK and a hidden state for each complex: the mean token of
the ligand beside that of the pocket.
"""

from __future__ import annotations

import json
import re
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
    released program writes it, or under ``affinity_pred_value``, as Boltz writes it.

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
        stem = self.folder / name_of(of)
        path = next((p for e in ("npz", "pt") if (p := Path(f"{stem}.{e}")).exists()), None)
        if path is None:
            raise InputError(f"{stem}.npz: the teacher has no file for this complex")
        arrays = _arrays(path)
        hidden = pooled(arrays.get("s"), of, path)
        if "fitness" in arrays:
            return float(arrays["fitness"]), hidden
        return fitness_of(Path(f"{stem}_affinity.json")), hidden


class BoltzTeacher(FilesTeacher):
    """The output folder of ``boltz predict --write_embeddings``; names as for `FilesTeacher`.

    The ligand stands last in each input and is the binder of its affinity. Boltz wants an
    environment of its own and is not started here. Its value is the log10 of the IC50 in µM, lower
    is better; pK = 6 - value.

    Args:
        folder: The folder with ``predictions``, or the one above.
    """

    hint = (
        "boltz predict INPUTS --write_embeddings makes it (in an environment of its own: "
        "uv tool install boltz)"
    )

    def one(self, of: Complex) -> tuple[float, Tensor]:
        """Fitness (pK) and hidden state (2 C,) of a complex."""
        name = name_of(of)
        folder = _only(self.folder, f"predictions/{name}", self.hint)
        path = _only(folder, f"embeddings_{name}.npz", self.hint)
        hidden = pooled(_arrays(path).get("s"), of, path)
        return fitness_of(_only(folder, f"affinity_{name}.json", self.hint)), hidden


class OpenFold3Teacher(FilesTeacher):
    """The output folder of OpenFold3 with ``write_latent_outputs``, queries named as above.

    OpenFold3 predicts no affinity: the hidden state is its, the fitness that of another teacher.

    Args:
        folder: Its output folder.
        fitness: Who knows the fitness.
    """

    hint = (
        "run_openfold predict with output_writer_settings: {write_latent_outputs: true} makes it "
        "(in an environment of its own: pip install openfold3)"
    )

    def __init__(self, folder: Path, fitness: Teacher) -> None:
        super().__init__(folder)
        self.fitness = fitness

    def answers(self, data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read one file for each complex; of several seeds the first by name.

        Raises:
            InputError: A file is missing or holds something else.
        """
        states = []
        for one in (data.data.complexes[i] for i in places):
            name = name_of(one)
            path = _only(self.folder, f"{name}/seed_*/{name}_seed_*_latent_output.pt", self.hint)
            states.append(pooled(load_weights(path).get("si_trunk"), one, path))
        return self.fitness.answers(data, places)[0], torch.stack(states)


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
    return torch.cat((tokens[-count:].mean(0), tokens[:-count].mean(0))).float()


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


def _only(folder: Path, pattern: str, hint: str) -> Path:
    """The first file of a pattern, here or one folder below."""
    found = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
    if not found:
        raise InputError(f"{folder / pattern}: no such file; {hint}")
    return found[0]


def _arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        return load_weights(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None

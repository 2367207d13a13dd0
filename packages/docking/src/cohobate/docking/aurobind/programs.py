"""Other structure models as teachers: their inputs are written, they are run, their outputs read.

They want environments of their own and are sub-processes. Each gives tokens for a complex; a
complex that has them is not computed again, so a run that was stopped goes on.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import shlex
import shutil
import string
import subprocess
import sys
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from rdkit import Chem
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import load_weights
from cohobate.docking.aurobind.teachers import (
    FilesTeacher,
    FolderTeacher,
    Teacher,
    arrays_of,
    fitness_of,
    name_of,
    pooled,
)
from cohobate.docking.data.features import Complex
from cohobate.docking.data.receptors import Chain

log = logging.getLogger("cohobate")
Kind = Literal["files", "boltz", "openfold3", "aurobind"]


def teacher_of(kind: Kind, folder: Path, run: str | None, own: Teacher) -> Teacher:
    """The teacher whose answers are, or will be, in a folder.

    Args:
        kind: ``files``, or a program.
        folder: It.
        run: How the program is started, with options of the user's; ``None``: not from here.
        own: Who knows the fitness where the program does not.

    Raises:
        InputError: There is no program to run, or no such folder.
    """
    if kind == "files":
        if run is not None:
            raise InputError("model.teacher_run: teacher_kind files is of no program")
        return FilesTeacher(folder)
    if kind == "openfold3":
        return OpenFold3Teacher(folder, own, run)
    return (BoltzTeacher if kind == "boltz" else AuroBindTeacher)(folder, run)


class ProgramTeacher(FolderTeacher):
    """The output folder of a program, which may be run to fill it.

    Its inputs go to ``inputs/<program>`` in the folder, only those of complexes without an answer.
    They are named ``<target>__<molecule>``; proteins are A, B and so on, the ligand comes last.

    Args:
        folder: It; made when there is something to write.
        run: How the program is started, split as a shell would; ``None``: it is not, and what is
            missing is an error with the command that makes it.

    Raises:
        InputError: ``run`` is empty or has an open quotation.
    """

    kind: ClassVar[str]
    """Its name."""
    started: ClassVar[str]
    """How the program is started where it is at home."""
    install: ClassVar[str]
    """How to get it."""
    needed: ClassVar[tuple[str, ...]]
    """Files of a complex, of which only the first is a tensor file."""

    def __init__(self, folder: Path, run: str | None = None) -> None:
        self.folder, self.run = Path(folder).resolve(), run
        try:
            self.words = shlex.split(self.started if run is None else run)
        except ValueError as error:
            raise InputError(f"model.teacher_run: {run}: {error}") from None
        if not self.words:
            raise InputError("model.teacher_run: is empty")

    @property
    def inputs(self) -> Path:
        """Where the program's inputs are."""
        return self.folder / "inputs" / self.kind

    @abstractmethod
    def write(self, missing: Sequence[Complex]) -> None:
        """Write inputs of these, and no others."""

    @abstractmethod
    def command(self) -> list[str]:
        """What answers the inputs, word by word."""

    def places(self) -> Iterable[Path]:
        """Folders that may hold answers: this one, or that of a run inside."""
        return [self.folder, *(p.parent for p in sorted(self.folder.glob("*/predictions")))]

    def files(self, of: Complex) -> list[Path] | None:
        """The files of a complex, all from one run, if they are there and whole."""
        for place in self.places():
            patterns = (n.format(name=name_of(of)) for n in self.needed)
            found = [sorted(place.glob(pattern)) for pattern in patterns]
            # A program that was killed leaves an archive without its directory.
            if all(found) and zipfile.is_zipfile(found[0][0]):
                return [one[0] for one in found]
        return None

    def ask(self, missing: Sequence[Complex]) -> None:
        """Write the inputs of these, and run the program.

        Raises:
            InputError: A target has no sequence, the program is not there, or it fails.
        """
        for one in missing:
            if not one.pocket.chains:
                raise InputError(
                    f"{one.target}: only its pocket is known, and a structure model needs the "
                    "whole sequence: sequences.csv (target, sequence) in data.root"
                )
        self.write(missing)
        words = self.command()
        if self.run is None:
            raise InputError(
                f"{self.folder}: no answer to {_some(missing)}; the inputs are written, and this "
                f"makes the answers: {shlex.join(words)} (or --model.teacher_run "
                f"'{self.started}' from here; to install: {self.install})"
            )
        if shutil.which(words[0]) is None:
            raise InputError(
                f"{words[0]}: no such program (to install: {self.install}); the inputs are "
                f"written, and where it is, this makes the answers: {shlex.join(words)}"
            )
        log.info("%s: %d complexes; %s", words[0], len(missing), shlex.join(words))
        code, last = _run(words)
        if code:
            raise InputError(f"{shlex.join(words)}: ended with {code}: {last}")

    def complaint(self, missing: Sequence[Complex]) -> str:
        """The program ended well and has left some out."""
        return f"{self.folder}: {self.words[0]} has run and not answered {_some(missing)}"


class BoltzTeacher(ProgramTeacher):
    """Boltz-2, by ``boltz predict --write_embeddings``.

    Its value is the log10 of the IC50 in µM, lower is better; pK = 6 - value.
    """

    kind = "boltz"
    started = "boltz predict"
    install = "uv tool install boltz"
    needed = ("predictions/{name}/embeddings_{name}.npz", "predictions/{name}/affinity_{name}.json")

    def one(self, of: Complex) -> tuple[float, Tensor] | None:
        """Fitness (pK) and hidden state (2 C,) of a complex, if it is answered."""
        files = self.files(of)
        if files is None:
            return None
        return fitness_of(files[1]), pooled(arrays_of(files[0]).get("s"), of, files[0])

    def write(self, missing: Sequence[Complex]) -> None:
        """One YAML for each, with the ligand as the binder."""
        documents = {name_of(one): _entities(one, self.words) for one in missing}
        for document in documents.values():
            binder = document["sequences"][-1]["ligand"]["id"]
            document["properties"] = [{"affinity": {"binder": binder}}]
        _write_yaml(self.inputs, documents)
        if self.run is None:
            return
        for name in documents:
            # Boltz takes a folder that it has begun for a finished one.
            begun = self.folder / "boltz_results_boltz" / "predictions" / name
            whole = self.needed[0].format(name=name).rpartition("/")[2]
            if begun.is_dir() and not zipfile.is_zipfile(begun / whole):
                shutil.rmtree(begun)

    def command(self) -> list[str]:
        """It goes on where it was stopped by itself."""
        out = ["--out_dir", str(self.folder), "--write_embeddings"]
        return [*self.words, str(self.inputs), *out]


class AuroBindTeacher(ProgramTeacher):
    """The released AuroBind, by ``run_aurobind.py --save_features``; its affinity is a pK."""

    kind = "aurobind"
    started = "python run_aurobind.py"
    install = "clone github.com/GENTEL-lab/AuroBind, environment and weights as its README says"
    needed = (
        "features/{name}/features_{name}.pt",
        "predictions/{name}/{name}_seed-*_affinity.json",
    )

    def one(self, of: Complex) -> tuple[float, Tensor] | None:
        """Fitness (pK) and hidden state (2 C,) of a complex, if it is answered."""
        files = self.files(of)
        if files is None:
            return None
        return fitness_of(files[1]), pooled(load_weights(files[0]).get("s"), of, files[0])

    def write(self, missing: Sequence[Complex]) -> None:
        """One YAML for each."""
        _write_yaml(self.inputs, {name_of(one): _entities(one, self.words) for one in missing})

    def command(self) -> list[str]:
        """One pose is enough for the tokens and the affinity."""
        out = ["--out_dir", str(self.folder), "--save_features", "--num_diffusion_samples", "1"]
        return [*self.words, str(self.inputs), *out]


class OpenFold3Teacher(ProgramTeacher):
    """OpenFold3, by ``run_openfold predict`` with ``write_latent_outputs``.

    It predicts no affinity: the hidden state is its, the fitness that of another teacher. Of
    several seeds the first by name counts. A ``--runner_yaml`` in ``run`` stands in the place of
    the one that is written, and has to set ``write_latent_outputs`` itself.

    Args:
        folder: As for `ProgramTeacher`.
        fitness: Who knows the fitness.
        run: As for `ProgramTeacher`.
    """

    kind = "openfold3"
    started = "run_openfold predict"
    install = "pip install openfold3, in an environment of its own"
    needed = ("{name}/seed_*/{name}_seed_*_latent_output.pt",)

    def __init__(self, folder: Path, fitness: Teacher, run: str | None = None) -> None:
        super().__init__(folder, run)
        self.fitness = fitness

    def answers(self, data: Any, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fitness (n,) of the other, hidden states (n, H) of OpenFold3."""
        _, hidden = super().answers(data, places)
        return self.fitness.answers(data, places)[0], hidden

    def one(self, of: Complex) -> tuple[float, Tensor] | None:
        """No fitness, and the hidden state (2 C,) of a complex, if it is answered."""
        files = self.files(of)
        if files is None:
            return None
        return float("nan"), pooled(load_weights(files[0]).get("si_trunk"), of, files[0])

    def places(self) -> Iterable[Path]:
        """This folder alone."""
        return [self.folder]

    def write(self, missing: Sequence[Complex]) -> None:
        """One file with all queries, and one that has the tokens written out."""
        queries = {name_of(one): {"chains": _chains(one)} for one in missing}
        _write(self.inputs / "queries.json", json.dumps({"queries": queries}, indent=1))
        runner = {"output_writer_settings": {"write_latent_outputs": True}}
        _write(self.inputs / "runner.yml", yaml.safe_dump(runner))

    def command(self) -> list[str]:
        """The user's options go before these; no server is asked unless they say so."""
        words = [*self.words, "--query_json", str(self.inputs / "queries.json")]
        words += ["--output_dir", str(self.folder)]
        given = {word.partition("=")[0].replace("-", "_") for word in self.words}
        for option, value in (
            ("--runner_yaml", str(self.inputs / "runner.yml")),
            ("--use_msa_server", "False"),
            ("--use_templates", "False"),
        ):
            if option.replace("-", "_") not in given:
                words += [option, value]
        return words


def chain_id(place: int) -> str:
    """Name of a chain by its place: A to Z, then AA, AB and so on.

    Example:
        >>> [chain_id(i) for i in (0, 25, 26, 701, 702)]
        ['A', 'Z', 'AA', 'ZZ', 'AAA']
    """
    before, letter = divmod(place, 26)
    return (chain_id(before - 1) if before else "") + string.ascii_uppercase[letter]


def _grouped(one: Complex) -> tuple[dict[Chain, list[str]], str, str]:
    """The names of each different chain, and the ligand's name and SMILES."""
    names: dict[Chain, list[str]] = {}
    for place, chain in enumerate(one.pocket.chains):
        names.setdefault(chain, []).append(chain_id(place))
    return names, chain_id(len(one.pocket.chains)), Chem.MolToSmiles(one.molecule)


def _entities(one: Complex, words: Sequence[str]) -> dict[str, Any]:
    """What Boltz and AuroBind read."""
    names, ligand, smiles = _grouped(one)
    found: list[dict[str, dict[str, Any]]] = []
    for chain, ids in names.items():
        protein = {"id": ids if len(ids) > 1 else ids[0], "sequence": chain.sequence}
        # Without an alignment: that of the server, if it may be asked, else the sequence alone.
        if chain.msa is not None:
            protein["msa"] = str(chain.msa)
        elif "--use_msa_server" not in words:
            protein["msa"] = "empty"
        found.append({"protein": protein})
    found.append({"ligand": {"id": ligand, "smiles": smiles}})
    return {"version": 1, "sequences": found}


def _chains(one: Complex) -> list[dict[str, Any]]:
    """What OpenFold3 reads."""
    names, ligand, smiles = _grouped(one)
    found: list[dict[str, Any]] = []
    for chain, ids in names.items():
        known = {"main_msa_file_paths": [str(chain.msa)]} if chain.msa else {}
        protein = {"molecule_type": "protein", "chain_ids": ids, "sequence": chain.sequence}
        found.append({**protein, **known})
    found.append({"molecule_type": "ligand", "chain_ids": [ligand], "smiles": smiles})
    return found


def _write_yaml(folder: Path, documents: dict[str, Any]) -> None:
    """One file for each; the program computes whatever the folder holds."""
    for old in folder.glob("*.yaml"):
        if old.stem not in documents:
            old.unlink()
    for name, document in documents.items():
        _write(folder / f"{name}.yaml", yaml.safe_dump(document, sort_keys=False))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _run(words: Sequence[str]) -> tuple[int, str]:
    """Run a program with its output shown as it comes; exit code and last line of its errors."""
    decoder, tail = codecs.getincrementaldecoder("utf-8")("replace"), ""
    try:
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            for chunk in iter(partial(os.read, process.stderr.fileno(), 4096), b""):
                text = decoder.decode(chunk)
                sys.stderr.write(text)
                sys.stderr.flush()
                tail = (tail + text)[-4096:]
    except OSError as error:
        raise InputError(f"{words[0]}: {error.strerror}") from None
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return process.returncode, lines[-1] if lines else "without a word"


def _some(complexes: Sequence[Complex]) -> str:
    more = f" and {len(complexes) - 1} more" if len(complexes) > 1 else ""
    return f"{name_of(complexes[0])}{more}"

"""Ligands and libraries, one at a time, with a list of what could not be read.

A library never stands in memory: ``read`` gives records as the file is read.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem, rdBase

from cohobate.core.errors import InputError
from cohobate.docking.data.files import is_gzip, kind, open_text, reading

SUFFIXES = (".smi", ".csv", ".parquet", ".sdf", ".mol2", ".pdbqt")
_SMILES_COLUMNS = ("smiles", "canonical_smiles", "smi", "structure")
_NAME_COLUMNS = ("id", "name", "title", "molecule", "zinc_id", "chembl_id")


@dataclass(frozen=True)
class Record:
    """One molecule of a file.

    Attributes:
        molecule: Parsed and sanitised.
        name: Its name there, else its number.
        place: ``line 12`` or ``record 3``.
        row: Further columns.
    """

    molecule: Chem.Mol
    name: str
    place: str
    row: dict[str, Any] = field(default_factory=dict)


@dataclass
class Problems:
    """What could not be read: file, place and reason.

    Attributes:
        found: (file, place, reason).
    """

    found: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, path: Path, place: str, reason: str) -> None:
        """Note one."""
        self.found.append((path.name, place, " ".join(reason.split())))

    def lines(self) -> list[str]:
        """One line for each."""
        return [f"{name}: {place}: {reason}" for name, place, reason in self.found]


def read(path: Path, problems: Problems) -> Iterator[Record]:
    """Read molecules from ``.smi``, ``.csv``, ``.parquet``, ``.sdf``, ``.mol2`` or ``.pdbqt``.

    All but parquet also as ``.gz``. What does not parse is added to ``problems`` and left out.

    Args:
        path: The file.
        problems: Gets what could not be read.

    Raises:
        InputError: The file cannot be read at all, or is of another kind.
    """
    readers: dict[str, Callable[[Path, Problems], Iterator[Record]]] = {
        ".smi": _smiles, ".smiles": _smiles, ".csv": _table, ".parquet": _parquet,
        ".sdf": _sdf, ".mol2": _mol2, ".pdbqt": _pdbqt,
    }  # fmt: skip
    if kind(path) not in readers:
        raise InputError(f"{path}: a library is {', '.join(SUFFIXES)} (or that with .gz)")
    with rdBase.BlockLogs(), reading(path):
        yield from readers[kind(path)](path, problems)


def rows(
    path: Path, problems: Problems, wanted: Callable[[int], bool] | None = None
) -> Iterator[tuple[str, str, str] | None]:
    """The (SMILES, name, place) of a library, without parsing what is text.

    Args:
        path: As for `read`.
        problems: Gets what could not be read.
        wanted: Whether the row of this number, from 0, is asked for; default every one.

    Yields:
        One for each row; None where it is not asked for, and where an SDF record cannot be read.

    Raises:
        InputError: The file cannot be read at all, or is of another kind.
    """
    found: Iterator[tuple[str, str, str] | None]
    with reading(path):
        if kind(path) in (".smi", ".smiles"):
            found = _smiles_rows(path)
        elif kind(path) == ".csv":
            found = _csv_rows(path)
        elif kind(path) == ".parquet":
            found = (row[:3] for row in _columns(_parquet_rows(path), path, first=1))
        elif kind(path) == ".sdf":
            yield from _sdf_rows(path, problems, wanted)
            return
        else:
            found = (_as_row(record) for record in read(path, problems))
        for number, row in enumerate(found):
            yield row if wanted is None or wanted(number) else None


def parse_smiles(text: str) -> tuple[Chem.Mol | None, str]:
    """A molecule, or why there is none."""
    if not text.strip():
        return None, "no SMILES"
    molecule = Chem.MolFromSmiles(text, sanitize=False)
    if molecule is None:
        return None, f"not SMILES: {text[:40]}"
    return sanitised(molecule)


def sanitised(molecule: Chem.Mol) -> tuple[Chem.Mol | None, str]:
    """The molecule after rdkit's checks, or their complaint."""
    if molecule.GetNumHeavyAtoms() == 0:
        return None, "no heavy atom"
    try:
        Chem.SanitizeMol(molecule)
    except (ValueError, RuntimeError) as error:
        return None, str(error)
    Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
    return molecule, ""


def largest_fragment(molecule: Chem.Mol) -> Chem.Mol:
    """The molecule without its counter-ions: the fragment with most heavy atoms."""
    parts = Chem.GetMolFrags(molecule, asMols=True)
    return max(parts, key=lambda part: part.GetNumHeavyAtoms()) if len(parts) > 1 else molecule


def has_pose(molecule: Chem.Mol) -> bool:
    """Whether a molecule has a place in space; a drawing lies at z = 0."""
    if not molecule.GetNumConformers() or not molecule.GetConformer().Is3D():
        return False
    return bool(np.any(molecule.GetConformer().GetPositions()[:, 2]))


def reference(path: Path) -> Chem.Mol:
    """The first molecule of a file, where it lies.

    Raises:
        InputError: None can be read, or it has no 3-D coordinates.
    """
    problems = Problems()
    record = next(iter(read(path, problems)), None)
    if record is None:
        why = f": {problems.lines()[0]}" if problems.found else ""
        raise InputError(f"{path}: no molecule could be read{why}")
    if not has_pose(record.molecule):
        raise InputError(f"{path}: {record.name} has no 3-D coordinates")
    return record.molecule


def _one(
    molecule: Chem.Mol | None, reason: str, path: Path, place: str, problems: Problems
) -> Iterator[Chem.Mol]:
    if molecule is None:
        problems.add(path, place, reason)
    else:
        yield molecule


def _smiles_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words or (number == 1 and words[0].lower() in _SMILES_COLUMNS):
                continue
            yield words[0], words[1] if len(words) > 1 else str(number), f"line {number}"


def _smiles(path: Path, problems: Problems) -> Iterator[Record]:
    for smiles, name, place in _smiles_rows(path):
        for molecule in _one(*parse_smiles(smiles), path, place, problems):
            yield Record(molecule, name, place)


def _table(path: Path, problems: Problems) -> Iterator[Record]:
    with open_text(path) as file:
        yield from _parsed(_columns(csv.DictReader(file), path, first=2), path, problems)


def _parquet(path: Path, problems: Problems) -> Iterator[Record]:
    yield from _parsed(_columns(_parquet_rows(path), path, first=1), path, problems)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=8192):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None


def _columns(
    rows: Iterable[dict[str, Any]], path: Path, first: int
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    smiles, name = "", ""
    for number, row in enumerate(rows, first):
        if not smiles:
            lower = {str(key).lower(): key for key in row if key is not None}
            smiles = next((lower[c] for c in _SMILES_COLUMNS if c in lower), "")
            name = next((lower[c] for c in _NAME_COLUMNS if c in lower), "")
            if not smiles:
                raise InputError(f"{path}: no column smiles (it has: {', '.join(map(str, row))})")
        yield str(row[smiles] or ""), str(row.get(name) or number), f"line {number}", row


def _parsed(
    found: Iterator[tuple[str, str, str, dict[str, Any]]], path: Path, problems: Problems
) -> Iterator[Record]:
    for smiles, name, place, row in found:
        for molecule in _one(*parse_smiles(smiles), path, place, problems):
            yield Record(molecule, name, place, row)


def _csv_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    with open_text(path) as file:
        for smiles, name, place, _ in _columns(csv.DictReader(file), path, first=2):
            yield smiles, name, place


def _sdf(path: Path, problems: Problems) -> Iterator[Record]:
    for number, block in enumerate(_sdf_blocks(path), 1):
        yield from _sdf_record(block, number, path, problems)


def _sdf_rows(
    path: Path, problems: Problems, wanted: Callable[[int], bool] | None
) -> Iterator[tuple[str, str, str] | None]:
    """A row for each record; what is not asked for is not parsed."""
    for number, block in enumerate(_sdf_blocks(path)):
        asked = wanted is None or wanted(number)
        record = next(_sdf_record(block, number + 1, path, problems), None) if asked else None
        yield None if record is None else _as_row(record)


def _as_row(record: Record) -> tuple[str, str, str]:
    return Chem.MolToSmiles(Chem.RemoveHs(record.molecule)), record.name, record.place


def _sdf_blocks(path: Path) -> Iterator[bytes]:
    """The records as they stand."""
    lines: list[bytes] = []
    with gzip.open(path) if is_gzip(path) else path.open("rb") as file:
        for line in file:
            lines.append(line)
            if line.startswith(b"$$$$"):
                yield b"".join(lines)
                lines = []
    if any(map(bytes.strip, lines)):
        yield b"".join(lines)


def _sdf_record(block: bytes, number: int, path: Path, problems: Problems) -> Iterator[Record]:
    molecule = next(Chem.ForwardSDMolSupplier(io.BytesIO(block), sanitize=False), None)
    place = f"record {number}"
    found = (None, "not an SDF record") if molecule is None else sanitised(molecule)
    for good in _one(*found, path, place, problems):
        if good.GetNumConformers() and good.GetConformer().Is3D():
            Chem.AssignStereochemistryFrom3D(good)
        name = good.GetProp("_Name") if good.HasProp("_Name") else ""
        yield Record(good, name or str(number), place, good.GetPropsAsDict())


def _mol2(path: Path, problems: Problems) -> Iterator[Record]:
    with open_text(path) as file:
        blocks = file.read().split("@<TRIPOS>MOLECULE")[1:]
    for number, block in enumerate(blocks, 1):
        molecule = Chem.MolFromMol2Block(
            "@<TRIPOS>MOLECULE" + block, sanitize=False, removeHs=False
        )
        found = (None, "not a MOL2 record") if molecule is None else sanitised(molecule)
        for good in _one(*found, path, f"record {number}", problems):
            yield Record(good, block.strip().splitlines()[0].strip(), f"record {number}")


def _pdbqt(path: Path, problems: Problems) -> Iterator[Record]:
    """PDBQT has no bond orders; meeko takes them from the SMILES it wrote into a remark."""
    try:
        from meeko import PDBQTMolecule, RDKitMolCreate
    except ImportError:
        raise InputError(
            f"{path}: PDBQT ligands need meeko: pip install 'cohobate-docking[vina]'"
        ) from None
    with open_text(path) as file:
        text = file.read()
    if "REMARK SMILES" not in text:
        problems.add(path, "record 1", "PDBQT without a REMARK SMILES has no bond orders")
        return
    for molecule in RDKitMolCreate.from_pdbqt_mol(PDBQTMolecule(text, skip_typing=True)):
        found = (None, "meeko cannot rebuild it") if molecule is None else sanitised(molecule)
        for good in _one(*found, path, "record 1", problems):
            for number, place in enumerate(good.GetConformers(), 1):
                model = Chem.Mol(good, False, place.GetId())
                yield Record(model, path.name.split(".")[0], f"model {number}")

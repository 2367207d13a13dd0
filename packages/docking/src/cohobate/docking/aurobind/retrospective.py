"""Screens whose answer is known: how early the actives come, and what would have found them too.

Decoys are presumed inactives and differ from actives in more than binding. A student that never
saw the pocket, the similarity to known ligands and the bare size are printed beside the student:
what they reach needs no structure.
"""

from __future__ import annotations

import csv
import json
import logging
import platform
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import DataStructs
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking import vina
from cohobate.docking.aurobind.predict import Site, StudentScorer
from cohobate.docking.data.features import bit_vector, centroids
from cohobate.docking.data.molecules import Problems, largest_fragment, parse_smiles, read
from cohobate.docking.data.receptors import Pocket
from cohobate.docking.metrics import recovery, screening
from cohobate.docking.plots import enrichment_plot
from cohobate.docking.screen import features

log = logging.getLogger("cohobate")

MEASURES = {"ef1": "EF1 %", "bedroc20": "BEDROC20", "auc": "AUC"}
SCORERS = ("student", "other pocket", "similarity", "size")
_COLUMNS = ("target", "library", "receptor", "ligand")
_SAMPLE = 500
SHARES = np.geomspace(1e-3, 1, 91)
"""Shares of the library at which the enrichment curve is drawn."""


@dataclass(frozen=True)
class Case:
    """A target with a library whose answer is known.

    Attributes:
        name: Of the target.
        library: CSV with columns ``smiles`` and ``label`` (1 active, 0 not), also ``.gz``.
        receptor: The protein.
        ligand: Ligands known of the site: the first says where it is, and none is counted.
        group: Means are taken over each group, such as targets seen in training.
        protein_embedding: As for `Site`, where the runs need it.
    """

    name: str
    library: Path
    receptor: Path
    ligand: Path
    group: str = ""
    protein_embedding: Path | None = None


@dataclass(frozen=True)
class Library:
    """A labelled library, without what the model was trained on.

    Attributes:
        smiles: (n,).
        label: 1 for actives (n,).
        bits: Fingerprints (n, bits), uint8.
        counts: Atoms of each element (n, elements).
        similarity: Largest Tanimoto similarity to a known ligand (n,).
        excluded: How many were left out as known.
        unread: How many could not be read.
    """

    smiles: list[str]
    label: np.ndarray
    bits: np.ndarray
    counts: np.ndarray
    similarity: np.ndarray
    excluded: int
    unread: int


def read_cases(path: Path) -> list[Case]:
    """Read a table: target, library, receptor, ligand, and perhaps group and protein_embedding.

    Args:
        path: CSV; its paths are relative to its own folder.

    Raises:
        InputError: The file cannot be read, a column is missing, or a file of it is.
    """
    try:
        with path.open(newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not table:
        raise InputError(f"{path}: no target")
    cases = []
    for number, row in enumerate(table, 2):
        if missing := [name for name in _COLUMNS if not row.get(name)]:
            raise InputError(f"{path}: line {number}: no {missing[0]}")
        given = [name for name in (*_COLUMNS[1:], "protein_embedding") if row.get(name)]
        files = {name: path.parent / row[name] for name in given}
        for found in files.values():
            if not found.exists():
                raise InputError(f"{path}: line {number}: {found}: no such file")
        cases.append(Case(row["target"], group=row.get("group") or "", **files))
    return cases


def read_library(case: Case, exclude: str) -> Library:
    """Read and encode a labelled library.

    A molecule is left out when the column ``exclude`` is 1, or when its fingerprint is that of a
    ligand known of the site.

    Args:
        case: Whose.
        exclude: Name of the column that marks what the model was trained on.

    Raises:
        InputError: A label is missing or not 0 or 1, or nothing or only one kind is left.
    """
    problems = Problems()
    smiles, labels, marked = [], [], []
    for place, row in _rows(case.library):
        if row.get("label") not in ("0", "1"):
            raise InputError(f"{case.library}: {place}: label {row.get('label')!r} is not 0 or 1")
        smiles.append(row.get("smiles") or "")
        labels.append(int(row["label"]))
        marked.append(row.get(exclude) == "1")
    bits, counts, bad = features(smiles)
    good = np.array([i for i in range(len(smiles)) if i not in bad], dtype=np.int64)
    known = [bit_vector(r.molecule) for r in read(case.ligand, problems)]
    near = nearest(bits, np.stack([_array(k) for k in known]))
    kept = ~np.array(marked, bool)[good] & (near < 1)
    label = np.array(labels)[good][kept]
    if label.min(initial=1) == label.max(initial=0):
        raise InputError(f"{case.library}: needs actives and others beside the known ligands")
    return Library(
        [smiles[i] for i in good[kept]], label, bits[kept], counts[kept], near[kept],
        int((~kept).sum()), len(bad),
    )  # fmt: skip


def nearest(bits: np.ndarray, known: np.ndarray, rows: int = 8192) -> np.ndarray:
    """Largest Tanimoto similarity (n,) of fingerprints (n, bits) to known ones (m, bits).

    Example:
        >>> nearest(np.array([[1, 1, 0]]), np.array([[1, 0, 0], [0, 0, 1]])).tolist()
        [0.5]
    """
    own, size = known.astype(np.float32), known.sum(1, dtype=np.float32)
    found = []
    for start in range(0, len(bits), rows):
        some = bits[start : start + rows].astype(np.float32)
        both = some @ own.T
        found.append((both / np.maximum(some.sum(1)[:, None] + size - both, 1)).max(1))
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def scores_of(model: Any, library: Library, own: Pocket, other: Pocket) -> dict[str, np.ndarray]:
    """Scores (n,) of a library by each of `SCORERS`, higher is better."""
    sample = random.Random(0).sample(library.smiles, min(_SAMPLE, len(library.smiles)))
    molecules = [m for m in (parse_smiles(s)[0] for s in sample) if m is not None]
    chosen = [molecules[i] for i in centroids(molecules, model.centroids)]
    found = {
        name: _student(StudentScorer(model, pocket, chosen), library)
        for name, pocket in (("student", own), ("other pocket", other))
    }
    return {**found, "similarity": library.similarity, "size": library.counts.sum(1)}


def retrospective(
    models: Sequence[Any],
    cases: Sequence[Case],
    *,
    max_residues: int,
    exclude: str,
    docked: int = 0,
    dock: Sequence[str] = (),
    exhaustiveness: int = 8,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Screen every library with every model and count.

    Args:
        models: Runs of the last stage; their measures are averaged.
        cases: The libraries. The control's pocket is that of the next one.
        max_residues: The pocket is cut to these nearest to its centre; as in training.
        exclude: See `read_library`.
        docked: Molecules, one third actives, that AutoDock Vina docks as well …
        dock: … for these targets.
        exhaustiveness: Vina's.
        progress: Whether to show a bar.

    Returns:
        For each target its counts, ``measures``: scorer → measure → value, and ``curves``: scorer →
        share of the actives found (S,) at `SHARES`; where Vina docked, also ``docked``, the
        measures on those molecules.

    Raises:
        InputError: A file cannot be read, or there are fewer than two targets.
    """
    if len(cases) < 2:
        raise InputError("retrospective: the control needs a second target")
    if unknown := sorted(set(dock) - {case.name for case in cases}):
        raise InputError(f"retrospective: no target {unknown[0]} to dock into")
    sites = [
        Site(
            c.receptor, c.ligand, max_residues=max_residues, protein_embedding=c.protein_embedding
        ).pocket()
        for c in cases
    ]  # fmt: skip
    table = []
    for place, case in enumerate(tqdm(cases, disable=not progress, unit="target")):
        library = read_library(case, exclude)
        other = sites[(place + 1) % len(sites)]
        every = [scores_of(model, library, sites[place], other) for model in models]
        row: dict[str, Any] = {
            "target": case.name, "group": case.group, "molecules": len(library.label),
            "actives": int(library.label.sum()), "excluded": library.excluded,
            "unread": library.unread, "measures": _mean(every, library.label),
            "curves": _curves(every, library.label),
        }  # fmt: skip
        if case.name in dock and docked:
            row["docked"] = _docked(case, library, every, docked, exhaustiveness)
        table.append(row)
    return table


def report(table: Sequence[dict[str, Any]], checkpoints: Sequence[Path], out: Path) -> None:
    """Write the JSON: a row for each target and each group's mean, all scorers in one cell.

    The picture beside it has a panel of enrichment curves for each row.
    """
    panels = {row["target"]: row["curves"] for row in table}
    rows = [
        {
            "target": row["target"], **({"group": row["group"]} if row["group"] else {}),
            "actives / molecules": f"{row['actives']} / {row['molecules']}",
            **_cells(row["measures"]),
        }
        for row in table
    ]  # fmt: skip
    for group in dict.fromkeys(row["group"] for row in table):
        own = [row for row in table if row["group"] == group]
        means = {
            s: {m: float(np.mean([r["measures"][s][m] for r in own])) for m in MEASURES}
            for s in SCORERS
        }
        about = {"target": f"mean of {len(own)}", **({"group": group} if group else {})}
        rows.append({**about, "actives / molecules": "", **_cells(means)})
        panels[", ".join(about.values())] = {
            s: np.mean([r["curves"][s] for r in own], axis=0) for s in SCORERS
        }
    enrichment_plot(SHARES.tolist(), panels, out.with_suffix(".png"))
    table = [{k: v for k, v in row.items() if k != "curves"} for row in table]
    _write(out, rows, table, checkpoints)
    docked = [
        {"target": row["target"], "actives / docked": row["docked"]["counts"]}
        | {f"AUC: {s}": f"{v['auc']:.3f}" for s, v in row["docked"]["measures"].items()}
        for row in table
        if "docked" in row
    ]
    if docked:
        _write(out.with_name(f"{out.stem}-vina.json"), docked, [], checkpoints)


def _write(
    out: Path, rows: list[dict[str, Any]], table: Sequence[dict[str, Any]], runs: Sequence[Path]
) -> None:
    content = {
        "command": shlex.join(["cohobate-docking", *sys.argv[1:]]),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "rdkit", "cohobate-docking")},
        "runs": len(runs),
        "rows": rows,
        **({"targets": list(table)} if table else {}),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with save_atomic(out) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _cells(measures: dict[str, dict[str, float]]) -> dict[str, str]:
    return {
        f"{label}: {' / '.join(measures)}": " / ".join(
            f"{v[name]:.1f}" if name == "ef1" else f"{v[name]:.2f}" for v in measures.values()
        )
        for name, label in MEASURES.items()
    }


def _mean(every: Sequence[dict[str, np.ndarray]], label: np.ndarray) -> dict[str, dict[str, float]]:
    """Each scorer's measures, averaged over the models."""
    found = {s: [screening(scores[s], label) for scores in every] for s in every[0]}
    return {
        s: {name: float(np.mean([one[name] for one in values])) for name in MEASURES}
        for s, values in found.items()
    }


def _curves(every: Sequence[dict[str, np.ndarray]], label: np.ndarray) -> dict[str, np.ndarray]:
    """Each scorer's enrichment curve, averaged over the models."""
    return {
        s: np.mean([np.interp(SHARES, *recovery(scores[s], label)) for scores in every], axis=0)
        for s in every[0]
    }


def _docked(
    case: Case,
    library: Library,
    every: Sequence[dict[str, np.ndarray]],
    count: int,
    exhaustiveness: int,
) -> dict[str, Any]:
    """Vina and all scorers on a seeded sample, one third of it actives."""
    rng = np.random.default_rng(0)
    some = [
        rng.permutation(np.flatnonzero(library.label == value))[:size]
        for value, size in ((1, count // 3), (0, count - count // 3))
    ]
    places = np.concatenate(some)
    ligand = next(iter(read(case.ligand, Problems()))).molecule.GetConformer().GetPositions()
    middle = ligand.mean(0).tolist()
    box = vina.Box((middle[0], middle[1], middle[2]), (22.5, 22.5, 22.5))
    scores = np.full(len(places), -np.inf)
    with vina.as_pdbqt(vina.prepared(case.receptor)) as receptor:
        docker = vina.Docker(receptor, box, exhaustiveness=exhaustiveness)
        for i, place in enumerate(places):
            molecule, _ = parse_smiles(library.smiles[place])
            assert molecule is not None  # it had a fingerprint
            try:
                scores[i] = -docker.dock(largest_fragment(molecule)).scores[0]
            except InputError as error:
                log.warning("%s: %s", case.name, error)
    own = [{**{s: v[places] for s, v in one.items()}, "Vina": scores} for one in every]
    label = library.label[places]
    return {"counts": f"{label.sum()} / {len(places)}", "measures": _mean(own, label)}


def _student(scorer: StudentScorer, library: Library, rows: int = 8192) -> np.ndarray:
    parts = [
        scorer.score(scorer.encode(library.bits[i : i + rows], library.counts[i : i + rows]))
        for i in range(0, len(library.bits), rows)
    ]
    return np.concatenate(parts)


def _rows(path: Path) -> Any:
    import gzip

    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                yield f"line {number}", row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _array(bits: DataStructs.ExplicitBitVect) -> np.ndarray:
    found = np.zeros(bits.GetNumBits(), np.uint8)
    DataStructs.ConvertToNumpyArray(bits, found)
    return found


__all__ = ["Case", "Library", "nearest", "read_cases", "read_library", "report", "retrospective"]

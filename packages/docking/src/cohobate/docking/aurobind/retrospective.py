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
import torch
from rdkit import Chem
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking import vina
from cohobate.docking.aurobind.predict import Site, StudentScorer, Trained, at_least, pocket_size
from cohobate.docking.aurobind.targets import tanimoto
from cohobate.docking.data.features import atom_counts, centroids, fingerprint, parent
from cohobate.docking.data.molecules import Problems, largest_fragment, parse_smiles, read
from cohobate.docking.data.receptors import Pocket
from cohobate.docking.metrics import recovery, screening
from cohobate.docking.plots import enrichment_plot

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
        library: CSV with columns ``smiles`` and ``label`` (1 active, 0 not), also ``.gz``; or
            parquet, or SDF with such a tag.
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
        exclude: Name of the column that marks what the model was trained on; empty for none.

    Raises:
        InputError: A column is missing, a label is not 0 or 1, or nothing or only one kind is left.
    """
    problems = Problems()
    smiles, labels, marked, bits, counts = [], [], [], [], []
    for record in read(case.library, problems):
        label = str(record.row.get("label"))
        if label not in ("0", "1"):
            raise InputError(f"{case.library}: {record.place}: label {label!r} is not 0 or 1")
        if exclude and exclude not in record.row:
            raise InputError(
                f"{case.library}: no column {exclude} (exclude; '' where nothing is to be left out)"
            )
        molecule = parent(record.molecule)
        smiles.append(Chem.MolToSmiles(molecule))
        labels.append(int(label))
        marked.append(bool(exclude) and str(record.row[exclude]) == "1")
        bits.append(fingerprint(molecule))
        counts.append(atom_counts(molecule))
    if not smiles:
        why = f": {problems.lines()[0]}" if problems.found else ""
        raise InputError(f"{case.library}: no molecule could be read{why}")
    unread = len(problems.found)
    known = [fingerprint(parent(r.molecule)) for r in read(case.ligand, problems)]
    if not known:
        raise InputError(f"{case.ligand}: no molecule could be read")
    every = np.stack(bits)
    near = nearest(every, np.stack(known))
    kept = ~np.array(marked) & (near < 1)
    active = np.array(labels)[kept]
    if len(np.unique(active)) < 2:
        raise InputError(f"{case.library}: needs actives and others beside the known ligands")
    return Library(
        [smiles[i] for i in np.flatnonzero(kept)], active, every[kept], np.stack(counts)[kept],
        near[kept], int((~kept).sum()), unread,
    )  # fmt: skip


def nearest(bits: np.ndarray, known: np.ndarray, rows: int = 8192) -> np.ndarray:
    """Largest Tanimoto similarity (n,) of fingerprints (n, bits) to known ones (m, bits).

    Example:
        >>> nearest(np.array([[1, 1, 0]]), np.array([[1, 0, 0], [0, 0, 1]])).tolist()
        [0.5]
    """
    own = torch.from_numpy(known).float()
    found = [
        tanimoto(torch.from_numpy(bits[i : i + rows]).float(), own).amax(1)
        for i in range(0, len(bits), rows)
    ]
    return torch.cat(found).numpy() if found else np.zeros(0, np.float32)


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
    max_residues: int | None = None,
    exclude: str,
    docked: int = 24,
    dock: Sequence[str] = (),
    exhaustiveness: int = 8,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Screen every library with every model and count.

    Args:
        models: Runs of the last stage; their measures are averaged.
        cases: The libraries. The control's pocket is that of the next one.
        max_residues: Pockets are cut to these nearest to their centre; default as in each training.
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
        InputError: A file cannot be read, or there are no model or fewer than two targets.
    """
    at_least(1, docked=docked, exhaustiveness=exhaustiveness)
    if not models:
        raise InputError("retrospective: no checkpoint")
    if len(cases) < 2:
        raise InputError("retrospective: the control needs a second target")
    if unknown := sorted(set(dock) - {case.name for case in cases}):
        raise InputError(f"retrospective: no target {unknown[0]} to dock into")
    sizes = [pocket_size(model, max_residues) for model in models]
    pockets = {
        size: [
            Site(
                c.receptor, c.ligand, max_residues=size, protein_embedding=c.protein_embedding
            ).pocket()
            for c in cases
        ]
        for size in set(sizes)
    }  # fmt: skip
    table = []
    for place, case in enumerate(tqdm(cases, disable=not progress, unit="target")):
        library = read_library(case, exclude)
        other = (place + 1) % len(cases)
        every = [
            scores_of(model, library, pockets[size][place], pockets[size][other])
            for model, size in zip(models, sizes, strict=True)
        ]
        row: dict[str, Any] = {
            "target": case.name, "group": case.group, "molecules": len(library.label),
            "actives": int(library.label.sum()), "excluded": library.excluded,
            "unread": library.unread, "measures": _mean(every, library.label),
            "curves": _curves(every, library.label),
        }  # fmt: skip
        if case.name in dock:
            row["docked"] = _docked(case, library, every, docked, exhaustiveness)
        table.append(row)
    return table


def report(table: Sequence[dict[str, Any]], models: Sequence[Any], out: Path) -> None:
    """Write the JSON: a row for each target, each group's mean and median, all scorers in one cell.

    Under ``targets`` it has every measure. The picture beside it has a panel of enrichment curves
    for each target and each group's mean.
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
        for name, of in (("mean", np.mean), ("median", np.median)):
            middle = {
                s: {m: float(of([r["measures"][s][m] for r in own])) for m in MEASURES}
                for s in SCORERS
            }
            about = {"target": f"{name} of {len(own)}", **({"group": group} if group else {})}
            rows.append({**about, "actives / molecules": "", **_cells(middle)})
        panels[", ".join(filter(None, (f"mean of {len(own)}", group)))] = {
            s: np.mean([r["curves"][s] for r in own], axis=0) for s in SCORERS
        }
    sources = sorted({source for model in models if (source := Trained.of(model).source)})
    title = f"labels trained on: {', '.join(sources)}" if sources else ""
    enrichment_plot(SHARES.tolist(), panels, out.with_suffix(".png"), title)
    table = [{k: v for k, v in row.items() if k != "curves"} for row in table]
    runs = {"runs": len(models), "labels": sources}
    _write(out, {**runs, "rows": rows, "targets": table})
    docked = [
        {"target": row["target"], "actives / docked": row["docked"]["counts"]}
        | {f"AUC: {s}": f"{v['auc']:.3f}" for s, v in row["docked"]["measures"].items()}
        for row in table
        if "docked" in row
    ]
    if docked:
        _write(out.with_name(f"{out.stem}-vina.json"), {**runs, "rows": docked})


def _write(out: Path, found: dict[str, Any]) -> None:
    content = {
        "command": shlex.join(["cohobate-docking", *sys.argv[1:]]),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "rdkit", "cohobate-docking")},
        **found,
    }
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
        s: {name: float(np.mean([one[name] for one in values])) for name in values[0]}
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


__all__ = ["Case", "Library", "nearest", "read_cases", "read_library", "report", "retrospective"]

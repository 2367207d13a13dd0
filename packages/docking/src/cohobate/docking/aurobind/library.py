"""A library ranked for a target: the student on all, the structure model on the best."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet
from rdkit import Chem, DataStructs

from cohobate.core.errors import InputError
from cohobate.core.io import result_folder, save_atomic
from cohobate.docking.aurobind.predict import (
    Site,
    StudentScorer,
    Trained,
    at_least,
    teacher_fitness,
)
from cohobate.docking.data.features import bit_vector, parent
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.plots import molecule_grid
from cohobate.docking.properties import Filters
from cohobate.docking.screen import Screened, screen, some_molecules

log = logging.getLogger("cohobate")
Kind = Literal["csv", "parquet"]


def screen_library(
    model: Any,
    library: Path,
    site: Site,
    out: Path,
    *,
    top: int,
    rescore: int,
    filters: Filters,
    known: Path | None,
    cache: Path,
    kind: Kind = "csv",
    chunk: int = 8192,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Screened | None:
    """Student on all, structure model on the best, filters; writes the table and a picture.

    Args:
        model: A run of the last stage.
        library: The library.
        site: Receptor and pocket.
        out: Folder for ``ranking.csv`` or ``.parquet``, ``problems.csv``, ``top.png``.
        top: How many molecules are kept.
        rescore: How many of them the structure model scores too.
        filters: Property limits; what fails is kept and marked.
        known: File of known actives for the similarity column.
        cache: Folder for encoded chunks.
        kind: Of the ranking's file.
        chunk: Rows of a chunk.
        workers: Further processes for fingerprints.
        accelerator: Lightning's.
        devices: Processes on each machine.
        num_nodes: Machines.

    Returns:
        What was found; None in every process but the first, which alone writes.

    Raises:
        InputError: An option is out of its range, or a file cannot be read or written.
    """
    at_least(1, top=top, chunk=chunk, devices=devices, num_nodes=num_nodes)
    at_least(0, rescore=rescore, workers=workers)
    trained = Trained.of(model)
    actives = [] if known is None else _known(known)
    pocket = site.pocket()
    scorer = StudentScorer(model, pocket, some_molecules(library, 500))
    with result_folder(out), result_folder(cache):
        found = screen(
            library, scorer, cache=cache, state=out / "state.json", top=top, chunk=chunk,
            workers=workers, accelerator=accelerator, devices=devices, num_nodes=num_nodes,
        )  # fmt: skip
    if found is None:
        return None
    molecules = [Chem.MolFromSmiles(smiles) for smiles, _ in found.top.rows]
    again = teacher_fitness(model, molecules[:rescore], pocket).tolist()
    table = [
        {
            "rank": 0, "name": name, "smiles": smiles, "student": float(score),
            "teacher": again[i] if i < len(again) else None,
            **filters.describe(molecules[i], actives),
        }
        for i, ((smiles, name), score) in enumerate(
            zip(found.top.rows, found.top.score, strict=True)
        )
    ]  # fmt: skip
    table.sort(
        key=lambda row: (1, -row["student"]) if row["teacher"] is None else (0, -row["teacher"])
    )
    for rank, row in enumerate(table, 1):
        row["rank"] = rank
    if kind == "parquet":
        with save_atomic(out / "ranking.parquet") as temporary:
            parquet.write_table(pa.Table.from_pylist(table), temporary)
    else:
        _table(out / "ranking.csv", table)
    bad = [dict(zip(("file", "place", "reason"), p, strict=True)) for p in found.problems.found]
    _table(out / "problems.csv", bad, ["file", "place", "reason"])
    best = table[:12]
    molecule_grid(
        [Chem.MolFromSmiles(row["smiles"]) for row in best], [_legend(row) for row in best],
        out / "top.png", trained.source and f"labels: {trained.source}",
    )  # fmt: skip
    return found


def _known(path: Path) -> list[DataStructs.ExplicitBitVect]:
    """Fingerprints of known actives.

    Raises:
        InputError: There is none.
    """
    problems = Problems()
    found = [bit_vector(parent(r.molecule)) for r in read(path, problems)]
    for line in problems.lines():
        log.warning("%s", line)
    if not found:
        raise InputError(f"{path}: no molecule could be read")
    return found


def _table(path: Path, table: list[dict[str, Any]], names: list[str] | None = None) -> None:
    """Write a CSV, numbers to four decimals."""
    with save_atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names or list(table[0]))
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def _legend(row: dict[str, Any]) -> str:
    teacher = "" if row["teacher"] is None else f"teacher {row['teacher']:.2f}, "
    passed = f"fails: {row['failed']}" if row["failed"] else "passes the filters"
    return f"{row['rank']}: {row['name']}\n{teacher}student {row['student']:.2f}\n{passed}"

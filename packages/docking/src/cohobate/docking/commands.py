# ruff: noqa: B008 (the defaults are frozen dataclasses)
"""Commands of this package beside the common ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cohobate.docking.checks import check_poses
from cohobate.docking.data.prepare import prepare
from cohobate.docking.properties import Filters


def screen(
    library: Path,
    receptor: Path,
    checkpoint: Path = Path("runs/aurobind"),
    ligand: Path | None = None,
    centre: tuple[float, float, float] | None = None,
    size: tuple[float, float, float] = (20.0, 20.0, 20.0),
    residues: list[str] | None = None,
    max_residues: int = 24,
    out: Path = Path("screen"),
    cache: Path = Path("screen/cache"),
    top: int = 1000,
    rescore: int = 100,
    known: Path | None = None,
    filters: Filters = Filters(),
    chunk: int = 8192,
    workers: int = 0,
) -> int | None:
    """Rank a library for a target: the student on all, the structure model on the best.

    Args:
        library: .smi, .csv, .parquet or .sdf, also .gz, of any size.
        receptor: The target: .pdb, .cif or .pdbqt, also .gz.
        checkpoint: A run of docking/aurobind.
        ligand: File of a reference ligand in the site …
        centre: … or the centre of a box, Å …
        size: … and its size …
        residues: … or the site's residues, A:123.
        max_residues: The pocket is cut to these nearest to its centre; as in training.
        out: Folder for ranking.csv, problems.csv and top.png; an existing one goes on.
        cache: Folder for the encoded library, shared by targets.
        top: How many molecules are kept.
        rescore: How many of them the structure model scores too.
        known: File of known actives, for the similarity column.
        filters: Property limits; what fails is marked.
        chunk: Rows read at a time.
        workers: Further processes for fingerprints.
    """
    from cohobate.core.runs import load_run
    from cohobate.docking.aurobind.predict import Site, screen_library

    model = load_run(checkpoint)
    site = Site(receptor, ligand, centre, size, residues, max_residues)
    found = screen_library(
        model, library, site, out, top=top, rescore=rescore, filters=filters, known=known,
        cache=cache, chunk=chunk, workers=workers,
    )  # fmt: skip
    for line in found.problems.lines()[:20]:
        print(line)
    print(
        f"{out / 'ranking.csv'}: {found.read} rows, {len(found.problems.found)} not readable, "
        f"{found.encoded} chunks encoded"
    )
    return None


COMMANDS: list[Callable[..., int | None]] = [check_poses, prepare, screen]

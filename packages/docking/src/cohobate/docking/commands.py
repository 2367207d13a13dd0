# ruff: noqa: B008 (the defaults are frozen dataclasses)
"""Commands of this package beside the common ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cohobate.core.errors import InputError
from cohobate.core.io import result_folder
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
    max_residues: int | None = None,
    protein_embedding: Path | None = None,
    out: Path = Path("screen"),
    cache: Path = Path("screen/cache"),
    format: Literal["csv", "parquet"] = "csv",
    top: int = 1000,
    rescore: int = 100,
    known: Path | None = None,
    filters: Filters = Filters(),
    chunk: int = 8192,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
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
        max_residues: The pocket is cut to these nearest to its centre; default as in training.
        protein_embedding: .npz or .npy with the protein's embedding, where the run was trained with
            such; of several arrays that with the receptor file's name, up to its dot.
        out: Folder for the ranking, problems.csv and top.png; an existing one goes on.
        cache: Folder for the encoded library, shared by targets.
        format: Of the ranking.
        top: How many molecules are kept.
        rescore: How many of them the structure model scores too.
        known: File of known actives, for the similarity column.
        filters: Property limits; what fails is marked.
        chunk: Rows read at a time.
        workers: Further processes for fingerprints, of each process.
        accelerator: cpu, gpu, auto; as Lightning's.
        devices: Processes on each machine, each on a device of its own.
        num_nodes: Machines; see the paper's page.
    """
    from cohobate.core.runs import load_run
    from cohobate.docking.aurobind.library import screen_library
    from cohobate.docking.aurobind.predict import Site, Trained, pocket_size

    model = load_run(checkpoint, paper="docking/aurobind")
    cut = pocket_size(model, max_residues)
    site = Site(receptor, ligand, centre, size, residues, cut, protein_embedding)
    found = screen_library(
        model, library, site, out, top=top, rescore=rescore, filters=filters, known=known,
        cache=cache, kind=format, chunk=chunk, workers=workers, accelerator=accelerator,
        devices=devices, num_nodes=num_nodes,
    )  # fmt: skip
    if found is None:
        return None  # the first process speaks for all
    for line in found.problems.lines()[:20]:
        print(line)
    written = out / f"ranking.{format}"
    print(
        f"{written}: {found.read} rows, {len(found.problems.found)} not readable, "
        f"{found.encoded} chunks encoded"
    )
    _say_source(Trained.of(model).source)
    return None


def retrospective(
    targets: Path,
    checkpoint: list[Path] | Path = Path("runs/aurobind"),
    out: Path = Path("retrospective.json"),
    exclude: str = "in_fep_set",
    max_residues: int | None = None,
    dock: list[str] = [],  # noqa: B006 (read only)
    docked: int = 24,
    exhaustiveness: int = 8,
) -> int | None:
    """Screen libraries of known actives, with controls that need no structure beside the student.

    Args:
        targets: CSV with columns target, library, receptor, ligand, perhaps group and
            protein_embedding (as for screen); a library is CSV with columns smiles and label.
            Ligands known of the site are not counted.
        checkpoint: A run of docking/aurobind, or a list of runs; measures are averaged over them.
        out: The JSON; a picture of the enrichment curves stands beside it.
        exclude: Column of the libraries that marks with 1 what the model was trained on; '' for
            none.
        max_residues: Pockets are cut to these nearest to their centre; default as in training.
        dock: Targets in which AutoDock Vina docks a sample as well.
        docked: Molecules of that sample, one third actives.
        exhaustiveness: Vina's.
    """
    from cohobate.core.runs import load_run
    from cohobate.docking.aurobind import retrospective as known
    from cohobate.docking.aurobind.predict import Trained

    paths = checkpoint if isinstance(checkpoint, list) else [checkpoint]
    models = [load_run(path, paper="docking/aurobind") for path in paths]
    if out.is_dir():
        raise InputError(f"{out}: a folder, not a file to write")
    with result_folder(out.parent):
        table = known.retrospective(
            models, known.read_cases(targets), max_residues=max_residues, exclude=exclude,
            dock=dock, docked=docked, exhaustiveness=exhaustiveness,
        )  # fmt: skip
        known.report(table, models, out)
    for row in table:
        text = ", ".join(f"{s} {v['auc']:.3f}" for s, v in row["measures"].items())
        print(f"{row['target']}: {row['actives']} of {row['molecules']} active; AUC: {text}")
    print(out)
    for source in sorted({Trained.of(model).source for model in models}):
        _say_source(source)
    return None


def _say_source(source: str) -> None:
    if source:
        print(f"scores are on the scale of the labels trained on: {source}")


COMMANDS: list[Callable[..., int | None]] = [check_poses, prepare, retrospective, screen]

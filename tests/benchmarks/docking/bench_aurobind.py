"""What the student saves, what each stage adds, and tables of labelled libraries.

    python tests/benchmarks/docking/bench_aurobind.py speed
    python tests/benchmarks/docking/bench_aurobind.py stages WORK [--root DIR] [--by ligand]
    python tests/benchmarks/docking/bench_aurobind.py dude DATA TABLE

``speed``: seconds are those of the process for one molecule and one core: a new molecule from its
SMILES and one in a cached library by the student, fitness and a pose of 200 steps by the structure
model, a pose by AutoDock Vina (where it is installed) at its own exhaustiveness of 8.

``stages`` trains the default recipe and its variants in ``WORK/seed-<n>`` and puts them side by
side, seed by seed; what is finished is kept, so that ``WORK`` may be the folder ``distilled`` of
``cohobate compare docking/aurobind``. ``--root`` takes other complexes, split by protein or, with
``--by ligand``, inside proteins, and ``--longer`` trains every stage so many times as long.
``--collect`` trains nothing and puts together what is there.

``dude`` writes the table that ``cohobate-docking retrospective`` reads, for the DUD-E libraries and
the FEP benchmark's complexes in one folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from rdkit import Chem

from cohobate.core import catalog, runs
from cohobate.core.catalog import overlay
from cohobate.core.errors import InputError
from cohobate.core.recipes import read_config
from cohobate.core.testing import build
from cohobate.core.testing.bench import in_turn, medians, write_rows
from cohobate.docking import vina
from cohobate.docking.aurobind import structure
from cohobate.docking.aurobind.predict import StudentScorer, teacher_fitness
from cohobate.docking.data import ComplexData, Split
from cohobate.docking.data.features import collate
from cohobate.docking.screen import features

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs/results"


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "stages", "dude"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("table", type=Path, nargs="?")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--by", choices=["ligand", "protein"], default="protein")
    parser.add_argument("--longer", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.what == "dude":
        dude(asked.folder, asked.table)
        return
    if asked.what == "speed":
        data = ComplexData(max_residues=24)
        data.setup()
        name, rows = "bench-aurobind", throughput(data)
    else:
        name = "bench-aurobind-stages"
        other = None if asked.root is None else Other(asked.root, asked.by)
        rows = stages(asked.folder, asked.seeds, other, asked.longer, not asked.collect)
    words = shlex.join(str(word).replace(f"{ROOT}/", "") for word in sys.argv)
    out = asked.out or RESULTS / f"{name}.json"
    write_rows(out, words, ("torch", "rdkit", "cohobate-docking"), rows)
    for one in rows:
        print(one)


def row(what: str, result: str, note: str) -> dict[str, str]:
    """A line of the table."""
    return {"what": what, "result": result, "note": note}


@torch.no_grad()
def throughput(data: ComplexData) -> list[dict[str, str]]:
    """Seconds for one molecule, each way, and the ratios."""
    last = read_config(catalog.find("docking/aurobind").stages[-1].path)["model"]["init_args"]
    model = build("docking/aurobind", *[f"--model.{k}={v}" for k, v in last.items()]).model.eval()
    some = [data.data.complexes[i] for i in data.places("test")][:16]
    pocket, molecules = some[0].pocket, [c.molecule for c in some]
    scorer = StudentScorer(model, pocket, molecules)
    smiles = [Chem.MolToSmiles(m) for m in molecules] * 256
    codes = scorer.encode(*features(smiles)[:2]).astype(np.float16)
    batch = collate([c.features() for c in some])
    known = model.network.trunk(batch)
    quick = {
        "cached": lambda: scorer.score(codes),
        "SMILES": lambda: scorer.encode(*features(smiles[:512])[:2]),
        "fitness": lambda: teacher_fitness(model, molecules, pocket),
    }
    slow: dict[str, Callable[[], object]] = {
        "pose": lambda: structure.roll_out(model.network, batch, known, 1, 200)
    }
    try:
        receptor, box = vina.target("CDK2")
        small = vina.Box(box.centre, (20.0, 20.0, 20.0))
        docker = vina.Docker(receptor, small, exhaustiveness=8)
        slow["Vina"] = lambda: docker.dock(molecules[0])
    except InputError as error:
        print(f"no row for Vina: {error}")
    taken = medians(in_turn(quick, 3)) | medians(in_turn(slow, 1))
    number = {"cached": len(smiles), "SMILES": 512, "Vina": 1}
    spent = {name: value / number.get(name, len(molecules)) for name, value in taken.items()}
    spent["SMILES"] += spent["cached"]
    about = {
        "cached": "student, molecule in a cached library",
        "SMILES": "student, new molecule from its SMILES",
        "fitness": "structure model, fitness without a pose",
        "pose": "structure model, one pose of 200 steps",
        "Vina": "AutoDock Vina, one molecule, exhaustiveness 8, box 20 Å",
    }
    return [
        row(
            about[name],
            f"{value:.3g} s a molecule",
            f"{value / spent['cached']:,.0f} × the cached student, "
            f"{value / spent['SMILES']:,.1f} × the student from SMILES",
        )
        for name, value in spent.items()
    ]


def placements(data: ComplexData) -> list[dict[str, str]]:
    """Median RMSD of the test complexes for placements that learn nothing, three seeds."""
    found: dict[str, list[float]] = {"random place": [], "at the true centroid": []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rmsd: dict[str, list[float]] = {name: [] for name in found}
        for place in data.places("test", pose=True)[:40]:
            one = data.data.complexes[place]
            centre = one.molecule.GetConformer().GetPositions().mean(0) - one.pocket.centre
            try:
                made = Chem.RemoveHs(vina.conformer(one.molecule, seed + 1))
            except InputError:
                continue
            x = vina.like(one.molecule, made).GetConformer().GetPositions()
            x = x - x.mean(0)
            turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            x = x @ (turn * np.linalg.det(turn))
            away = {"random place": rng.uniform(-6, 6, 3), "at the true centroid": centre}
            for name, where in away.items():
                pose = torch.from_numpy(x + where)
                rmsd[name].append(structure.error_of(one, pose))
        for name, values in rmsd.items():
            found[name].append(statistics.median(values))
    return [
        row(f"(a) RDKit conformer, {name}", f"rmsd {shown(values)}", "3 draws of at most 40")
        for name, values in found.items()
    ]


@dataclass(frozen=True)
class Other:
    """Complexes beside the embedded ones, of molecules of at most 30 heavy atoms."""

    root: Path
    by: Literal["ligand", "protein"] = "protein"

    def data(self) -> ComplexData:
        """Them, as the options read them."""
        return ComplexData(
            root=self.root, max_residues=24, max_atoms=30, split=Split(self.by, *SHARES)
        )

    def options(self) -> list[str]:
        """Of the command."""
        val, test = SHARES
        return [
            f"--data.root={self.root}", f"--data.split.by={self.by}", f"--data.split.val={val}",
            f"--data.split.test={test}", "--data.max_atoms=30", "--data.lists.size=8",
        ]  # fmt: skip


SHARES = 0.1, 0.2


def stages(
    work: Path, seeds: list[int], other: Other | None, longer: int, train: bool
) -> list[dict[str, str]]:
    """Every stage and its variants over seeds, with paired differences."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for seed in seeds:
        if train:
            fit(work, seed, other, longer)
        for path in sorted((work / f"seed-{seed}").glob("*/run.json")):
            info = json.loads(path.read_text())
            if info["status"] == "finished":
                found.setdefault(info["stage"], {})[seed] = info["test"]
    data = ComplexData(max_residues=24) if other is None else other.data()
    data.setup()
    return [row("data", data.describe(), ""), *placements(data), *compared(found)]


def fit(work: Path, seed: int, other: Other | None, longer: int) -> None:
    """Train what is not finished."""
    recipe, folder = variants(work, longer, 100 if other is None else 20), work / f"seed-{seed}"
    args = ["--trainer.enable_progress_bar=false", f"--seed_everything={seed}"]
    args += [] if other is None else other.options()
    runs.fit(catalog.Recipe(recipe.paper, recipe.name, recipe.stages[:-1]), args, out=folder)
    # The student of labels alone has the same teacher's priors: not computed a second time.
    (folder / "5-labels").mkdir(exist_ok=True)
    shutil.copy(folder / "5-student" / "teacher.safetensors", folder / "5-labels")
    runs.fit(recipe, args, out=folder)


ABOUT = {
    "structure": "(a) structure model after stage 1, half of the poses",
    "self-distil": "(b) after stage 2, self-labels where the gate lets them (it may refuse)",
    "override": "(b) after stage 2, self-labels whatever the gate says",
    "oracle": "(b) after stage 2, with the hidden poses shown",
    "fitness": "(c) fitness head, squared error",
    "longer": "(c) fitness head, squared error, as many steps as with the preference",
    "preference": "(c) fitness head, squared error, then Plackett-Luce",
    "student": "(d) student of teacher and labels",
    "labels": "(d) student of labels alone",
}
PAIRS = [
    ("override", "self-distil", "rmsd"), ("oracle", "self-distil", "rmsd"),
    ("preference", "fitness", "spearman"), ("preference", "fitness", "rmse"),
    ("preference", "longer", "spearman"), ("preference", "longer", "kendall"),
    ("preference", "longer", "rmse"), ("student", "labels", "spearman"),
    ("student", "labels", "kendall"), ("student", "labels", "rmse"),
]  # fmt: skip


def compared(found: dict[str, dict[int, dict[str, float]]]) -> list[dict[str, str]]:
    """A row for each stage that is there, and the paired differences."""
    rows = []
    for stage, about in ABOUT.items():
        if stage not in found:
            continue
        values = list(found[stage].values())
        names = [k for k in values[0] if k not in ("test/targets", "test/best_rmsd")]
        text = "; ".join(
            f"{k.removeprefix('test/')} {shown([r[k] for r in values])}" for k in names
        )
        rows.append(row(about, text, "seeds " + ", ".join(map(str, found[stage]))))
    for one, other, name in PAIRS:
        a, b = found.get(one, {}), found.get(other, {})
        change = [a[s][f"test/{name}"] - b[s][f"test/{name}"] for s in a if s in b]
        if change:
            rows.append(row(f"{one} minus {other}: {name}", shown(change), "paired, by seed"))
    return rows


def variants(work: Path, longer: int, unlabelled: int) -> catalog.Recipe:
    """The default recipe's stages and their variants, as files in ``WORK/recipe``."""
    recipe = catalog.find("docking/aurobind")
    config = {stage.name: read_config(stage.path) for stage in recipe.stages}
    folder = work / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    for one in config.values():
        one["trainer"]["max_epochs"] *= longer
    config["student"]["data"]["init_args"]["unlabelled"] = unlabelled
    steps = sum(
        config[k]["data"]["init_args"]["epoch_samples"] * config[k]["trainer"]["max_epochs"]
        for k in ("fitness", "preference")
    )
    equal = {"data": {"init_args": {"epoch_samples": steps // 4}}, "trainer": {"max_epochs": 4}}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "2-override": ("self-distil", model({"keep": {"override_gate": True}})),
        "2-oracle": (
            "self-distil", {**model({"distill": False}), "data": {"init_args": {"posed": 1.0}}}
        ),
        "3-longer": ("fitness", equal),
        "5-labels": ("student", model({"distill": False})),
    }  # fmt: skip
    every = {stage.path.stem: config[stage.name] for stage in recipe.stages}
    every |= {name: overlay(config[base], change) for name, (base, change) in changes.items()}
    for name, one in every.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(one))
    made = [catalog.Stage(name[2:], folder / f"{name}.yaml") for name in every]
    return catalog.Recipe(recipe.paper, "stages", tuple(made))


def model(options: dict[str, Any]) -> dict[str, Any]:
    """An overlay of the model's options."""
    return {"model": {"init_args": options}}


def dude(data: Path, table: Path) -> None:
    """The table for ``cohobate-docking retrospective``, grouped by whether training saw it."""
    complexes = Other(data / "fep_complexes").data()
    complexes.setup()
    seen = {complexes.data.complexes[i].target for i in complexes.parts["train"]}
    with (data / "dude" / "targets.csv").open() as file, table.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["target", "library", "receptor", "ligand", "group"])
        for one in csv.DictReader(file):
            system = one["fep_system"]
            files = [
                data / "dude" / f"{one['dude_target']}.csv.gz",
                data / "receptors" / f"{system}.receptor.pdb.gz",
                data / "fep_complexes" / "systems" / f"{system}.ligands.sdf.gz",
            ]
            group = "trained on" if one["protein"] in seen else "new protein"
            writer.writerow([one["dude_target"], *(f.resolve() for f in files), group])


def shown(values: list[float]) -> str:
    """Every seed's value."""
    return ", ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    main()

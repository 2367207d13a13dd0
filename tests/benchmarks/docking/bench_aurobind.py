"""What the student saves, and what each stage did in the runs of a comparison.

    python tests/benchmarks/docking/bench_aurobind.py [--compare DIR] [--out FILE]

Seconds are those of the process for one molecule and one core: a new molecule from its SMILES and
one in a cached library by the student, fitness and a pose of 200 steps by the structure model, a
pose by AutoDock Vina (where it is installed) at its own exhaustiveness of 8. ``--compare`` is the
folder of ``cohobate compare docking/aurobind``; its stages are put beside each other, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem

from cohobate.core import catalog
from cohobate.core.errors import InputError
from cohobate.core.recipes import read_config
from cohobate.core.testing import build
from cohobate.docking import vina
from cohobate.docking.aurobind import structure
from cohobate.docking.aurobind.predict import StudentScorer, teacher_fitness
from cohobate.docking.data import ComplexData
from cohobate.docking.data.features import collate
from cohobate.docking.screen import features

ROOT = Path(__file__).parents[3]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/bench-aurobind.json")
    asked = parser.parse_args()
    data = ComplexData(max_residues=24)
    data.setup()
    rows = [*throughput(data), *placements(data)]
    if asked.compare is not None:
        rows += stages(asked.compare)
    content = {
        "command": "python tests/benchmarks/docking/bench_aurobind.py --compare DIR",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, process seconds",
        "versions": {name: version(name) for name in ("torch", "rdkit", "cohobate-docking")},
        "rows": rows,
    }
    asked.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for row in rows:
        print(row)


def seconds(call: Callable[[], object], repeat: int = 3) -> float:
    """Least process seconds of a call."""
    call()
    found = []
    for _ in range(repeat):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


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
    spent = {
        "cached": seconds(lambda: scorer.score(codes)) / len(smiles),
        "SMILES": seconds(lambda: scorer.encode(*features(smiles[:512])[:2])) / 512,
        "fitness": seconds(lambda: teacher_fitness(model, molecules, pocket)) / len(molecules),
        "pose": seconds(lambda: structure.roll_out(model.network, batch, known, 1, 200), 1)
        / len(molecules),
    }
    spent["SMILES"] += spent["cached"]
    try:
        receptor, box = vina.target("CDK2")
        small = vina.Box(box.centre, (20.0, 20.0, 20.0))
        docker = vina.Docker(receptor, small, exhaustiveness=8)
        spent["Vina"] = seconds(lambda: docker.dock(molecules[0]), 1)
    except InputError as error:
        print(f"no row for Vina: {error}")
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
        for place in data.places("test", pose=True):
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
        row(f"pose: RDKit conformer, {name}", f"median RMSD {shown(values)} Å", "seeds 0-2")
        for name, values in found.items()
    ]


def stages(folder: Path) -> list[dict[str, str]]:
    """The stages of each seed of a comparison."""
    of: dict[tuple[str, str], list[dict[str, float]]] = {}
    for path in sorted(folder.glob("*/*/run.json")) + sorted(folder.glob("*/*/*/run.json")):
        info = json.loads(path.read_text())
        arm = "baseline" if "baseline" in str(path.relative_to(folder)) else "distilled"
        of.setdefault((arm, info["stage"]), []).append(info["test"])
    rows = []
    for (arm, stage), runs in of.items():
        names = [k for k in runs[0] if k != "test/targets"]
        text = "; ".join(f"{k.removeprefix('test/')} {shown([r[k] for r in runs])}" for k in names)
        rows.append(row(f"after {stage}, {arm}", text, f"{len(runs)} seeds"))
    pair = of.get(("distilled", "preference")), of.get(("distilled", "fitness"))
    if all(pair):
        for name in ("test/spearman", "test/kendall", "test/rmse"):
            change = [a[name] - b[name] for a, b in zip(*pair, strict=True)]
            rows.append(row(f"preference minus fitness: {name[5:]}", shown(change), "paired"))
    return rows


def shown(values: list[float]) -> str:
    """Every seed's value."""
    return ", ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    main()

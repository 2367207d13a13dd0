"""A library of a million molecules: memory, a killed run that goes on, a second target.

    python tests/benchmarks/docking/bench_library.py WORK RUN SMILES.csv.gz... [--molecules N]

The library is made of the given tables' SMILES and of their variants, one hydrogen of an aromatic
ring replaced by a small group; the choice is seeded. ``cohobate-docking screen`` runs on it as a
process of its own, is killed (SIGKILL) after two fifths, runs again, and its ranking is compared
with that of a run that nobody killed. A second target follows. What is finished in ``WORK`` is
kept. Memory is the largest resident set that the system saw of any of the processes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdkit import Chem

from cohobate.core.testing.bench import write_rows
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.sources import embedded_folder

ROOT = Path(__file__).parents[3]
GROUPS = ("F", "Cl", "Br", "C", "CC", "OC", "O", "N", "C#N", "C(F)(F)F")
CHUNK = 8192


def main() -> None:
    """Run what is left and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--molecules", type=int, default=1_000_000)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/results/bench-aurobind-library.json"
    )
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    library = asked.work / "library.smi.gz"
    if not library.exists():
        make(library, asked.tables, asked.molecules)
    screens = [
        ("killed", "CDK2", int(0.4 * asked.molecules / CHUNK)),
        ("whole", "CDK2", None), ("second target", "F10", None),
    ]  # fmt: skip
    found = [once(asked.work, asked.run, library, *one) for one in screens]
    same = ranking(asked.work, "killed") == ranking(asked.work, "whole")
    about = {
        "killed": "first target, killed after two fifths and started again",
        "whole": "first target, not killed; the library is in the cache",
        "second target": "second target; the library is in the cache",
    }
    rows = [
        {
            "what": about[name], "starts": one["starts"], "chunks encoded": one["encoded"],
            "peak memory": f"{one['memory'] / 2**20:,.0f} MiB",
            "CPU seconds": round(one["seconds"], 1),
        }
        for (name, _, _), one in zip(screens, found, strict=True)
    ]  # fmt: skip
    rows.append(dict.fromkeys(rows[0], "") | {
        "what": f"the first two rankings are byte for byte the same: {'yes' if same else 'no'}"
    })  # fmt: skip
    words = shlex.join(str(word).replace(f"{ROOT}/", "") for word in sys.argv[:3])
    words += f" TABLES --molecules {asked.molecules}"
    packages = ("torch", "rdkit", "cohobate-docking")
    write_rows(asked.out, words, packages, rows, f"{found[0]['read']:,} molecules, one process")
    print(*rows, sep="\n")


def make(path: Path, tables: list[Path], count: int) -> None:
    """Write the library: the tables' own molecules first, then variants of them, none twice."""
    own: list[str] = []
    for table in tables:
        with gzip.open(table, "rt") as file:
            own += [row["smiles"] for row in csv.DictReader(file)]
    rng = random.Random(0)
    rng.shuffle(own)
    seen: set[str] = set()
    with gzip.open(path.with_suffix(".part"), "wt", compresslevel=1) as file:
        for number, smiles in enumerate(distinct(own, rng, seen)):
            if number == count:
                break
            file.write(f"{smiles} M{number}\n")
        else:
            raise SystemExit(f"{len(seen)} molecules and no more from {len(own)}")
    path.with_suffix(".part").rename(path)


def distinct(own: list[str], rng: random.Random, seen: set[str]) -> Iterator[str]:
    """The molecules, then rounds of variants; the middle of ``ccc`` has a hydrogen to replace."""
    for smiles in own:
        if smiles not in seen:
            seen.add(smiles)
            yield smiles
    for _ in range(50):
        for smiles in own:
            places = [m.start() for m in re.finditer(r"(?<=c)c(?=c)", smiles)]
            if not places:
                continue
            place = rng.choice(places) + 1
            new = f"{smiles[:place]}({rng.choice(GROUPS)}){smiles[place:]}"
            if new not in seen:
                seen.add(new)
                yield new


def once(
    work: Path, run: Path, library: Path, name: str, target: str, stop: int | None
) -> dict[str, Any]:
    """One screen to its end, killed once at ``stop`` chunks; what it took."""
    out = work / name
    note = work / f"{name}.json"
    known: dict[str, Any] = {"starts": 0, "memory": 0, "seconds": 0.0, "killed": stop is None}
    if note.exists():
        known = json.loads(note.read_text())
    while "encoded" not in known:
        command = command_of(work, run, library, target, out)
        with (work / f"{name}.txt").open("w") as text:
            child = subprocess.Popen(command, stdout=text, stderr=subprocess.DEVNULL)
            if not known["killed"]:
                wait_for(out / "state.json", stop or 0, child)
                child.send_signal(signal.SIGKILL)
            _, status, usage = os.wait4(child.pid, 0)
        known["starts"] += 1
        known["memory"] = max(known["memory"], usage.ru_maxrss * 1024)
        known["seconds"] += usage.ru_utime + usage.ru_stime
        if status == 0:
            said = (work / f"{name}.txt").read_text()
            read_rows, encoded = re.findall(r"(\d+) rows.* (\d+) chunks encoded", said)[0]
            known |= {"read": int(read_rows), "encoded": int(encoded)}
        elif known["killed"]:
            raise SystemExit(f"{shlex.join(command)} ended with {status}")
        known["killed"] = True
        note.write_text(json.dumps(known))
    return known


def command_of(work: Path, run: Path, library: Path, target: str, out: Path) -> list[str]:
    """The command a user types."""
    site = work / f"{target}.sdf"
    if not site.exists():
        record = next(iter(read(embedded_folder() / f"{target}.poses.sdf.gz", Problems())))
        site.write_text(Chem.SDWriter.GetText(record.molecule))
    receptor = embedded_folder() / f"{target}.pocket.pdb.gz"
    return [
        sys.executable, "-m", "cohobate.docking", "screen", str(library), str(receptor),
        "--ligand", str(site), "--checkpoint", str(run), "--out", str(out),
        "--cache", str(work / "cache"), "--rescore", "20", "--chunk", str(CHUNK),
    ]  # fmt: skip


def wait_for(state: Path, chunks: int, child: subprocess.Popen[bytes]) -> None:
    """Until so many chunks are done, as the process itself notes."""
    while child.poll() is None:
        time.sleep(1)
        if state.exists() and json.loads(state.read_text())["done"] >= chunks:
            return
    raise SystemExit("the screen ended before it could be killed")


def ranking(work: Path, name: str) -> bytes:
    """The table that a screen wrote."""
    return (work / name / "ranking.csv").read_bytes()


if __name__ == "__main__":
    main()

"""Screens of libraries whose answer is known."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from matplotlib import image
from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.core.runs import load_run
from cohobate.core.testing import assert_one_line, run_command
from cohobate.docking.aurobind.retrospective import (
    SHARES,
    nearest,
    read_cases,
    read_library,
    retrospective,
)
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.sources import embedded_folder
from cohobate.docking.metrics import recovery, screening

SMILES = [f"{'C' * (1 + i % 6)}{tail}" for i, tail in enumerate(["O", "N", "c1ccccc1", "F"] * 6)]


@pytest.fixture
def table(tmp_path):
    """Two targets; the library holds a known ligand, a marked row and an unreadable one."""
    lines = ["target,library,receptor,ligand,group"]
    for target in ("CDK2", "F10"):
        folder = embedded_folder()
        known = next(iter(read(folder / f"{target}.poses.sdf.gz", Problems()))).molecule
        posed = Chem.AddHs(known, addCoords=True)
        (tmp_path / f"{target}.sdf").write_text(Chem.SDWriter.GetText(posed))
        receptor = tmp_path / f"{target}.pdb.gz"
        receptor.write_bytes((folder / f"{target}.pocket.pdb.gz").read_bytes())
        rows = [(s, int("c1" in s), 0) for s in dict.fromkeys(SMILES)]
        rows += [(Chem.MolToSmiles(known), 1, 0), ("CCCCCCCO", 1, 1), ("C1CC", 0, 0)]
        text = "smiles,label,in_fep_set\n" + "".join(f"{s},{a},{b}\n" for s, a, b in rows)
        (tmp_path / f"{target}.csv.gz").write_bytes(gzip.compress(text.encode()))
        lines.append(f"{target},{target}.csv.gz,{target}.pdb.gz,{target}.sdf,seen")
    path = tmp_path / "targets.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_known_and_marked_molecules_do_not_count(table):
    found = read_library(read_cases(table)[0], "in_fep_set")
    count = len(dict.fromkeys(SMILES))
    assert (found.excluded, found.unread, len(found.smiles)) == (2, 1, count)
    assert found.label.sum() == sum("c1" in s for s in dict.fromkeys(SMILES))
    assert (found.similarity < 1).all()
    assert len(read_library(read_cases(table)[0], "").smiles) == count + 1
    with pytest.raises(InputError, match=r"CDK2\.csv\.gz: no column in_fep "):
        read_library(read_cases(table)[0], "in_fep")


def test_similarity_is_that_of_the_nearest():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (5, 30)), rng.integers(0, 2, (3, 30))
    wanted = [max((x & y).sum() / (x | y).sum() for y in b) for x in a]
    np.testing.assert_allclose(nearest(a, b, rows=2), wanted, rtol=1e-6)


def test_the_command_measures_every_scorer(run, table, tmp_path):
    out = tmp_path / "r.json"
    done = run_command(
        "retrospective", table, "--checkpoint", run / "5-student", "--out", out, domain="docking",
    )  # fmt: skip
    assert done.code == 0, done.err
    content = json.loads(out.read_text())
    assert [row["target"] for row in content["rows"]] == ["CDK2", "F10", "mean of 2", "median of 2"]
    first = content["targets"][0]
    assert (first["excluded"], first["unread"]) == (2, 1)
    assert set(first["measures"]) == {"student", "other pocket", "similarity", "size"}
    library = read_library(read_cases(table)[0], "in_fep_set")
    wanted = screening(library.similarity, library.label)
    assert first["measures"]["similarity"] == pytest.approx(wanted)
    assert {"ef0.5", "ef2", "ef5", "ef10", "bedroc80", "aupr"} < set(wanted)
    assert "labels are Vina scores" in done.out
    assert "labels are Vina scores" in content["labels"][0]
    assert first["measures"]["size"]["bedroc20"] > first["measures"]["size"]["auc"] / 2
    own, other = (first["measures"][k] for k in ("student", "other pocket"))
    assert all(np.isfinite(list(own.values()) + list(other.values())))
    assert "curves" not in first, "they are drawn"
    seen = image.imread(out.with_suffix(".png"))
    assert seen.shape[1] > 2 * seen.shape[0], "two targets and their mean"
    assert seen[..., :3].std() > 0.05


def test_the_curves_are_those_of_every_scorer(run, table):
    rows = retrospective(
        [load_run(run / "5-student")], read_cases(table), max_residues=8, exclude="in_fep_set",
        progress=False,
    )  # fmt: skip
    library = read_library(read_cases(table)[0], "in_fep_set")
    x, y = recovery(library.similarity, library.label)
    curves = rows[0]["curves"]
    assert set(curves) == set(rows[0]["measures"])
    np.testing.assert_allclose(curves["similarity"], np.interp(SHARES, x, y))
    assert all(c[-1] == 1 and (np.diff(c) >= 0).all() for c in curves.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target,library\n", "no target"),
        ("target,library,receptor,ligand\nA,x.csv,,\n", "line 2: no receptor"),
        ("target,library,receptor,ligand\nA,x.csv,r.pdb,l.sdf\n", "x.csv: no such file"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_cases(tmp_path / "t.csv")


def test_bad_libraries_are_one_line(run, table, tmp_path):
    case = read_cases(table)[0]
    for text, message in (
        ("smiles,label\nCCO,2\n", "line 2: label '2' is not 0 or 1"),
        ("smiles,label\nCCO,0\nCCN,0\n", "needs actives and others"),
        ("structures,label\nCCO,0\nCCN,1\n", "no column smiles"),
        ("smiles,active\nCCO,0\nCCN,1\n", "line 2: label 'None' is not 0 or 1"),
        ("smiles,label\n", "no molecule could be read"),
        ("smiles,label\nC1CC,0\nCC(,1\n", "no molecule could be read: .*line 2"),
    ):
        case.library.write_bytes(gzip.compress(text.encode()))
        with pytest.raises(InputError, match=message):
            read_library(case, "")
    wrong = ["retrospective", table, "--checkpoint"]
    outcome = run_command(*wrong, "[]", "--out", tmp_path / "r.json", domain="docking")
    assert_one_line(outcome, "no checkpoint")
    for out in (table / "r.json", tmp_path):
        outcome = run_command(*wrong, run / "5-student", "--out", out, domain="docking")
        assert_one_line(outcome, str(out if out == tmp_path else table))
    first = "\n".join(table.read_text().splitlines()[:2])
    table.write_text(first)
    words = ["retrospective", table, "--checkpoint", f"[{run / '5-student'}]"]
    outcome = run_command(*words, "--out", tmp_path / "r.json", domain="docking")
    assert_one_line(outcome, "needs a second target")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_vina_docks_a_sample(run, real, tmp_path):
    systems = {"cdk2": "jacs_set__cdk2", "hs90a": "waterset__hsp90_woodhead"}
    lines = ["target,library,receptor,ligand"]
    for name, system in systems.items():
        text = "smiles,label\nc1ccccc1O,1\nCCO,0\nCCN,0\nCCC,0\n"
        (tmp_path / f"{name}.csv").write_text(text)
        receptor = real / "receptors" / f"{system}.receptor.pdb.gz"
        ligand = real / "fep_complexes" / "systems" / f"{system}.ligands.sdf.gz"
        lines.append(f"{name},{name}.csv,{receptor},{ligand}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    table = retrospective(
        [load_run(run / "5-student")], read_cases(tmp_path / "t.csv"), max_residues=8, exclude="",
        dock=["cdk2"], docked=3, exhaustiveness=1, progress=False,
    )  # fmt: skip
    assert "docked" not in table[1]
    found = table[0]["docked"]
    assert found["counts"] == "1 / 3"
    assert found["measures"]["Vina"]["auc"] == 1.0, "phenol binds better than ethanol to Vina"

"""The commands that use a run: screens by several processes, and pictures."""

from __future__ import annotations

import csv
import io
import json
import logging
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from matplotlib import image
from pyarrow import parquet
from rdkit import Chem

from cohobate.core.runs import load_run
from cohobate.core.testing import assert_one_line, run_command
from cohobate.docking.aurobind.predict import StudentScorer
from cohobate.docking.aurobind.predict import scene as scene_of
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.receptors import find_pocket, heavy_atoms, read_receptor
from cohobate.docking.data.sources import embedded_folder

TAILS = ["O", "N", "c1ccccc1", "C(=O)Nc1ccccc1", "F", "C1CC", "c1ccncc1", "S(=O)(=O)N"]


@pytest.fixture
def words(run, tmp_path):
    """The options of a screen, by target and output folder."""
    library = tmp_path / "library.smi"
    rows = [f"{'C' * (1 + i % 5)}{tail} m{i}" for i, tail in enumerate(TAILS * 6)]
    library.write_text("\n".join(rows))

    def make(target, out, *more):
        site = next(iter(read(embedded_folder() / f"{target}.poses.sdf.gz", Problems())))
        (tmp_path / f"{target}.sdf").write_text(Chem.SDWriter.GetText(site.molecule))
        return [
            "screen", library, embedded_folder() / f"{target}.pocket.pdb.gz", "--ligand",
            tmp_path / f"{target}.sdf", "--checkpoint", run, "--out", tmp_path / out, "--cache",
            tmp_path / f"cache-{out}", "--chunk", "4", "--top", "20", "--rescore", "5",
            "--max_residues", "8", "--accelerator", "cpu", *more,
        ]  # fmt: skip

    return make


def pocket_of(target):
    structure = read_receptor(embedded_folder() / f"{target}.pocket.pdb.gz")
    site = next(iter(read(embedded_folder() / f"{target}.poses.sdf.gz", Problems()))).molecule
    atoms = site.GetConformer().GetPositions()
    return find_pocket(structure, ligand=atoms).nearest(atoms.mean(0), 8)


def program(words):
    return [sys.executable, "-m", "cohobate.docking", *map(str, words)]


def test_two_processes_write_the_files_of_one(words, tmp_path):
    alone = run_command(*words("CDK2", "one"), domain="docking")
    assert alone.code == 0, alone.err
    two = program(words("CDK2", "two", "--devices", "2"))
    done = subprocess.run(two, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.out.replace("/one/", "/two/"), "the first process speaks for all"
    assert "48 rows" in done.stdout
    assert not [
        line for line in done.stderr.splitlines() if line.strip() and "molecule" not in line
    ]
    for name in ("ranking.csv", "problems.csv", "top.png"):
        first, second = ((tmp_path / out / name).read_bytes() for out in ("one", "two"))
        assert first == second, name
    other = run_command(*words("F10", "other", "--cache", tmp_path / "cache-two"), domain="docking")
    assert " 0 chunks encoded" in other.out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_left_of_a_killed_screen_ends_and_a_new_one_goes_on(words, tmp_path, how):
    library = tmp_path / "library.smi"
    text = "".join(f"{'C' * (1 + i % 50)}{TAILS[i % 8]} m{i}\n" for i in range(20_000))
    alone = words("CDK2", "one", "--chunk", "256")
    two = program(words("CDK2", "two", "--chunk", "256", "--devices", "2"))
    library.write_text(text)
    assert run_command(*alone, domain="docking").code == 0
    state = tmp_path / "two" / "state-0-of-2.json"
    with subprocess.Popen(two, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while not state.exists():
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.1)
        others = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(how)
    assert child.returncode == -how
    assert others
    assert not psutil.wait_procs(others, timeout=60)[1], "no process goes on alone"
    before = json.loads(state.read_text())["done"]
    done = subprocess.run(two, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0 < before < json.loads(state.read_text())["done"]
    first, second = ((tmp_path / out / "ranking.csv").read_bytes() for out in ("one", "two"))
    assert first == second


def test_more_devices_than_there_are_is_one_line(words, tmp_path):
    wrong = words("CDK2", "wrong", "--accelerator", "gpu", "--devices", "99")
    assert_one_line(run_command(*wrong, domain="docking"), "1 × 99 × gpu")
    assert not (tmp_path / "wrong").exists()


def test_a_second_target_in_one_folder_has_its_own_ranking(words, tmp_path):
    """With the run's own student: its encoder does not know the target, its scores do."""
    for target, out in (("CDK2", "same"), ("F10", "same"), ("F10", "fresh")):
        done = run_command(*words(target, out), domain="docking")
        assert done.code == 0, done.err
    fresh = [(tmp_path / out / "ranking.csv").read_text() for out in ("same", "fresh")]
    assert fresh[0] == fresh[1]


def test_a_scorer_is_marked_by_pocket_and_structure_model_its_codes_are_not(run):
    model = load_run(run / "5-student")
    pockets = [pocket_of(target) for target in ("CDK2", "F10")]
    molecules = [Chem.MolFromSmiles(s) for s in ("CCO.Cl", "c1ccccc1")]
    one, other = (StudentScorer(model, pocket, molecules) for pocket in pockets)
    assert one.key == other.key
    assert one.target != other.target
    assert StudentScorer(model, pockets[0], molecules).target == one.target
    free = StudentScorer(model, pockets[0], [Chem.MolFromSmiles("CCO"), molecules[1]])
    assert (free.key, free.target) == (one.key, one.target), "of salts the largest fragment counts"
    with torch.no_grad():
        next(model.network.fitness.parameters()).add_(1)
    changed = StudentScorer(model, pockets[0], molecules)
    assert changed.key == one.key
    assert changed.target != one.target


def test_a_ranking_says_which_filter_failed_and_what_labels_it_is_of(words, tmp_path):
    done = run_command(*words("CDK2", "out"), domain="docking")
    assert "labels are Vina scores" in done.out
    with (tmp_path / "out" / "ranking.csv").open() as file:
        table = list(csv.DictReader(file))
    again = run_command(*words("CDK2", "out", "--format", "parquet"), domain="docking")
    assert f"{tmp_path / 'out' / 'ranking.parquet'}: 48 rows" in again.out
    names = parquet.read_table(tmp_path / "out" / "ranking.parquet")["name"].to_pylist()
    assert names == [row["name"] for row in table]
    assert all("weight" in row["failed"] for row in table), "all are small"
    assert {row["similarity_to_known"] for row in table} == {""}
    teacher = [float(row["teacher"]) for row in table[:5]]
    assert teacher == sorted(teacher, reverse=True)
    assert all(len(row["student"].partition(".")[2]) == 4 for row in table)
    assert image.imread(tmp_path / "out" / "top.png")[..., :3].std() > 0.02


@pytest.mark.parametrize(
    ("option", "value"),
    [("top", 0), ("chunk", -1), ("rescore", -1), ("workers", -1), ("max_residues", 0)],
)
def test_numbers_out_of_range_are_one_line(words, tmp_path, option, value):
    wrong = words("CDK2", "wrong", f"--{option}", str(value))
    assert_one_line(run_command(*wrong, domain="docking"), f"--{option} {value}: must be at least")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.smi", ""), ("a.csv", "smiles,id\n"), ("a.smi", "C1CC\nCC(\n"), ("a.sdf", ""),
        ("a.sdf", "garbage\n\nM  END\n$$$$\n"),
    ],
)  # fmt: skip
def test_libraries_without_a_molecule_are_one_line(words, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    wrong = words("CDK2", "wrong")
    wrong[1] = tmp_path / name
    assert_one_line(run_command(*wrong, domain="docking"), "no molecule could be read")


def test_known_actives_are_read_before_the_screen(words, tmp_path):
    (tmp_path / "broken.smi").write_text("C1CC\n")
    for name, message in (("none.smi", "No such file"), ("broken.smi", "no molecule")):
        wrong = words("CDK2", "wrong", "--known", tmp_path / name)
        done = run_command(*wrong, domain="docking")
        assert done.code == 2
        assert f"{name}: {message}" in done.err.splitlines()[-1]
        assert not (tmp_path / "wrong").exists()


def test_out_on_a_file_is_one_line(words, tmp_path):
    (tmp_path / "file").write_text("")
    wrong = words("CDK2", "file", "--cache", tmp_path / "file" / "cache")
    assert_one_line(run_command(*wrong, domain="docking"), "not a folder")


@pytest.fixture
def said():
    """What is logged; commands run in this process after others."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("cohobate").addHandler(handler)
    yield stream.getvalue
    logging.getLogger("cohobate").removeHandler(handler)


@pytest.fixture
def predict(run, tmp_path):
    """Runs ``predict`` with further words, by default with the last stage."""
    site = next(iter(read(embedded_folder() / "CDK2.poses.sdf.gz", Problems()))).molecule
    (tmp_path / "site.sdf").write_text(Chem.SDWriter.GetText(site))
    pocket = embedded_folder() / "CDK2.pocket.pdb.gz"

    def with_words(*more, stage="5-student"):
        return run_command(
            "predict", "docking/aurobind", *more, "--checkpoint", run / stage, "--receptor", pocket,
            "--ligand", tmp_path / "site.sdf", "--out", tmp_path / "out",
            *([] if "--steps" in more else ["--steps", "2"]),
        )  # fmt: skip

    return with_words


def test_poses_are_drawn_beside_their_file(predict, said, tmp_path):
    library = tmp_path / "ligands.smi"
    library.write_text("".join(f"{'C' * (1 + i)}O m{i}\n" for i in range(7)) + "C1CC bad\n")
    done = predict(library)
    assert done.code == 0, done.err
    seen = image.imread(tmp_path / "out" / "ligands.poses.png")
    assert seen.shape[1] > seen.shape[0] > 1000, "two rows of three"
    assert seen[..., :3].std() > 0.02
    pocket = read_receptor(tmp_path / "out" / "ligands.pocket.pdb")
    assert sum(len(chain) for chain in pocket[0]) == 8, "as many residues as in training"
    record = next(iter(read(tmp_path / "out" / "ligands.poses.sdf", Problems())))
    assert "labels are Vina scores" in record.row["pK_source"]
    assert "labels are Vina scores" in said()


def test_what_cannot_be_posed_is_listed_and_the_others_are_kept(predict, said, tmp_path):
    library = tmp_path / "ligands.smi"
    library.write_text(f"CCO good\n[Na+] ion\n[Na+].[Cl-] salt\n{'C' * 60} long\nCCN also\n")
    done = predict(library)
    assert done.code == 0, done.err
    found = [r.name for r in read(tmp_path / "out" / "ligands.poses.sdf", Problems())]
    assert found == ["good", "also"]
    assert "line 2: cannot be relaxed" in said()
    assert "line 3: cannot be relaxed" in said()
    assert "line 4: 60 heavy atoms; the run was trained on at most 48" in said()


def test_an_untrained_head_is_not_asked(predict, tmp_path):
    (tmp_path / "a.smi").write_text("CCO a\n")
    assert predict(tmp_path / "a.smi", stage="1-structure").code == 0
    record = next(iter(read(tmp_path / "out" / "a.poses.sdf", Problems())))
    assert {"score", "confidence", "rank"} <= set(record.row)
    assert not {"pK_pred", "pK_source"} & set(record.row)


def test_without_noise_the_seed_counts_for_the_start_alone(predict, tmp_path):
    (tmp_path / "a.smi").write_text("CCOCC a\n")
    found = []
    for more in ([], ["--ode", "true"], ["--ode", "true"]):
        assert predict(tmp_path / "a.smi", "--steps", "4", *more).code == 0
        found.append((tmp_path / "out" / "a.poses.sdf").read_text())
    assert found[0] != found[1] == found[2]


def test_files_of_one_name_keep_their_own_poses(predict, tmp_path):
    paths = [tmp_path / name for name in ("lig.v1.smi", "lig.v2.smi", "lig.v1.csv")]
    for path in paths:
        path.write_text("smiles\nCCO\n")
    assert predict(*paths[:2]).code == 0
    assert (tmp_path / "out" / "lig.v1.poses.sdf").exists()
    assert (tmp_path / "out" / "lig.v2.poses.sdf").exists()
    assert_one_line(predict(*paths), "lig.v1.csv: its poses would overwrite those of")


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("steps", -1), ("poses", 0), ("max_residues", 0)]
)
def test_no_poses_are_made_of_nothing(predict, tmp_path, option, value):
    (tmp_path / "a.smi").write_text("CCO a\n")
    done = predict(tmp_path / "a.smi", f"--{option}", str(value))
    assert_one_line(done, f"--{option} {value}: must be at least 1")


def test_the_student_alone_is_one_line(words, run):
    wrong = words("CDK2", "wrong", "--checkpoint", run / "5-student" / "student.safetensors")
    assert_one_line(run_command(*wrong, domain="docking"), "the student alone")


def test_a_scene_holds_the_near_residues_and_their_contacts():
    folder = embedded_folder()
    posed = next(iter(read(folder / "CDK2.poses.sdf.gz", Problems()))).molecule
    posed = Chem.RemoveHs(posed)
    for name in ("pK_pred", "confidence", "_Name"):
        posed.SetProp(name, name)
    structure = read_receptor(folder / "CDK2.pocket.pdb.gz")
    atoms = posed.GetConformer().GetPositions()
    pocket = find_pocket(structure, ligand=atoms)
    scene = scene_of(posed, pocket, heavy_atoms(structure, pocket))
    assert "ASP 86" in scene.labels
    assert len(scene.labels) == len(scene.residues) == len(scene.contacts) == 12
    far = np.linalg.norm(scene.contacts[:, 0] - scene.contacts[:, 1], axis=1)
    assert (np.diff(far) >= 0).all()
    assert far[0] < 4
    every = np.array([a.pos.tolist() for chain in structure[0] for r in chain for a in r])
    assert far[0] == pytest.approx(np.linalg.norm(atoms[:, None] - every, axis=-1).min())
    place = pocket.names.index(next(n for n in pocket.names if n.endswith(":86")))
    shown = scene.residues[list(scene.labels).index("ASP 86")]
    assert (shown == [pocket.ca[place], pocket.side[place]]).all()

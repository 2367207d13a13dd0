"""The commands that use a run: screens by several processes, and pictures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from matplotlib import image
from rdkit import Chem

from cohobate.core.testing import assert_one_line, run_command
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


def test_poses_are_drawn_beside_their_file(run, tmp_path):
    library = tmp_path / "ligands.smi"
    library.write_text("".join(f"{'C' * (1 + i)}O m{i}\n" for i in range(7)) + "C1CC bad\n")
    pocket = embedded_folder() / "CDK2.pocket.pdb.gz"
    site = next(iter(read(embedded_folder() / "CDK2.poses.sdf.gz", Problems()))).molecule
    (tmp_path / "site.sdf").write_text(Chem.SDWriter.GetText(site))
    done = run_command(
        "predict", "docking/aurobind", library, "--checkpoint", run / "5-student", "--receptor",
        pocket, "--ligand", tmp_path / "site.sdf", "--steps", "2", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    seen = image.imread(tmp_path / "out" / "ligands.poses.png")
    assert seen.shape[1] > seen.shape[0] > 1000, "two rows of three"
    assert seen[..., :3].std() > 0.02


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

"""Another model's answers from files: units, shapes, and what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.docking.aurobind.targets import answers_of
from cohobate.docking.aurobind.teachers import FilesTeacher, fitness_of
from cohobate.docking.data import ComplexData


@pytest.fixture(scope="module")
def data() -> ComplexData:
    found = ComplexData(max_residues=6)
    found.setup()
    return found


@pytest.fixture
def files(data, tmp_path):
    rng = np.random.default_rng(0)
    for place, one in enumerate(data.data.complexes):
        tokens = rng.normal(size=(6 + one.molecule.GetNumAtoms(), 4)).astype(np.float32)
        np.savez(tmp_path / f"{one.target}__{one.name}.npz", s=tokens, fitness=5.0 + 0.01 * place)
    return tmp_path


def test_files_are_answers(data, files, tmp_path):
    found = answers_of(FilesTeacher(files), data, 3, tmp_path / "kept.safetensors", 8)
    count = len(data.data)
    torch.testing.assert_close(found.fitness, 5.0 + 0.01 * torch.arange(count))
    one = data.data.complexes[2]
    with np.load(files / f"{one.target}__{one.name}.npz") as file:
        tokens = torch.from_numpy(file["s"])
    atoms = one.molecule.GetNumAtoms()
    wanted = torch.cat((tokens[6:].mean(0), tokens[:6].mean(0)))
    assert len(tokens) == 6 + atoms
    torch.testing.assert_close(found.hidden[2], wanted)
    for name in ("CDK2", "ESR1"):
        own = [i for i, c in enumerate(data.data.complexes) if c.target == name]
        assert 1 <= len(found.prior[own].unique(dim=0)) <= 3
        assert {tuple(p.tolist()) for p in found.prior[own]} <= {
            tuple(h.tolist()) for h in found.hidden[own]
        }


def test_another_width_is_one_line(data, files, tmp_path):
    with pytest.raises(InputError, match=r"--model\.single 4"):
        answers_of(FilesTeacher(files), data, 3, tmp_path / "kept.safetensors", 64)


def test_the_answers_are_kept(data, files, tmp_path):
    first = answers_of(FilesTeacher(files), data, 3, tmp_path / "kept.safetensors", 8)

    class Silent:
        def answers(self, data, places):
            raise AssertionError("asked twice")

    again = answers_of(Silent(), data, 3, tmp_path / "kept.safetensors", 8)
    assert torch.equal(first.hidden, again.hidden)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [({"affinity_pred_value": -2.0}, 8.0), ({"affinity": 7.5}, 7.5)],
)
def test_units(tmp_path, content, wanted):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert fitness_of(tmp_path / "a.json") == wanted


def test_missing_and_wrong_files_are_one_line(data, tmp_path):
    with pytest.raises(InputError, match="no such folder of teacher files"):
        FilesTeacher(tmp_path / "x")
    one = data.data.complexes[0]
    with pytest.raises(InputError, match="no file for this complex"):
        FilesTeacher(tmp_path).one(one)
    path = tmp_path / f"{one.target}__{one.name}.npz"
    np.savez(path, s=np.zeros((2, 4), np.float32))
    with pytest.raises(InputError, match=r"needs s \(N, C\)"):
        FilesTeacher(tmp_path).one(one)
    np.savez(path, s=np.zeros((60, 4), np.float32))
    with pytest.raises(InputError, match=r"_affinity\.json: No such file"):
        FilesTeacher(tmp_path).one(one)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match="no number under"):
        fitness_of(tmp_path / "bad.json")

"""Another model's answers from files: units, shapes, and what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.docking.aurobind.targets import answers_of
from cohobate.docking.aurobind.teachers import (
    BoltzTeacher,
    FilesTeacher,
    OpenFold3Teacher,
    fitness_of,
    name_of,
)
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
    with pytest.raises(InputError, match=r"--model\.hidden 8"):
        answers_of(FilesTeacher(files), data, 3, tmp_path / "kept.safetensors", 64)


class Constant:
    """A teacher of one number and one hidden state."""

    def answers(self, data, places):
        return torch.full((len(places),), 7.0), torch.full((len(places), 2), 3.0)


def test_the_prior_is_of_the_model_at_hand(data, files, tmp_path):
    path = tmp_path / "kept.safetensors"
    found = answers_of(FilesTeacher(files), data, 3, path, 8, Constant())
    assert found.hidden.shape[1] == 8
    assert (found.prior == 3.0).all()
    assert found.prior.shape == (len(data.data), 2)


def test_boltz_output_is_read_and_its_units_converted(data, tmp_path):
    one = data.data.complexes[0]
    name, atoms = name_of(one), one.molecule.GetNumAtoms()
    tokens = np.arange((5 + atoms) * 3, dtype=np.float32).reshape(1, -1, 3)
    folder = tmp_path / "boltz_results_x" / "predictions" / name
    with pytest.raises(InputError, match=r"no such file; boltz predict .*uv tool install boltz"):
        BoltzTeacher(tmp_path).one(one)
    folder.mkdir(parents=True)
    np.savez(folder / f"embeddings_{name}.npz", s=tokens, z=np.zeros((1, 2, 2, 1), np.float32))
    with pytest.raises(InputError, match="no such file; boltz predict"):
        BoltzTeacher(tmp_path).one(one)
    content = {"affinity_pred_value": -1.5, "affinity_probability_binary": 0.9}
    (folder / f"affinity_{name}.json").write_text(json.dumps(content))
    for root in (tmp_path, tmp_path / "boltz_results_x"):
        fitness, hidden = BoltzTeacher(root).one(one)
        assert fitness == 7.5
        wanted = np.concatenate((tokens[0, 5:].mean(0), tokens[0, :5].mean(0)))
        torch.testing.assert_close(hidden, torch.from_numpy(wanted))


def test_openfold3_gives_states_and_another_the_fitness(data, tmp_path):
    one = data.data.complexes[0]
    name, atoms = name_of(one), one.molecule.GetNumAtoms()
    teacher = OpenFold3Teacher(tmp_path, Constant())
    with pytest.raises(InputError, match=r"no such file; run_openfold .*pip install openfold3"):
        teacher.answers(data, [0])
    folder = tmp_path / name / "seed_42"
    folder.mkdir(parents=True)
    state = {"si_trunk": torch.ones(1, 4 + atoms, 6), "zij_trunk": torch.zeros(1, 2, 2, 1)}
    torch.save(state, folder / f"{name}_seed_42_latent_output.pt")
    fitness, hidden = teacher.answers(data, [0])
    assert fitness.tolist() == [7.0]
    assert hidden.tolist() == [[1.0] * 12]


def test_names_in_files_are_plain():
    from types import SimpleNamespace

    assert name_of(SimpleNamespace(target="HIV1 protease", name="a:1/2")) == "HIV1_protease__a_1_2"


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

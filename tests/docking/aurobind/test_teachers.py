"""Another model's answers from files: units, shapes, and what is missing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.docking.aurobind.targets import answers_of
from cohobate.docking.aurobind.teachers import FilesTeacher, fitness_of, name_of
from cohobate.docking.data import ComplexData
from cohobate.docking.data.features import Complex


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


def test_another_model_is_asked_about_what_is_learned_from_alone(data, files, tmp_path):
    class Asked(FilesTeacher):
        def answers(self, data, places):
            self.places = list(places)
            return super().answers(data, places)

    teacher = Asked(files)
    found = answers_of(teacher, data, 3, tmp_path / "kept.safetensors", 8, Constant())
    assert teacher.places == sorted(data.parts["train"])
    held = [*data.parts["val"], *data.parts["test"]]
    assert found.fitness[held].isnan().all()
    assert found.hidden[held].isnan().all()
    wanted = 5.0 + 0.01 * torch.tensor(teacher.places)
    torch.testing.assert_close(found.fitness[teacher.places], wanted)
    assert found.hidden[teacher.places].isfinite().all()


def test_names_in_files_are_plain():
    assert name_of(SimpleNamespace(target="HIV1 protease", name="a:1/2")) == "HIV1_protease__a_1_2"


def test_two_complexes_have_not_one_file(data, tmp_path):
    first, second = data.data.complexes[:2]
    twin = Complex("t", "a:1", first.molecule, first.pocket)
    other = Complex("t", "a/1", second.molecule, second.pocket)
    pair = SimpleNamespace(data=SimpleNamespace(complexes=[twin, other]))
    with pytest.raises(InputError, match="t__a_1: two complexes would have files of this name"):
        FilesTeacher(tmp_path).answers(pair, [0, 1])


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
    with pytest.raises(InputError, match=f"{name_of(one)}.npz: the teacher has no file for this"):
        FilesTeacher(tmp_path).answers(data, [0])
    path = tmp_path / f"{name_of(one)}.npz"
    path.write_bytes(b"PK half of it")
    with pytest.raises(InputError, match=r"\.npz: "):
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

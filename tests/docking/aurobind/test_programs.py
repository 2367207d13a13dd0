"""Other programs as teachers: what is written for them, what is read, what is asked again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from rdkit import Chem

from cohobate.core import catalog, runs
from cohobate.core.errors import InputError
from cohobate.core.io import load_weights
from cohobate.core.recipes import read_config
from cohobate.docking.aurobind import AuroBind
from cohobate.docking.aurobind.programs import (
    AuroBindTeacher,
    BoltzTeacher,
    OpenFold3Teacher,
    ProgramTeacher,
    teacher_of,
)
from cohobate.docking.aurobind.teachers import FilesTeacher, name_of
from cohobate.docking.data import ComplexData
from cohobate.docking.data.receptors import Chain
from cohobate.docking.data.sources import embedded_folder

SEQUENCES = {
    "CDK2": ["MENF"],
    "ESR1": ["SKKN", "SKKN"],
    "F10": ["IVGG", "KLCS"],
    "HSP90AA1": ["NO"],
}
KINDS = ["boltz", "openfold3", "aurobind"]
STARTED = {"boltz": "boltz predict", "openfold3": "run_openfold predict"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Embedded complexes with made-up short sequences."""
    folder = tmp_path_factory.mktemp("data")
    for target in SEQUENCES:
        for path in embedded_folder().glob(f"{target}.*"):
            shutil.copy(path, folder)
    with (folder / "sequences.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target", "sequence"])
        writer.writerows([t, s] for t, every in SEQUENCES.items() for s in every)
    return folder


@pytest.fixture(scope="module")
def data(root) -> ComplexData:
    found = ComplexData(root=root, max_residues=6)
    found.setup()
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder with stand-ins."""
    folder = tmp_path_factory.mktemp("bin")
    text = Path(__file__).with_name("fake_program.py").read_text()
    for name in ("boltz", "run_openfold", "run_aurobind.py"):
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
    return folder


@pytest.fixture
def on_path(programs, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return programs


class Own:
    """Knows the fitness where a program does not."""

    def answers(self, data, places):
        return torch.full((len(places),), 7.0), torch.zeros(len(places), 2)


def teacher(kind: str, folder: Path, programs: Path | None = None) -> ProgramTeacher:
    """With ``programs``, one that runs."""
    run = None
    if programs is not None:
        run = STARTED.get(kind, f"'{sys.executable}' '{programs / 'run_aurobind.py'}'")
    found = teacher_of(kind, folder, run, Own())
    assert isinstance(found, ProgramTeacher)
    return found


def places(data: ComplexData, *targets: str) -> list[int]:
    """The first complex of each target."""
    names = [c.target for c in data.data.complexes]
    return [names.index(target) for target in targets]


def asked(folder: Path) -> list[str]:
    return (folder / "asked.txt").read_text().split()


def written(kind: str, folder: Path) -> dict[str, dict]:
    """The inputs, as the program reads them."""
    inputs = folder / "inputs" / kind
    if kind == "openfold3":
        return json.loads((inputs / "queries.json").read_text())["queries"]
    return {p.stem: yaml.safe_load(p.read_text()) for p in inputs.iterdir()}


# --- what is written -------------------------------------------------------------------------


def test_boltz_and_aurobind_inputs_field_by_field(data, tmp_path):
    """Boltz: version, sequences with the ligand last, properties. AuroBind: the first two."""
    (place,) = places(data, "F10")
    one = data.data.complexes[place]
    wanted = {
        "version": 1,
        "sequences": [
            {"protein": {"id": "A", "sequence": "IVGG", "msa": "empty"}},
            {"protein": {"id": "B", "sequence": "KLCS", "msa": "empty"}},
            {"ligand": {"id": "C", "smiles": Chem.MolToSmiles(one.molecule)}},
        ],
    }
    for kind in ("aurobind", "boltz"):
        with pytest.raises(InputError):
            teacher(kind, tmp_path).answers(data, [place])
        assert written(kind, tmp_path) == {name_of(one): wanted}
        wanted["properties"] = [{"affinity": {"binder": "C"}}]


def test_openfold3_inputs_field_by_field(data, tmp_path):
    (place,) = places(data, "ESR1")
    one = data.data.complexes[place]
    with pytest.raises(InputError):
        teacher("openfold3", tmp_path).answers(data, [place])
    chains = [
        {"molecule_type": "protein", "chain_ids": ["A", "B"], "sequence": "SKKN"},
        {"molecule_type": "ligand", "chain_ids": ["C"], "smiles": Chem.MolToSmiles(one.molecule)},
    ]
    assert written("openfold3", tmp_path) == {name_of(one): {"chains": chains}}
    runner = yaml.safe_load((tmp_path / "inputs" / "openfold3" / "runner.yml").read_text())
    assert runner == {"output_writer_settings": {"write_latent_outputs": True}}


def several(data, chains):
    """A single complex with other chains."""
    one = data.data.complexes[0]
    one = replace(one, pocket=replace(one.pocket, chains=tuple(chains)))
    return SimpleNamespace(data=SimpleNamespace(complexes=[one]))


def test_equal_chains_share_an_entry_and_later_names_have_two_letters(data, tmp_path):
    msa = tmp_path / "a.a3m"
    many = several(data, [Chain("NO"), *[Chain("YES", msa)] * 13, *[Chain("NO")] * 14])
    for kind in KINDS:
        with pytest.raises(InputError):
            teacher(kind, tmp_path).answers(many, [0])
        (found,) = written(kind, tmp_path).values()
        first, second, ligand = found["chains"] if kind == "openfold3" else found["sequences"]
        if kind == "openfold3":
            assert (first["sequence"], second["sequence"]) == ("NO", "YES")
            assert second["main_msa_file_paths"] == [str(msa)]
            assert "main_msa_file_paths" not in first
            names = [first["chain_ids"], second["chain_ids"], ligand["chain_ids"]]
        else:
            assert (first["protein"]["sequence"], first["protein"]["msa"]) == ("NO", "empty")
            assert (second["protein"]["sequence"], second["protein"]["msa"]) == ("YES", str(msa))
            names = [first["protein"]["id"], second["protein"]["id"], [ligand["ligand"]["id"]]]
        assert names[0] == ["A", *"OPQRSTUVWXYZ", "AA", "AB"]
        assert names[1] == list("BCDEFGHIJKLMN")
        assert names[2] == ["AC"]


@pytest.mark.parametrize("kind", ["boltz", "aurobind"])
def test_with_the_server_no_alignment_is_named(kind, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="--use_msa_server"):
        teacher_of(kind, tmp_path, "boltz predict --use_msa_server", Own()).answers(data, [0])
    (found,) = written(kind, tmp_path).values()
    assert found["sequences"][0]["protein"] == {"id": "A", "sequence": "MENF"}


# --- what is run and read --------------------------------------------------------------------


@pytest.fixture
def tokens_of_torch(data, tmp_path_factory, monkeypatch):
    """Files for the stand-in to copy: the released program writes half precision."""
    folder = tmp_path_factory.mktemp("torch")
    for one in data.data.complexes:
        residues = sum(len(c.sequence) for c in one.pocket.chains)
        atoms = one.molecule.GetNumAtoms()
        s = torch.ones(residues + atoms, 3)
        s[residues:] = 2
        contents = {
            "aurobind": {"s": s.bfloat16(), "z": torch.zeros(1, 1, 1)},
            "openfold3": {"si_trunk": s[None], "confidence_scores": {"plddt": s[None]}},
        }
        for kind, content in contents.items():
            path = folder / f"{kind}-{residues}-{atoms}.pt"
            if not path.exists():
                torch.save(content, path)
    monkeypatch.setenv("FAKE_TORCH", str(folder))


@pytest.mark.usefixtures("tokens_of_torch")
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_is_asked_once_about_what_is_missing(kind, data, tmp_path, on_path):
    chosen = places(data, "CDK2", "ESR1", "F10")
    names = [name_of(data.data.complexes[i]) for i in chosen]
    atoms = torch.tensor([data.data.complexes[i].molecule.GetNumAtoms() for i in chosen])
    fitness, hidden = teacher(kind, tmp_path, on_path).answers(data, chosen[:2])
    assert sorted(asked(tmp_path)) == sorted(names[:2])
    fitness, hidden = teacher(kind, tmp_path, on_path).answers(data, chosen)
    assert asked(tmp_path)[2:] == names[2:]
    assert set(written(kind, tmp_path)) == set(names[2:])
    torch.testing.assert_close(hidden, torch.tensor([[2.0] * 3 + [1.0] * 3] * 3))
    wanted = torch.full((3,), 7.0) + (0 if kind == "openfold3" else atoms / 100)
    torch.testing.assert_close(fitness, wanted)
    again = teacher(kind, tmp_path).answers(data, chosen)
    assert torch.equal(again[1], hidden)
    assert len(asked(tmp_path)) == 3


def test_a_stopped_program_is_one_line_and_goes_on(data, tmp_path, on_path, monkeypatch):
    chosen = places(data, "CDK2", "ESR1", "F10")
    monkeypatch.setenv("FAKE_STOP", "2")
    boltz = teacher("boltz", tmp_path, on_path)
    with pytest.raises(InputError, match=r"ended with 3: RuntimeError: out of memory$"):
        boltz.answers(data, chosen)
    monkeypatch.delenv("FAKE_STOP")
    assert len(boltz.answers(data, chosen)[0]) == 3
    assert len(asked(tmp_path)) == len(set(asked(tmp_path))) == 3


def test_a_half_written_answer_is_made_again(data, tmp_path, on_path):
    boltz = teacher("boltz", tmp_path, on_path)
    boltz.answers(data, [0])
    name = name_of(data.data.complexes[0])
    (path,) = tmp_path.glob(f"*/predictions/{name}/embeddings_{name}.npz")
    path.write_bytes(path.read_bytes()[:-30])
    assert boltz.answers(data, [0])[1].shape == (1, 6)
    assert asked(tmp_path) == [name, name]


def test_what_a_program_leaves_out_is_named(data, tmp_path, on_path, monkeypatch):
    chosen = places(data, "CDK2", "ESR1")
    name = name_of(data.data.complexes[chosen[1]])
    monkeypatch.setenv("FAKE_SKIP", name)
    with pytest.raises(InputError, match=rf"boltz has run and not answered {name}$"):
        teacher("boltz", tmp_path, on_path).answers(data, chosen)


def test_answers_made_elsewhere_are_read_from_any_run_in_the_folder(data, tmp_path):
    one = data.data.complexes[0]
    name, atoms = name_of(one), one.molecule.GetNumAtoms()
    tokens = np.arange((5 + atoms) * 3, dtype=np.float32).reshape(1, -1, 3)
    begun = tmp_path / "boltz_results_a" / "predictions" / name
    whole = tmp_path / "boltz_results_b" / "predictions" / name
    for folder in (begun, whole):
        folder.mkdir(parents=True)
        np.savez(folder / f"embeddings_{name}.npz", s=tokens, z=np.zeros((1, 2, 2, 1), np.float32))
    content = {"affinity_pred_value": -1.5, "affinity_probability_binary": 0.9}
    (whole / f"affinity_{name}.json").write_text(json.dumps(content))
    for folder in (tmp_path, tmp_path / "boltz_results_b"):
        fitness, hidden = BoltzTeacher(folder).answers(data, [0])
        assert fitness.tolist() == [7.5]
        wanted = np.concatenate((tokens[0, 5:].mean(0), tokens[0, :5].mean(0)))
        torch.testing.assert_close(hidden[0], torch.from_numpy(wanted))


# --- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "command", "install"),
    [
        ("boltz", "boltz predict {inputs} --out_dir {out} --write_embeddings", "uv tool install"),
        (
            "openfold3",
            "run_openfold predict --query_json {inputs}/queries.json --output_dir {out} "
            "--runner_yaml {inputs}/runner.yml --use_msa_server False --use_templates False",
            "pip install openfold3",
        ),
        (
            "aurobind",
            "python run_aurobind.py {inputs} --out_dir {out} --save_features "
            "--num_diffusion_samples 1",
            "clone github.com/GENTEL-lab/AuroBind",
        ),
    ],
)
def test_the_command_is_named_where_nothing_is_run(kind, command, install, data, tmp_path):
    words = command.format(inputs=tmp_path / "inputs" / kind, out=tmp_path)
    with pytest.raises(InputError) as found:
        teacher(kind, tmp_path).answers(data, places(data, "CDK2", "ESR1", "F10"))
    message = str(found.value)
    assert words in message
    assert install in message
    assert f"{name_of(data.data.complexes[0])} and 2 more" in message
    assert "\n" not in message
    assert len(written(kind, tmp_path)) == 3


def test_the_users_options_of_openfold3_are_left_as_they_are(tmp_path):
    run = "run_openfold predict --runner-yaml mine.yml --use_templates=True"
    words = OpenFold3Teacher(tmp_path, Own(), run).command()
    assert words[:5] == [
        "run_openfold",
        "predict",
        "--runner-yaml",
        "mine.yml",
        "--use_templates=True",
    ]
    assert words[5::2] == ["--query_json", "--output_dir", "--use_msa_server"]


def test_a_program_that_is_not_there_is_a_hint(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = r"boltz: no such program \(to install: uv tool install boltz\).* boltz predict .*inputs"
    with pytest.raises(InputError, match=line):
        BoltzTeacher(tmp_path, "boltz predict").answers(data, [0])
    assert len(written("boltz", tmp_path)) == 1


def test_without_a_sequence_nothing_is_written(root, tmp_path):
    shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("*.csv"))
    cropped = ComplexData(root=tmp_path / "data", max_residues=6)
    cropped.setup()
    line = r"CDK2: only its pocket is known.*sequences\.csv \(target, sequence\) in data\.root"
    with pytest.raises(InputError, match=line):
        AuroBindTeacher(tmp_path / "x").answers(cropped, [0])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("run", "line"), [("boltz 'predict", "No closing quotation"), (" ", "is empty")]
)
def test_a_bad_command_is_one_line(run, line, tmp_path):
    with pytest.raises(InputError, match=rf"model\.teacher_run: .*{line}"):
        OpenFold3Teacher(tmp_path, Own(), run)


def test_options_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"teacher_run: teacher_kind files is of no program"):
        teacher_of("files", tmp_path, "boltz predict", Own())
    assert isinstance(teacher_of("files", tmp_path, None, Own()), FilesTeacher)


# --- the whole stage -------------------------------------------------------------------------


def test_the_student_is_fitted_to_a_program(root, tmp_path, on_path, monkeypatch):
    """The last stage alone, from an untrained structure model; stopped, it goes on."""
    tiny = {"single": 8, "pair": 4, "width": 8, "diffusion_blocks": 1, "heads": 2}
    recipe = catalog.find("docking/aurobind")
    recipe = replace(recipe, stages=recipe.stages[-1:])
    settings = read_config(recipe.stages[0].path)["model"]["init_args"]
    earlier = AuroBind(**{**settings, **tiny, "stage": "preference"})
    (tmp_path / "run" / "preference").mkdir(parents=True)
    path = tmp_path / "run" / "preference" / "best.ckpt"
    torch.save({"state_dict": earlier.state_dict()}, path)
    path.with_name("run.json").write_text(json.dumps({"paper": recipe.paper.name}))
    answers = tmp_path / "answers"
    args = [
        *(f"--model.{k}={v}" for k, v in tiny.items()), "--model.hidden=6",
        "--model.teacher_kind=boltz", f"--model.teacher_files={answers}",
        "--model.teacher_run=boltz predict", f"--data.root={root}", "--data.max_residues=6",
        "--data.unlabelled=1", "--data.epoch_samples=6", "--data.batch_size=3",
        "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
    ]  # fmt: skip
    monkeypatch.setenv("FAKE_STOP", "5")
    with pytest.raises(InputError, match="out of memory"):
        runs.fit(recipe, args, out=tmp_path / "run")
    monkeypatch.delenv("FAKE_STOP")
    (folder,) = runs.fit(recipe, args, out=tmp_path / "run")
    assert folder.finished
    known = load_weights(folder.path / "teacher.safetensors")["fitness"].isfinite()
    assert 0 < known.sum() < len(known)
    assert len(asked(answers)) == len(set(asked(answers))) == known.sum()
    with (folder.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    seen = [float(v) for row in rows for k, v in row.items() if "hidden" in k and v]
    assert seen
    assert np.isfinite(seen).all()

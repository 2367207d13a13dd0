"""The released layout of the student, released weights, and embeddings of whole proteins."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rdkit import Chem
from safetensors.torch import save_file
from torch.testing import assert_close

from cohobate.core import catalog, runs
from cohobate.core.errors import InputError
from cohobate.core.io import load_weights
from cohobate.core.recipes import read_config
from cohobate.core.testing import (
    assert_export_round_trip,
    assert_one_line,
    assert_student_only,
    run_command,
)
from cohobate.docking.aurobind import AuroBind, ReleasedStudent
from cohobate.docking.aurobind.network import Embedding
from cohobate.docking.aurobind.predict import Site
from cohobate.docking.aurobind.retrospective import read_cases
from cohobate.docking.aurobind.student import make_student
from cohobate.docking.data import ComplexData
from cohobate.docking.data.embeddings import ProteinEmbeddings
from cohobate.docking.data.features import Complex, collate
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.sources import embedded_folder

CHANNELS, WIDTH = 6, 10
TINY = {"single": 8, "pair": 4, "width": 8, "diffusion_blocks": 1, "heads": 2}


def one_layer_at_a_time(student, bits, counts, protein, number):
    """The released network before anything is split, from its description."""
    gate = student.trunk_encoder(number.expand(-1, student.width))
    e = student.esm_proj(protein) + student.scale * torch.sigmoid(gate) * gate
    table = student.atom_encoder.weight
    atoms = [[i for i, n in enumerate(row) for _ in range(int(n))] for row in counts]
    a = torch.stack([table[torch.tensor(own)].mean(0) for own in atoms])
    whole = torch.cat((student.fp_encoder(bits), e, a), -1)
    return student.graph_predictor(student.global_combiner(whole)).squeeze(-1)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_towers_are_the_whole_network(dtype, close):
    torch.manual_seed(0)
    student = ReleasedStudent(16, 5, 32, 9, scale=1.0).to(dtype).eval()
    bits = torch.randint(0, 2, (4, 32)).to(dtype)
    counts = torch.randint(1, 4, (4, 9)).to(dtype)
    protein, number = torch.randn(4, 5, dtype=dtype), torch.randn(4, 1, dtype=dtype)
    wanted = one_layer_at_a_time(student, bits, counts, protein, number)
    fitness, state = student(bits, counts, protein, number)
    assert_close(fitness, wanted, rtol=close, atol=close)
    assert state.shape == (4, 16)
    library, target = student.library(bits, counts), student.target(protein, number)
    assert library.shape == target.shape == (4, 32), "what a library's cache holds is 2 hidden"
    assert_close(student.combine(library, target)[0], wanted, rtol=close, atol=close)
    for changed in ((protein + 1, number), (protein, number + 1)):
        other = student.combine(library, student.target(*changed))[0]
        assert not torch.allclose(other, wanted), "both the protein and the trunk reach the score"


def test_the_towers_are_the_ragged_forward():
    torch.manual_seed(1)
    student = ReleasedStudent(8, 3, 16, 10).double().eval()
    sizes = {"atoms": (2, 5), "esm": (4, 1), "tokens": (3, 6)}
    sample = {k: torch.tensor([0] * a + [1] * b) for k, (a, b) in sizes.items()}
    atoms = torch.randint(0, 10, (7,))
    esm, s, z = (torch.randn(n, c).double() for n, c in ((5, 3), (9, 4), (9, 2)))
    bits = torch.randint(0, 2, (2, 16)).double()
    found = student.ragged(
        (atoms, sample["atoms"]), (esm, sample["esm"]), (s, sample["tokens"]),
        (z, sample["tokens"]), bits,
    )  # fmt: skip
    counts = torch.stack([atoms[:2].bincount(minlength=10), atoms[2:].bincount(minlength=10)])
    protein = torch.stack([esm[:4].mean(0), esm[4:].mean(0)])
    number = torch.tensor([[float(s[i].mean() + z[i].mean())] for i in (slice(3), slice(3, 9))])
    towers = student(bits, counts.double(), protein, number.double())[0]
    assert_close(found[:, 0], towers, rtol=1e-6, atol=1e-6)


def test_the_trunks_number_is_the_mean_of_tokens_plus_that_of_pairs():
    torch.manual_seed(2)
    s, z = torch.randn(2, 5, 3), torch.randn(2, 5, 5, 4)
    mask = torch.tensor([[1.0] * 5, [1.0, 1, 0, 1, 0]])  # pockets are padded before the ligand
    found = ReleasedStudent.prior_of(Embedding(s, z, mask, torch.zeros_like(mask)))
    kept = torch.tensor([0, 1, 3])
    wanted = [s[0].mean() + z[0].mean(), s[1][kept].mean() + z[1][kept][:, kept].mean()]
    assert_close(found, torch.stack(wanted)[:, None])


# --- released weights ------------------------------------------------------------------------


def saved(path, change=lambda weights: None):
    torch.manual_seed(3)
    weights = dict(ReleasedStudent(WIDTH, CHANNELS).state_dict())
    change(weights)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"model_state_dict": weights, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("name", ["model_aurofast.pt", "student.safetensors"])
def test_released_weights_are_taken_and_name_the_width(tmp_path, name):
    path = saved(tmp_path / name)
    made = make_student("released", 16, CHANNELS, None, "mlp", 16, path)
    assert made.width == WIDTH
    made.load_released(path)
    for key, tensor in load_weights(path).items():
        assert torch.equal(made.state_dict()[key], tensor), key


def test_without_a_file_the_released_width_is_taken():
    with torch.device("meta"):
        assert make_student("released", 16, 2560, None, "mlp", 16, None).width == 1024
        assert make_student("paper", 16, 37, None, "mlp", 16, None).width == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("esm_proj.bias"), "no weights for esm_proj.bias of"),
        (lambda w: w.update(more=torch.zeros(1)), "more is not in"),
        (lambda w: w.update({"esm_proj.bias": torch.zeros(3)}), r"esm_proj.bias has shape \(3,\)"),
        (
            lambda w: w.update({"esm_proj.weight": torch.zeros(WIDTH, 2560)}),
            "takes protein embeddings of 2560 channels, not of 6: --data.protein_embeddings",
        ),
    ],
)
@pytest.mark.parametrize("name", ["changed.pt", "changed.safetensors"])
def test_another_state_dict_is_refused(tmp_path, name, change, message):
    path = saved(tmp_path / name, change)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        ReleasedStudent(WIDTH, CHANNELS).load_released(path)


def test_a_pickle_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(ReleasedStudent(2, 2, 4, 3), path)
    with pytest.raises(InputError, match="never loaded"):
        ReleasedStudent(2, 2, 4, 3).load_released(path)


def test_options_of_the_other_layout_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"need --model\.layout released"):
        make_student("paper", 16, 37, None, "mlp", 16, tmp_path / "model.pt")
    with pytest.raises(InputError, match="the released layout has mlp alone"):
        make_student("released", 16, 37, None, "late", 16, None)


# --- embeddings of proteins ------------------------------------------------------------------


def embeddings(path, **changed):
    rng = np.random.default_rng(0)
    names = sorted(p.name.split(".")[0] for p in embedded_folder().glob("*.pocket.pdb.gz"))
    arrays = {n: rng.normal(size=(3 + i, CHANNELS)) for i, n in enumerate(names)}
    arrays = {k: v for k, v in {**arrays, **changed}.items() if v is not None}
    np.savez(path, **arrays)
    return arrays


def test_the_protein_embedding_takes_the_place_of_the_pockets(tmp_path):
    path = tmp_path / "esm.npz"
    arrays = embeddings(path, CDK2=np.arange(CHANNELS, dtype=np.float16))
    data = ComplexData(protein_embeddings=path, max_residues=8)
    assert data.protein_channels == CHANNELS
    data.setup()
    assert "protein embeddings of esm.npz" in data.describe()
    for one in (data.data.complexes[i] for i in (0, 20, 50)):
        given = torch.from_numpy(arrays[one.target]).float()
        assert_close(one.features()["embedding"], given.mean(0) if given.ndim == 2 else given)
        assert len(one.pocket.types) <= 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"CDK2": None}, "no protein embedding for CDK2"),
        ({"CDK2": np.zeros((4, 5))}, "CDK2 has 5 channels, .* 6"),
        ({"CDK2": np.zeros((2, 4, 6))}, r"CDK2 is float64 \(2, 4, 6\), not real numbers \(L, C\)"),
        ({"CDK2": np.zeros((0, 6))}, r"CDK2 is float64 \(0, 6\)"),
        ({"CDK2": np.zeros((4, 6), int)}, r"CDK2 is int64 \(4, 6\)"),
        ({"CDK2": np.full((4, 6), np.nan)}, "CDK2 has values that are not finite"),
        ({"CDK2": np.array([None])}, "no .npz or .npy of numbers: Object arrays"),
    ],
)
def test_faults_of_embeddings_name_file_and_protein(tmp_path, changed, message):
    path = tmp_path / "esm.npz"
    embeddings(path, **changed)
    with pytest.raises(InputError, match=rf"esm\.npz: {message}"):
        ComplexData(protein_embeddings=path).setup()


@pytest.mark.parametrize("content", [None, b"", b"PK half of it", b"\x80\x04K\x01.", "empty"])
def test_a_file_without_embeddings_is_one_line(tmp_path, content):
    path = tmp_path / "esm.npz"
    if content == "empty":
        np.savez(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"esm\.npz: ") as error:
        ProteinEmbeddings(path)
    assert "\n" not in str(error.value)


def test_a_receptors_embedding_is_the_only_one_or_that_of_its_name(tmp_path):
    arrays = embeddings(tmp_path / "many.npz")
    many, receptor = ProteinEmbeddings(tmp_path / "many.npz"), tmp_path / "CDK2.pocket.pdb.gz"
    assert_close(many.of_file(receptor), arrays["CDK2"].mean(0).astype(np.float32))
    with pytest.raises(InputError, match="no protein embedding for protein"):
        many.of_file(tmp_path / "protein.pdb")
    np.save(tmp_path / "one.npy", arrays["CDK2"])
    one = ProteinEmbeddings(tmp_path / "one.npy")
    assert_close(one.of_file(tmp_path / "protein.pdb"), arrays["CDK2"].mean(0).astype(np.float32))


# --- a run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with released weights, embeddings, and an untrained structure model."""
    folder = tmp_path_factory.mktemp("released")
    saved(folder / "model_aurofast.pt")
    embeddings(folder / "esm.npz")
    recipe = catalog.find("docking/aurobind").stages[-1]
    settings = read_config(recipe.path)["model"]["init_args"]
    torch.manual_seed(4)
    earlier = AuroBind(**{**settings, **TINY, "stage": "preference"})
    torch.save({"state_dict": earlier.state_dict()}, folder / "preference.ckpt")
    return folder


def options(folder, **more):
    """Options of the last stage alone."""
    words = {
        **{f"model.{k}": v for k, v in TINY.items()}, "model.layout": "released",
        "model.student_weights": folder / "model_aurofast.pt", "model.lr": 0.01,
        "data.protein_embeddings": folder / "esm.npz", "data.max_residues": 8,
        "data.unlabelled": 0, "data.epoch_samples": 12, "data.batch_size": 6,
        "trainer.max_epochs": 1, "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": False, "trainer.check_val_every_n_epoch": 1,
        "init_from": folder / "preference.ckpt", **more,
    }  # fmt: skip
    return [f"--{k}={v}" for k, v in words.items()]


def last_stage():
    recipe = catalog.find("docking/aurobind")
    return replace(recipe, stages=recipe.stages[-1:])


@pytest.fixture(scope="module")
def released(files):
    """The last stage in the released layout, from released weights."""
    runs.fit(last_stage(), options(files), out=files / "run")
    return files / "run"


def test_the_released_layout_is_trained_from_released_weights(files, released):
    before = load_weights(files / "model_aurofast.pt")
    after = load_weights(released / "student.safetensors")
    assert set(after) == set(before), "names are those of the released checkpoint"
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert {"esm_proj.weight", "global_combiner.0.weight", "graph_predictor.3.bias"} <= set(moved)
    assert all((before[k] - after[k]).abs().max() < 0.05 for k in before), "it started from there"
    header, *rows = (released / "metrics.csv").read_text().splitlines()
    assert {"train/hidden", "train/teacher", "train/label"} <= set(header.split(","))
    assert rows
    kept = load_weights(released / "teacher.safetensors")
    assert kept["prior"].shape[1] == 1, "the prior is one number"
    assert kept["prior"].isfinite().all()
    assert len(kept["prior"].unique()) > 4, "of each centroid's complex"
    assert kept["hidden"].shape[1] == 16


def test_the_teacher_stays_and_the_student_is_kept_alone(files, released, tmp_path):
    old = load_weights(files / "preference.ckpt")
    new = load_weights(runs.checkpoint_file(released))
    assert all(torch.equal(v, new[k]) for k, v in old.items())
    assert {k.split(".")[0] for k in new} == {"network", "fast", "adapter"}
    assert_student_only(released)
    assert_export_round_trip(released, tmp_path)
    info = json.loads((released / "run.json").read_text())
    assert "protein embeddings of esm.npz" in info["data"]


def test_only_distillation_adds_something_to_the_student():
    made = {
        distill: AuroBind("student", distill, **TINY, layout="released", student_width=WIDTH)
        for distill in (True, False)
    }
    names = {k: {n.split(".")[0] for n in m.state_dict()} for k, m in made.items()}
    assert names == {True: {"network", "fast", "adapter"}, False: {"network", "fast"}}
    trained = {n.split(".")[0] for n, p in made[True].named_parameters() if p.requires_grad}
    assert trained == {"fast", "adapter"}


def test_with_its_width_given_a_run_does_not_need_the_released_file_later(released, tmp_path):
    checkpoint = runs.checkpoint_file(released)
    (tmp_path / checkpoint.name).write_bytes(checkpoint.read_bytes())
    config = (released / "config.yaml").read_text().replace("model_aurofast.pt", "gone.pt")
    assert "student_width: null" in config
    config = config.replace("student_width: null", f"student_width: {WIDTH}")
    (tmp_path / "config.yaml").write_text(config)
    found, own = runs.load_run(tmp_path).state_dict(), runs.load_run(released).state_dict()
    assert all(torch.equal(v, own[k]) for k, v in found.items())


@pytest.fixture
def words(tmp_path):
    """A screen of a small library for CDK2, by run and more options."""
    (tmp_path / "library.smi").write_text("CCO a\nc1ccccc1O b\nC1CC bad\nCC(=O)Nc1ccccc1 c\n")
    site = next(iter(read(embedded_folder() / "CDK2.poses.sdf.gz", Problems())))
    (tmp_path / "site.sdf").write_text(Chem.SDWriter.GetText(site.molecule))

    def make(run, *more):
        return [
            "screen", tmp_path / "library.smi", embedded_folder() / "CDK2.pocket.pdb.gz",
            "--ligand", tmp_path / "site.sdf", "--checkpoint", run, "--out", tmp_path / "out",
            "--cache", tmp_path / "cache", "--max_residues", "8", "--accelerator", "cpu", *more,
        ]  # fmt: skip

    return make


def test_a_library_is_screened_by_the_released_layout(files, released, words, tmp_path):
    done = run_command(*words(released, "--protein_embedding", files / "esm.npz"), domain="docking")
    assert done.code == 0, done.err
    codes = np.load(next((tmp_path / "cache").glob("*.npy")))
    assert codes.shape == (3, 2 * WIDTH + 1), "the first layer's share, and the centroid"
    # Each molecule is its own centroid here: the network on it, the given protein and its number.
    model = runs.load_run(released)
    site = Site(
        embedded_folder() / "CDK2.pocket.pdb.gz", tmp_path / "site.sdf", max_residues=8,
        protein_embedding=files / "esm.npz",
    )  # fmt: skip
    pocket = site.pocket()
    with (tmp_path / "out" / "ranking.csv").open() as file:
        table = {row["smiles"]: float(row["student"]) for row in csv.DictReader(file)}
    assert len(table) == 3
    with np.load(files / "esm.npz") as arrays:
        protein = torch.from_numpy(arrays["CDK2"].mean(0)).float()[None]
    for smiles, score in table.items():
        batch = collate([Complex("CDK2", "", Chem.MolFromSmiles(smiles), pocket).features()])
        number = model.fast.prior_of(model.network.trunk(batch))
        with torch.no_grad():
            wanted = model.fast(batch["bits"], batch["counts"], protein, number)[0]
        assert score == pytest.approx(wanted.item(), abs=2e-3), "the cache is half precision"


def test_another_proteins_embedding_begins_the_ranking_again(files, released, words, tmp_path):
    """In one output folder; the encoded library stays."""
    tables = []
    for number, name in enumerate(("CDK2", "ESR1")):
        with np.load(files / "esm.npz") as arrays:
            np.save(tmp_path / f"{name}.npy", 9 * arrays[name])
        done = run_command(
            *words(released, "--protein_embedding", tmp_path / f"{name}.npy"), domain="docking"
        )
        assert f"{1 - number} chunks encoded" in done.out
        with (tmp_path / "out" / "ranking.csv").open() as file:
            tables.append({row["smiles"]: row["student"] for row in csv.DictReader(file)})
    assert all(tables[0][smiles] != tables[1][smiles] for smiles in tables[0])


def test_what_is_missing_for_a_screen_is_said(files, released, words, tmp_path):
    missing = run_command(*words(released), domain="docking")
    assert_one_line(missing, "protein embeddings of 6 channels", "protein_embedding names its file")
    np.save(tmp_path / "small.npy", np.zeros((3, 4)))
    wrong = run_command(
        *words(released, "--protein_embedding", tmp_path / "small.npy"), domain="docking"
    )
    assert_one_line(wrong, "of 6 channels", "this target has one of 4 channels")
    assert not (tmp_path / "out").exists()


def test_a_labelled_library_names_its_targets_embedding(files, words, tmp_path):
    words(None)
    rows = [
        "target,library,receptor,ligand,protein_embedding",
        f"a,library.smi,library.smi,site.sdf,{files / 'esm.npz'}",
        "b,library.smi,library.smi,site.sdf,",
    ]
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    found = [case.protein_embedding for case in read_cases(tmp_path / "cases.csv")]
    assert found == [files / "esm.npz", None]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"model.student_weights": "gone.pt"}, "gone.pt: no such checkpoint"),
        ({"data.protein_embeddings": "gone.npz"}, "gone.npz: "),
        ({"model.layout": "paper"}, "need --model.layout released"),
    ],
)
def test_a_fit_without_its_files_is_one_line(files, tmp_path, more, part):
    with pytest.raises(InputError, match=part):
        runs.fit(last_stage(), options(files, **more), out=tmp_path / "run")

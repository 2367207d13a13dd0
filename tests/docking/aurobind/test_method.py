"""The promises of the stages: what is frozen, what is mixed, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem, RDConfig
from torch.optim.swa_utils import AveragedModel

from cohobate.core import runs
from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint, load_weights
from cohobate.core.testing import (
    assert_equal,
    assert_export_round_trip,
    assert_one_line,
    assert_recipe_parses,
    assert_same_run,
    assert_student_only,
    recipes,
    run_command,
)
from cohobate.docking.aurobind import AuroBind, Keep, structure
from cohobate.docking.aurobind.average import MovingAverage
from cohobate.docking.data import ComplexData, Lists
from cohobate.docking.data.molecules import Problems, read
from cohobate.docking.data.prepare import choose
from cohobate.docking.data.sources import embedded_folder

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "path"), recipes("docking"))
def test_every_recipe_parses(name, path):
    assert_recipe_parses(path)


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    file = next(f for f in ("best.ckpt", "last.ckpt") if (run / stage / f).exists())
    return load_weights(run / stage / file)


@pytest.mark.parametrize(
    ("before", "after"), [("2-self-distil", "3-fitness"), ("3-fitness", "4-preference")]
)
def test_fitness_stages_leave_the_trunk_and_the_diffusion_bit_identical(run, before, after):
    old, new = weights(run, before), weights(run, after)
    moved = {k for k in old if not torch.equal(old[k], new[k])}
    assert moved
    assert all(k.startswith("network.fitness.") for k in moved)


def test_the_last_stage_leaves_the_teacher_bit_identical(run):
    old, new = weights(run, "4-preference"), weights(run, "5-student")
    assert all(torch.equal(v, new[k]) for k, v in old.items())
    assert any(k.startswith("fast.") for k in new)


def test_structure_stages_leave_the_fitness_head(run):
    old, new = weights(run, "1-structure"), weights(run, "2-self-distil")
    moved = {k.split(".")[1] for k in old if not torch.equal(old[k], new[k])}
    assert moved >= {"trunk", "diffusion", "distogram"}
    assert "fitness" not in moved


def test_the_student_is_saved_and_exported_alone(run, tmp_path):
    assert_student_only(run / "5-student")
    assert_export_round_trip(run / "5-student", tmp_path)
    info = json.loads((run / "5-student" / "run.json").read_text())
    assert "Vina" in info["data"]
    assert {"test/spearman", "test/kendall", "test/rmse"} <= set(info["test"])


def test_poses_come_back_with_the_inputs_chemistry(run, tmp_path):
    library = tmp_path / "ligands.smi"
    smiles = ["C[C@H](N)C(=O)Nc1ccccc1", "F/C=C/c1ccncc1", "CC(=O)[O-].[Na+]"]
    library.write_text("".join(f"{s} m{i}\n" for i, s in enumerate(smiles)) + "C1CC bad\n")
    receptor = embedded_folder() / "CDK2.pocket.pdb.gz"
    site = next(iter(read(embedded_folder() / "CDK2.poses.sdf.gz", Problems()))).molecule
    (tmp_path / "site.sdf").write_text(Chem.SDWriter.GetText(site))
    words = ["--receptor", receptor, "--ligand", tmp_path / "site.sdf", "--poses", "2",
             "--steps", "2", "--checkpoint", run / "5-student"]  # fmt: skip
    for out in ("a", "b"):
        done = run_command("predict", "docking/aurobind", library, *words, "--out", tmp_path / out)
        assert done.code == 0, done.err
    first, second = ((tmp_path / out / "ligands.poses.sdf").read_bytes() for out in "ab")
    assert first == second, "the same seed gives the same file"
    found = list(Chem.SDMolSupplier(str(tmp_path / "a" / "ligands.poses.sdf")))
    assert [m.GetProp("_Name") for m in found] == ["m0", "m0", "m1", "m1", "m2", "m2"]
    graphs = {Chem.MolToSmiles(m) for m in found}
    assert graphs == {Chem.CanonSmiles(s) for s in (*smiles[:2], "CC(=O)[O-]")}
    busters = pytest.importorskip("posebusters").PoseBusters(config="mol")
    assert busters.bust(found).to_numpy().all(), "every pose is possible chemistry"
    assert {"score", "pK_pred", "confidence", "rank"} <= set(found[0].GetPropsAsDict())


def test_a_library_is_screened_for_two_targets_and_encoded_once(run, tmp_path):
    library = tmp_path / "library.smi"
    library.write_text("CCO a\nc1ccccc1O b\nC1CC bad\nCC(=O)Nc1ccccc1 c\n")
    for target, encoded in (("CDK2", 1), ("F10", 0)):
        site = next(iter(read(embedded_folder() / f"{target}.poses.sdf.gz", Problems())))
        (tmp_path / f"{target}.sdf").write_text(Chem.SDWriter.GetText(site.molecule))
        done = run_command(
            "screen", library, embedded_folder() / f"{target}.pocket.pdb.gz", "--ligand",
            tmp_path / f"{target}.sdf", "--checkpoint", run, "--out", tmp_path / target, "--cache",
            tmp_path / "cache", "--known", library, domain="docking",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert f"4 rows, 1 not readable, {encoded} chunks encoded" in done.out
        table = (tmp_path / target / "ranking.csv").read_text().splitlines()
        assert len(table) == 4
        assert table[0].startswith("rank,name,smiles,student,teacher,")
        assert "line 3" in (tmp_path / target / "problems.csv").read_text()
        assert (tmp_path / target / "top.png").read_bytes().startswith(b"\x89PNG")


def test_bad_inputs_of_predict_are_one_line(run, tmp_path):
    library = tmp_path / "l.smi"
    library.write_text("CCO a\n")
    receptor = embedded_folder() / "CDK2.pocket.pdb.gz"
    base = ["predict", "docking/aurobind", library, "--checkpoint", run / "5-student",
            "--out", tmp_path / "o"]  # fmt: skip
    for words, parts in (
        (["--receptor", tmp_path / "no.pdb", "--centre", "[0,0,0]"], ["no.pdb"]),
        (["--receptor", receptor], ["by a ligand, a box, or residues"]),
        (["--receptor", receptor, "--centre", "[9e3,0,0]"], ["the pocket has no residue"]),
    ):
        assert_one_line(run_command(*base, *words), *parts)
    (tmp_path / "l.smi").write_text("C1CC bad\n")
    outcome = run_command(*base, "--receptor", receptor, "--residues", '["9999"]')
    assert_one_line(outcome, "no residue 9999")
    assert not list((tmp_path / "o").glob("*.sdf"))


@pytest.mark.parametrize(
    "option", [{"heads": 3}, {"single": 6}, {"tau": 0.0}, {"centroids": 0}, {"draws": -1}]
)
def test_sizes_that_cannot_be_are_one_line(option):
    with pytest.raises(InputError, match=r"^model\.\w+ -?\d"):
        AuroBind(**option)


def test_a_stage_needs_the_one_before(run):
    model = AuroBind(stage="fitness", single=16)
    with pytest.raises(InputError, match="no fitting weights for network"):
        model.load_stage(weights(run, "1-structure"))


def test_the_fitness_head_starts_near_the_labels(run):
    lines = (run / "3-fitness" / "metrics.csv").read_text().splitlines()
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert float(first["train/mse"]) < 3, "from 0 the squared error of a pK of 5.5 is 30"


@pytest.mark.parametrize("stage", ["1-structure", "3-fitness", "5-student"])
def test_a_run_that_stopped_ends_the_same(run, fit, stage, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    for earlier in sorted(p for p in run.iterdir() if p.name < stage):
        shutil.copytree(earlier, out / earlier.name)
    original = AuroBind.forward_train

    def forward_train(self, batch):
        if self.global_step == 1:
            raise RuntimeError("power cut")
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AuroBind, "forward_train", forward_train)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(out, "--checkpoint_steps=1", last=stage)
    fit(out, last=stage)
    assert_same_run(out / stage, run / stage)
    a, b = (load_checkpoint(f / stage / "last.ckpt") for f in (out, run))
    for key in ("current_model_state", "averaging_state"):
        assert (key in a) == (stage == "1-structure")
        assert_equal(a.get(key, {}), b.get(key, {}), key)


def test_poses_come_from_the_average_of_the_weights(run):
    kept = load_checkpoint(run / "1-structure" / "last.ckpt")
    average, current = kept["state_dict"], kept["current_model_state"]
    moved = {k for k in average if not torch.equal(average[k], current[k])}
    assert {k.split(".")[1] for k in moved} >= {"trunk", "diffusion", "distogram"}


def test_the_average_starts_fast_and_never_lags_further_than_its_decay():
    network = torch.nn.Linear(1, 1, bias=False)
    callback = MovingAverage(decay=0.3)
    kept = AveragedModel(network, use_buffers=False, **callback._kwargs)
    seen = []
    for value in (0.0, 1.0, 1.0, 1.0, 1.0):
        torch.nn.init.constant_(network.weight, value)
        kept.update_parameters(network)
        seen.append(kept.module.weight.item())
    # The first is a copy; after it step k keeps (1 + k) / (10 + k) of the old, at most 0.3.
    old, expected = 0.0, [0.0]
    for k in range(1, 5):
        old = 1 + min(0.3, (1 + k) / (10 + k)) * (old - 1)
        expected.append(old)
    assert seen == pytest.approx(expected)


# --- self-distillation -----------------------------------------------------------------------


def scores(iptm: list[float]) -> dict[str, torch.Tensor]:
    value = torch.tensor(iptm)
    return {"iptm": value, "ligand_ptm": value, "ligand_plddt": 100 * value, "ranking": value}


def test_only_confident_poses_are_kept():
    keep = Keep(min_keep=2, iptm=0.8, ligand_ptm=0.5, plddt=70)
    assert keep.passing(scores([0.9, 0.7, 0.85, 0.1])).tolist() == [True, False, True, False]


def test_when_few_pass_the_best_share_is_kept():
    keep = Keep(min_keep=3, keep_fraction=0.5)
    assert keep.passing(scores([0.9, 0.7, 0.2, 0.1])).tolist() == [True, True, False, False]


def test_the_gate_refuses_wrong_poses(caplog):
    assert structure.open_gate(Keep(gate=2.0), [1.0, 1.5, 9.0])
    assert not structure.open_gate(Keep(gate=2.0), [1.0, 2.5, 9.0])
    assert structure.open_gate(Keep(gate=2.0, override_gate=True), [9.0])
    with pytest.raises(InputError, match="no validation complex"):
        structure.open_gate(Keep(), [])


def test_the_gate_keeps_in_proportion():
    """Sixteen of the hidden poses are asked for; of a tenth as many validation poses, two."""
    seen = []

    class Asked(Keep):
        def passing(self, scores):
            seen.append(self.min_keep)
            return torch.ones(len(scores["ranking"]), dtype=torch.bool)

    data = ComplexData(posed=0.5, max_residues=8)
    data.setup()
    network = AuroBind(single=8, pair=4, width=8, diffusion_blocks=1, heads=2).network
    held = len(data.places("val", pose=True))
    structure.own_poses_allowed(network, data, Asked(samples=1, steps=1), 10 * held, CPU)
    assert seen == [2]


def test_when_nothing_is_hidden_nothing_is_labelled(tmp_path, caplog):
    data = ComplexData(posed=1.0, max_residues=8)
    data.setup()
    assert structure.own_poses(None, data, Keep(), tmp_path / "own.npz", CPU) == {}
    assert "nothing to label" in caplog.text


def test_confidence_is_that_of_sampled_poses(run, tmp_path):
    data = ComplexData(posed=0.5, labelled=0.6, max_residues=8)
    data.setup()
    network, keep = runs.load_run(run / "3-fitness").network, Keep(samples=1, steps=2)
    found = structure.confidences(network, data, keep, tmp_path / "c.npz", CPU)
    known = data.places("train", label=True)
    assert set(known) & set(data.hidden_poses()), "a hidden pose is judged by sampling, too"
    assert (found[known] > 0).all()
    assert found.sum() == pytest.approx(found[known].sum())
    again = structure.confidences(None, data, keep, tmp_path / "c.npz", CPU)
    assert torch.equal(again, found)


def test_no_term_of_a_list_is_left_when_nobody_is_confident(run):
    model = runs.load_run(run / "4-preference")
    model.min_confidence, model.mse_anchor = 0.5, 0.0
    batch = {"list": torch.zeros(3).long(), "index": torch.arange(3), "label": torch.arange(3.0)}
    fitness = torch.zeros(3, requires_grad=True)
    for confidence, loss in ((0.6, math.log(6)), (0.4, 0.0)):
        model._confidence = torch.full((3,), confidence)
        found = model.task_loss((fitness, None, None), batch)["preference"]
        assert found.item() == pytest.approx(loss)


def test_validation_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_command("validate", "docking/aurobind", "--checkpoint", run / "5-student")
    assert done.code == 0, done.err
    assert not list(tmp_path.iterdir())


def test_half_of_an_epoch_is_self_labelled_and_no_validation_target_is():
    data = ComplexData(posed=0.5, batch_size=4, max_residues=8)
    data.setup()
    hidden = data.hidden_poses()
    held = {*data.parts["val"], *data.parts["test"]}
    assert not held & set(hidden)
    data.self_labelled = hidden[:5]
    drawn = [i for batch in data.train_dataloader() for i in batch["index"].tolist()]
    share = np.mean([i in set(data.self_labelled) for i in drawn])
    assert abs(share - 0.5) <= 0.02
    assert not held & set(drawn)


# --- data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["ligand", "protein"])
def test_no_molecule_or_target_is_in_two_parts(by):
    from cohobate.docking.data import Split

    data = ComplexData(split=Split(by=by, val=0.25, test=0.25))
    data.setup()
    of = {
        part: {
            c.target if by == "protein" else Chem.MolToSmiles(c.molecule)
            for c in (data.data.complexes[i] for i in places)
        }
        for part, places in data.parts.items()
    }
    assert all(of.values())
    assert not of["train"] & of["test"]
    assert not of["train"] & of["val"]
    assert not of["val"] & of["test"]


def test_unlabelled_molecules_are_none_of_the_held_out_ones():
    data = ComplexData(unlabelled=20)
    data.setup()
    every = [Chem.MolToSmiles(c.molecule) for c in data.data.complexes]
    assert not {every[i] for i in data.extra} & set(every[: data.extra[0]])


def test_a_choice_leaves_out_what_it_is_told():
    path = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    first = {Chem.MolToSmiles(m) for m in choose(path, 30, seed=1)}
    again = {Chem.MolToSmiles(m) for m in choose(path, 30, seed=1, without=first)}
    assert len(again) == 30
    assert not first & again
    with pytest.raises(InputError, match="drug-like molecules, 100000 are wanted"):
        choose(path, 100_000, seed=1)


def test_a_list_keeps_few_of_a_bin_and_one_target():
    labels = np.array([5.0] * 20 + [6.0, 7.0])
    drawn = Lists(size=16, most=5).draw(labels, seed=3)
    assert (labels[drawn] == 5.0).sum() == 5
    assert set(labels[drawn]) == {5.0, 6.0, 7.0}
    data = ComplexData(batches="lists", lists=Lists(least=5), batch_size=2)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    for one in batch["list"].unique():
        assert len(batch["group"][batch["list"] == one].unique()) == 1


def test_a_split_without_a_part_is_one_line():
    from cohobate.docking.data import Split

    with pytest.raises(InputError, match="do not give"):
        ComplexData(split=Split(by="protein", val=0.01)).setup()

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint
from cohobate.core.testing import (
    assert_equal,
    assert_export_round_trip,
    assert_one_line,
    assert_recipe_parses,
    assert_same_run,
    assert_student_only,
    assert_teachers_frozen,
    build,
    recipes,
    run_command,
)
from cohobate.detection.dwpose import WHOLEBODY, DWPose, RTMPose
from cohobate.detection.dwpose.checkpoint import load_into, merge
from cohobate.detection.dwpose.data import Batch
from cohobate.detection.dwpose.teachers import Average

SIZE = (192, 256)
SHORT = (
    "--data.size=[64,64]", "--data.batch_size=32", "--data.num_workers=0", "--model.hidden=32",
    "--model.attention=16", "--trainer.enable_progress_bar=false",
    "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1", "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=1",
)  # fmt: skip
SMALL = (*SHORT, "--model.variant=micro")
ALIKE = (*SMALL, "--model.teacher_variant=micro")


def recorded_batch(record):
    rng = np.random.default_rng(int(record["seed"]))
    images = rng.standard_normal((int(record["N"]), 3, 256, 192)).astype(np.float32)
    crops = torch.tensor([[96.0, 128, 192, 256]] * len(images))
    return Batch(
        torch.from_numpy(images), record["keypoints"], record["visible"],
        torch.arange(len(images)), crops,
    )  # fmt: skip


def assert_norms(record, named):
    found = {name: p.grad.norm().item() for name, p in named if p.grad is not None}
    wanted = dict(zip(record["grad_names"].tolist(), record["grad_norms"].tolist(), strict=True))
    assert set(found) == set(wanted)
    for name, norm in wanted.items():
        if norm > 1e-3:
            assert found[name] == pytest.approx(norm, rel=0.05), name


def dwpose(stage, **options):
    return DWPose(keypoints=WHOLEBODY, size=SIZE, stage=stage, variant="t", ema=None, **options)


@pytest.mark.parametrize(
    ("name", "bn"), [("stage1_loss", "eval"), ("stage1_loss_teacher_bn_train", "train")]
)
def test_first_stage_of_the_official_code(recorded, fill, name, bn, monkeypatch):
    record = recorded(name)
    module = dwpose("distil", teacher_variant="s", teacher_bn=bn)
    module._teach(fill(RTMPose("s", 133, SIZE)).state_dict(), "file")
    fill(module.network, "student.")
    fill(module.align, "align.")
    progress = int(record["epoch"]) / int(record["max_epochs"])
    monkeypatch.setattr(DWPose, "progress", progress)
    batch = recorded_batch(record)
    module.train()
    outputs = module.forward_train(batch)
    terms = {**module.task_loss(outputs, batch), **module.distill_loss(outputs, batch)}
    share = 1 - progress
    for ours, theirs, factor in (
        ("task", "kpt", 1.0), ("feature", "fea", share), ("logit", "logit", 0.1 * share),
    ):  # fmt: skip
        assert terms[ours].item() * factor == pytest.approx(
            float(record[f"out_loss_{theirs}"]), rel=1e-3
        ), ours
    total = module.weigh(terms)
    assert total.item() == pytest.approx(float(record["out_total"]), rel=1e-3)
    total.backward()
    student = [(f"student.{n}", p) for n, p in module.network.named_parameters()]
    align = [
        (next(k for k in record["grad_names"].tolist() if "align" in k and k.endswith(n)), p)
        for n, p in module.align.named_parameters()
    ]
    assert_norms(record, [*student, *align])


def test_second_stage_of_the_official_code(recorded, fill):
    record = recorded("stage2_loss")
    module = dwpose("head")
    module._teach(fill(RTMPose("t", 133, SIZE)).state_dict(), "file")
    fill(module.network.head, "student.head.")
    module.train()
    total = module.training_step(recorded_batch(record), 0)
    assert total.item() == pytest.approx(float(record["out_total"]), rel=1e-3)
    total.backward()
    named = [(f"student.{n}", p) for n, p in module.network.named_parameters()]
    assert_norms(record, named)
    assert sum(p.grad is not None for p in module.parameters()) == 12
    assert all(p.grad is None for p in module.network.backbone.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All three stages, two steps an epoch."""
    folder = tmp_path_factory.mktemp("run") / "run"
    done = run_command(
        "fit", "detection/dwpose", "--out", folder, "--trainer.max_epochs=2",
        *ALIKE,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def test_the_second_stage_keeps_the_backbone_and_makes_a_new_head(run):
    first = load_checkpoint(run / "2-distil" / "student.safetensors")
    second = load_checkpoint(run / "3-head" / "student.safetensors")
    assert set(first) == set(second)
    for name, tensor in second.items():
        assert torch.equal(tensor, first[name]) == name.startswith("backbone."), name


def test_runs_hold_the_student_alone_and_load_into_a_plain_network(run):
    for stage in ("2-distil", "3-head"):
        assert_student_only(run / stage)
        plain = RTMPose("micro", 33, (64, 64), 32, 16)
        plain.load_state_dict(load_checkpoint(run / stage / "student.safetensors"))
        from cohobate.core.runs import load_run

        inside, images = load_run(run / stage), torch.randn(1, 3, 64, 64)
        for one, other in zip(plain.eval()(images), inside.network(images), strict=True):
            torch.testing.assert_close(one, other)
    checkpoint = load_checkpoint(run / "3-head" / "last.ckpt")
    assert set(checkpoint["teachers"]["teacher"]) == {
        k.removeprefix("head.") for k in plain.state_dict() if k.startswith("head.")
    }
    assert not any("teacher" in k for k in checkpoint["state_dict"])


@pytest.mark.parametrize(("stage", "before"), [("distil", "1-teacher"), ("head", "2-distil")])
def test_a_stopped_stage_goes_on_as_if_it_had_not(run, tmp_path, stage, before):
    for name, lengths in (("whole", (2,)), ("stopped", (1, 2))):
        for epochs in lengths:
            # the schedules must not know how long the run will be
            done = run_command(
                "fit", f"detection/dwpose/{stage}", "--out", _after(run / before, tmp_path / name),
                f"--trainer.max_epochs={epochs}", "--model.decay=false", "--model.flat=1",
                *ALIKE,
            )  # fmt: skip
            assert done.code == 0, done.err
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def _after(earlier, folder):
    """A run folder whose stage finds the earlier stage by its name."""
    name = earlier.name.partition("-")[2]
    shutil.copytree(earlier, folder / name, dirs_exist_ok=True)
    return folder


def test_lessons_fall_by_epochs_and_labels_do_not(run):
    with (run / "2-distil" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    weights = [float(r["train/logit_weight"]) for r in rows if r["train/logit_weight"]]
    assert weights == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert not any("task_weight" in name for name in rows[0])


@pytest.mark.parametrize("epochs", [1, 4, 60])
def test_the_last_epoch_has_one_share_of_the_lessons(epochs, monkeypatch):
    module = small("distil")
    trainer = type("T", (), {"max_epochs": epochs, "current_epoch": 0})()
    module._trainer = trainer
    for epoch in range(epochs):
        trainer.current_epoch = epoch
        share = 1 - epoch / epochs
        assert module.weights["feature"](module.progress) == pytest.approx(share)
        assert module.weights["logit"](module.progress) == pytest.approx(0.1 * share)
    assert share == pytest.approx(1 / epochs)


def small(stage, **options):
    from cohobate.detection.dwpose.synthetic import KINDS

    return DWPose(
        keypoints=KINDS, size=(64, 64), stage=stage, variant="micro", teacher_variant="mini",
        hidden=32, attention=16, **options,
    )  # fmt: skip


def batch_of(count=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(count, 3, 64, 64, generator=draw),
        64 * torch.rand(count, 33, 2, generator=draw),
        torch.ones(count, 33), torch.arange(count), torch.ones(count, 4),
    )  # fmt: skip


def taught(stage, **options):
    module = small(stage, **options)
    variant = "mini" if stage == "distil" else "micro"
    module._teach(RTMPose(variant, 33, (64, 64), 32, 16).state_dict(), "file")
    return module


@pytest.mark.parametrize("stage", ["distil", "head"])
def test_the_teacher_does_not_change(stage):
    assert_teachers_frozen(taught(stage), batch_of())


@pytest.mark.parametrize("stage", ["distil", "head"])
def test_batch_statistics_change_only_when_asked(stage):
    for bn in ("eval", "train"):
        module = taught(stage, teacher_bn=bn)
        network = module.teacher.networks[0] if stage == "distil" else module.network
        before = {k: v.clone() for k, v in network.backbone.state_dict().items()}
        module.train()
        module.training_step(batch_of(), 0).backward()
        same = all(torch.equal(v, before[k]) for k, v in network.backbone.state_dict().items())
        assert same == (bn == "eval"), bn


def test_people_without_any_point_train_through():
    for stage in ("plain", "distil", "head"):
        module = small("plain") if stage == "plain" else taught(stage)
        batch = batch_of()
        batch = Batch(batch.images, batch.points, torch.zeros(4, 33), batch.rows, batch.crops)
        module.train()
        loss = module.training_step(batch, 0)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_both_arms_start_from_the_same_student():
    one = build("detection/dwpose/distil", *SMALL).model.network.state_dict()
    for option in ("--model.distill=false", "--model.lessons=second"):
        other = build("detection/dwpose/distil", *SMALL, option).model
        assert not other.taught
        assert_equal(dict(other.network.state_dict()), dict(one))


def test_weight_decay_spares_biases_and_normalisation():
    module = taught("distil")
    module._trainer = type("T", (), {"estimated_stepping_batches": 100})()
    groups = module.configure_optimizers()["optimizer"].param_groups
    names = {id(p): n for n, p in module.named_parameters()}
    spared = {names[id(p)] for p in groups[1]["params"]}
    assert groups[0]["weight_decay"] == 0.05
    assert groups[1]["weight_decay"] == 0.0
    assert {"align.bias", "network.head.final_layer.bias"} <= spared
    assert all(n.endswith((".bias", ".bn.weight")) for n in spared)


def test_the_learning_rate_warms_up_stays_and_falls():
    module = small("plain", warmup=10, flat=0.5, final=0.05)
    rates = [module._rate(n, 100) for n in range(101)]
    assert rates[0] == 1e-5
    assert rates[5] == pytest.approx(0.5)
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.525)
    assert rates[100] == pytest.approx(0.05)
    constant = small("plain", warmup=0, flat=1.0)
    assert {constant._rate(n, 100) for n in range(101)} == {1.0}


def test_the_average_follows_with_a_falling_momentum():
    layer = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    average = Average(layer, momentum=0.1, gamma=2.0)
    wanted = None
    for step in range(4):
        with torch.no_grad():
            layer[0].weight.fill_(float(step))
            layer[1].running_mean.fill_(-float(step))
        average.after_step(0.0)
        share = 0.1 + 0.9 * np.exp(-(1 + step) / 2.0)
        wanted = float(step) if step == 0 else wanted + share * (step - wanted)
    state = average.network.state_dict()
    assert state["0.weight"].item() == pytest.approx(wanted)
    assert state["1.running_mean"].item() == pytest.approx(-wanted)


def test_weights_of_the_released_distiller_are_merged(tmp_path):
    student, teacher = (RTMPose(v, 33, (64, 64), 32, 16) for v in ("micro", "mini"))
    state = {f"student.{k}": v for k, v in student.state_dict().items()}
    first = {**state, **{f"teacher.{k}": v for k, v in teacher.state_dict().items()}}
    assert_equal(merge(first), dict(student.state_dict()))
    other = RTMPose("micro", 33, (64, 64), 32, 16)
    second = {**state, **{f"teacher.{k}": v for k, v in other.state_dict().items()}}
    merged = merge(second)
    assert torch.equal(merged["head.cls_x.weight"], student.head.cls_x.weight)
    assert torch.equal(merged["backbone.stem.0.conv.weight"], other.backbone.stem[0].conv.weight)
    torch.save({"state_dict": dict(student.state_dict()), "meta": {}}, tmp_path / "dw.pth")
    assert load_into(other, tmp_path / "dw.pth") == []
    assert_equal(dict(other.state_dict()), dict(student.state_dict()))


def test_other_key_points_keep_their_fresh_head(tmp_path):
    torch.save(RTMPose("micro", 133, (64, 64), 32, 16).state_dict(), tmp_path / "w.pth")
    fresh = load_into(RTMPose("micro", 33, (64, 64), 32, 16), tmp_path / "w.pth", strict=False)
    assert set(fresh) == {"head.final_layer.weight", "head.final_layer.bias"}
    with pytest.raises(InputError, match=r"w.pth: head.final_layer.weight has shape"):
        load_into(RTMPose("micro", 33, (64, 64), 32, 16), tmp_path / "w.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"none.pth: holds no RTMPose"):
        load_into(RTMPose("micro", 33, (64, 64), 32, 16), tmp_path / "none.pth")


def test_export_is_the_plain_network(run, tmp_path):
    assert_export_round_trip(run / "3-head", tmp_path, onnx=False)


@pytest.mark.parametrize(
    ("name", "path"),
    [r for r in recipes("detection") if r[0].startswith("detection/dwpose")],
    ids=lambda x: str(x)[-40:],
)
def test_recipes_parse(name, path):
    assert_recipe_parses(path)


@pytest.mark.parametrize("arm", ["baseline", "first", "second"])
def test_arms_run_all_stages(arm, tmp_path):
    from cohobate.core import catalog, runs

    recipe = catalog.find("detection/dwpose")
    options = ["--trainer.max_epochs=1", "--model.teacher_variant=micro", *SMALL]
    folders = runs.fit(recipe, options, arm=recipe.paper.arms[arm], out=tmp_path / "run")
    first, second = (load_checkpoint(f.student) for f in folders[1:])
    changed = not all(torch.equal(first[k], second[k]) for k in first)
    assert changed == (arm == "second")
    rows = (folders[1].path / "metrics.csv").read_text().splitlines()[0]
    assert ("train/feature" in rows) == (arm == "first")
    assert folders[2].finished


def test_a_stage_without_a_teacher_says_so(tmp_path):
    done = run_command("fit", "detection/dwpose/finetune", "--out", tmp_path / "run", *SMALL)
    assert_one_line(done, "stage distil", "model.teacher")
    done = run_command(
        "fit", "detection/dwpose/finetune", "--out", tmp_path / "other", *SMALL,
        f"--model.teacher={tmp_path / 'none.pth'}",
    )  # fmt: skip
    assert_one_line(done, tmp_path / "none.pth", "no such checkpoint")


def test_a_teacher_of_another_size_is_refused(tmp_path):
    torch.save(RTMPose("micro", 33, (64, 64), 32, 16).state_dict(), tmp_path / "t.pth")
    done = run_command(
        "fit", "detection/dwpose/finetune", "--out", tmp_path / "run", *SMALL,
        "--model.teacher_variant=mini", f"--model.teacher={tmp_path / 't.pth'}",
    )  # fmt: skip
    assert_one_line(done, tmp_path / "t.pth", "has shape")

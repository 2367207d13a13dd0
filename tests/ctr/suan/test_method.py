"""Training: what learns from what, the baseline, warm-up, resume, processes."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cohobate.core import catalog, runs
from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint
from cohobate.core.testing import (
    assert_equal,
    assert_recipe_parses,
    assert_same_run,
    assert_student_only,
    build,
    recipes,
)
from cohobate.ctr.nets import Batch, Common, Layout
from cohobate.ctr.optim import JointOptimizer, click_optimizer
from cohobate.ctr.suan import SUAN, DistilSUAN, LightSUAN

Fit = Callable[..., Path]
TINY = ["--data.rows=[512,256,256]", "--data.length=8", "--model.common.head=[8]"]
FOUND = recipes("ctr")


def light(layout: Layout, common: Common) -> LightSUAN:
    return LightSUAN(layout, common, window=3)


def module(layout: Layout, **options: Any) -> DistilSUAN:
    torch.manual_seed(0)
    options = {"common": Common(head=(8,), embedding_std=0.3), **options}
    return DistilSUAN(layout, light, SUAN, **{"teacher_warmup_epochs": 0, **options})


@pytest.fixture
def batch(layout: Layout) -> Batch:
    return Batch(layout.example(6), torch.tensor([1.0, 0, 0, 1, 0, 1]), torch.arange(6))


@pytest.mark.parametrize(("name", "path"), FOUND, ids=[name for name, _ in FOUND])
def test_every_recipe_parses(name: str, path: Path) -> None:
    assert_recipe_parses(path)


@pytest.mark.parametrize("arm", catalog.papers("ctr")["ctr/suan"].arms)
def test_every_arm_trains(arm: str, tmp_path: Path, fit: Fit) -> None:
    folder = fit(tmp_path / arm, "--data.rows=[128,64,64]", arm=arm)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_the_soft_loss_reaches_the_student_alone(layout: Layout, batch: Batch) -> None:
    model = module(layout)
    outputs = model.forward_train(batch)
    outputs["student"].retain_grad()
    model.distill_loss(outputs, batch)["kd"].backward()
    assert model.teacher is not None
    assert all(p.grad is None for p in model.teacher.parameters())
    s, t = (outputs[n].detach().double() / 2 for n in ("student", "teacher"))
    expected = 2 * (s.sigmoid() - t.sigmoid()) / len(batch.label)
    torch.testing.assert_close(
        outputs["student"].grad.double(), expected, atol=1e-6, rtol=0, check_dtype=False
    )


def test_the_teacher_can_learn_from_the_student(layout: Layout, batch: Batch) -> None:
    model = module(layout, detach_teacher=False)
    model.distill_loss(model.forward_train(batch), batch)["kd"].backward()
    assert model.teacher is not None
    assert any(p.grad is not None and p.grad.any() for p in model.teacher.parameters())


def test_the_loss_is_the_weighted_sum(layout: Layout, batch: Batch) -> None:
    model = module(layout, weights={"kd": 0.5, "teacher": 2.0})
    state = copy.deepcopy(model.state_dict())
    loss = model.training_step(batch, 0)
    model.load_state_dict(state)
    outputs = model.forward_train(batch)
    task, kd = model.task_loss(outputs, batch), model.distill_loss(outputs, batch)["kd"]
    torch.testing.assert_close(loss, task["student"] + 2 * task["teacher"] + 0.5 * kd)


def test_without_weight_the_student_is_the_baselines_bit_for_bit(tmp_path: Path, fit: Fit) -> None:
    last = "--evaluate=last"
    distilled = fit(tmp_path / "kd0", "--model.weights={kd: 0.0}", last)
    alone = fit(tmp_path / "alone", last, arm="baseline")
    a, b = (load_checkpoint(f / "student.safetensors") for f in (distilled, alone))
    assert_equal(a, b)
    moved = fit(tmp_path / "kd1", "--model.weights={kd: 1.0}", last)
    c = load_checkpoint(moved / "student.safetensors")
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_the_teacher_trains_alone_first(tmp_path: Path, fit: Fit) -> None:
    start = build("ctr/suan", *TINY).model.state_dict()
    states = [
        load_checkpoint(fit(tmp_path / f"{n}", f"--trainer.max_steps={n}") / "last.ckpt")
        for n in (8, 16)  # an epoch has eight steps
    ]
    for name, tensor in start.items():
        after = states[0]["state_dict"][name]
        if name.startswith("network."):
            assert torch.equal(tensor, after), name
    for part, state in (("teacher.table.weight", 0), ("network.table.weight", 1)):
        assert not torch.equal(start[part], states[state]["state_dict"][part])


def test_a_run_folder_has_the_student_alone_and_says_what_the_data_are(trained: Path) -> None:
    assert_student_only(trained)
    names = load_checkpoint(trained / "student.safetensors")
    assert not any("teacher" in name for name in names)
    info = json.loads((trained / "run.json").read_text())
    assert info["data"].startswith("SYNTHETIC clicks, best reachable test AUC 0.")
    assert {"test/auc", "test/gauc", "test/log_loss", "test/calibration", "test/ece",
            "test/teacher_auc", "test/teacher_gap"} <= set(info["test"])  # fmt: skip
    assert (trained / "calibration.png").stat().st_size > 1000


def test_the_students_size_does_not_depend_on_distillation(layout: Layout) -> None:
    sizes = [sum(p.numel() for p in module(layout, distill=d).student.parameters())
             for d in (True, False)]  # fmt: skip
    assert sizes[0] == sizes[1]
    assert module(layout, distill=False).teacher is None


def test_killed_twice_a_run_ends_the_same(
    trained: Path, tmp_path: Path, fit: Fit, killed: Callable[..., int]
) -> None:
    out = tmp_path / "killed"
    for step in (5, 19):  # in the warm-up and in the joint part, in the middle of an epoch
        code = killed(lambda: fit(out, "--checkpoint_steps=2"), step)
        assert code == -signal.SIGKILL
    assert_same_run(fit(out, "--checkpoint_steps=2"), trained)


def test_offline_the_teacher_of_the_first_stage_stays_as_it_is(tmp_path: Path, fit: Fit) -> None:
    folder = fit(tmp_path / "off", recipe="ctr/suan/offline")
    first = load_checkpoint(tmp_path / "off" / "1-teacher" / "best.ckpt")["state_dict"]
    second = load_checkpoint(folder / "last.ckpt")["state_dict"]
    for name, tensor in second.items():
        if name.startswith("teacher."):
            assert torch.equal(tensor, first[name.replace("teacher.", "network.", 1)]), name
    assert_student_only(folder)


def test_a_teacher_starts_from_a_run_folder(trained: Path, layout: Layout) -> None:
    data = runs.load_run(trained)
    torch.manual_seed(1)
    model = DistilSUAN(
        data.layout,
        SUAN,
        lambda la, c: LightSUAN(la, c, window=4, dilation=4),
        common=Common(head=(8,), embedding_std=0.3),
        teacher_checkpoint=trained,
    )
    model.setup("fit")
    assert model.teacher is not None
    assert_equal(dict(model.teacher.state_dict()), load_checkpoint(trained / "student.safetensors"))
    wrong = DistilSUAN(data.layout, SUAN, SUAN, common=Common(head=(4,)),
                       teacher_checkpoint=trained)  # fmt: skip
    with pytest.raises(InputError, match=r"student\.safetensors"):
        wrong.setup("fit")


def test_contradictions_are_named(layout: Layout) -> None:
    with pytest.raises(InputError, match="teacher_warmup_epochs"):
        module(layout, train_teacher=False, teacher_warmup_epochs=1)
    with pytest.raises(InputError, match="temperature 0"):
        module(layout, temperature=0)
    with pytest.raises(InputError, match="share_embeddings: widths 8 and 16"):
        DistilSUAN(
            layout,
            light,
            lambda la, c: SUAN(la, Common(dim=16, head=(8,))),
            common=Common(dim=8, head=(8,)),
            share_embeddings=True,
        )


def test_shared_embeddings_get_both_gradients(layout: Layout, batch: Batch) -> None:
    model = module(layout, share_embeddings=True)
    assert model.teacher is not None
    assert model.teacher.table is model.network.table
    task = model.task_loss(model.forward_train(batch), batch)
    each = [
        torch.autograd.grad(task[n], model.network.table.weight, retain_graph=True)[0] for n in task
    ]
    sum(task.values()).backward()
    torch.testing.assert_close(model.network.table.weight.grad, each[0] + each[1])
    count = sum(p is model.network.table.weight for p in model.parameters())
    assert count == 1


@pytest.mark.parametrize(("kind", "sparse"), [("adam", False), ("adam", True), ("adagrad", False),
                                              ("adagrad", True)])  # fmt: skip
def test_optimisers_move_the_rows_of_a_batch(
    kind: Any, sparse: bool, layout: Layout, batch: Batch
) -> None:
    network = SUAN(layout, Common(head=(8,), embedding_std=0.3, sparse=sparse))
    optimizer = click_optimizer(network, lr=1e-3, embedding_lr=0.1, embedding_optimizer=kind)
    before = copy.deepcopy(network.state_dict())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = network(*batch.features).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    seen = torch.cat([x.flatten() for x in batch.features[:4]]).unique()
    unseen = torch.ones(layout.ids, dtype=torch.bool)
    unseen[seen[seen > 0]] = False
    moved = (network.table.weight - before["table.weight"]).detach().abs().amax(1)
    assert (moved[unseen] == 0).all()
    assert (moved[~unseen] > 1e-3).all()
    assert moved.max().item() == pytest.approx(0.1, rel=1e-3)  # the tables' own rate
    assert not torch.equal(network.project.weight, before["project.weight"])
    again = click_optimizer(network, lr=1e-3, embedding_lr=0.1, embedding_optimizer=kind)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(again.state_dict(), optimizer.state_dict())
    if isinstance(again, JointOptimizer):
        again.param_groups[0]["lr"] = 0.5  # what a schedule changes is what the inner one uses
        assert again.optimizers[0].param_groups[0]["lr"] == 0.5


def test_adagrad_and_bf16_train_through_the_command(tmp_path: Path, fit: Fit) -> None:
    folder = fit(
        tmp_path / "bf16",
        "--model.embedding_optimizer=adagrad",
        "--model.embedding_lr=0.05",
        "--model.common.sparse=true",
        "--trainer.precision=bf16-mixed",
        "--trainer.max_epochs=1",
    )
    state = load_checkpoint(folder / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(t).all() for t in state.values())


def test_binned_metrics_through_the_command(tmp_path: Path, fit: Fit, trained: Path) -> None:
    folder = fit(tmp_path / "binned", "--model.exact_metrics=false")
    found = json.loads((folder / "run.json").read_text())["test"]
    exact = json.loads((trained / "run.json").read_text())["test"]
    assert found["test/auc"] == pytest.approx(exact["test/auc"], abs=1e-3)
    assert "test/gauc" not in found


def test_validate_repeats_the_results_of_the_run(trained: Path) -> None:
    found = runs.validate(trained, ["--trainer.enable_progress_bar=false"])
    info = json.loads((trained / "run.json").read_text())
    assert found["test/auc"] == pytest.approx(info["test"]["test/auc"], abs=1e-7)
    assert found["val/auc"] == pytest.approx(info["best"]["val/auc"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_train_and_measure_together(tmp_path: Path) -> None:
    from cohobate.ctr.data.generator import write_generated

    write_generated(tmp_path / "log", (512, 257, 255), length=8)
    command = [
        sys.executable, "-m", "cohobate.ctr", "fit", "suan", "--out", str(tmp_path / "ddp"),
        f"--data.root={tmp_path / 'log'}", "--data.batch_size=32", "--model.common.head=[8]",
        "--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.max_epochs=1",
        "--trainer.strategy=ddp_find_unused_parameters_true",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "ddp" / "run.json").read_text())
    assert info["steps"] == 16  # 512 rows by two processes of 32
    alone = runs.validate(
        tmp_path / "ddp",
        ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.enable_progress_bar=false"],
    )
    for name in ("auc", "gauc", "log_loss"):
        assert alone[f"test/{name}"] == pytest.approx(info["test"][f"test/{name}"], abs=1e-6)


def test_every_module_is_reached_by_the_loss(layout: Layout, batch: Batch) -> None:
    model = module(layout)
    model.training_step(batch, 0).backward()
    parts: list[nn.Module] = [model.network]
    idle = [n for m in parts for n, p in m.named_parameters() if p.grad is None]
    assert idle == []

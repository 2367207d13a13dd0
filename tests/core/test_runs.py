from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cohobate.core import catalog, runs
from cohobate.core.errors import InputError
from cohobate.core.export import export, load_student
from cohobate.core.folders import stage_source
from cohobate.core.io import load_checkpoint, load_weights
from cohobate.core.testing import (
    assert_one_line,
    assert_same_run,
    assert_student_only,
    run_command,
)
from cohobate.core.training.logger import MetricsCsv
from cohobate.toy.tiny.method import Cloud, Points, Tiny


def test_a_run_folder_holds_what_is_promised(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "run.json", "metrics.csv", "best.ckpt", "last.ckpt", "student.safetensors",
    }  # fmt: skip
    info = json.loads((trained / "run.json").read_text())
    assert (info["status"], info["seed"], info["steps"]) == ("finished", 0, 32)
    assert {"python", "torch", "lightning", "cohobate-core"} <= set(info["versions"])
    assert info["data"] == "SYNTHETIC points"


def test_checkpoint_and_student_hold_no_teacher(trained: Path) -> None:
    assert_student_only(trained)
    content = load_checkpoint(trained / "best.ckpt")
    assert all(name.startswith("net.") for name in content["state_dict"])
    assert len(content["optimizer_states"][0]["state"]) == len(content["state_dict"])


def test_best_is_the_best_epoch(trained: Path) -> None:
    with (trained / "metrics.csv").open() as file:
        scores = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    info = json.loads((trained / "run.json").read_text())
    assert info["best"]["val/accuracy"] == pytest.approx(max(scores))
    assert load_checkpoint(trained / "best.ckpt")["epoch"] == scores.index(max(scores))


def test_plain_lightning_reads_the_config(trained: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["class_path"] == "cohobate.toy.tiny.Tiny"
    assert config["model"]["init_args"]["width"] == 8


def test_what_came_from_the_data_is_read_back(trained: Path, fit) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["init_args"]["bounds"] == {"low": -4.0, "high": 5.0}
    assert runs.load_run(trained).bounds.high == 5.0
    fit(trained)  # finished: its config is read and agreed to


def test_weights_from_elsewhere_become_a_run(trained: Path, tmp_path: Path) -> None:
    config, model = runs.read_run_config(trained), runs.load_run(trained)
    folder = tmp_path / "run"
    runs.make_run(folder, model.state_dict(), config["model"], config["data"])
    taken = runs.load_run(folder).state_dict()
    assert all(torch.equal(taken[name], value) for name, value in model.state_dict().items())
    assert runs.validate(folder) == runs.validate(trained)
    with pytest.raises(InputError, match=f"^{folder}: there is a run already$"):
        runs.make_run(folder, model.state_dict(), config["model"], config["data"])


def test_validation_may_be_rarer_than_epochs(fit, tmp_path: Path) -> None:
    out = fit(tmp_path / "run", "--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=3")
    assert load_checkpoint(out / "best.ckpt")["epoch"] == 1


def test_the_same_seed_gives_the_same_run(trained: Path, fit, tmp_path: Path) -> None:
    assert_same_run(fit(tmp_path / "again"), trained)


def test_workers_do_not_change_the_numbers(trained: Path, fit, tmp_path: Path) -> None:
    out = fit(tmp_path / "run", "--data.workers=1", "--trainer.max_epochs=1")
    head = (out / "metrics.csv").read_text().splitlines()[1:9]
    whole = (trained / "metrics.csv").read_text().splitlines()[1:9]
    # the schedule's weight depends on the length of the run, the task loss of the first step not
    assert head[0].split(",")[:3] == whole[0].split(",")[:3]
    assert len(head) == len(whole)


def test_another_seed_gives_another_run(trained: Path, fit, tmp_path: Path) -> None:
    out = fit(tmp_path / "other", "--seed_everything=1")
    assert (out / "metrics.csv").read_text() != (trained / "metrics.csv").read_text()


def _fit_and_die(out: Path, step: int) -> None:
    os.environ["TINY_DIE_AT_STEP"] = str(step)
    options = ["--trainer.enable_progress_bar=false", "--checkpoint_steps=3"]
    runs.fit(catalog.find("toy/tiny"), options, out=out)


def test_killed_three_times_a_run_ends_the_same(
    trained: Path, fit, in_child, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    for step in (5, 14, 27):  # inside the first, the second and the last epoch
        assert in_child(_fit_and_die, out, step) == -signal.SIGKILL
        assert not runs.RunFolder(out).finished
    fit(out)
    assert_same_run(out, trained)


def _fit_on_a_full_disk(out: Path) -> None:
    """A file-size limit stands in for the full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a checkpoint has 28,000 bytes
    outcome = run_command(
        "fit", "toy/tiny", f"--out={out}", "--trainer.max_epochs=2",
        "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert_one_line(outcome, "ckpt: cannot be written: no space left")
    raise SystemExit(outcome.code)


def test_a_full_disk_is_one_line_and_the_run_can_go_on(fit, in_child, tmp_path: Path) -> None:
    out = fit(tmp_path / "run", "--trainer.max_epochs=1")
    before = {path.name: path.read_bytes() for path in out.glob("*.ckpt")}
    assert in_child(_fit_on_a_full_disk, out) == 2
    assert {path.name: path.read_bytes() for path in out.glob("*.ckpt")} == before
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    fit(out, "--trainer.max_epochs=2")
    assert runs.RunFolder(out).info["steps"] == 16


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(fit, tmp_path: Path) -> None:
    out = fit(tmp_path / "run", "--trainer.max_epochs=2")
    before = (out / "last.ckpt").stat().st_mtime_ns
    fit(out)
    assert (out / "last.ckpt").stat().st_mtime_ns == before
    fit(out, "--trainer.max_epochs=3")
    assert runs.RunFolder(out).info["steps"] == 24


def test_a_run_folder_refuses_another_configuration(trained: Path, fit) -> None:
    with pytest.raises(InputError, match=r"started with model\.width = 8, not 9"):
        fit(trained, "--model.width=9")
    with pytest.raises(InputError, match="seed_everything = 0, not 3"):
        fit(trained, "--seed_everything=3")


def test_stages_start_from_the_one_before_and_are_skipped_when_finished(
    fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = fit(tmp_path / "run", recipe="toy/staged")
    assert last.name == "2-distil"
    first = load_checkpoint(last.parent / "1-warm" / "best.ckpt")["state_dict"]
    second = load_checkpoint(last / "last.ckpt")["state_dict"]  # its learning rate is 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = (last / "last.ckpt").stat().st_mtime_ns
    fit(tmp_path / "run", recipe="toy/staged")
    assert (last / "last.ckpt").stat().st_mtime_ns == before
    assert runs.checkpoint_file(tmp_path / "run").parent == last


def test_a_stage_killed_before_its_first_checkpoint_starts_from_the_one_before(
    fit, tmp_path: Path
) -> None:
    last = fit(tmp_path / "run", recipe="toy/staged")
    for name in ("best.ckpt", "last.ckpt", "student.safetensors", "metrics.csv", "run.json"):
        (last / name).unlink()
    fit(tmp_path / "run", recipe="toy/staged")
    first = load_checkpoint(last.parent / "1-warm" / "best.ckpt")["state_dict"]
    second = load_checkpoint(last / "last.ckpt")["state_dict"]  # its learning rate is 0
    assert all(torch.equal(first[name], second[name]) for name in first)


def forget(checkpoint: Path) -> None:
    """Other weights of the same shapes, all zero."""
    content = load_checkpoint(checkpoint)
    for tensor in content["state_dict"].values():
        tensor.zero_()
    torch.save(content, checkpoint)


def test_the_weights_that_were_tested_are_those_that_are_used(fit, tmp_path: Path) -> None:
    out = fit(tmp_path / "run", "--evaluate=last", "--trainer.max_epochs=1")
    fit(out, "--trainer.max_epochs=2")  # going on, nobody says it again
    run, best = runs.RunFolder(out), out / "best.ckpt"
    assert run.info["evaluated"] == "last.ckpt"
    forget(best)
    assert runs.checkpoint_file(out) == out / "last.ckpt"
    assert runs.checkpoint_file(best) == best
    assert runs.load_run(out).net[0].weight.any()
    assert not runs.load_run(best).net[0].weight.any()
    student = load_student(export(out, "safetensors")[0].parent)
    assert torch.equal(student[0].weight, runs.load_run(out).net[0].weight)
    quiet = "--trainer.enable_progress_bar=false"
    tested = run.info["test"]["test/loss"]
    assert runs.validate(out, [quiet])["test/loss"] == pytest.approx(tested)
    for found in (runs.validate(out, [quiet, "--evaluate=best"]), runs.validate(best, [quiet])):
        assert found["test/loss"] == pytest.approx(np.log(2))  # of two classes, knowing nothing


def test_a_run_without_its_tested_weights_has_the_others(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "best.ckpt").unlink()
    assert runs.checkpoint_file(run) == run / "last.ckpt"


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Points, "describe"), (Points, "setup"), (Points, "val_dataloader"),
        (Cloud, "__getitem__"), (Tiny, "configure_optimizers"),
    ],
)  # fmt: skip
def test_bad_input_that_is_found_late_leaves_nothing(
    in_tmp: Path, monkeypatch, kind: type, method: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise InputError("labels/a.png: unreadable")

    words = ("fit", "toy/tiny", "--out=runs/x", "--trainer.enable_progress_bar=false")
    short = (*words, "--trainer.max_epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, fail)
        assert_one_line(run_command(*short, "--data.samples=32"), "labels/a.png: unreadable")
        assert list(in_tmp.iterdir()) == []
        Path("runs/x").mkdir(parents=True)
        Path("runs/x/mine.txt").touch()
        assert_one_line(run_command(*short, "--data.samples=32"), "labels/a.png: unreadable")
    assert [path.name for path in Path("runs/x").iterdir()] == ["mine.txt"]
    assert run_command(*short, "--data.samples=16").code == 0


def test_bad_input_leaves_a_run_that_has_a_checkpoint(fit, tmp_path: Path, monkeypatch) -> None:
    out = fit(tmp_path / "run", "--trainer.max_epochs=1")
    before = (out / "last.ckpt").read_bytes()

    def fail(*args: object, **options: object) -> None:
        raise InputError("unreadable")

    with monkeypatch.context() as patch:
        patch.setattr(Points, "setup", fail)
        with pytest.raises(InputError, match="unreadable"):
            fit(out, "--trainer.max_epochs=2")
    assert (out / "last.ckpt").read_bytes() == before
    fit(out, "--trainer.max_epochs=2")
    assert runs.RunFolder(out).info["steps"] == 16


@pytest.fixture
def warm(fit, tmp_path: Path) -> Path:
    """The first of two stages, in the folder of the whole recipe."""
    out = tmp_path / "runs" / "x" / "1-warm"
    return fit(out, "--evaluate=last", "--trainer.max_epochs=2", recipe="toy/staged/warm")


def starts_from(run: Path, checkpoint: Path) -> bool:
    """Whether a stage of learning rate 0 began with these weights."""
    first = load_checkpoint(checkpoint)["state_dict"]
    second = load_checkpoint(run / "last.ckpt")["state_dict"]
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("out", "made"),
    [
        ("x", "x/2-distil"),  # the whole recipe's folder
        ("x/2-distil", "x/2-distil"),
        ("x/again", "x/again"),
        ("x-distil", "x-distil"),  # as without --out
    ],
)
def test_a_stage_alone_finds_the_one_before(
    fit, warm: Path, tmp_path: Path, out: str, made: str
) -> None:
    forget(warm / "best.ckpt")  # what the stage before was tested with is its last
    run = fit(tmp_path / "runs" / out, recipe="toy/staged/distil")
    assert run == tmp_path / "runs" / made
    assert starts_from(run, warm / "last.ckpt")
    assert not starts_from(run, warm / "best.ckpt")
    if out == "x":  # the whole recipe agrees that it is done
        before = (run / "last.ckpt").stat().st_mtime_ns
        fit(tmp_path / "runs" / "x", recipe="toy/staged/distil")
        assert (run / "last.ckpt").stat().st_mtime_ns == before


def test_stages_alone_one_after_the_other(fit, warm: Path, in_tmp: Path) -> None:
    warm.rename("runs/staged-warm")
    run = fit(None, recipe="toy/staged/distil")
    assert str(run) == "runs/staged-distil"
    assert starts_from(run, Path("runs/staged-warm/last.ckpt"))


def test_a_stage_of_a_setting_looks_in_the_setting(warm: Path, tmp_path: Path) -> None:
    """``recipe/big/2-distil.yaml`` goes on from ``x-big``, not from the default's ``x``."""
    shutil.copytree(warm, tmp_path / "runs" / "x-big" / "1-warm")
    recipe = catalog.find("toy/staged/distil")
    stage = catalog.Stage("distil", Path("recipe/big/2-distil.yaml"))
    found = stage_source(recipe, stage, "warm", tmp_path / "runs" / "x-distil")
    assert found == tmp_path / "runs" / "x-big" / "1-warm"


def test_a_stage_of_that_name_of_another_paper_is_passed_over(
    trained: Path, fit, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "warm")
    with pytest.raises(InputError, match=r"init_from: no run of stage 'warm' in .*--init_from"):
        fit(tmp_path / "distil", recipe="toy/staged/distil")
    assert not (tmp_path / "distil").exists()


@pytest.mark.parametrize("name", ["", "best.ckpt", "last.ckpt", "student.safetensors"])
@pytest.mark.parametrize("by", ["option", "words", "file"])
def test_any_run_or_checkpoint_can_be_the_start(
    trained: Path, fit, tmp_path: Path, name: str, by: str
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"init_from: {trained / name}\n")
    options = {
        "option": [f"--init_from={trained / name}"],
        "words": ["--init_from", str(trained / name)],
        "file": ["--config", str(mine)],
    }[by]
    run = fit(tmp_path / "run", *options, recipe="toy/staged/distil")
    used = "last.ckpt" if name == "last.ckpt" else "best.ckpt"
    if name != "student.safetensors":
        assert starts_from(run, trained / used)
    student = load_weights(run / "student.safetensors")
    wanted = load_checkpoint(trained / used)["state_dict"]
    assert all(torch.equal(student[name], wanted[f"net.{name}"]) for name in student)


def test_of_several_stages_the_first_starts_where_the_option_says(
    trained: Path, fit, tmp_path: Path
) -> None:
    options = [f"--init_from={trained}", "--model.lr=0"]
    last = fit(tmp_path / "run", *options, recipe="toy/staged")
    assert starts_from(last.parent / "1-warm", trained / "best.ckpt")
    assert starts_from(last, last.parent / "1-warm" / "best.ckpt")
    config = yaml.safe_load((last / "config.yaml").read_text())
    assert config["init_from"] == "warm"
    fit(tmp_path / "run", *options, recipe="toy/staged")
    fit(tmp_path / "run", recipe="toy/staged")
    with pytest.raises(InputError, match=r"1-warm: .* started with init_from = .*, not warm"):
        fit(tmp_path / "run", "--init_from=warm", recipe="toy/staged")


def test_an_arm_may_start_elsewhere(trained: Path, tmp_path: Path) -> None:
    arm = tmp_path / "arm.yaml"
    arm.write_text(f"init_from: {trained}\n")
    quiet = ["--trainer.enable_progress_bar=false"]
    made = runs.fit(catalog.find("toy/staged"), quiet, arm=arm, out=tmp_path / "run")
    assert starts_from(made[1].path, trained / "best.ckpt")


def test_a_start_that_does_not_fit_is_one_line(trained: Path, in_tmp: Path) -> None:
    words = ("fit", "toy/tiny", f"--init_from={trained}", "--out=run")
    assert_one_line(run_command(*words, "--model.width=5"), "init_from", trained, "net.0.weight")
    assert_one_line(run_command(*words[:2], "--init_from=nowhere"), "no run of stage 'nowhere'")
    assert list(in_tmp.iterdir()) == []


def test_a_run_of_another_paper_or_stage_is_not_gone_on_with(
    trained: Path, warm: Path, fit
) -> None:
    with pytest.raises(InputError, match="a run of toy/tiny, not of toy/staged"):
        fit(trained, recipe="toy/staged/distil")
    with pytest.raises(InputError, match="a run of toy/staged, stage warm, not distil"):
        fit(warm, recipe="toy/staged/distil")


def test_validate_repeats_the_numbers_of_the_run(trained: Path) -> None:
    found = runs.validate(trained, ["--trainer.enable_progress_bar=false"])
    info = runs.RunFolder(trained).info
    assert found["test/loss"] == pytest.approx(info["test"]["test/loss"])
    assert found["val/accuracy"] == pytest.approx(info["best"]["val/accuracy"])


def test_metrics_keep_their_rows_and_gain_columns(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({"a": 1.0, "epoch": 0}, 0)
    logger.log_metrics({"b": 2.0, "epoch": 0}, 1)
    logger.log_metrics({"a": 3.0, "epoch": 1}, 2)
    text = "step,epoch,a,b\r\n0,0,1,\r\n1,0,,2\r\n2,1,3,\r\n"
    assert (tmp_path / "metrics.csv").read_bytes().decode() == text
    again = MetricsCsv(tmp_path)
    again.truncate(1)
    again.log_metrics({"b": 2.0, "epoch": 0}, 1)
    again.log_metrics({"a": 3.0, "epoch": 1}, 2)
    assert (tmp_path / "metrics.csv").read_bytes().decode() == text


def test_two_processes_give_the_losses_of_one(fit, tmp_path: Path) -> None:
    common = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--model.dropout=0.0"]
    alone = fit(tmp_path / "one", *common, "--data.batch_size=8")
    command = [
        sys.executable, "-m", "cohobate.core", "fit", "toy/tiny", *common, "--data.batch_size=4",
        "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.enable_progress_bar=false",
        f"--out={tmp_path / 'two'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = []
    for folder in (alone, tmp_path / "two"):
        with (folder / "metrics.csv").open() as file:
            rows.append([row for row in csv.DictReader(file) if row["train/loss"]])
    assert len(rows[0]) == len(rows[1]) == 16
    for one, two in zip(*rows, strict=True):
        assert float(one["train/loss"]) == pytest.approx(float(two["train/loss"]), rel=1e-5)
    assert_close_states(alone, tmp_path / "two")


def assert_close_states(one: Path, two: Path) -> None:
    a, b = load_checkpoint(one / "last.ckpt"), load_checkpoint(two / "last.ckpt")
    for name, tensor in a["state_dict"].items():
        torch.testing.assert_close(tensor, b["state_dict"][name], rtol=1e-4, atol=1e-6)
    for name, tensor in a["teachers"]["teacher"].items():
        torch.testing.assert_close(tensor, b["teachers"]["teacher"][name], rtol=1e-4, atol=1e-6)

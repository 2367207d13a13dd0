from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cohobate.core.errors import InputError, guard
from cohobate.core.testing import assert_one_line, run_command

QUIET = "--trainer.enable_progress_bar=false"


def test_list_and_info_say_what_is_there() -> None:
    def listed(domain: str | None = None) -> list[str]:
        lines = run_command("list", domain=domain).out.splitlines()
        return [" ".join(line.split()) for line in lines]

    toys = [line for line in listed() if line.startswith("toy/")]
    assert toys[1].startswith("toy/tiny two-class points")
    assert listed("toy") == toys
    info = run_command("info", "toy/tiny").out
    assert "arms of compare: baseline, wide" in info


def test_help_shows_the_recipes_own_options() -> None:
    general = run_command("--help")
    assert general.code == 0
    assert "compare RECIPE" in general.out
    own = run_command("fit", "toy/tiny", "--help")
    assert own.code == 0
    assert "--model.decay DECAY   Decay of the teacher. (type: float, default: 0.9)" in own.out
    assert "--data.root ROOT" in own.out
    predict = run_command("predict", "toy/tiny", "--help")
    assert "Least probability of class 1." in predict.out


def test_print_config_is_a_config(in_tmp: Path) -> None:
    printed = run_command("fit", "toy/tiny", "--model.width=5", "--print_config")
    assert printed.code == 0
    Path("mine.yaml").write_text(printed.out)
    outcome = run_command(
        "fit", "toy/tiny", "--config", "mine.yaml", "--out=run", "--model.lr", "x"
    )
    assert_one_line(outcome, "model.lr")


def test_a_config_file_of_the_user_is_laid_over_the_recipe(in_tmp: Path) -> None:
    Path("mine.yaml").write_text("model: {width: 3}\ntrainer: {max_epochs: 1}\n")
    words = ["--config=mine.yaml", "--data.samples=16", QUIET, "--out", "run"]
    assert run_command("fit", "toy/tiny", *words).code == 0
    assert "width: 3" in Path("run/config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["fit"], ["fit needs a recipe"]),
        (["fti", "toy/tiny"], ["unknown command 'fti', did you mean 'fit'"]),
        (["fit", "toy/tinny"], ["unknown recipe 'toy/tinny', did you mean 'toy/tiny'"]),
        (["fit", "toy/tiny", "--model.widht=3"], ["--model.widht", "did you mean '--model.width'"]),
        (["fit", "toy/tiny", "--model.width=abc"], ["model.width", "abc"]),
        (["fit", "toy/tiny", "--data.root=missing"], ["missing: no such folder"]),
        (["fit", "toy/tiny", "--config=none.yaml"], ["none.yaml", "No such file"]),
        (["fit", "toy/tiny", "--config"], ["--config needs a file"]),
        (["validate", "toy/tiny"], ["runs/tiny: no such run folder"]),
        (["compare", "toy/tiny", "--arms", "widee"], ["unknown arm 'widee'", "'wide'"]),
        (["compare", "toy/tiny", "--seeds=0"], ["at least one seed"]),
        (["predict", "toy/tiny", "none.npy"], ["none.npy: no such file"]),
        (["predict", "toy/tiny", "none.npy", "--treshold=1"], ["--treshold", "--threshold"]),
        (["export", "toy/tiny", "--format=tflite"], ["--format", "tflite"]),
        (["list", "--jsn"], ["--jsn"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(in_tmp: Path, words, parts) -> None:
    assert_one_line(run_command(*words), *parts)
    assert list(in_tmp.iterdir()) == []


def test_bad_checkpoints_are_one_line(in_tmp: Path, trained: Path) -> None:
    run = Path(shutil.copytree(trained, "run"))
    (run / "best.ckpt").write_bytes(b"not a checkpoint")
    command = ("validate", "toy/tiny", "--checkpoint", run)
    assert_one_line(run_command(*command), "best.ckpt")
    torch.save({"state_dict": {"net.0.weight": torch.zeros(2, 2)}}, run / "best.ckpt")
    assert_one_line(run_command(*command), "best.ckpt", "net.0.bias")
    torch.save({"state_dict": {}}, "alone.ckpt")
    assert_one_line(
        run_command("export", "toy/tiny", "--checkpoint", "alone.ckpt"), "not a run folder"
    )
    (run / "config.yaml").write_text("model: {class_path: os.path.join}")
    assert_one_line(run_command("predict", "toy/tiny", run, "--checkpoint", run), "os.path.join")


def test_predict_reads_files_with_the_papers_options(in_tmp: Path, trained: Path) -> None:
    np.save("x.npy", np.zeros((3, 4)))
    words = ("predict", "toy/tiny", "x.npy", "--checkpoint", trained, "--out", "done")
    assert run_command(*words, "--threshold", "0").code == 0
    assert np.load("done/x.npy").tolist() == [True] * 3
    assert run_command(*words, "--threshold", "1").code == 0
    assert np.load("done/x.npy").tolist() == [False] * 3
    Path("y.npy").write_text("words")
    assert_one_line(run_command("predict", "toy/tiny", "y.npy", "--checkpoint", trained), "y.npy")
    assert_one_line(run_command(*words, "--device", "tpux"), "--device tpux")


def test_a_run_of_another_paper_is_one_line(in_tmp: Path, trained: Path) -> None:
    np.save("x.npy", np.zeros((3, 4)))
    run = Path(shutil.copytree(trained, "run"))
    for words in (["predict", "toy/staged", "x.npy"], ["validate", "toy/staged"],
                  ["export", "toy/staged"]):  # fmt: skip
        for checkpoint in (run, run / "last.ckpt"):
            outcome = run_command(*words, "--checkpoint", checkpoint)
            assert_one_line(outcome, f"{run}: a run of toy/tiny, not of toy/staged")
    assert {path.name for path in in_tmp.iterdir()} == {"x.npy", "run"}
    assert not (run / "export").exists()
    (run / "run.json").unlink()  # nothing says whose it is
    assert run_command("export", "toy/staged", "--checkpoint", run, "--out=done").code == 0


def test_a_class_that_is_used_otherwise_on_files_is_one_line(
    in_tmp: Path, trained: Path, monkeypatch
) -> None:
    Path("other.py").write_text(
        "from cohobate.toy.tiny import Tiny\n"
        "class Other(Tiny):\n"
        "    def predict_files(self, inputs, out): return []\n"
    )
    monkeypatch.syspath_prepend(in_tmp)
    run = Path(shutil.copytree(trained, "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("cohobate.toy.tiny.Tiny", "other.Other"))
    np.save("x.npy", np.zeros((3, 4)))
    outcome = run_command("predict", "toy/tiny", "x.npy", "--checkpoint", run)
    assert_one_line(outcome, "run: trained Other", "toy/tiny", "(Tiny)")


@pytest.mark.parametrize("out", ["x.npy", "x.npy/under", "x.npy/far/under", "/proc/none"])
@pytest.mark.parametrize("command", ["fit", "predict", "safetensors", "onnx"])
def test_results_cannot_go_to_or_under_a_file(
    in_tmp: Path, trained: Path, command: str, out: str
) -> None:
    np.save("x.npy", np.zeros((3, 4)))
    words = {
        "fit": ["fit", "toy/tiny", QUIET],
        "predict": ["predict", "toy/tiny", "x.npy", "--checkpoint", trained],
    }.get(command, ["export", "toy/tiny", "--format", command, "--checkpoint", trained])
    assert_one_line(run_command(*words, "--out", out), f"{out}: cannot be written: ")
    assert [path.name for path in in_tmp.iterdir()] == ["x.npy"]


def test_predict_leaves_no_empty_folder_behind(in_tmp: Path, trained: Path) -> None:
    Path("y.npy").write_text("words")
    words = ("predict", "toy/tiny", "y.npy", "--checkpoint", trained)
    assert_one_line(run_command(*words, "--out=far/away"), "y.npy")
    assert [path.name for path in in_tmp.iterdir()] == ["y.npy"]


def test_an_error_wrapped_by_a_library_is_still_one_line(capsys) -> None:
    def fail() -> None:
        try:
            raise InputError("a.nii.gz: unreadable")
        except InputError as error:
            raise RuntimeError("applying transform X") from error

    assert guard(fail, "cohobate") == 2
    assert capsys.readouterr().err == "cohobate: a.nii.gz: unreadable\n"


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guard(lambda: 1 // 0, "cohobate")


def test_interrupted(capsys) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    assert guard(stop, "cohobate") == 130
    assert "goes on from here" in capsys.readouterr().err

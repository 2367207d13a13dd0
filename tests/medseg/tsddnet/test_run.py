"""The paper through the command: three stages, the table, prediction, and what must not change."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cohobate.core import catalog, runs
from cohobate.core.io import load_checkpoint
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
from cohobate.core.training.logger import read_metrics
from cohobate.medseg.tsddnet import Fuse

SMALL = [
    "--model.crop_size=32",
    "--model.roi_hidden=16",
    "--model.width=8",
    "--model.fused_width=6",
    "--model.selection.tau_det=0.0",
    "--model.selection.tau_cls=0.2",
    "--data.image_size=64",
    "--data.batch_size=4",
    "--data.split.folds=3",
    "--data.split.val=0.25",
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest) -> list[str]:
    args = (
        "{channels: 8, levels: 2, hidden: 16, anchors: [16, 32], box_batch_size_per_image: 8, "
        "rpn_pre_nms_top_n_train: 20, rpn_post_nms_top_n_train: 20, rpn_pre_nms_top_n_test: 10, "
        "rpn_post_nms_top_n_test: 10}"
    )
    return [f"--model.detector_args={args}", *SMALL]


def fit(root: Path, out: Path, small: list[str], *options: str, recipe: str = "") -> list[Path]:
    words = [f"--data.root={root}", *small, *options]
    found = runs.fit(catalog.find(f"medseg/tsddnet{recipe}"), words, out=out)
    return [run.path for run in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as BUSI comes, shared by the runs."""
    root = tmp_path_factory.mktemp("data") / "busi"
    rng = np.random.default_rng(5)
    for kind, (height, width) in (("benign", (16, 24)), ("malignant", (24, 16))):
        (root / kind).mkdir(parents=True)
        for number in range(1, 13):
            image = rng.integers(90, 255, (64, 60)).astype(np.uint8)
            mask = np.zeros_like(image)
            y, x = rng.integers(4, 24, 2)
            mask[y : y + height, x : x + width] = 255
            image[mask > 0] //= 4
            Image.fromarray(image).save(root / kind / f"{kind} ({number}).png")
            Image.fromarray(mask).save(root / kind / f"{kind} ({number})_mask.png")
    return root


@pytest.fixture(scope="module")
def trained(folder, small, tmp_path_factory) -> list[Path]:
    """The finished run folders of the three stages."""
    return fit(folder, tmp_path_factory.mktemp("runs") / "tsddnet", small)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def weights(run: Path) -> dict:
    return load_checkpoint(run / "last.ckpt")["state_dict"]


def test_the_stages_and_what_they_leave(trained):
    assert [p.name for p in trained] == ["1-detect", "2-classify", "3-fuse"]
    info = json.loads((trained[-1] / "run.json").read_text())
    wanted = {"auc", "corloc", "ap50", "ap", "miou", "accuracy", "sensitivity", "specificity"}
    wanted |= {"precision", "f1", "drawn_iou", "hidden_iou", "hidden_share"}
    assert {f"test/{name}" for name in wanted} <= set(info["test"])
    assert info["parameters"]["added"] > 0, "the inner folds' networks are not the student"
    assert (trained[-1] / "lesions.png").read_bytes().startswith(b"\x89PNG")
    assert (trained[-1] / "audit.html").exists()
    rows = table(trained[-1] / "audit.csv")
    decisions = {row["decision"] for row in rows}
    assert decisions <= {"kept", "replaced", "accepted", "rejected", "nothing found"}
    assert not (trained[0] / "audit.csv").exists()
    assert_student_only(trained[-1])


def test_every_term_is_logged(trained):
    rows = read_metrics(trained[-1] / "metrics.csv")
    logged = {key for row in rows for key in row}
    terms = {"detection", "ce", "branch_ce", "self_kl", "self_hint", "loss"}
    assert {f"train/{term}" for term in terms} <= logged
    classify = {key for row in read_metrics(trained[1] / "metrics.csv") for key in row}
    assert {"train/ce", "train/fold_ce", "val/loss"} <= classify


def test_test_boxes_change_no_weight(folder, trained, small, tmp_path):
    """Masks of the test images are moved; training and selection end in the same weights."""
    from cohobate.medseg.tsddnet import UltrasoundData
    from cohobate.medseg.tsddnet.data import Split

    test = UltrasoundData(root=folder, image_size=64, split=Split(folds=3, val=0.25)).test
    root = tmp_path / "busi"  # the folder's name is part of no draw
    shutil.copytree(folder, root)
    for name in test.samples.names:
        path = root / name.split(" ")[0] / f"{name}_mask.png"
        mask = np.zeros_like(np.asarray(Image.open(path)))
        mask[50:60, 2:30] = 255
        Image.fromarray(mask).save(path)
    again = fit(root, tmp_path / "run", small)
    for one, other in zip(trained, again, strict=True):
        assert_equal(weights(one), weights(other))
    assert (trained[-1] / "audit.csv").read_text() == (again[-1] / "audit.csv").read_text()
    scores = [
        json.loads((run / "run.json").read_text())["test"] for run in (trained[-1], again[-1])
    ]
    assert scores[0]["test/auc"] == scores[1]["test/auc"]
    assert scores[0]["test/miou"] != scores[1]["test/miou"]


def test_a_run_that_stopped_inside_the_last_stage_ends_the_same(
    folder, trained, small, tmp_path, monkeypatch
):
    original = Fuse.forward_train

    def forward_train(self, batch):
        if self.global_step == 4:
            raise RuntimeError("power cut")
        return original(self, batch)

    out = tmp_path / "stopped"
    for stage in trained[:2]:
        shutil.copytree(stage, out / stage.name)
    with monkeypatch.context() as patch:
        patch.setattr(Fuse, "forward_train", forward_train)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(folder, out, small, "--checkpoint_steps=1")
    monkeypatch.setattr(
        "cohobate.medseg.tsddnet.method.refine", lambda *_: pytest.fail("selected twice")
    )
    stages = fit(folder, out, small)
    assert_same_run(stages[-1], trained[-1])


def test_from_the_table_stage_1_is_skipped(folder, trained, small, tmp_path, monkeypatch):
    """The run from the table ends as the run that wrote it."""
    monkeypatch.setattr(
        "cohobate.medseg.tsddnet.method.refine", lambda *_: pytest.fail("selected again")
    )
    found = fit(
        folder, tmp_path / "again", small, f"--data.audit={trained[-1] / 'audit.csv'}",
        f"--model.start={trained[1]}", recipe="/from_audit",
    )  # fmt: skip
    assert len(found) == 1
    assert_equal(weights(found[0]), weights(trained[-1]))


@pytest.mark.parametrize("arm", ["baseline", "no_fusion", "full_only"])
def test_arms_run(arm, folder, small, tmp_path):
    recipe = catalog.find("medseg/tsddnet")
    words = [f"--data.root={folder}", *small, "--trainer.max_epochs=1"]
    found = runs.fit(recipe, words, arm=recipe.paper.arms[arm], out=tmp_path)
    info = json.loads((found[-1].path / "run.json").read_text())
    assert info["status"] == "finished"
    assert (found[-1].path / "audit.csv").exists() == (arm != "baseline")
    if arm != "no_fusion":
        assert info["test"]["test/hidden_share"] == 0.0


@pytest.mark.slow
def test_two_rounds(folder, small, tmp_path):
    found = fit(folder, tmp_path, small, "--trainer.max_epochs=1", recipe="/two_rounds")
    assert [(p / "audit.csv").exists() for p in found] == [False, False, True, True, True]


def test_prediction(trained, folder, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    large = Image.open(folder / "benign" / "benign (1).png").resize((90, 96))
    large.save(inputs / "scan.png")
    (inputs / "broken.png").write_bytes(b"text")
    out = tmp_path / "out"
    words = ["predict", "medseg/tsddnet", "--checkpoint", trained[-1], "--device", "cpu"]
    outcome = run_command(*words, inputs, "--out", out)
    assert_one_line(outcome, "broken.png: not a readable image", "the other 1 are in")
    assert sorted(p.name for p in out.iterdir()) == ["lesions.csv", "scan_lesion.png"]
    row = table(out / "lesions.csv")[0]
    assert list(row) == [
        "image", "x1", "y1", "x2", "y2", "score", "p_benign", "p_malignant", "class", "note",
    ]  # fmt: skip
    assert 0 <= float(row["x1"]) < float(row["x2"]) <= 90
    assert 0 <= float(row["y1"]) < float(row["y2"]) <= 96
    assert float(row["p_benign"]) + float(row["p_malignant"]) == pytest.approx(1, abs=1e-3)
    good = run_command(
        *words, inputs / "scan.png", "--out", tmp_path / "none", "--threshold=1.1",
        "--picture=false",
    )  # fmt: skip
    assert good.code == 0, good.err
    row = table(tmp_path / "none" / "lesions.csv")[0]
    assert row["note"] == "whole image"
    assert [float(row[k]) for k in ("x1", "y1", "x2", "y2", "score")] == [0, 0, 90, 96, 0]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_line(run_command(*words, empty), "empty: no images")


def test_the_student_is_exported(trained, tmp_path):
    assert_export_round_trip(trained[-1], tmp_path, onnx=False)
    outcome = run_command(
        "export", "medseg/tsddnet", "--checkpoint", trained[-1], "--format", "onnx"
    )
    assert_one_line(outcome, "no ONNX export")


def test_validate_repeats_the_test(trained):
    outcome = run_command("validate", "medseg/tsddnet", "--checkpoint", trained[-1], "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.strip().splitlines()[-1])
    info = json.loads((trained[-1] / "run.json").read_text())
    for name in ("test/auc", "test/ap50", "test/corloc"):
        assert found[name] == pytest.approx(info["test"][name])


@pytest.mark.parametrize(
    ("name", "path"), [r for r in recipes("medseg") if "tsddnet" in r[0]], ids=str
)
def test_every_recipe_parses(name, path):
    assert_recipe_parses(path)


# --- bad input through the command ----------------------------------------------------------------


@pytest.fixture
def refused(small, tmp_path) -> Callable[..., object]:
    def run(root: Path, *options: str):
        return run_command(
            "fit", "medseg/tsddnet", f"--data.root={root}", *small, *options,
            "--out", tmp_path / "run",
        )  # fmt: skip

    return run


def test_bad_data_leaves_nothing(refused, folder, tmp_path):
    root = tmp_path / "bad"
    shutil.copytree(folder, root)
    mask = root / "malignant" / "malignant (4)_mask.png"
    mask.unlink()
    assert_one_line(refused(root), "malignant (4)_mask.png: no such mask")
    assert_one_line(refused(tmp_path / "gone"), "gone: no such file or folder")
    assert_one_line(refused(folder, "--data.image_size=65"), "image_size 65")
    assert_one_line(refused(folder, "--model.selection.tau_iou=2"), "tau_iou")
    assert_one_line(refused(folder, "--model.classifier=resnet1"), "did you mean 'resnet18'")
    assert not (tmp_path / "run").exists()


def test_bad_lines_of_a_manifest(refused, folder, tmp_path):
    root = tmp_path / "table"
    shutil.copytree(folder / "benign", root)
    Image.new("L", (31, 64)).save(root / "tiny.png")
    header, good = "image,class,x1,y1,x2,y2", "benign (1).png,b,,,,"
    for line, message in (
        ("benign (2).png,m,5,5,5,9", "line 3: box 5, 5, 5, 9: has no area"),
        ("benign (2).png,m,0,0,90,9", "line 3: box 0, 0, 90, 9: outside the image (60 × 64)"),
        ("benign (2).png,m,nan,0,9,9", "line 3: box nan, 0, 9, 9: not four numbers"),
        ("benign (2).png,z,0,0,9,9", "line 3: class 'z' is not in"),
        ("gone.png,m,0,0,9,9", "line 3: no image gone.png"),
        ("tiny.png,m,0,0,9,9", "tiny.png: 31 × 64 pixels, at least 32"),
    ):
        (root / "manifest.csv").write_text("\n".join([header, good, line]) + "\n")
        assert_one_line(refused(root, "--data.class_names=[b, m]"), message)
    assert not (tmp_path / "run").exists()


def test_a_table_of_other_images(refused, folder, trained, tmp_path):
    outcome = refused(folder, f"--data.audit={trained[-1] / 'audit.csv'}", "--data.split.fold=2")
    assert_one_line(outcome, "audit.csv line", "is no training image of this fold")
    assert_one_line(
        refused(folder, f"--data.audit={tmp_path / 'no.csv'}"), "no.csv: cannot be read"
    )
    assert not (tmp_path / "run").exists()

"""The paper through the command, from a folder of NIfTI files to a segmentation."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from cohobate.core import catalog, runs
from cohobate.core.testing import (
    assert_export_round_trip,
    assert_one_line,
    assert_same_run,
    assert_student_only,
    run_command,
)
from cohobate.core.training.logger import read_metrics
from cohobate.medseg.dsd import DSD

OPTIONS = [
    "--model.backbone_args={filters: [4, 6, 8, 8]}",
    "--data.roi_size=[16, 16, 16]",
    "--data.split.test=2",
    "--data.split.val=1",
    "--data.epoch_volumes=4",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
]
TILTED = np.array([[0, -1.0, 0, 5], [1.0, 0, 0, 3], [0, 0, 1.0, 4], [0, 0, 0, 1]])


def fit(root: Path, out: Path, *options: str) -> Path:
    words = [f"--data.root={root}", *OPTIONS, *options]
    return runs.fit(catalog.find("medseg/dsd"), words, out=out)[0].path


@pytest.fixture(scope="module")
def images(tmp_path_factory, request) -> Path:
    """A folder of six cases."""
    root = tmp_path_factory.mktemp("data") / "balls"
    for number in range(6):
        rng = np.random.default_rng(number)
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in (28, 24, 26)], indexing="ij"), -1)
        radius = np.linalg.norm(grid - np.array([14, 12, 13]) - rng.uniform(-2, 2, 3), axis=-1)
        ids = (radius < 9).astype(np.uint8) + (radius < 5)
        image = (100 + 40 * ids + rng.normal(0, 5, ids.shape)).astype(np.float32)
        for folder, array in (("images", image), ("labels", ids)):
            path = root / folder / f"case_{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return root


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """A finished run."""
    return fit(images, tmp_path_factory.mktemp("runs") / "dsd")


def test_a_run_reports_the_test_and_draws(trained):
    info = json.loads((trained / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["data"].startswith("balls: 3 train, 1 val, 2 test cases")
    assert info["parameters"]["added"] > 0
    assert {"test/dice", "test/hd95", "test/msd", "test/dice_excluded"} <= set(info["test"])
    assert 0 <= info["test"]["test/dice"] <= 1
    assert (trained / "segmentation.png").read_bytes().startswith(b"\x89PNG")
    assert_student_only(trained)


def test_every_term_is_logged(trained):
    rows = read_metrics(trained / "metrics.csv")
    logged = {key for row in rows for key in row}
    terms = {"dice_ce", "deep_supervision", "decoder_kl", "encoder_kl", "encoder_entropy", "loss"}
    assert {f"train/{term}" for term in terms} <= logged
    assert {"val/dice", "val/loss", "val/dice/class_1"} <= logged
    entropy = [row["train/encoder_entropy"] for row in rows if "train/encoder_entropy" in row]
    assert all(0 < value <= np.log(3) for value in entropy)


def test_the_bare_network_is_exported(trained, tmp_path):
    assert_export_round_trip(trained, tmp_path, onnx=False)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    student = runs.load_run(trained).student
    assert config["parameters"] == sum(p.numel() for p in student.parameters())
    assert config["model"]["init_args"]["preprocess"]["orientation"] == "RAS"


@pytest.mark.slow
def test_onnx_gives_the_networks_output(trained, tmp_path):
    assert_export_round_trip(trained, tmp_path, onnx=True)


def test_a_run_that_stopped_inside_an_epoch_ends_the_same(images, trained, tmp_path, monkeypatch):
    original = DSD.forward_train

    def forward_train(self, batch):
        if self.global_step == 3:
            raise RuntimeError("power cut")
        return original(self, batch)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(DSD, "forward_train", forward_train)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(images, out, "--checkpoint_steps=1")
    fit(images, out)
    assert_same_run(out, trained)


def test_prediction_is_on_the_inputs_grid(trained, images, tmp_path):
    inputs = tmp_path / "scans"
    inputs.mkdir()
    image = nib.load(images / "images" / "case_0.nii.gz").get_fdata(dtype=np.float32)
    nib.save(nib.Nifti1Image(image, TILTED), inputs / "scan.nii.gz")
    (inputs / "broken.nii").write_bytes(b"nothing")
    out = tmp_path / "out"
    outcome = run_command(
        "predict", "medseg/dsd", inputs, "--checkpoint", trained, "--out", out, "--device", "cpu"
    )
    assert_one_line(outcome, "broken.nii: not a readable NIfTI file", "the other 1 are in")
    assert sorted(p.name for p in out.iterdir()) == ["scan_seg.nii.gz", "scan_seg.png"]
    written = nib.load(out / "scan_seg.nii.gz")
    np.testing.assert_allclose(written.affine, TILTED)
    assert written.shape == image.shape
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2}
    again = tmp_path / "again"
    good = run_command(
        "predict", "medseg/dsd", inputs / "scan.nii.gz", "--checkpoint", trained, "--out", again,
        "--device", "cpu", "--picture=false",
    )  # fmt: skip
    assert good.code == 0, good.err
    assert [p.name for p in again.iterdir()] == ["scan_seg.nii.gz"]
    assert (again / "scan_seg.nii.gz").read_bytes() == (out / "scan_seg.nii.gz").read_bytes()


def test_prediction_refuses_what_does_not_fit(trained, tmp_path):
    image = nib.Nifti1Image(np.zeros((20, 20, 20, 3), np.float32), np.eye(4))
    nib.save(image, tmp_path / "rgb.nii")
    words = ("predict", "medseg/dsd", "--checkpoint", trained, "--out", tmp_path / "out")
    assert_one_line(run_command(*words, tmp_path / "rgb.nii"), "rgb.nii: 3 channels, the network")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_line(run_command(*words, empty), "empty: no NIfTI files")
    assert not (tmp_path / "out").exists()


def test_validate_repeats_the_test(trained):
    outcome = run_command("validate", "medseg/dsd", "--checkpoint", trained, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.strip().splitlines()[-1])
    info = json.loads((trained / "run.json").read_text())
    assert found["test/dice"] == pytest.approx(info["test"]["test/dice"])
    assert "val/dice" in found


# --- bad input through the command ----------------------------------------------------------------


def refused(root: Path, out: Path, *options: str):
    return run_command("fit", "medseg/dsd", f"--data.root={root}", *OPTIONS, *options, "--out", out)


def test_a_missing_folder(tmp_path):
    assert_one_line(refused(tmp_path / "no", tmp_path / "run"), "no: no such folder")
    assert not (tmp_path / "run").exists()


def test_an_unreadable_file(images, tmp_path, make_cases):
    root = make_cases(tmp_path / "data", 6, size=(24, 24, 24))
    (root / "images" / "case_002.nii.gz").write_bytes(b"text")
    assert_one_line(refused(root, tmp_path / "run"), "case_002.nii.gz: not a readable NIfTI file")


def test_a_label_out_of_range(tmp_path, make_cases):
    root = make_cases(tmp_path / "data", 6, size=(24, 24, 24))
    outcome = refused(root, tmp_path / "run", "--data.class_names=[background, ball]")
    assert_one_line(outcome, "labels/case_", "value 2 is not one of the 2 classes")


def test_a_size_that_is_not_divisible(images, tmp_path):
    outcome = refused(images, tmp_path / "run", "--data.roi_size=[18, 18, 18]")
    assert_one_line(outcome, "DynUNet refuses an image of shape (1, 1, 18, 18, 18)")
    assert not (tmp_path / "run").exists()


def test_another_networks_checkpoint(trained, images, tmp_path):
    other = fit(
        images, tmp_path / "wide", "--model.backbone_args={filters: [6, 6, 8, 8]}",
        "--trainer.max_epochs=1",
    )  # fmt: skip
    weights = torch.load(other / "last.ckpt", weights_only=True)
    clash = tmp_path / "clash"
    clash.mkdir()
    (clash / "config.yaml").write_text((trained / "config.yaml").read_text())
    torch.save(weights, clash / "best.ckpt")
    scan = images / "images" / "case_0.nii.gz"
    outcome = run_command("predict", "medseg/dsd", scan, "--checkpoint", clash, "--out", tmp_path)
    assert_one_line(outcome, "best.ckpt", "has shape")

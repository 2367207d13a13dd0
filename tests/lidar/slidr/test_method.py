"""The stages from the command: train, resume, probe, fine-tune, predict, export."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cohobate.core import runs
from cohobate.core.errors import InputError
from cohobate.core.testing import (
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
from cohobate.lidar.data import Frame, ImageCloudData, Voxels
from cohobate.lidar.nets import build as build_network
from cohobate.lidar.slidr import Pretrain, Segment
from cohobate.lidar.slidr.checkpoint import read_backbone

RECIPE = "lidar/slidr"
SMALL = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
# six scenes: two steps an epoch
TWO_EPOCHS = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2"]
PRE = ["--data.batch_size=2", "--data.crop=[64,112]", "--model.calibration_frames=2"]


def fit(stage: str, out: Path, root: Path, *options: str) -> None:
    done = run_command(
        "fit", f"{RECIPE}/{stage}", "--out", out, f"--data.root={root}", *SMALL, *options
    )
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    fit("pretrain", out, root, *PRE, *TWO_EPOCHS)
    return out


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory, root: Path, pretrained: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "all"
    shutil.copytree(pretrained, out / "pretrain")
    fit("finetune", out, root, "--data.every=3", "--data.epoch_clouds=4", "--trainer.max_epochs=1")
    return out


@pytest.fixture(scope="module")
def batch(root: Path) -> dict[str, Any]:
    recipe = build(f"{RECIPE}/pretrain", f"--data.root={root}", *PRE)
    assert isinstance(recipe.datamodule, ImageCloudData)
    recipe.datamodule.prepare_data()
    recipe.datamodule.setup("fit")
    return next(iter(recipe.datamodule.train_dataloader()))


def small(**more: Any) -> Pretrain:
    arguments: dict[str, Any] = {"network": "unet-small", "image": "resnet18-half", **more}
    return Pretrain(voxels=Voxels(0.2, True, 1.5), **arguments)


@pytest.mark.parametrize(
    "path", [p for _, p in recipes("lidar")], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_every_recipe_fits_its_classes(path: Path) -> None:
    assert_recipe_parses(path)


def test_the_probe_recipe_is_the_first_two_stages() -> None:
    by_name = dict(recipes("lidar"))
    folder = by_name["lidar/slidr:1-pretrain"].parent
    folder = folder if folder.name == "recipe" else folder.parent
    for name in ("1-pretrain.yaml", "2-probe.yaml"):
        assert (folder / name).read_text() == (folder / "probe" / name).read_text()


def test_the_pipeline_has_the_stages_of_the_default_recipe() -> None:
    folder = dict(recipes("lidar"))["lidar/slidr:1-superpixels"].parent
    names = [path.stem for path in sorted(folder.iterdir())]
    assert names == ["1-superpixels", "2-pretrain", "3-probe", "4-finetune", "5-evaluate"]
    for place, name in enumerate(("pretrain", "probe", "finetune"), start=1):
        own, other = folder / f"{place + 1}-{name}.yaml", folder.parent / f"{place}-{name}.yaml"
        assert yaml.safe_load(own.read_text()) == yaml.safe_load(other.read_text())


@pytest.mark.parametrize("contrast", ["superpixel", "pixel"])
def test_the_encoder_is_frozen_and_the_head_learns(batch: dict[str, Any], contrast: str) -> None:
    model = small(contrast=contrast)
    assert_teachers_frozen(model, batch)
    assert model.head[0].weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.network.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("contrast", ["superpixel", "pixel"])
def test_a_step_on_cuda_equals_one_on_the_cpu(
    batch: dict[str, Any], contrast: str, precision: str
) -> None:
    torch.manual_seed(0)
    model, steps = small(contrast=contrast, samples=10**6), []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        moved = model.transfer_batch_to_device(batch, torch.device(device), 0)
        half = device == "cuda" and precision == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = model.training_step(moved, 0)
        loss.backward()
        kernel, head = model.network.final.kernel.grad, model.head[0].weight.grad
        steps.append((loss.detach().cpu().float(), kernel.cpu().float(), head.cpu().float()))
    for one, other in zip(*steps, strict=True):
        alike = torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert alike > (0.999 if precision == "float32" else 0.95)
    assert steps[1][0].item() == pytest.approx(steps[0][0].item(), rel=2e-2)


def test_the_loss_starts_near_the_logarithm_of_the_regions(batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    loss = small().training_step(batch, 0).item()
    places = batch["pairing_pixels"]
    regions = batch["superpixels"][tuple(places.T)] + 1000 * places[:, 0]
    assert loss == pytest.approx(np.log(len(regions.unique())), abs=0.5)


def test_both_arms_start_from_the_same_network() -> None:
    networks, draws = [], []
    for distill in (True, False):
        torch.manual_seed(3)
        networks.append(small(distill=distill).network.state_dict())
        draws.append(torch.rand(1))
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    assert torch.equal(*draws)


def test_voxelnet_learns_too(root: Path) -> None:
    data = ImageCloudData(root, form="pillars", batch_size=1, crop=(64, 112))
    data.prepare_data()
    data.setup("fit")
    model = small(network="voxelnet", form="pillars")
    loss = model.training_step(next(iter(data.val_dataloader())), 0)
    loss.backward()
    assert loss.item() > 3
    assert all(p.grad is not None for p in model.network.parameters())
    with pytest.raises(InputError, match="does not take"):
        small(network="voxelnet")


def test_a_run_keeps_the_student_alone(pretrained: Path) -> None:
    assert_student_only(pretrained)
    assert (pretrained / "superpixels.png").stat().st_size > 10_000
    rows = (pretrained / "metrics.csv").read_text().splitlines()
    assert "train/superpixel" in rows[0]
    assert "val/loss" in rows[0]
    info = json.loads((pretrained / "run.json").read_text())
    assert info["steps"] == 6


def test_a_stopped_run_ends_like_one_that_was_not(
    tmp_path: Path, root: Path, pretrained: Path
) -> None:
    out = tmp_path / "stopped"
    fit("pretrain", out, root, *PRE, "--trainer.max_epochs=1")
    fit("pretrain", out, root, *PRE, "--trainer.max_epochs=2")
    whole, resumed = (torch.load(p / "last.ckpt", weights_only=True) for p in (pretrained, out))
    assert whole["global_step"] == resumed["global_step"]
    # the cosine knows how long training is, so only an interrupted run repeats every number
    again = tmp_path / "again"
    fit("pretrain", again, root, *PRE, *TWO_EPOCHS)
    assert_same_run(pretrained, again)


def test_a_run_killed_twice_ends_like_one_that_was_not(
    tmp_path: Path, root: Path, pretrained: Path
) -> None:
    out = tmp_path / "killed"
    child = [sys.executable, Path(__file__).with_name("child_killed.py")]
    words = ["fit", f"{RECIPE}/pretrain", "--out", out, f"--data.root={root}", *SMALL, *PRE]
    words += [*TWO_EPOCHS, "--checkpoint_steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for step in (2, 4):  # inside the first and the second epoch
        ended = subprocess.run([*child, str(step), *words], env=environment, check=False)
        assert ended.returncode == -signal.SIGKILL
        assert not runs.RunFolder(out).finished
    fit("pretrain", out, root, *PRE, *TWO_EPOCHS)
    assert_same_run(pretrained, out)


def test_superpixels_are_a_stage_that_trains_nothing(tmp_path: Path, root: Path) -> None:
    copy, out = tmp_path / "root", tmp_path / "superpixels"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("superpixels*"))
    fit("superpixels", out, copy)
    assert len(list(copy.glob("superpixels_slic_60_6_1/*.png"))) == 8 * 6
    assert (out / "superpixels.png").stat().st_size > 10_000
    again = tmp_path / "again"
    fit("superpixels", again, copy, "--trainer.max_epochs=2", "--trainer.limit_train_batches=2")
    one, other = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (out, again)
    )
    trained = [name for name in one if "running" not in name and "batches" not in name]
    assert all(torch.equal(one[name], other[name]) for name in trained)


def test_evaluation_takes_the_classifier_and_changes_nothing(
    tmp_path: Path, root: Path, segmented: Path
) -> None:
    shutil.copytree(segmented, tmp_path / "run/finetune", ignore=shutil.ignore_patterns("pretrain"))
    fit("evaluate", tmp_path / "run", root)
    before, after = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (segmented, tmp_path / "run")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    tested, again = (
        json.loads((folder / "run.json").read_text())["test"]
        for folder in (segmented, tmp_path / "run")
    )
    assert again == pytest.approx(tested, rel=1e-6)
    assert (tmp_path / "run/segmentation.png").stat().st_size > 10_000


def test_fine_tuning_starts_from_the_backbone(pretrained: Path, segmented: Path) -> None:
    found = runs.load_run(segmented)
    assert isinstance(found, Segment)
    assert found.network.out_channels == 17
    info = json.loads((segmented / "run.json").read_text())
    assert {"test/miou", "test/miou_present", "test/micro_iou"} <= set(info["test"])
    assert "every 3th" in info["data"]
    assert (segmented / "segmentation.png").stat().st_size > 10_000


def test_a_probe_trains_the_last_layer_alone(tmp_path: Path, root: Path) -> None:
    fit("probe", tmp_path, root, "--trainer.max_epochs=1")
    before, after = (
        torch.load(tmp_path / stage / "last.ckpt", weights_only=True)["state_dict"]
        for stage in ("1-pretrain", "2-probe")
    )
    compared = [name for name in after if not name.startswith("network.final")]
    assert len(compared) > 50
    assert all(torch.equal(after[name], before[name]) for name in compared)
    assert after["network.final.kernel"].shape[1] == 17


def test_the_baseline_teaches_nothing_but_sees_the_clouds(tmp_path: Path, root: Path) -> None:
    out = tmp_path / "random"
    overlay = (
        Path(__file__).parents[3] / "packages/lidar/src/cohobate/lidar/slidr/recipe/baseline.yaml"
    )
    fit("pretrain", out, root, *PRE, "--trainer.max_epochs=1", f"--config={overlay}")
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert state["network.bn0.bn.running_mean"].abs().max() > 0
    assert not any(name.startswith("head") for name in state)
    assert "train/idle" in (out / "metrics.csv").read_text()


def test_a_backbone_of_other_voxels_or_another_loss_is_refused(
    tmp_path: Path, root: Path, pretrained: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(pretrained, out / "pretrain")
    stage = ["fit", "lidar/slidr/finetune", f"--data.root={root}", "--data.every=3", *SMALL]
    assert_one_line(
        run_command(*stage, "--out", out, "--data.voxels.size=0.3"), "the earlier stage", "0.3"
    )
    assert_one_line(
        run_command(*stage, "--out", out, "--model.contrast=pixel"), "superpixel contrast"
    )


def _first(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _with_nan(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20] + np.full(5, np.nan, np.float32).tobytes())


def _another_size(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)


@pytest.mark.parametrize(
    ("stage", "pattern", "damage", "words"),
    [
        ("pretrain", "samples/LIDAR_TOP/*.bin", _cut_off, "cut off"),
        ("pretrain", "samples/LIDAR_TOP/*.bin", _with_nan, "not finite"),
        ("pretrain", "samples/LIDAR_TOP/*.bin", lambda p: p.write_bytes(b""), "no points"),
        ("pretrain", "samples/CAM_BACK/*.jpg", lambda p: p.write_bytes(b"x"), "damaged"),
        ("pretrain", "superpixels_slic_60_6_1/*.png", _another_size, "(4, 4) pixels"),
        ("pretrain", "v1.0-sim/ego_pose.json", Path.unlink, "no such table"),
        ("finetune", "v1.0-sim/sample_data.json", Path.unlink, "no such table"),
        ("finetune", "lidarseg/*/*.bin", lambda p: p.write_bytes(b"1"), "1 labels for"),
        ("finetune", "lidarseg/*/*.bin",
         lambda p: p.write_bytes(b"\xff" * p.stat().st_size), "label id 255"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path,
    root: Path,
    pretrained: Path,
    stage: str,
    pattern: str,
    damage: Callable[[Path], object],
    words: str,
) -> None:
    copy, out = tmp_path / "root", tmp_path / "run"
    shutil.copytree(root, copy)
    shutil.copytree(pretrained, out / "pretrain")
    path = _first(copy, pattern)
    damage(path)
    # all scenes are read, so the damaged one is met
    more = PRE if stage == "pretrain" else ["--data.every=1", "--data.epoch_clouds=6"]
    done = run_command(
        "fit", f"{RECIPE}/{stage}", "--out", out, f"--data.root={copy}", *SMALL, *more,
        "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0",
    )  # fmt: skip
    assert_one_line(done, path.name, words)
    assert not (out / "student.safetensors").exists()


def test_released_checkpoints_are_read(tmp_path: Path) -> None:
    network = build_network("unet-small", 64)
    path = tmp_path / "minkunet_slidr_1gpu.pt"
    config = {"voxel_size": 0.1, "cylindrical_coordinates": True}
    torch.save(
        {"model_points": network.state_dict(), "model_images": {}, "epoch": 50, "config": config},
        path,
    )
    model = Segment(class_names=["-", "a", "b"], network="unet-small", pretrained=path)
    model.setup("fit")
    state = network.state_dict()
    for name, tensor in model.network.state_dict().items():
        if not name.startswith("final"):
            assert torch.equal(tensor, state[name])
    with pytest.raises(
        InputError, match=r"minkunet_slidr_1gpu\.pt: trained on cylindrical voxels of 0.1"
    ):
        read_backbone(path, Voxels(0.2))
    with pytest.raises(InputError, match=r"no weights for|has shape"):
        Segment(class_names=["-", "a"], pretrained=path).setup("fit")
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"minkunet_slidr_1gpu\.pt"):
        read_backbone(path, Voxels())


def test_sweeps_are_labelled(
    tmp_path: Path, root: Path, segmented: Path, frames: list[Frame]
) -> None:
    sweep = frames[-1].sweep
    done = run_command(
        "predict", RECIPE, sweep, "--checkpoint", segmented, "--out", tmp_path, f"--root={root}"
    )
    assert done.code == 0, done.err
    stem = sweep.name.removesuffix(".pcd.bin")
    labels = np.fromfile(tmp_path / f"{stem}_lidarseg.bin", np.uint8)
    assert len(labels) == sweep.stat().st_size // 20
    assert labels.min() >= 1
    assert labels.max() <= 16
    for kind in ("bev", "cameras"):
        assert (tmp_path / f"{stem}_{kind}.png").stat().st_size > 10_000


def test_a_bad_sweep_is_named_and_nothing_is_written(tmp_path: Path, segmented: Path) -> None:
    bad = tmp_path / "bad.pcd.bin"
    bad.write_bytes(np.full(10, np.nan, np.float32).tobytes())
    out = tmp_path / "out"
    assert_one_line(
        run_command("predict", RECIPE, bad, "--checkpoint", segmented, "--out", out), bad, "finite"
    )
    assert not out.exists() or not list(out.iterdir())
    assert_one_line(
        run_command("predict", RECIPE, tmp_path / "no.bin", "--checkpoint", segmented), "no.bin"
    )


def test_the_student_is_exported(segmented: Path, tmp_path: Path) -> None:
    assert_export_round_trip(segmented, tmp_path, onnx=False)


def test_there_is_no_onnx_and_one_line_says_so(segmented: Path, tmp_path: Path) -> None:
    words = ["export", RECIPE, "--checkpoint", segmented, "--out", tmp_path / "o", "--format=onnx"]
    assert_one_line(run_command(*words), "no ONNX form", "safetensors or hub")
    assert not list(tmp_path.rglob("*.onnx*"))


def test_a_run_is_validated(segmented: Path) -> None:
    done = run_command("validate", RECIPE, "--checkpoint", segmented, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    tested = json.loads((segmented / "run.json").read_text())["test"]
    assert found["test/miou_present"] == pytest.approx(tested["test/miou_present"], rel=1e-6)


def test_the_packages_own_commands(tmp_path: Path) -> None:
    words = ["simulate", tmp_path / "s", "--train=1", "--val=1", "--azimuths=90"]
    assert run_command(*words, domain="lidar").code == 0
    made = run_command("superpixels", tmp_path / "s", "--segments=20", domain="lidar")
    assert "6 made, 0 were there" in made.out, made.err
    made = run_command("superpixels", tmp_path / "s", "--segments=20", domain="lidar")
    assert "0 made, 6 were there" in made.out, made.err
    drawn = run_command("pairs", tmp_path / "s", tmp_path / "p", domain="lidar")
    assert drawn.code == 0, drawn.err
    assert len(list((tmp_path / "p").glob("*.png"))) == 1
    assert_one_line(run_command("pairs", tmp_path / "no", tmp_path / "p", domain="lidar"), "no")


@pytest.mark.slow
def test_the_pipeline_runs_from_images_to_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COHOBATE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    scenes = ["--data.simulator.train=60", "--data.simulator.val=2"]
    done = run_command(
        "fit", f"{RECIPE}/pipeline", "--out", out, *SMALL, *scenes, "--trainer.max_epochs=1"
    )
    assert done.code == 0, done.err
    last = json.loads((out / "5-evaluate/run.json").read_text())
    tuned = json.loads((out / "4-finetune/run.json").read_text())
    assert last["test"] == pytest.approx(tuned["test"], rel=1e-6)

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cohobate.core import runs
from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint
from cohobate.core.testing import (
    assert_export_round_trip,
    assert_one_line,
    assert_recipe_parses,
    assert_same_run,
    assert_student_only,
    assert_teachers_frozen,
    recipes,
    run_command,
)
from cohobate.video.flow import PWCNet
from cohobate.video.selfdrsc import CorrectionNet, SelfDRSC, save_official
from cohobate.video.selfdrsc.__main__ import give, take

SMALL = [
    "--data.readout.height=32", "--data.readout.upsample=8", "--data.epoch_pairs=8",
    "--data.patch=32", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
]  # fmt: skip


def fit(out: Path, *options: str, epochs: int = 1) -> None:
    done = run_command(
        "fit", "video/selfdrsc", "--out", out, *SMALL, f"--trainer.max_epochs={epochs}", *options
    )
    assert done.code == 0, done.err


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages; the second one's margin fits patches of 32."""
    out = tmp_path_factory.mktemp("run") / "full"
    fit(out)
    return out


def batch(size: int = 32, rows_: int = 40) -> dict[str, Any]:
    torch.manual_seed(1)
    base = nn.functional.interpolate(torch.rand(2, 3, 6, 6), size=(size, size), mode="bicubic")
    images = torch.stack((base, base.roll(2, -1)), 1).clamp(0, 1)
    return {
        "images": images,
        "frames": images[:, [0, 0, 1]],
        "time": torch.tensor([0.25, 0.5]),
        "top": torch.tensor([0, 5]),
        "rows": torch.tensor([rows_, rows_]),
    }


def second_stage(**options: Any) -> SelfDRSC:
    torch.manual_seed(0)
    return SelfDRSC(margin=8, perceptual=0.0, **options)


def test_teacher_and_flow_are_frozen_and_gradients_pass_the_flow() -> None:
    model = second_stage()
    assert_teachers_frozen(model, batch())
    frames = torch.rand(1, 3, 3, 24, 24, requires_grad=True)
    model.flow(frames).sum().backward()
    assert frames.grad is not None
    assert frames.grad.abs().max() > 0


def test_the_teacher_does_not_follow_and_starts_from_the_first_stage() -> None:
    model, stage = second_stage(), SelfDRSC(perceptual=0.0)
    nn.init.normal_(stage.network.ife_net.conv1[0].weight)
    model.load_stage(stage.state_dict())
    assert model.teacher is not None
    before = {k: v.clone() for k, v in model.teacher.networks[0].state_dict().items()}
    assert all(torch.equal(v, stage.network.state_dict()[k]) for k, v in before.items())
    optimizer = torch.optim.SGD(model.network.parameters(), 0.1)
    model.training_step(batch(), 0).backward()
    optimizer.step()
    model.after_step()
    after = model.teacher.networks[0].state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())


def test_the_students_part_is_the_teachers_centre() -> None:
    model = second_stage()
    outputs = model.forward_train(batch())
    assert outputs.wanted is not None
    assert outputs.out.frames.shape[-2:] == (16, 16)
    # at the start both give the average of their inputs: the centre must line up to the pixel
    terms = model.distill_loss(outputs, batch())
    assert terms["distil"].item() == pytest.approx(1e-9**0.5, rel=0.01)


def test_a_full_size_student_on_the_teachers_patch_agrees_inside() -> None:
    torch.manual_seed(0)
    model = SelfDRSC(margin=16, perceptual=0.0)
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.02)
    assert model.teacher is not None
    model.teacher.load_changing_state(model.network.state_dict())
    data = batch(96, 100)
    outputs = model.forward_train(data)
    assert outputs.wanted is not None
    wanted = outputs.wanted[..., 16:-16, 16:-16]
    error = (outputs.out.frames - wanted).abs()
    assert error[..., 24:-24, 24:-24].max() < 0.02 * wanted.std()


def test_terms_and_weights_are_those_of_the_equations() -> None:
    model = SelfDRSC(perceptual=0.0, variation=0.1)
    outputs = model.forward_train(batch())
    terms = model.task_loss(outputs, batch())
    assert list(terms) == ["reconstruction", "variation"]
    total = model.training_step(batch(), 0)
    want = terms["reconstruction"] + 0.1 * terms["variation"]
    torch.testing.assert_close(total, want)


def test_perceptual_terms_need_a_file_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from cohobate.video.perceptual import VGGFeatures

    torch.save(VGGFeatures().state_dict(), tmp_path / "vgg19.pth")
    model = second_stage()
    assert model.features is None
    logging.getLogger("cohobate").propagate = True
    SelfDRSC()
    assert "no perceptual term" in caplog.text
    torch.manual_seed(0)
    model = SelfDRSC(margin=8, vgg_weights=tmp_path / "vgg19.pth")
    terms = model.task_loss(outputs := model.forward_train(batch()), batch())
    assert terms["perceptual"] > 0
    assert "distil_perceptual" in model.distill_loss(outputs, batch())
    assert model.weights["perceptual"](0.5) == model.weights["distil_perceptual"](0.5) == 0.1
    assert not any(name.startswith("features") for name in model.state_dict())


def test_supervised_learns_from_truth_and_needs_it() -> None:
    model = SelfDRSC(supervised=True, perceptual=0.0)
    outputs = model.forward_train(batch())
    assert outputs.made is None
    found = model.task_loss(outputs, batch())["reconstruction"]
    average = batch()["images"].mean(1, keepdim=True)
    want = ((average - batch()["frames"]) ** 2 + 1e-9).sqrt().mean()
    assert found.item() == pytest.approx(want.item(), rel=1e-4)
    without = {k: v for k, v in batch().items() if k != "frames"}
    with pytest.raises(InputError, match="no true frames"):
        model.training_step(without, 0)


def test_crops_that_the_network_cannot_take() -> None:
    with pytest.raises(InputError, match=r"data\.patch: crops of 24×24 .* multiples of 16"):
        SelfDRSC(perceptual=0.0).training_step(batch(24), 0)
    with pytest.raises(InputError, match="margin of 8"):
        second_stage().training_step(batch(24), 0)


def test_pwc_trains_from_a_file_in_released_colours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(PWCNet().moduleNetwork.state_dict(), tmp_path / "pwc.pytorch")
    options = {"flow": "pwc", "flow_weights": tmp_path / "pwc.pytorch", "official_warp": True}
    model = SelfDRSC(perceptual=0.0, bgr=True, **options)
    loss = model.training_step(batch(), 0)
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.network.parameters())


def test_a_run_ends_with_everything_it_promises(run: Path, tmp_path: Path) -> None:
    for stage in ("1-self-supervised", "2-self-distil"):
        info = runs.RunFolder(run / stage).info
        assert info["status"] == "finished"
        assert "real clip" in info["data"]
        assert info["parameters"]["added"] == 0
        scores = ("psnr", "psnr_ring", "psnr_rows", "ssim", "rs_psnr", "average_psnr")
        assert {f"test/{name}" for name in scores} <= set(info["test"])
        assert (run / stage / "frames.png").exists()
    assert_student_only(run / "2-self-distil")
    assert "train/distil" in rows(run / "2-self-distil")[0]
    assert "train/distil" not in rows(run / "1-self-supervised")[0]
    assert_export_round_trip(run / "2-self-distil", tmp_path)


def test_validate_and_export_by_command(run: Path, tmp_path: Path) -> None:
    done = run_command("validate", "video/selfdrsc", "--checkpoint", run, "--json")
    assert done.code == 0, done.err
    assert "test/psnr_ring" in done.out
    words = ("export", "video/selfdrsc", "--checkpoint", run, "--out", tmp_path)
    assert run_command(*words).code == 0
    assert (tmp_path / "model.safetensors").exists()


def test_arms_switch_off_what_they_say(run: Path, tmp_path: Path) -> None:
    fit(tmp_path / "plain", "--model.distill=false")
    fit(tmp_path / "truth", "--model.supervised=true", "--model.distill=false")
    full, plain, truth = (
        rows(folder / "2-self-distil") for folder in (run, tmp_path / "plain", tmp_path / "truth")
    )
    assert "train/distil" not in plain[0]
    assert "train/distil" not in truth[0]
    assert plain[0]["train/reconstruction"] == full[0]["train/reconstruction"]
    assert truth[0]["train/reconstruction"] != full[0]["train/reconstruction"]


def test_a_resumed_run_keeps_the_teacher_of_the_first_stage(run: Path, tmp_path: Path) -> None:
    # the second epoch of the second stage is resumed from the end of the first
    for epochs in (1, 2):
        fit(tmp_path / "parts", epochs=epochs)
    fit(tmp_path / "whole", epochs=2)
    kept = load_checkpoint(tmp_path / "parts/2-self-distil/last.ckpt")["teachers"]["teacher"]
    first = load_checkpoint(run / "1-self-supervised/last.ckpt")["state_dict"]
    assert kept.keys() == {k.removeprefix("network.") for k in first}
    again = tmp_path / "again"
    fit(again, epochs=2)
    for stage in ("1-self-supervised", "2-self-distil"):
        assert_same_run(tmp_path / "whole" / stage, again / stage)


@pytest.mark.parametrize(("name", "path"), recipes("video"))
def test_every_recipe_parses(name: str, path: Path) -> None:
    assert_recipe_parses(path)


def test_released_weights_go_in_and_out(
    tmp_path: Path, hash_fill: Callable[[nn.Module], nn.Module]
) -> None:
    network = hash_fill(CorrectionNet())
    assert isinstance(network, CorrectionNet)
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    torch.save({**state, "module.total_ops": torch.zeros(1)}, tmp_path / "G.pth")
    take(tmp_path / "G.pth", tmp_path / "run")
    give(tmp_path / "run", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(network.state_dict())
    assert all(torch.equal(v, back[k]) for k, v in network.state_dict().items())
    with pytest.raises(InputError, match="there is a run already"):
        take(tmp_path / "G.pth", tmp_path / "run")
    save_official(network, tmp_path / "own.pth")
    model = SelfDRSC(network="paper", weights=tmp_path / "own.pth", perceptual=0.0, bgr=True)
    images = torch.rand(2, 3, 32, 64)
    with torch.no_grad():
        found = model.correct(images, (0.5,))
        model.bgr = False
        torch.testing.assert_close(model.correct(images.flip(1), (0.5,)).flip(1), found)
    torch.save({"a": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad\.pth: no weights for flow_net"):
        SelfDRSC(network="paper", weights=tmp_path / "bad.pth", perceptual=0.0)


def test_bad_options_end_in_one_line(tmp_path: Path) -> None:
    words = ["fit", "video/selfdrsc", "--out", tmp_path / "r", *SMALL]
    assert_one_line(run_command(*words, "--data.root", tmp_path), tmp_path.name, "no pictures")
    assert_one_line(run_command(*words, "--model.marign", "3"), "marign")
    folder = tmp_path / "pairs"
    folder.mkdir()
    for side, height in (("t2b", 32), ("b2t", 40)):
        Image.fromarray(np.zeros((height, 32, 3), np.uint8)).save(folder / f"0_{side}.png")
    assert_one_line(
        run_command(*words, "--data.root", folder), "0_b2t.png", "32×40 pixels, but its partner"
    )

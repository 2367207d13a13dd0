from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cohobate.avviolence.macil_sd import MACILSD, checkpoint, losses
from cohobate.core import runs
from cohobate.core.io import load_checkpoint
from cohobate.core.testing import (
    assert_equal,
    assert_export_round_trip,
    assert_one_line,
    assert_recipe_parses,
    assert_student_only,
    golden,
    recipes,
    run_command,
)

RECIPE = "avviolence/macil-sd"
GOLDEN = Path(__file__).parent / "golden"
SMALL = [
    "--data.synthetic.train=24", "--data.synthetic.val=4", "--data.synthetic.test=6",
    "--data.synthetic.visual_width=12", "--data.synthetic.audio_width=8", "--data.batch_size=8",
    "--model.hidden=8", "--model.heads=2", "--model.ramp_steps=4", "--model.merge_every=2",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip


def fit(out: Path, *options: str, epochs: int = 2) -> list[dict[str, str]]:
    done = run_command(
        "fit",
        "avviolence/macil-sd",
        "--out",
        out,
        *SMALL,
        f"--trainer.max_epochs={epochs}",
        *options,
    )
    assert done.code == 0, done.err
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "full"
    fit(out, "--trainer.log_every_n_steps=1")
    return out


def named(z: dict[str, Any], prefix: str, visual_only: bool) -> dict[str, torch.Tensor]:
    names = checkpoint.official_names(visual_only)
    return {ours: z[f"{prefix}.{theirs}"] for ours, theirs in names.items()}


def test_training_steps_match_the_official_code_with_its_swap() -> None:
    z = golden(GOLDEN / "train_steps_s11.npz")
    method = MACILSD(
        24, 12, hidden=16, heads=4, dropout=0.0, swap_representations=True, lr=float(z["lr"])
    )
    assert method.partner is not None
    method.network.load_state_dict(named(z, "av0", False))
    method.partner.load_state_dict(named(z, "v0", True))
    method.weights = dict.fromkeys(losses.Contrast._fields, lambda progress: float(z["lambda"]))
    groups = [(method.network, float(z["lr"])), (method.partner, float(z["lr"]) / 5)]
    optimizer = torch.optim.Adam([{"params": list(n.parameters()), "lr": lr} for n, lr in groups])
    for step in range(3):
        length = z[f"seq_len_{step}"]
        batch = {
            "visual": z[f"visual_{step}"][:, : length.max()],
            "audio": z[f"audio_{step}"][:, : length.max()],
            "label": z[f"label_{step}"],
            "length": length,
        }
        outputs = method.forward_train(batch)
        task, terms = method.task_loss(outputs, batch), method.distill_loss(outputs, batch)
        assert list(terms) == list(losses.Contrast._fields)
        torch.testing.assert_close(
            torch.stack(list(terms.values())).double(), z["cmal_losses"][step], rtol=1e-4, atol=1e-5
        )
        assert task["visual_mil"].item() == pytest.approx(float(z["v_loss"][step]), rel=1e-4)
        loss = method.training_step(batch, step)
        total = float(z["av_total_loss"][step] + z["v_loss"][step])
        assert loss.item() == pytest.approx(total, rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def check(prefix: str, visual_only: bool) -> None:
        network = method.partner if visual_only else method.network
        assert network is not None
        for name, wanted in named(z, prefix, visual_only).items():
            slack = 2 * 3 * float(z["lr"]) if name == "layer.key.bias" else 2e-6
            torch.testing.assert_close(
                network.state_dict()[name], wanted, rtol=0, atol=slack, msg=f"{prefix} {name}"
            )

    check("av1", False)
    check("v1", True)
    losses.merge_(method.network, method.partner, float(z["m"]))
    check("av2", False)
    check("v1", True)


def test_no_swap_is_the_default() -> None:
    torch.manual_seed(0)
    method = MACILSD(6, 4, hidden=8, heads=2, dropout=0.0)
    batch = {
        "visual": torch.randn(4, 20, 6), "audio": torch.randn(4, 20, 4),
        "label": torch.tensor([0.0, 1, 0, 1]), "length": torch.full((4,), 20),
    }  # fmt: skip
    method.split_by = "label"
    outputs = method.forward_train(batch)
    streams = outputs["streams"]
    want = losses.contrast_semi_bags(
        batch["label"] > 0, streams.audio_logits, streams.visual_logits, batch["length"],
        streams.audio_rep, streams.visual_rep,
    )  # fmt: skip
    torch.testing.assert_close(tuple(method.distill_loss(outputs, batch).values()), tuple(want))
    method.swap_representations = True
    assert not torch.allclose(method.distill_loss(outputs, batch)["a2v_normal"], want.a2v_normal)


def test_a_run_ends_with_everything_it_promises(run: Path, tmp_path: Path) -> None:
    info = runs.RunFolder(run).info
    assert {"test/ap", "test/ap_step", "test/auc", "test/video_auc", "test/bag_ap"} <= set(
        info["test"]
    )
    assert "SYNTHETIC" in info["data"]
    assert_student_only(run)
    assert_export_round_trip(run, tmp_path)


def test_validate_gives_all_metrics_again(run: Path) -> None:
    done = run_command(
        "validate", "avviolence/macil-sd", "--checkpoint", run / "last.ckpt", "--json"
    )
    assert done.code == 0, done.err
    for name, value in runs.RunFolder(run).info["test"].items():
        if name != "test/ap_peak":
            assert f'"{name}": {value}' in done.out


def test_lambda_ramps_and_m_rises_with_the_steps(tmp_path: Path) -> None:
    rows = fit(tmp_path / "r", "--trainer.log_every_n_steps=1", "--model.merges=3", epochs=3)
    weights = [float(r["train/a2v_normal_weight"]) for r in rows if r["train/a2v_normal_weight"]]
    assert weights[:6] == [0, 0.25, 0.5, 0.75, 1, 1]
    m = list(dict.fromkeys(float(r["train/m"]) for r in rows if r.get("train/m")))
    want = [1 - 0.045 * (1 + math.cos(math.pi * i / 3)) for i in range(len(m))]
    assert m == pytest.approx(want, abs=1e-6)
    assert len(m) == 4  # nine steps, every second one


def test_arms_switch_off_what_they_say(tmp_path: Path) -> None:
    options = ("--trainer.log_every_n_steps=1",)
    full = fit(tmp_path / "full", *options, epochs=1)
    light = fit(tmp_path / "light", "--model.merge=false", *options, epochs=1)
    plain = fit(tmp_path / "plain", "--model.distill=false", *options, epochs=1)
    assert full[0]["train/mil"] == light[0]["train/mil"] == plain[0]["train/mil"]
    assert {"train/visual_mil", "train/m", "train/a2v_normal"} <= full[0].keys()
    assert "train/a2v_normal" in light[0]
    assert not {"train/visual_mil", "train/m"} & light[0].keys()
    assert not {"train/visual_mil", "train/m", "train/a2v_normal"} & plain[0].keys()


def test_a_resumed_run_repeats_both_rates_schedules_and_merges(tmp_path: Path) -> None:
    # three steps an epoch, merges every second step: the first epoch ends between two merges
    for epochs in (1, 3):
        fit(tmp_path / "parts", "--model.lr_epochs=3", epochs=epochs)
    fit(tmp_path / "whole", "--model.lr_epochs=3", epochs=3)
    one, two = (load_checkpoint(tmp_path / n / "last.ckpt") for n in ("parts", "whole"))
    assert len(one["optimizer_states"][0]["param_groups"]) == 2
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "peak"):
        assert_equal(one[key], two[key], key)


@pytest.mark.parametrize("batch", [1, 2])
def test_tiny_batches_and_batches_of_one_kind_train(tmp_path: Path, batch: int) -> None:
    rows = fit(
        tmp_path / "r", f"--data.batch_size={batch}", "--data.synthetic.train=4",
        "--trainer.log_every_n_steps=1", epochs=1,
    )  # fmt: skip
    terms = [float(r["train/a2v_normal"]) for r in rows if r["train/a2v_normal"]]
    assert len(terms) == 4 // batch
    assert batch != 1 or terms == [0.0] * 4
    assert all(math.isfinite(float(r["train/loss"])) for r in rows if r["train/loss"])


def test_another_network_is_trained_contrasted_and_merged(tmp_path: Path) -> None:
    nets = "cohobate.avviolence.nets"
    rows = fit(
        tmp_path / "r",
        f"--model.network={nets}.TemporalMIL", "--model.network.visual_width=12",
        "--model.network.audio_width=8", "--model.network.hidden=8",
        f"--model.partner={nets}.VisualTemporalMIL", "--model.partner.visual_width=12",
        "--model.partner.hidden=8", "--trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert {"train/m", "train/visual_mil", "train/a2v_normal"} <= rows[0].keys()
    model = runs.load_run(tmp_path / "r")
    assert type(model.student).__name__ == "TemporalMIL"
    assert_export_round_trip(tmp_path / "r", tmp_path, onnx=False)


def test_bad_options_end_in_one_line(tmp_path: Path) -> None:
    words = ["fit", "avviolence/macil-sd", "--out", tmp_path / "r", *SMALL]
    assert_one_line(
        run_command(*words, "--data.root", tmp_path), tmp_path.name, "neither labels.csv"
    )
    assert_one_line(run_command(*words, "--model.unheard_of", "3"), "unheard_of")


@pytest.mark.parametrize(("name", "path"), recipes("avviolence"))
def test_every_recipe_parses(name: str, path: Path) -> None:
    assert_recipe_parses(path)

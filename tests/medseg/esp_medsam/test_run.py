"""The paper through the command: all stages, prediction, export, resuming, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from cohobate.core import catalog, runs
from cohobate.core.testing import (
    assert_export_round_trip,
    assert_one_line,
    assert_same_run,
    assert_student_only,
    run_command,
)
from cohobate.core.training.logger import read_metrics
from cohobate.medseg.esp_medsam import ESPMedSAM
from cohobate.medseg.esp_medsam.__main__ import give, onnx, take

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.max_epochs=2",
    "--data.image_size=64",
    "--data.batch_size=4",
    "--model.width=16",
    "--model.student={embed_dims: [8, 16, 16, 32], depths: [1, 1, 1, 1], num_heads: [1, 2, 2, 4]}",
    "--model.vit={hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 3, window_size: 2}",
    "--model.decoder={num_heads: 2, mlp_dim: 24, patch_dim: 8}",
]
OPTIONS = ("--data.flip=0.5", "--data.epoch_images=8")
STUDENT = "network.encoder.controllers."


def pictures(root: Path, kinds: tuple[str, ...], count: int = 4) -> Path:
    """A folder with a manifest: a bright disc on noise."""
    rows = ["image,mask,modality,split"]
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    for kind in kinds:
        for number in range(count + 4):
            name = f"{kind}_{number}.png"
            cy, cx = rng.integers(12, 36, 2)
            mask = np.hypot(y - cy, x - cx) < 9
            image = rng.integers(0, 90, (48, 64, 3)) + 140 * mask[..., None]
            for folder, array in (("images", image), ("masks", 255 * mask)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(root / folder / name)
            split = "train" if number < count else "val" if number < count + 2 else "test"
            rows.append(f"images/{name},masks/{name},{kind},{split}")
    (root / "manifest.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "discs", ("ultrasound", "fundus"))


def fit(recipe: str, out: Path, *options: str) -> Path:
    """Run the stages of a recipe that are not finished in ``out``; the last one's folder."""
    return runs.fit(catalog.find(recipe), [*QUICK, *options], out=out)[-1].path


def begun(trained: Path, out: Path) -> Path:
    """A run folder whose first two stages are those of another run."""
    out.mkdir()
    for name in ("1-teacher", "2-common"):
        (out / name).symlink_to(trained / name)
    return out


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """All three stages."""
    out = tmp_path_factory.mktemp("runs") / "esp"
    fit("medseg/esp-medsam", out, f"--data.root={data}", *OPTIONS)
    return out


def test_every_stage_tells_its_losses(trained):
    logged = {
        name: {key for row in read_metrics(trained / name / "metrics.csv") for key in row}
        for name in ("1-teacher", "2-common", "3-modality")
    }
    assert {"train/masks", "train/patches", "val/dice", "val/patch_accuracy"} <= logged["1-teacher"]
    assert "train/embedding" not in logged["1-teacher"]
    assert {"train/embedding", "val/loss"} <= logged["2-common"]
    assert "val/dice" not in logged["2-common"]
    assert {"train/embedding", "val/loss", "val/dice/fundus"} <= logged["3-modality"]
    info = json.loads((trained / "3-modality" / "run.json").read_text())
    assert info["data"].startswith("discs: ultrasound 4/2/2, fundus 4/2/2")
    tested = {"dice", "dice_sd", "iou", "hausdorff", "embedding_mse", "dice_no_prompt", "f1"}
    assert {f"test/{name}" for name in (*tested, "dice_wrong_modality")} <= set(info["test"])
    assert (trained / "3-modality" / "segmentation.png").read_bytes().startswith(b"\x89PNG")
    assert_student_only(trained / "3-modality")


def test_the_student_is_assembled_of_its_parts(trained):
    teacher = runs.load_run(trained / "1-teacher").state_dict()
    common = runs.load_run(trained / "2-common").state_dict()
    student = runs.load_run(trained).state_dict()
    for name, tensor in student.items():
        if name.startswith(("network.prompter", "network.decoder")):
            assert torch.equal(tensor, teacher[name]), name
        elif not name.startswith(STUDENT):
            assert torch.equal(tensor, common[name]), name


def test_the_teachers_answers_are_on_disk(trained):
    parts = sorted(p.name for p in (trained / "3-modality" / "teacher-embeddings").iterdir())
    assert parts == ["test", "train", "val"]


def test_a_stage_that_stopped_ends_the_same(data, trained, tmp_path, monkeypatch):
    original = ESPMedSAM.forward_train

    def forward_train(self, batch):
        if self.global_step == 2:
            raise RuntimeError("power cut")
        return original(self, batch)

    out = begun(trained, tmp_path / "stopped")
    options = (f"--data.root={data}", *OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(ESPMedSAM, "forward_train", forward_train)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("medseg/esp-medsam", out, *options, "--checkpoint_steps=1")
    assert_same_run(fit("medseg/esp-medsam", out, *options), trained / "3-modality")


def test_a_live_teacher_trains_alike(data, trained, tmp_path):
    out = begun(trained, tmp_path / "live")
    live = fit("medseg/esp-medsam", out, f"--data.root={data}", *OPTIONS, "--model.cache=false")
    assert not (live / "teacher-embeddings").exists()
    one, other = (read_metrics(f / "metrics.csv") for f in (live, trained / "3-modality"))
    for a, b in zip(one, other, strict=True):
        if "train/embedding" in a:
            assert a["train/embedding"] == pytest.approx(b["train/embedding"], rel=5e-3)


def test_predict_writes_masks_of_the_images_size(trained, data, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    first = Image.open(data / "images" / "fundus_0.png")
    first.resize((100, 70)).save(inputs / "a.png")
    first.convert("L").save(inputs / "b.jpg")
    (inputs / "broken.png").write_bytes(b"text")
    words = ("predict", "medseg/esp-medsam", "--checkpoint", trained, "--device", "cpu")
    out = tmp_path / "out"
    outcome = run_command(*words, inputs, "--out", out, "--modality", "fundus")
    assert_one_line(outcome, "broken.png: not a readable image", "the other 2 are in")
    names = ["a_mask.png", "a_overlay.png", "b_mask.png", "b_overlay.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    mask = np.asarray(Image.open(out / "a_mask.png"))
    assert mask.shape == (70, 100)
    assert set(np.unique(mask)) <= {0, 255}
    plain = tmp_path / "plain"
    good = run_command(
        *words, inputs / "a.png", "--out", plain, "--modality", "fundus", "--picture=false"
    )
    assert good.code == 0, good.err
    assert [p.name for p in plain.iterdir()] == ["a_mask.png"]


def test_predict_refuses_what_it_cannot_know(trained, data, tmp_path):
    image = data / "images" / "fundus_0.png"
    words = ("predict", "medseg/esp-medsam", "--checkpoint", trained, "--out", tmp_path / "out")
    assert_one_line(run_command(*words, image), "--modality: choose one of ultrasound, fundus")
    wrong = run_command(*words, image, "--modality", "fundis")
    assert_one_line(wrong, "unknown modality 'fundis', did you mean 'fundus'")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_line(run_command(*words, empty, "--modality", "fundus"), "empty: no images")
    assert not (tmp_path / "out").exists()


def test_one_modality_as_onnx(trained, tmp_path):
    assert_export_round_trip(trained, tmp_path, onnx=False)
    onnx(trained, "fundus", tmp_path / "fundus.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fundus.onnx")
    image = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (masks,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        network = runs.load_run(trained).network
        expected = network(image, "fundus").masks
        other = network(image, "ultrasound").masks
    np.testing.assert_allclose(masks, expected.numpy(), atol=1e-3)
    assert not torch.allclose(expected, other, atol=1e-2)


def test_a_modality_is_added_and_the_others_stay(trained, tmp_path):
    new = pictures(tmp_path / "new", ("mri",))
    out = tmp_path / "added"
    fit(
        "medseg/esp-medsam/add", out,
        f"--data.root={new}",
        "--data.modalities=[mri]",
        "--model.known=[ultrasound, fundus]",
        f"--model.start={trained}",
    )  # fmt: skip
    before, after = runs.load_run(trained).network, runs.load_run(out).network
    assert after.modalities == ["ultrasound", "fundus", "mri"]
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for name in before.modalities:
            pairs = zip(before(image, name), after(image, name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert after(image, "mri").masks.isfinite().all()


def test_joint_tuning_goes_on_from_a_run(trained, data, tmp_path):
    done = run_command(
        "fit", "medseg/esp-medsam/joint", *QUICK, f"--data.root={data}",
        f"--model.start={trained}", "--out", tmp_path / "joint",
    )  # fmt: skip
    assert done.code == 0, done.err
    before, after = (
        runs.load_run(trained).state_dict(),
        runs.load_run(tmp_path / "joint").state_dict(),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("network.decoder") for name in changed)
    assert not any(
        name.startswith(("network.encoder.vit", "network.encoder.neck")) for name in changed
    )


def test_released_checkpoints_become_runs_and_go_back(official_state, tmp_path):
    file = tmp_path / "released.pth"
    torch.save(official_state, file)
    run = tmp_path / "run"
    take(file, "colonoscopy", run)
    model = runs.load_run(run)
    assert model.normalization == "official"
    assert model.network.modalities == ["colonoscopy"]
    give(run, "colonoscopy", tmp_path / "back.pth")
    again = torch.load(tmp_path / "back.pth", weights_only=True)
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in official_state.items()}
    name = "mask_query.weight"
    assert torch.equal(again[name], official_state[name])


# --- bad input through the command ----------------------------------------------------------------


def refused(recipe: str, out: Path, *options: str):
    return run_command("fit", recipe, *QUICK, *options, "--out", out)


def test_a_missing_folder(tmp_path):
    outcome = refused("medseg/esp-medsam", tmp_path / "run", f"--data.root={tmp_path / 'no'}")
    assert_one_line(outcome, "no: no such folder")


def test_bad_pictures_and_lines(data, tmp_path):
    root = tmp_path / "bad"
    shutil.copytree(data, root)
    good = (root / "manifest.csv").read_text()
    Image.new("L", (32, 32)).save(root / "masks" / "small.png")
    (root / "images" / "broken.png").write_bytes(b"text")
    image, mask = "images/fundus_0.png", "masks/fundus_0.png"
    for line, message in (
        (f"{image},{mask},fundis,train", "unknown modality 'fundis', did you mean 'fundus'"),
        (f"{image},masks/gone.png,fundus,train", "gone.png: no such file"),
        (f"{image},masks/small.png,fundus,test", "small.png: the mask is (32, 32), the image"),
        (f"images/broken.png,{mask},fundus,test", "broken.png: not a readable image"),
    ):
        (root / "manifest.csv").write_text(f"{good}\n{line}\n")
        outcome = refused("medseg/esp-medsam", tmp_path / "run", f"--data.root={root}")
        assert_one_line(outcome, message)
    size = refused(
        "medseg/esp-medsam", tmp_path / "run", f"--data.root={data}", "--data.image_size=65"
    )
    assert_one_line(size, "image_size: 65 is not divisible by 32")
    assert not (tmp_path / "run").exists(), "all of it shows before a run starts"


def test_a_missing_teacher(data, tmp_path):
    missing = tmp_path / "none"
    outcome = refused(
        "medseg/esp-medsam/joint", tmp_path / "run", f"--data.root={data}",
        f"--model.start={missing}",
    )  # fmt: skip
    assert_one_line(outcome, f"model.start: {missing}: no such run folder")
    outcome = refused(
        "medseg/esp-medsam", tmp_path / "run", f"--data.root={data}",
        f"--model.teacher={tmp_path}",
    )  # fmt: skip
    assert_one_line(outcome, "model.teacher:", "no best.ckpt or last.ckpt")


def test_a_folder_without_a_sam(data, tmp_path):
    outcome = refused(
        "medseg/esp-medsam", tmp_path / "run", f"--data.root={data}", f"--model.sam={tmp_path}"
    )
    assert_one_line(outcome, f"{tmp_path}: no config.json of a SAM")

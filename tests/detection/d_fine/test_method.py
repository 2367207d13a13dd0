from __future__ import annotations

import json
import zlib
from dataclasses import replace

import av
import pytest
import torch

from cohobate.core.errors import InputError
from cohobate.core.io import load_checkpoint
from cohobate.core.testing import (
    assert_one_line,
    assert_recipe_parses,
    assert_same_run,
    assert_student_only,
    build,
    recipes,
    run_command,
)
from cohobate.detection.boxes import pad_targets
from cohobate.detection.commands import give, take
from cohobate.detection.d_fine.checkpoint import official_name, save_hub, save_official
from cohobate.detection.d_fine.ema import WarmEMA
from cohobate.detection.d_fine.method import DFine
from cohobate.detection.d_fine.network import DFineNet
from cohobate.detection.d_fine.optim import RATES, parameter_groups
from cohobate.detection.d_fine.serving import difference, to_onnx
from cohobate.detection.d_fine.sizes import config_of
from cohobate.detection.data import Category

SMALL = (
    "--data.size=64", "--data.batch_size=2", "--model.num_queries=10", "--model.top=20",
    "--trainer.enable_progress_bar=false", "--model.denoising.budget=4", "--model.warmup=2",
    "--trainer.check_val_every_n_epoch=1",
)  # fmt: skip


def test_the_average_of_the_official_code(recorded):
    record = recorded("ema")
    count, decay, warmup = (record["params"][n].item() for n in range(3))
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    network.load_state_dict({k[5:]: v for k, v in record.items() if k.startswith("init_")})
    ema = WarmEMA(network, decay, int(warmup))
    for step in range(int(count)):
        prefix = f"step{step}_"
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
        )
        ema.after_step(0.0)
    for name, value in ema.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, record[f"ema_{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", ["n", pytest.param("l", marks=pytest.mark.slow)])
def test_parameter_groups_of_the_official_code(recorded, size):
    wanted = [g for g in recorded("param_groups")[size] if g["tensors"]]
    network = DFineNet(config_of(size, 80))
    by_id = {id(p): official_name(n) for n, p in network.model.named_parameters()}
    groups = {}
    for group in parameter_groups(network, RATES[size]):
        names = {by_id[id(p)] for p in group["params"]}
        key = zlib.crc32("\n".join(sorted(names)).encode())
        numel = sum(p.numel() for p in group["params"])
        groups[key] = (group["lr"], group["weight_decay"], len(names), numel)
    for group in wanted:
        found = groups[group["crc32_of_sorted_names_joined_by_newline"]]
        assert found == (group["lr"], group["weight_decay"], group["tensors"], group["numel"])


@pytest.mark.parametrize(("name", "path"), recipes("detection"), ids=lambda x: str(x)[-40:])
def test_recipes_parse(name, path):
    assert_recipe_parses(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three epochs on four images with ids 1, 7, 90 and faulty boxes; epoch 1 is stage two."""
    folder = tmp_path_factory.mktemp("run")
    root = _coco(folder)
    done = run_command(
        "fit", "detection/d-fine", "--data.root", root, "--data.stop_epoch=1",
        "--trainer.max_epochs=3", "--out", folder / "run", *SMALL,
    )  # fmt: skip
    assert done.code == 0, done.err
    return root, folder / "run"


def _coco(folder):
    from cohobate.detection.data import synthetic
    from cohobate.detection.plots import write_picture

    root = folder / "data"
    for part, seed in (("train", 1), ("val", 2)):
        made = synthetic.shapes(4, seed, 64)
        content = {
            "images": [], "annotations": [],
            "categories": [{"id": c.id, "name": c.name} for c in made.categories],
        }  # fmt: skip
        for n, picture in enumerate(made.pictures):
            write_picture(root / part / picture.name, picture.pixels)
            entry = {"id": n, "file_name": picture.name, "width": 64, "height": 64}
            content["images"].append(entry)
            if n == 1:
                continue  # an image without objects
            ids = [made.categories[label].id for label in picture.labels]
            boxes = [[x, y, right - x, low - y] for x, y, right, low in picture.boxes.tolist()]
            # one without area, one that sticks out, one outside
            faulty = [[5, 5, 0, 9], [50, 50, 30, 30], [80, 70, 9, 9]]
            for kind, box in zip([*ids, 7, 7, 7], boxes + faulty, strict=True):
                content["annotations"].append({
                    "id": len(content["annotations"]), "image_id": n, "category_id": kind,
                    "bbox": box,
                })  # fmt: skip
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{part}.json").write_text(json.dumps(content))
    return root


def test_a_run_keeps_ids_and_the_averaged_weights(run):
    _, folder = run
    checkpoint = load_checkpoint(folder / "last.ckpt")
    assert checkpoint["categories"] == [[1, "disc"], [7, "box"], [90, "triangle"]]
    averaged, live = checkpoint["state_dict"], checkpoint["live"]
    assert set(averaged) == set(live)
    assert any(not torch.equal(averaged[k], live[k]) for k in live)
    assert_student_only(folder)
    assert (folder / "detections.png").exists()


def test_the_second_stage_takes_up_the_best_of_the_first(run):
    _, folder = run
    first = load_checkpoint(folder / "first-stage.ckpt")
    assert first["epoch"] == 0
    last = load_checkpoint(folder / "last.ckpt")
    _, second, stale = last["two_stages"]
    assert second
    assert not stale
    decay = last["teachers"]["ema"]["decay"]
    reloads = round((0.9999 - decay) / 1e-4)
    assert decay == pytest.approx(0.9999 - 1e-4 * reloads)
    updates = last["teachers"]["ema"]["updates"]
    # every reload goes back to the two updates of the first epoch
    assert updates in (2, 4, 6)
    assert (updates == 2) == torch.equal(
        last["state_dict"]["network.model.enc_score_head.bias"],
        first["state_dict"]["network.model.enc_score_head.bias"],
    )


def test_a_stopped_run_goes_on_as_if_it_had_not(run, tmp_path):
    root, folder = run
    for epochs in (2, 3):
        done = run_command(
            "fit", "detection/d-fine", "--data.root", root, "--data.stop_epoch=1",
            f"--trainer.max_epochs={epochs}", "--out", tmp_path / "run", *SMALL,
        )  # fmt: skip
        assert done.code == 0, done.err
    assert_same_run(folder, tmp_path / "run")


def test_predict_writes_the_files_own_ids(run, tmp_path):
    root, folder = run
    done = run_command(
        "predict", "detection/d-fine", root / "val", "--checkpoint", folder, "--out", tmp_path,
        "--threshold=0",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "detections.json").read_text())
    assert len(found) == 4
    for objects in found.values():
        assert len(objects) == 20
        assert {o["category_id"] for o in objects} <= {1, 7, 90}
        assert [o["score"] for o in objects] == sorted((o["score"] for o in objects), reverse=True)
    assert len(list(tmp_path.glob("*_detected.jpg"))) == 4


def test_predict_on_a_clip_and_a_damaged_file(run, make_clip, tmp_path):
    _, folder = run
    clip, bad = make_clip(tmp_path / "clip.mp4", 5), tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    done = run_command(
        "predict", "detection/d-fine", clip, bad, "--checkpoint", folder, "--out", tmp_path / "out",
        "--threshold=0", "--batch=2",
    )  # fmt: skip
    assert_one_line(done, bad, "not a picture", "the other 1 are in")
    frames = json.loads((tmp_path / "out" / "clip.json").read_text())["frames"]
    assert len(frames) == 5
    with av.open(str(tmp_path / "out" / "clip_detected.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5


def test_wrong_options_end_in_one_line(tmp_path):
    done = run_command("fit", "detection/d-fine", "--data.root", tmp_path / "none")
    assert_one_line(done, tmp_path / "none", "no such folder")
    done = run_command("fit", "detection/d-fine", "--data.size=50")
    assert_one_line(done, "multiple of 32")


def test_onnx_with_postprocessing_gives_the_same_detections(run, tmp_path):
    _, folder = run
    assert give(folder, tmp_path / "d.onnx") is None
    assert json.loads((tmp_path / "d.json").read_text())["categories"][2]["id"] == 90


def test_an_onnx_file_that_differs_is_not_written(tmp_path, monkeypatch):
    from cohobate.detection.d_fine import serving

    monkeypatch.setattr(serving, "difference", lambda *_: 0.5)
    network = DFineNet(config_of("tiny", 2, num_queries=10), top=10)
    with pytest.raises(InputError, match=r"differs from the network by 0\.5"):
        to_onnx(network, 64, tmp_path / "d.onnx")
    assert not list(tmp_path.iterdir())


def test_difference_of_detections_is_of_sets():
    from cohobate.detection.d_fine.network import Detections

    labels, scores = torch.tensor([[0, 1, 0]]), torch.tensor([[0.9, 0.5, 0.1]])
    boxes, sizes = torch.rand(1, 3, 4) * 10, torch.tensor([[10.0, 10.0]])
    one = Detections(labels, boxes, scores)
    order = torch.tensor([1, 0, 2])
    other = Detections(labels[:, order], boxes[:, order], scores[:, order])
    assert difference(one, other, sizes) == 0
    moved = Detections(labels, boxes + 1, scores)
    assert difference(one, moved, sizes) == pytest.approx(0.1, abs=1e-6)
    swapped = Detections(1 - labels, boxes, scores)
    assert difference(one, swapped, sizes) > 0.1


def test_released_weights_become_a_run_and_come_back(tmp_path, monkeypatch):
    from cohobate.detection.d_fine import sizes

    network = DFineNet(config_of("tiny", 80))
    file = save_official(network, tmp_path / "dfine.pth")
    assert take(file, "tiny", tmp_path / "run") is None
    assert give(tmp_path / "run", tmp_path / "again.pth") is None
    one, two = load_checkpoint(file), load_checkpoint(tmp_path / "again.pth")
    assert all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    save_hub(network, tmp_path / "hub", {n: f"c{n}" for n in range(80)})
    take(tmp_path / "hub", "tiny", tmp_path / "run2")
    from cohobate.core.runs import load_run

    assert load_run(tmp_path / "run2").categories[5] == Category(5, "c5")
    assert sizes is not None


@pytest.mark.parametrize("arm", ["baseline", "fdr", "logit_mimicking", "localization"])
def test_arms_train_a_step(arm):
    from cohobate.core import catalog
    from cohobate.core.recipes import Recipe, read_config

    paper = catalog.find("detection/d-fine")
    config = read_config(paper.stages[0].path)
    config = catalog.overlay(config, read_config(paper.paper.arms[arm]))
    parts = {"logger": [], "enable_checkpointing": False}
    built = Recipe(config, SMALL, lambda _: dict(parts))
    assert isinstance(built.model, DFine)
    batch = next(iter(built.datamodule.train_dataloader()))
    loss = built.model.training_step(batch, 0)
    loss.backward()
    outputs = built.model.forward_train(batch)
    terms = set(built.model.task_loss(outputs, batch))
    assert ("fgl" in terms) == (arm in ("fdr", "localization"))
    lessons = {"logit_mimicking": {"kd"}, "localization": {"ld"}}.get(arm, set())
    assert set(built.model.distill_loss(outputs, batch)) == lessons


def test_both_arms_start_from_the_same_backbone():
    one = build("detection/d-fine", *SMALL).model.network.model.backbone.state_dict()
    plain = "--model.regression=plain", "--model.distill=false"
    other = build("detection/d-fine", *SMALL, *plain).model
    for name, value in other.network.model.backbone.state_dict().items():
        assert torch.equal(value, one[name])


def test_bfloat16_trains_without_an_assertion():
    built = build("detection/d-fine", *SMALL)
    batch = next(iter(built.datamodule.train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = built.model.training_step(batch, 0)
    assert loss.dtype == torch.float32
    loss.backward()
    grads = [p.grad for p in built.model.network.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)


def test_plain_boxes_have_no_distributions_to_distil():
    with pytest.raises(InputError, match="plain regression has no edge distributions"):
        build("detection/d-fine", *SMALL, "--model.regression=plain")


@pytest.mark.parametrize("options", [[], ["--model.regression=plain", "--model.distill=false"]])
def test_a_batch_without_any_object_trains(options):
    built = build("detection/d-fine", *SMALL, *options)
    batch = next(iter(built.datamodule.train_dataloader()))
    none = pad_targets([torch.zeros(0, dtype=torch.long)] * 2, [torch.zeros(0, 4)] * 2)
    loss = built.model.training_step(replace(batch, targets=none), 0)
    loss.backward()
    assert loss > 0  # every query learns that it answers for nothing
    grads = [p.grad for p in built.model.network.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)


def test_an_image_with_a_pixel_that_is_no_number_is_named():
    built = build("detection/d-fine", *SMALL)
    batch = next(iter(built.datamodule.train_dataloader()))
    batch.images[1, 0, 3, 4] = torch.nan
    with pytest.raises(InputError, match=f"^{batch.pictures[1].name}: has pixels that are no"):
        built.model.training_step(batch, 0)


def test_weights_to_start_from_are_read_once(tmp_path):
    file = save_official(DFineNet(config_of("tiny", 5, num_queries=10)), tmp_path / "d.pth")
    built = build("detection/d-fine", *SMALL, f"--model.init={file}")
    model = built.model
    model.setup("fit")
    given = load_checkpoint(file)["model"]["encoder.input_proj.0.conv.weight"]
    assert torch.equal(model.network.model.encoder_input_proj[0][0].weight, given)
    assert torch.equal(model.ema.network.model.encoder_input_proj[0][0].weight, given)
    file.unlink()
    build("detection/d-fine", *SMALL, f"--model.init={file}")  # needs no file to be built

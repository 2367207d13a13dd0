"""The three stages on a batch: who gets a gradient, who scores whom, and how stages join."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.medseg.tsddnet import (
    Classify,
    Decision,
    Detect,
    Fuse,
    Selection,
    UltrasoundData,
    branch_ce,
    branch_hint,
    branch_kl,
    read_audit,
)
from cohobate.medseg.tsddnet.refine import quality, refine


@pytest.fixture
def build(small_args) -> Callable[..., Any]:
    def make(kind=Fuse, **options):
        torch.manual_seed(0)
        given = {"class_names": ["benign", "malignant"], "image_size": 64, "cross_fit": 2}
        given |= {"detector": "test_resnet", "detector_args": small_args}
        given |= {"classifier": "test_resnet", "crop_size": 32}
        given |= {"roi_hidden": 16, "width": 8, "fused_width": 6}
        return kind(**{**given, **options})

    return make


@pytest.fixture
def data(busi: Path) -> UltrasoundData:
    return UltrasoundData(root=busi, image_size=64, hidden=0.5, coarse=0.25, batch_size=6)


@pytest.fixture
def batch(data) -> dict[str, torch.Tensor]:
    """Six images, three of them without a box."""
    drawn = np.isfinite(data.train.boxes).all(1)
    chosen = [*np.flatnonzero(drawn)[:3], *np.flatnonzero(~drawn)[:3]]
    rows = [data.train[int(i)] for i in chosen]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def give(model: Any, data: UltrasoundData) -> None:
    """A trainer as far as the stages look at it."""
    model._trainer = SimpleNamespace(datamodule=data)


def only(batch, places):
    return {key: value[places] for key, value in batch.items()}


def test_an_image_without_a_box_never_trains_the_detectors_heads(build, batch):
    model = build().train()
    unboxed = only(batch, [3, 4, 5])
    model.training_step(unboxed, 0).backward()
    assert all(p.grad is None for p in model.net.detector.heads.parameters())
    assert model.net.out.weight.grad.abs().sum() > 0


def test_the_loss_is_that_of_the_formula(build, batch):
    model = build(detected_share=0.0).eval()  # no batch statistics: two passes give the same
    torch.manual_seed(1)
    got = model.training_step(batch, 0)
    torch.manual_seed(1)
    detection, said = model.forward_train(batch)
    label = batch["label"]
    mapped = [m(f) for m, f in zip(model.maps, said.features, strict=True)]
    want = detection + F.cross_entropy(said.logits, label)
    want = want + 0.7 * branch_ce(said.branches, label)
    want = want + 0.3 * branch_kl(said.branches, said.logits, temperature=3.0)
    want = want + 0.03 * branch_hint(mapped, said.fused)
    torch.testing.assert_close(got, want)


def test_without_distillation_it_is_plain_cross_entropy(build, batch):
    torch.manual_seed(0)
    model = build(distill=False, detected_share=0.0).eval()
    assert len(model.maps) == 0
    torch.manual_seed(1)
    got = model.training_step(batch, 0)
    torch.manual_seed(1)
    detection, said = model.forward_train(batch)
    heads = (said.logits, *said.branches)
    want = detection + sum(F.cross_entropy(z, batch["label"]) for z in heads)
    torch.testing.assert_close(got, want)
    zero = build(alpha=0.0, hint=0.0, detected_share=0.0).eval()
    zero.net.load_state_dict(model.net.state_dict())
    torch.manual_seed(1)
    torch.testing.assert_close(zero.training_step(batch, 0), got)


def test_the_arms_start_from_the_same_detector_and_classifier(build):
    fused, plain = build(), build(fusion=False, distill=False, cross_fit=0)
    for name, tensor in plain.net.state_dict().items():
        assert torch.equal(tensor, fused.net.state_dict()[name]), name


def test_the_boxes_that_are_diagnosed(build, batch, monkeypatch):
    """The box in use; the best detection where there is none, or where draw and overlap say so."""
    from cohobate.medseg.tsddnet.network import Detections

    model = build(detected_share=0.5)
    near, far = batch["box"][0] + 1.0, torch.tensor([0.0, 0, 5, 5])
    batch["chance"] = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    best = torch.stack([near, far, far, far, far])  # asked: 0, 1, 3, 4, 5
    scores = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.01])
    monkeypatch.setattr(
        model.net.detector, "detect", lambda *_: Detections(best[:, None], scores[:, None])
    )
    images = batch["image"].expand(-1, 3, -1, -1)
    found = model._boxes(model.net.detector.features(images), images, batch)
    whole = torch.cat([torch.zeros(2), batch["size"][5].flip(0)])
    want = torch.stack([near, batch["box"][1], batch["box"][2], far, far, whole])
    torch.testing.assert_close(found, want)


def test_no_box_and_nothing_found_is_no_nan(build, batch):
    model = build().train()
    model.net.threshold = 1.1
    loss = model.training_step(only(batch, [3, 4, 5]), 0)
    assert loss.isfinite()
    assert build(Detect).training_step(only(batch, [3, 4, 5]), 0).item() == 0.0


# --- cross-fitting --------------------------------------------------------------------------------


def test_a_folds_classifier_does_not_train_on_its_fold(build, data, batch):
    model = build(Classify).train()
    give(model, data)
    boxed = only(batch, [0, 1, 2])
    data.train.fold[boxed["index"].numpy()] = [0, 0, 1]
    data.train.fold[:] = np.where(
        np.isin(np.arange(len(data.train)), boxed["index"]), data.train.fold, 0
    )
    seen: dict[int, int] = {}
    for fold, net in enumerate(model.fold_nets):
        net.register_forward_pre_hook(lambda _, x, fold=fold: seen.update({fold: len(x[0])}))
    boxed = {k: torch.cat([v, v]) for k, v in boxed.items()}
    terms = model.forward_train(boxed)
    assert seen == {0: 2, 1: 4}, "net 0 sees what is outside fold 0"
    terms["fold_ce"].backward()
    assert all(p.grad is None for p in model.net.parameters())


def test_no_image_is_scored_by_a_classifier_that_trained_on_it(build, data):
    model = build().eval()
    scored: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    original = model.net.crops
    sources: list[torch.Tensor] = []
    loader = iter(data.whole(data.train, 5))
    index = [b["index"] for b in loader]

    def crops(images, size, boxes, of=None):
        sources.append(of)
        return original(images, size, boxes, of)

    model.net.crops = crops
    order = iter(range(10**6))
    batches: list[int] = []
    detect = model.net.detector.detect

    def counted(*args):
        batches.append(next(order))
        return detect(*args)

    model.net.detector.detect = counted
    for fold, net in enumerate(model.fold_nets):
        net.register_forward_hook(
            lambda *_, fold=fold: scored[fold].append(index[batches[-1]][sources[-1]])
        )
    model.net.classifier.register_forward_hook(lambda *_: pytest.fail("the main C-Net scored"))
    refine(model.net, list(model.fold_nets), data, Selection(tau_det=0.0, tau_iou=0.0), 5)
    for fold, found in scored.items():
        ids = torch.cat(found).unique().numpy()
        assert len(ids)
        assert (data.train.fold[ids] == fold).all()
    everyone = torch.cat([torch.cat(f) for f in scored.values()]).unique()
    assert np.isfinite(data.drawn[everyone.numpy()]).any()


def test_without_cross_fitting_the_main_classifier_scores(build, busi):
    data = UltrasoundData(root=busi, image_size=64, cross_fit=0)
    model = build(cross_fit=0).eval()
    assert len(model.fold_nets) == 0
    audit = refine(model.net, [model.net.classifier], data, Selection())
    assert len(audit.names) == len(data.train)


# --- selection over the data, and the table -------------------------------------------------------


@pytest.fixture
def audit(build, data):
    model = build().eval()
    return refine(model.net, list(model.fold_nets), data, Selection(tau_det=0.0, tau_cls=0.3))


def test_selection_does_not_depend_on_the_batch_size(build, data, audit):
    model = build().eval()
    rule = Selection(tau_det=0.0, tau_cls=0.3)
    one = refine(model.net, list(model.fold_nets), data, rule, batch_size=1)
    assert one.decisions == audit.decisions
    np.testing.assert_allclose(one.new, audit.new, atol=1e-3)


def test_the_table_is_written_and_applied_again(audit, data, tmp_path):
    audit.write_csv(tmp_path / "audit.csv")
    boxes = read_audit(tmp_path / "audit.csv", data.train.samples)
    np.testing.assert_array_equal(boxes, audit.new)
    data.apply(boxes)
    accepted = np.array([d is Decision.ACCEPTED for d in audit.decisions])
    assert accepted.any()
    drawn = np.isfinite(data.drawn).all(1)
    np.testing.assert_array_equal(np.isfinite(data.train.boxes).all(1), drawn | accepted)
    found = quality(data)
    assert found["hidden_share"] == pytest.approx(accepted.sum() / (~drawn).sum())
    assert 0 <= found["hidden_iou"] <= found["hidden_share"]


def test_the_page_shows_every_changed_box(audit, data, tmp_path):
    audit.write_html(tmp_path / "audit.html", data.train.samples.images)
    text = (tmp_path / "audit.html").read_text()
    changed = [d in (Decision.REPLACED, Decision.ACCEPTED) for d in audit.decisions]
    assert text.count("data:image/png;base64,") == sum(changed) > 0
    assert "http" not in text, "the page needs no network"
    for name, shown in zip(audit.names, changed, strict=True):
        assert (f"<b>{name}</b>" in text) == shown
    assert audit.summary() in text


def test_bad_tables(audit, data, tmp_path):
    path = tmp_path / "audit.csv"
    audit.write_csv(path)
    good = path.read_text().splitlines()
    samples = data.train.samples

    def refuse(lines: list[str], message: str) -> None:
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(InputError, match=message):
            read_audit(path, samples)

    refuse(good[:-1], "audit.csv: has no line for training image")
    refuse([*good, good[-1].replace(good[-1].split(",")[0], "x", 1)], "x is no training image")
    refuse(["image,class", "a,b"], "no column 'old_x1': not an audit table")
    cells = good[1].split(",")
    cells[6:10] = ["5", "5", "5", "9"]
    refuse([good[0], ",".join(cells), *good[2:]], "audit.csv line 2: box 5, 5, 5, 9: has no area")
    with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
        read_audit(tmp_path / "none.csv", samples)


# --- stages and weights ---------------------------------------------------------------------------


def test_stages_join_strictly(build):
    torch.manual_seed(5)
    first, second = build(Detect), build(Fuse)
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.1)
    second.load_stage(first.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    for gone in ("net.detector.backbone.", "fold_nets.0.conv1."):
        state = {k: v for k, v in first.state_dict().items() if not k.startswith(gone)}
        with pytest.raises(InputError, match="no fitting weights for"):
            second.load_stage(state)


def test_weights_by_path(build, tmp_path, caplog):
    torch.manual_seed(9)
    import timm
    from torchvision.models import detection as tv

    build_tv = tv.fasterrcnn_mobilenet_v3_large_320_fpn
    coco = build_tv(weights=None, weights_backbone=None, num_classes=91).state_dict()
    imagenet = timm.create_model("test_resnet", num_classes=10, pretrained=False).state_dict()
    save_file(coco, tmp_path / "coco.safetensors")
    save_file(imagenet, tmp_path / "imagenet.safetensors")
    given = {
        "detector": "fasterrcnn_mobilenet_v3_large_320_fpn",
        "detector_args": None,
        "detector_weights": tmp_path / "coco.safetensors",
        "classifier_weights": tmp_path / "imagenet.safetensors",
    }
    model = build(Detect, **given)
    with caplog.at_level("INFO", logger="cohobate"):
        import logging

        logging.getLogger("cohobate").propagate = True
        model.setup("fit")
    assert "all but roi_heads.box_predictor.cls_score.weight" in caplog.text
    assert torch.equal(
        model.net.detector.heads.rpn.head.conv[0][0].weight, coco["rpn.head.conv.0.0.weight"]
    )
    for net in (model.net.classifier, *model.fold_nets):
        assert torch.equal(net.conv1[0].weight, imagenet["conv1.0.weight"])
    wrong = build(Detect, detector_weights=tmp_path / "imagenet.safetensors")
    with pytest.raises(InputError, match=r"imagenet\.safetensors: no fitting weights for"):
        wrong.setup("fit")
    with pytest.raises(InputError, match=r"none\.pth: no such checkpoint"):
        build(Detect, detector_weights=tmp_path / "none.pth").setup("fit")


def test_options_out_of_range(build):
    with pytest.raises(InputError, match="alpha"):
        build(alpha=1.5)
    with pytest.raises(InputError, match="no ONNX export"):
        build().open_axes()

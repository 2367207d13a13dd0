"""FDR and GO-LSD in mmdet's detectors, as its users meet them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")
pytest.importorskip("cohobate.detection.d_fine.mmdet")

from mmdet.apis import inference_detector, init_detector
from mmdet.models import layers
from mmdet.registry import MODELS

from cohobate.core.errors import InputError
from cohobate.detection.boxes import to_xyxy
from cohobate.detection.d_fine import Criterion, weighting
from cohobate.detection.d_fine.criterion import Outputs
from cohobate.detection.d_fine.mmdet import decoders, heads

pytestmark = pytest.mark.filterwarnings("default")  # what mmdet warns of is its own affair
DINO, DEFORMABLE, DAB = "dino_r50_12e_coco", "deformable_detr_r50_50e_coco", "dab_detr_r50_50e_coco"
WEIGHTS = {"bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}


def total(losses: dict[str, Any]) -> torch.Tensor:
    return sum(losses.values(), torch.zeros(()))


def test_trains_predicts_and_resumes(
    name: str, runner: Callable[..., Any], coco: Path, tmp_path: Path
) -> None:
    first = runner(name, epochs=1)
    before = {key: value.clone() for key, value in first.model.state_dict().items()}
    first.train()
    assert first.iter == 2
    changed = [k for k, v in first.model.state_dict().items() if not torch.equal(v, before[k])]
    assert any("reg_branches.0" in key for key in changed)
    checkpoint = tmp_path / "run" / "epoch_1.pth"
    again = runner(name, epochs=1, resume=True)
    again.load_or_resume()
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[key]), key
    more = runner(name, epochs=2, resume=True)
    more.train()
    assert more.iter == 4
    state = more.optim_wrapper.state_dict()["state"]
    assert {int(entry["step"]) for entry in state.values()} == {4}
    model = init_detector(more.cfg, str(checkpoint), device="cpu")
    found = inference_detector(model, str(coco / "val2017" / "1.png")).pred_instances
    assert found.bboxes.shape == (20, 4)
    assert found.scores.diff().max() <= 0
    assert found.bboxes[:, 2].max() <= 80


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_any_number_of_objects(
    name: str, counts: tuple[int, int], detector: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    model = detector(name).train()
    losses = model.loss(*batch(*counts))
    loss = total(losses)
    loss.backward()
    assert loss.isfinite()
    for key, value in model.named_parameters():
        if value.grad is not None:
            assert value.grad.isfinite().all(), key
    trained = (*model.bbox_head.reg_branches, model.bbox_head.pre_branch)
    assert all(p.grad is not None for branch in trained for p in branch.parameters())


def test_half_precision_leaves_the_losses_in_float32(
    name: str, detector: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    model = detector(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(*batch(3, 1))
    assert total(losses).isfinite()
    boxes = [v for k, v in losses.items() if "loss_cls" not in k and "enc" not in k]
    assert {value.dtype for value in boxes} == {torch.float32}


def test_two_stages_of_deformable_detr(
    config: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    cfg = config(DEFORMABLE)
    cfg.model.as_two_stage = True
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    losses = model.loss(*batch(3, 1))
    assert {"enc_loss_cls", "enc_loss_bbox", "enc_loss_iou"} <= set(losses)
    total(losses).backward()
    assert model.bbox_head.reg_branches[-1][-1].out_features == 4
    assert len(model.eval().predict(*batch(1, 1))) == 2


def test_distributions_need_refinement(config: Callable[..., Any]) -> None:
    cfg = config(DEFORMABLE)
    cfg.model.with_box_refine = False
    with pytest.raises(InputError, match="with_box_refine"):
        MODELS.build(cfg.model)


# --- the decoders ---------------------------------------------------------------------------------


def branch(numbers: int) -> nn.Linear:
    layer = nn.Linear(256, numbers)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def head(count: int) -> Any:
    return SimpleNamespace(
        pre_branch=branch(4),
        reg_branches=[branch(132) for _ in range(count)],
        bins=weighting(32),
        reg_scale=4.0,
    )


def decoder_inputs(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    queries, tokens = torch.randn(2, 5, 256), torch.randn(2, 26, 256)
    boxes = torch.rand(2, 5, 4) * 0.4 + 0.2
    if name == DAB:
        pos = torch.randn(2, 26, 256)
        return {"query": queries, "key": tokens, "query_pos": boxes.logit(), "key_pos": pos,
                "key_padding_mask": torch.zeros(2, 26, dtype=torch.bool)}  # fmt: skip
    inputs = {
        "query": queries,
        "value": tokens,
        "key_padding_mask": None,
        "reference_points": boxes,
        "spatial_shapes": torch.tensor([[4, 5], [2, 3]]),
        "level_start_index": torch.tensor([0, 20]),
        "valid_ratios": torch.tensor([[[1.0, 1.0], [0.9, 0.8]], [[0.7, 1.0], [1.0, 1.0]]]),
    }
    extra = {"self_attn_mask": None} if name == DINO else {"query_pos": torch.randn(2, 5, 256)}
    return {**inputs, **extra}


def test_a_decoder_without_refinement_is_mmdets(name: str, config: Callable[..., Any]) -> None:
    parents = {
        DINO: (layers.DinoTransformerDecoder, decoders.FDRDinoTransformerDecoder),
        DAB: (layers.DABDetrTransformerDecoder, decoders.FDRDABDetrTransformerDecoder),
        DEFORMABLE: (
            layers.DeformableDetrTransformerDecoder,
            decoders.FDRDeformableDetrTransformerDecoder,
        ),
    }
    settings = config(name).model.decoder
    if name != DAB:
        settings.layer_cfg.cross_attn_cfg.num_levels = 2
    parent, own = (kind(**settings).eval() for kind in parents[name])
    own.load_state_dict(parent.state_dict())
    inputs = decoder_inputs(name)
    flat = branch(4) if name == DAB else nn.ModuleList(branch(4) for _ in range(3))
    with torch.no_grad():
        true, _ = parent(**inputs, reg_branches=flat)
        found, refined = own(**inputs, head=head(3))
    torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3)
    place = inputs["query_pos"].sigmoid() if name == DAB else inputs["reference_points"]
    torch.testing.assert_close(refined.boxes, place.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)
    assert refined.edges.shape == (3, 2, 5, 4, 33)


# --- the losses -----------------------------------------------------------------------------------


def refined(leading: tuple[int, ...]) -> heads.Refined:
    torch.manual_seed(1)
    boxes = torch.rand(*leading, 4) * 0.4 + 0.2
    return heads.Refined(boxes, torch.randn(*leading, 4, 33), boxes[0] + 0.02)


def test_the_losses_are_the_criterions(
    detector: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    """Boxes, edges and the union equal D-FINE's own criterion with mmdet's assigner's costs."""
    model = detector(DINO).train()
    _, samples = batch(3, 1)
    noise, queries = 24, 20
    states = torch.randn(3, 2, noise + queries, 256)
    given = refined((3, 2, noise + queries))
    chosen = torch.randn(2, queries, 3), torch.rand(2, queries, 4) * 0.4 + 0.2
    meta = {"num_denoising_queries": noise, "num_denoising_groups": 4}
    found = model.bbox_head.loss(states, given, samples, *chosen, dn_meta=meta)

    logits, _ = model.bbox_head(states, given)
    sizes = heads._sizes(samples, states)
    targets = heads._targets(samples, sizes)
    corners = to_xyxy(targets.boxes[0]) * sizes[0]
    torch.testing.assert_close(corners, samples[0].gt_instances.bboxes)
    first, initial = logits[:1], given.initial[None]
    main = Outputs(
        torch.cat([torch.cat([logits, first])[:, :, noise:], chosen[0][None]]),
        torch.cat([torch.cat([given.boxes, initial])[:, :, noise:], chosen[1][None]]),
        given.edges[:, :, noise:],
        given.initial[:, noise:],
        ("pre", "enc"),
    )
    dn = Outputs(
        torch.cat([logits, first])[:, :, :noise],
        torch.cat([given.boxes, initial])[:, :, :noise],
        given.edges[:, :, :noise],
        given.initial[:, :noise],
        ("pre",),
    )
    criterion = Criterion()
    matched = criterion.match(main, targets, (dn, heads._denoised(targets, noise, 4), 4))
    terms = criterion.task(matched, targets) | criterion.distill(matched)
    names = {"": "", "aux_0": "d0.", "aux_1": "d1.", "pre": "pre_", "enc": "enc_",
             "dn_0": "d0.dn_", "dn_1": "d1.dn_", "dn_2": "dn_", "dn_pre": "pre_dn_"}  # fmt: skip
    compared = 0
    for kind, weight in WEIGHTS.items():
        for theirs, ours in names.items():
            term = f"{kind}_{theirs}".rstrip("_")
            key = f"{ours}loss_{kind}".replace("giou", "iou")
            if (kind, theirs) == ("ddf", "dn_2"):
                continue
            assert (term in terms) == (key in found), key
            if key in found:
                torch.testing.assert_close(found[key], weight * terms[term], rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared == 2 * 9 + 6 + 4


def test_denoising_queries_know_their_objects(
    detector: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    model = detector(DINO)
    _, samples = batch(3, 1)
    meta = model.dn_query_generator(samples)[3]
    queries, groups = meta["num_denoising_queries"], meta["num_denoising_groups"]
    targets = heads._targets(samples, heads._sizes(samples, torch.zeros(())))
    found = heads._denoised(targets, queries, groups)
    for n, sample in enumerate(samples):
        labels = model.bbox_head._get_dn_targets_single(sample.gt_instances, sample.metainfo, meta)[
            0
        ]
        own = torch.where(found[n] >= 0, targets.labels[n][found[n].clamp(min=0)], 3)
        assert torch.equal(own, labels)


def test_without_distillation_each_output_has_its_own_match(
    detector: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    model = detector(DAB, loss_ddf=None).train()
    losses = model.loss(*batch(3, 1))
    assert not [key for key in losses if "ddf" in key]
    assert [key for key in losses if "fgl" in key]
    assert model.bbox_head.criterion.distillation == "none"


def test_settings_of_the_distributions_reach_all_parts(detector: Callable[..., Any]) -> None:
    model = detector(DAB, reg_max=16, up=0.25, reg_scale=8.0)
    box = model.bbox_head
    assert torch.equal(box.bins, weighting(16, 0.25, 8.0))
    assert (box.loss_fgl.criterion.up, box.loss_fgl.criterion.reg_scale) == (0.25, 8.0)
    assert box.reg_branches[0][-1].out_features == 4 * 17
    assert len(box.reg_branches) == 3


def test_quality_focal_loss_learns_the_overlap(
    detector: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    quality = {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0}
    model = detector(DINO, loss_cls=quality).train()
    losses = model.loss(*batch(3, 1))
    assert losses["loss_cls"] > 0
    total(losses).backward()

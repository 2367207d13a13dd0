from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from transformers import DFineForObjectDetection

from cohobate.core.errors import InputError
from cohobate.detection.boxes import pad_targets
from cohobate.detection.d_fine.checkpoint import (
    from_official,
    load_weights_into,
    official_name,
    save_hub,
    save_official,
    to_official,
)
from cohobate.detection.d_fine.criterion import Criterion
from cohobate.detection.d_fine.denoising import Denoising
from cohobate.detection.d_fine.losses import expected_offsets
from cohobate.detection.d_fine.network import DFineNet, StemPool, best, deploy
from cohobate.detection.d_fine.sizes import config_of

WEIGHTS = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}
ANY_KEYS = ("anchors", "valid_mask", "num_points_scale", "num_batches_tracked", "up", "reg_scale")


def by_recipe(name, shape):
    """The weights that the recorded networks had."""
    n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif name.endswith("running_mean"):
        n = 0.1 * n
    elif name.endswith("scale"):
        n = 1 + 0.05 * n
    elif len(shape) == 1:
        n = 1 + 0.1 * n if name.endswith("weight") else 0.1 * n
    else:
        n = n / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(n)).float()


def made_of(network, keys):
    """Fill a network with the recipe's weights by the official names."""
    own = to_official(network)
    left = {k: own[k] for k in keys if k.rpartition(".")[2] in ANY_KEYS and k in own}
    drawn = {k: by_recipe(k, tuple(own[k].shape)) for k in own if k not in left}
    weights = from_official({**drawn, **left})
    network.model.load_state_dict(weights, strict=True)
    return network


@pytest.fixture(scope="module")
def nano():
    return DFineNet(config_of("n", 80)).eval()


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return DFineNet(config_of("tiny", 3, num_queries=20), top=30).eval()


def test_every_official_key_is_taken_and_given_back(recorded, nano):
    record = recorded("full_n_256x256")
    shapes = {
        str(k): tuple(int(n) for n in str(s).split(",") if n)
        for k, s in zip(record["keys"], record["shapes"], strict=True)
    }
    shapes = {k: v for k, v in shapes.items() if k.split(".")[1] not in ("anchors", "valid_mask")}
    given = {k: tuple(v.shape) for k, v in to_official(nano).items()}
    assert given == shapes
    taken = from_official(to_official(nano))
    own = nano.model.state_dict()
    assert set(taken) == set(own)
    assert all(torch.equal(taken[k], v) for k, v in own.items())


def test_the_whole_network_gives_the_official_outputs(recorded, nano):
    record = recorded("full_n_256x256")
    network = made_of(nano, [str(k) for k in record["keys"]]).double()
    size = int(record["height"]), int(record["width"])
    image = np.random.default_rng(int(record["seed"])).random((1, 3, *size)).astype(np.float32)
    with torch.no_grad():
        logits, boxes = network.predict(torch.from_numpy(image).double())
    torch.testing.assert_close(logits, record["pred_logits"].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(boxes, record["pred_boxes"].double(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # transformers' own forward agrees
        inner = network.model(torch.from_numpy(image).double())
    torch.testing.assert_close(inner.intermediate_logits[:, -1], logits, rtol=1e-9, atol=1e-9)
    nano.float()


def test_modules_of_the_official_code(cases):
    from transformers.models.d_fine import modeling_d_fine as hf

    for case in cases("modules"):
        width, points = case["x1"].shape[-1], case["num_points"].tolist()
        config = config_of("tiny", 3)
        config.d_model, config.decoder_n_points = width, points
        config.decoder_attention_heads, config.num_feature_levels = int(case["heads"]), len(points)
        config.max_num_bins = int(case["reg_max"])
        modules = {
            "lqe": hf.DFineLQE(config),
            "gate": hf.DFineGate(width),
            "attn": hf.DFineMultiscaleDeformableAttention(config),
        }
        for name, module in modules.items():
            prefix = f"w_{name}."
            weights = {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}
            module.load_state_dict(weights)
        shapes = case["spatial_shapes"]
        found = {
            "lqe": modules["lqe"](case["scores"], case["corners"]),
            "gate": modules["gate"](case["x1"], case["x2"]),
            "attn": modules["attn"](
                case["x1"],
                reference_points=case["ref"][:, :, None],
                encoder_hidden_states=case["memory"],
                spatial_shapes=shapes,
                spatial_shapes_list=[tuple(s) for s in shapes.tolist()],
            )[0],
        }
        for name, value in found.items():
            torch.testing.assert_close(value, case[f"{name}_out"], rtol=1e-5, atol=1e-6)


def test_a_training_pass_gives_the_official_losses_and_gradients(recorded):
    record = recorded("train_n_0")
    queries, classes = int(record["num_queries"]), int(record["num_classes"])
    network = DFineNet(config_of("n", classes, num_queries=queries))
    made_of(network, list(to_official(network))).train()
    counts = record["tgt_counts"].tolist()
    targets = pad_targets(record["tgt_labels"].split(counts), record["tgt_boxes"].split(counts))
    seed, size = int(record["seed"]), int(record["height"])
    images = np.random.default_rng(seed).random((len(counts), 3, size, size)).astype(np.float32)
    torch.manual_seed(seed)
    criterion = Criterion()
    outputs, noised = network.outputs(
        torch.from_numpy(images), targets, Denoising(int(record["num_denoising"]))
    )
    matched = criterion.match(outputs, targets, noised)
    terms = {**criterion.task(matched, targets), **criterion.distill(matched)}
    found = {f"out_loss_{k}": v * WEIGHTS[k.partition("_")[0]] for k, v in terms.items()}
    wanted = {k: v for k, v in record.items() if k.startswith("out_loss_")}
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)
    torch.stack(list(found.values())).sum().backward()
    norms = {}
    for name, parameter in network.model.named_parameters():
        if parameter.grad is not None:
            norms.setdefault(official_name(name), []).append(parameter.grad.norm() ** 2)
    checked = 0
    for name, norm in zip(record["grad_names"], record["grad_norms"], strict=True):
        if norm > 1e-3:
            own = torch.stack(norms[str(name)]).sum().sqrt()
            torch.testing.assert_close(own, norm.to(own.dtype), rtol=0.05, atol=1e-4, msg=str(name))
            checked += 1
    assert checked > 100
    for name in record["no_grad_names"]:
        assert all(n == 0 for n in norms.get(str(name), [])), name


def test_postprocessing_of_the_official_code(cases):
    for case in cases("postprocess"):
        found = best(case["pred_logits"], case["pred_boxes"], case["orig_wh"], int(case["top_k"]))
        assert torch.equal(found.labels, case["labels"].long())
        torch.testing.assert_close(found.scores, case["scores"])
        torch.testing.assert_close(found.boxes, case["boxes_xyxy"])


LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in "mlx"]


@pytest.mark.parametrize("size", ["n", "s", *LARGE])
def test_names_and_shapes_are_those_of_the_official_code(recorded, size):
    shapes = {
        name: tuple(value.shape)
        for name, value in to_official(DFineNet(config_of(size, 80))).items()
        if not name.endswith("num_batches_tracked")  # L and X have none: their norms are frozen
    }
    lines = [f"{name}:{','.join(map(str, shape))}" for name, shape in sorted(shapes.items())]
    found = {"tensors": len(lines), "crc32": zlib.crc32("\n".join(lines).encode())}
    assert found == recorded("state_dicts")[size]


@pytest.mark.parametrize(
    ("size", "training", "deployed"),
    [("n", 3.783, 3.754), ("s", 10.322, 10.237)],
)
def test_parameter_counts_of_the_paper(size, training, deployed):
    counts(size, training, deployed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "training", "deployed"),
    [("m", 19.590, 19.248), ("l", 31.244, 30.724), ("x", 62.622, 61.602)],
)
def test_parameter_counts_of_the_large_sizes(size, training, deployed):
    counts(size, training, deployed)


def counts(size, training, deployed):
    network = DFineNet(config_of(size, 80))

    def millions(net, more=0):
        return round((sum(p.numel() for p in net.parameters()) + more) / 1e6, 3)

    assert millions(network) == training
    # the official deployed form still holds the embedding that only denoising uses
    embedding = network.model.denoising_class_embed.weight.numel()
    assert millions(deploy(network, backbone=False), embedding) == deployed
    kinds = {type(module).__name__ for module in deploy(network).modules()}
    assert not any("Norm2d" in kind for kind in kinds)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_deployed_network_gives_the_same_detections(frozen):
    torch.manual_seed(1)
    config = config_of("tiny", 3, num_queries=20)
    config.freeze_backbone_batch_norms = frozen  # as L and X
    tiny = DFineNet(config, top=30).eval()
    assert any("Frozen" in type(module).__name__ for module in tiny.modules()) == frozen
    for module in tiny.modules():  # statistics that fusing must respect
        if "Norm2d" in type(module).__name__:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    for parameter in tiny.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    tiny.double()
    images, sizes = torch.rand(2, 3, 64, 64).double(), torch.tensor([[64.0, 64.0], [128.0, 64.0]])
    slim = deploy(tiny)
    with torch.no_grad():
        for one, other in zip(tiny(images, sizes), slim(images, sizes), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    kept = [name for name, _ in slim.named_parameters()]
    assert not any("class_embed.0" in name or "lqe_layers.0" in name for name in kept)
    assert not any("denoising" in name for name in kept)
    assert not any("Norm2d" in type(module).__name__ for module in slim.modules())


def test_an_official_file_loads_and_comes_back(tmp_path, tiny):
    file = save_official(tiny, tmp_path / "dfine.pth")
    other = DFineNet(config_of("tiny", 3, num_queries=20), top=30).eval()
    assert load_weights_into(other, file) == []
    images, sizes = torch.rand(1, 3, 64, 64), torch.tensor([[64.0, 64.0]])
    with torch.no_grad():
        for one, two in zip(tiny(images, sizes), other(images, sizes), strict=True):
            assert torch.equal(one, two)


def test_a_hub_folder_is_read_by_transformers_and_by_us(tmp_path, tiny):
    save_hub(tiny, tmp_path, {0: "a", 1: "b", 2: "c"})
    theirs = DFineForObjectDetection.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        logits, boxes = tiny.predict(images)
        out = theirs(images)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.pred_boxes, boxes, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    other = DFineNet(config_of("tiny", 3, num_queries=20)).eval()
    assert load_weights_into(other, tmp_path / "theirs") == []
    torch.testing.assert_close(other.predict(images)[0], logits, rtol=1e-4, atol=1e-5)


def test_other_classes_keep_what_fits(tmp_path, tiny):
    file = save_official(tiny, tmp_path / "dfine.pth")
    other = DFineNet(config_of("tiny", 5, num_queries=20))
    with pytest.raises(InputError, match=r"has shape \(3.*needs \(5|has shape \(4.*needs \(6"):
        load_weights_into(other, file)
    left = load_weights_into(other, file, strict=False)
    assert {name.split(".")[0] for name in left} == {
        "decoder", "enc_score_head", "denoising_class_embed"
    }  # fmt: skip
    assert all("class_embed" in name or "enc_score" in name for name in left)


def test_class_heads_between_objects365_and_coco_keep_the_common_classes(tmp_path):
    from cohobate.detection.d_fine.checkpoint import _COCO_IN_OBJECTS365

    assert len(set(_COCO_IN_OBJECTS365)) == 80
    wide, narrow = (DFineNet(config_of("tiny", count, num_queries=10)) for count in (366, 80))
    for network in (wide, narrow):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
    fresh = narrow.model.denoising_class_embed.weight.clone()
    other = wide.model.decoder.class_embed[1].bias.clone()
    left = load_weights_into(narrow, save_official(wide, tmp_path / "o.pth"), strict=False)
    assert left == ["denoising_class_embed.weight"]
    assert torch.equal(narrow.model.denoising_class_embed.weight, fresh)
    # person, bicycle and toothbrush are the ids 1, 47 and 227 of Objects365
    for own, index in ((0, 1), (1, 47), (79, 227)):
        for head in ("enc_score_head", "decoder.class_embed.1"):
            one, two = (n.model.get_submodule(head) for n in (narrow, wide))
            assert torch.equal(one.weight[own], two.weight[index])
            assert one.bias[own] == two.bias[index]
    narrow.model.decoder.class_embed[1].bias.data.add_(1)
    load_weights_into(wide, save_official(narrow, tmp_path / "c.pth"), strict=False)
    back = wide.model.decoder.class_embed[1].bias
    assert back[47] == narrow.model.decoder.class_embed[1].bias[1]
    assert back[3] == narrow.model.decoder.class_embed[1].bias[56]  # chair
    rest = [0, 2, 4, 5]  # of no class of COCO
    assert torch.equal(back[rest], other[rest])


def test_a_file_of_another_size_is_refused(tmp_path, tiny):
    file = save_official(tiny, tmp_path / "dfine.pth")
    with pytest.raises(InputError, match="another size"):
        load_weights_into(DFineNet(config_of("n", 3)), file, strict=False)
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds no D-FINE weights"):
        load_weights_into(tiny, tmp_path / "other.pth")


def test_fresh_weights_start_as_the_official_code_does(tiny):
    model, decoder = tiny.model, tiny.model.decoder
    for head in (*decoder.bbox_embed, decoder.pre_bbox_head, model.enc_bbox_head):
        assert not head.layers[-1].weight.any()
    prior = torch.tensor(0.01).logit()
    assert all(torch.allclose(head.bias, prior) for head in decoder.class_embed)
    assert not model.denoising_class_embed.weight[-1].any()
    assert model.denoising_class_embed.weight[:-1].std() > 0.5
    assert 0.02 < decoder.layers[0].self_attn.q_proj.weight.std() < 0.3
    images = torch.rand(1, 3, 64, 64)
    outputs, _ = tiny.outputs(images)
    # all edges' distributions are flat, so every layer keeps the initial box
    assert not outputs.edges.any()
    for layer in range(3):
        torch.testing.assert_close(outputs.boxes[layer], outputs.boxes[3], atol=1e-6, rtol=0)


def test_gradients_reach_the_earlier_layers_through_the_residual_logits(tiny):
    outputs, _ = tiny.train().outputs(torch.rand(2, 3, 64, 64))
    outputs.boxes[2].sum().backward()
    for head in tiny.model.decoder.bbox_embed:
        assert head.layers[-1].bias.grad.abs().sum() > 0
    assert tiny.model.decoder.pre_bbox_head.layers[-1].bias.grad is None or (
        not tiny.model.decoder.pre_bbox_head.layers[-1].bias.grad.any()  # b⁰ is detached
    )


def test_the_pool_of_the_stem_is_torchs_own():
    torch.manual_seed(0)
    given = torch.randn(2, 3, 9, 8).relu_()
    wanted = torch.nn.functional.max_pool2d(given, 2, 1)
    assert torch.equal(StemPool()(given), wanted)
    one, two = given.clone().requires_grad_(), given.clone().requires_grad_()
    torch.nn.functional.max_pool2d(one, 2, 1).square().sum().backward()
    found = StemPool()(two)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    assert torch.equal(two.grad, one.grad)


def test_plain_regression_has_no_distributions():
    net = DFineNet(config_of("tiny", 3, num_queries=20), regression="plain")
    outputs, _ = net.train().outputs(torch.rand(2, 3, 64, 64))
    assert outputs.edges is None
    assert outputs.others == ("enc_0",)
    outputs.boxes[2].sum().backward()
    heads = [h.layers[-1].bias.grad for h in net.model.decoder.bbox_embed]
    assert heads[0] is None or not heads[0].any()  # one layer back and no further
    assert heads[1].abs().sum() > 0
    assert heads[2].abs().sum() > 0


def test_matching_queries_do_not_see_the_denoising_ones(tiny):
    tiny.train()
    for module in tiny.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = torch.rand(2, 3, 64, 64)
    targets = pad_targets(
        [torch.tensor([0, 1]), torch.tensor([2])], [torch.rand(2, 4), torch.rand(1, 4)]
    )
    with torch.no_grad():
        alone, none = tiny.outputs(images)
        beside, noised = tiny.outputs(images, targets, Denoising())
    assert none is None
    torch.testing.assert_close(alone.logits, beside.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.boxes, beside.boxes, rtol=1e-4, atol=1e-5)
    part, match, groups = noised
    assert part.logits.shape[2] == match.shape[1] == groups * 4 == 200


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_other_shapes_than_squares(tiny, shape):
    logits, boxes = tiny.predict(torch.rand(1, 3, *shape))
    assert logits.shape == (1, 20, 3)
    assert boxes.isfinite().all()


def test_expected_offsets_match_the_integral_of_transformers(tiny):
    torch.manual_seed(0)
    edges = torch.randn(2, 5, 4, 33)
    weights = tiny._weights()
    found = tiny.model.decoder.integral(edges.flatten(-2), weights)
    torch.testing.assert_close(expected_offsets(edges, weights), found)

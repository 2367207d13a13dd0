from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cohobate.core.errors import InputError
from cohobate.medseg.esp_medsam import (
    MODALITIES,
    Controller,
    DecoderSize,
    MaskDecoder,
    OneModality,
    PatchPrompt,
    SAMEncoder,
    TinyViTEncoder,
    ViTSize,
    load_mobile_sam,
    load_official,
    mask_loss,
    save_official,
)
from cohobate.medseg.esp_medsam.encoder import ControlledAttention, ControlledBlock
from cohobate.medseg.esp_medsam.official import UNUSED, official_name, our_name


def weights(g, prefix="w_"):
    return {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}


# --- against the official code -----------------------------------------------------------------


def test_attention_with_a_prompt_token(recorded):
    g = recorded("modality_attention")
    dim, heads, window = g["x"].shape[-1], int(g["num_heads"]), int(g["window"])
    attention = ControlledAttention(dim, dim // heads, heads, 1, (window, window)).eval()
    assert torch.equal(attention.attention_bias_idxs, g["bias_index"])
    controller = Controller(dim, heads)
    given = weights(g)
    token, bias = given.pop("deep_QKV_embeddings_med"), given.pop("med_attention_biases")
    controller.load_state_dict({"token": token, "bias": bias}, strict=False)
    attention.load_state_dict(given)
    x = g["x"].requires_grad_()
    y = attention(x, controller)
    torch.testing.assert_close(y, g["y"], atol=1e-5, rtol=0)
    (y * g["cotangent"]).sum().backward()
    torch.testing.assert_close(controller.token.grad, g["grad_prompt"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(controller.bias.grad, g["grad_prompt_bias"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, g["grad_x"], atol=1e-5, rtol=1e-5)


def test_block_with_a_parallel_expert(recorded):
    g = recorded("modality_block")
    dim, heads = g["x"].shape[-1], int(g["num_heads"])
    block = ControlledBlock(dim, heads, int(g["window"])).eval()
    controller = Controller(dim, heads)
    given = {k.replace("local_conv.c.", "local_conv.conv."): v for k, v in weights(g).items()}
    given |= weights(g, "b_")
    own = {
        "token": given.pop("attn.deep_QKV_embeddings_med"),
        "bias": given.pop("attn.med_attention_biases"),
    }
    for name in [n for n in given if n.startswith("med_dah.")]:
        own[name.replace("med_dah.", "expert.")] = given.pop(name)
    controller.load_state_dict(own)
    given["local_conv.bn.num_batches_tracked"] = torch.tensor(0)
    block.load_state_dict(given)
    batch, (height, width) = len(g["x"]), g["hw"].tolist()
    y = block(g["x"].view(batch, height, width, dim), controller)
    torch.testing.assert_close(y.reshape(g["y"].shape), g["y"], atol=1e-5, rtol=0)


def test_patch_prompt(recorded):
    g = recorded("sppg")
    width, hidden = g["embedding"].shape[1], len(g["pd_0.bias"])
    prompter = PatchPrompt(width, hidden)
    prompter.patches.load_state_dict(weights(g, "pd_"))
    prompter.prompt.load_state_dict(weights(g, "dp_"))
    embedding = g["embedding"].requires_grad_()
    logits, prompt = prompter(embedding)
    torch.testing.assert_close(logits, g["patch_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(prompt, g["prompt_embedding"], atol=1e-5, rtol=0)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, g["patch_target"])
    (gradient,) = torch.autograd.grad(loss, embedding)
    torch.testing.assert_close(gradient, g["grad_embedding"], atol=1e-5, rtol=1e-5)


def qdmd(g):
    width, slots = g["src"].shape[1], [f"m{i}" for i in range(6)]
    given = weights(g)
    mlp = len(given["transformer.layers.0.mlp.lin1.bias"])
    decoder = MaskDecoder(slots, None, width, DecoderSize(int(g["num_heads"]), mlp))
    state = {"fourier": g["pe_gaussian"], "queries": g["queries"]}
    for name, tensor in given.items():
        ours = our_name(f"mask_decoder.{name}", "@").removeprefix("decoder.")
        names = [ours.replace("@", slot) for slot in slots] if "@" in ours else [ours]
        state |= dict.fromkeys(names, tensor)
    decoder.load_state_dict(state)
    return decoder.eval(), slots


def test_decoder(recorded):
    g = recorded("qdmd")
    decoder, slots = qdmd(g)
    torch.testing.assert_close(decoder.positions(8, 8), g["pos"], atol=1e-5, rtol=0)
    masks = torch.cat([decoder(g["src"], slot) for slot in slots], 1)
    torch.testing.assert_close(masks, g["masks_all"], atol=1e-5, rtol=0)
    chosen = decoder(g["src"], slots[int(g["modality"])])
    torch.testing.assert_close(chosen, g["mask_selected"], atol=1e-5, rtol=0)
    one_by_one = torch.cat([decoder(image[None], slots[0]) for image in g["src"]])
    torch.testing.assert_close(masks[:, :1], one_by_one, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def official(official_state, tmp_path_factory):
    """The released layout read from a file: network, unused tensors, file."""
    file = tmp_path_factory.mktemp("official") / "released.pth"
    torch.save(official_state, file)
    return *load_official(file, "ultrasound"), file


def test_whole_network_at_1024(recorded, official):
    g = recorded("full_network")
    network = official[0]
    x = np.random.RandomState(int(g["x_seed"])).standard_normal((1, 3, 1024, 1024))
    image = torch.from_numpy(x.astype(np.float32))
    torch.testing.assert_close(image.flatten()[:8], g["x_first8"])
    assert MODALITIES[int(g["modality"])] == "ultrasound"
    with torch.no_grad():
        out = network(image, "ultrasound")
    assert out.masks.shape == (1, 1, 1024, 1024)
    for found, name in (
        (out.masks[..., ::16, ::16], "mask_logits_s16"),
        (out.patches, "patch_logits"),
        (out.embedding[:, ::4, ::4, ::4], "embedding_s4"),
    ):
        torch.testing.assert_close(found, g[name], atol=2e-3, rtol=0)


def test_parameters_are_those_of_the_paper(recorded, official):
    network, unused, _ = official
    live = sum(p.numel() for p in network.parameters())
    assert live + sum(t.numel() for t in unused.values()) == int(
        recorded("full_network")["n_params"]
    )
    assert int(recorded("full_network")["n_params"]) == 12_789_587
    controllers = network.encoder.controllers["ultrasound"]
    assert sum(p.numel() for p in controllers.parameters()) == 3_144_202
    tokens = [p.numel() for n, p in controllers.named_parameters() if n.endswith("token")]
    assert sum(tokens) == 1_856


def test_official_names_round_trip(official, official_state, tmp_path):
    network, unused, _ = official
    save_official(network, "ultrasound", tmp_path / "again.pth", unused)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert set(again) == set(official_state)
    assert all(torch.equal(again[name], tensor) for name, tensor in official_state.items())
    save_official(network, "ultrasound", tmp_path / "own.pth")
    own = torch.load(tmp_path / "own.pth", weights_only=True)
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in official_state.items()}
    assert all(own[name].abs().sum() == 0 for name in UNUSED)


def test_names_are_one_to_one(official_state):
    for name in official_state:
        if name not in UNUSED:
            ours = our_name(name, "xray")
            assert ours != name
            assert official_name(ours, "xray") == name


def test_a_wrong_checkpoint_is_named(official_state, tmp_path):
    file = tmp_path / "bad.pth"
    torch.save({k: v for k, v in official_state.items() if k != "mask_query.weight"}, file)
    with pytest.raises(InputError, match=r"bad\.pth: no weights for decoder\.queries"):
        load_official(file, "fundus")
    torch.save({**official_state, "extra": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"bad\.pth: extra is not in Network"):
        load_official(file, "fundus")
    torch.save({**official_state, "mask_query.weight": torch.zeros(3, 256)}, file)
    with pytest.raises(InputError, match="has shape"):
        load_official(file, "fundus")
    file.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"bad\.pth"):
        load_official(file, "fundus")
    with pytest.raises(InputError, match="released ones"):
        load_official(file, "mri")


def test_a_network_without_the_official_queries_has_no_official_layout(small_network, tmp_path):
    with pytest.raises(InputError, match="the official layout needs"):
        save_official(small_network("ultrasound"), "ultrasound", tmp_path / "x.pth")
    with pytest.raises(InputError, match="the layout has"):
        save_official(small_network("mri"), "mri", tmp_path / "x.pth")


def test_mobile_sams_weights_give_timms_tinyvit_with_the_neck(official_state, tmp_path):
    """Strided otherwise, timm's network and a plain neck give the embedding of the shared part."""
    shared = {
        name.replace("SemiTViT.", "image_encoder."): tensor
        for name, tensor in official_state.items()
        if name.startswith("SemiTViT.") and "med" not in name
    }
    torch.save(shared, tmp_path / "mobile_sam.pt")
    encoder = TinyViTEncoder(["xray"])
    load_mobile_sam(encoder, tmp_path / "mobile_sam.pt")
    plain = timm.create_model("tiny_vit_5m_224", num_classes=0).eval()
    plain.stages[3].downsample.conv2.conv.stride = (1, 1)
    ours = {k.removeprefix("vit."): v for k, v in encoder.state_dict().items() if "vit." in k[:4]}
    missing, unexpected = plain.load_state_dict(ours, strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
    image = torch.randn(1, 3, 256, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder.neck(plain.forward_features(image))
        found = encoder.eval()(image)
    assert found.shape == (1, 256, 16, 14)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


# --- what the controller may do -----------------------------------------------------------------


def test_without_token_and_expert_the_encoder_is_the_shared_one(small_network):
    encoder = small_network("a").encoder
    image = torch.randn(2, 3, 64, 96)
    shared = encoder(image)
    assert not torch.allclose(encoder(image, "a"), shared, atol=1e-3)
    for controller in encoder.controllers["a"]:
        nn.init.zeros_(controller.expert.fc2.weight)
        nn.init.zeros_(controller.expert.fc2.bias)
        nn.init.constant_(controller.bias, float("-inf"))
    torch.testing.assert_close(encoder(image, "a"), shared)


def test_a_separate_value_token_is_used(small_network):
    torch.manual_seed(0)
    encoder = small_network("a", separate_kv=True).encoder
    image = torch.randn(1, 3, 64, 64)
    before = encoder(image, "a")
    with torch.no_grad():
        for controller in encoder.controllers["a"]:
            controller.value_token += 1
    assert not torch.allclose(encoder(image, "a"), before, atol=1e-4)


def test_changed_weights_count_in_eval_mode(small_network):
    encoder = small_network("a").encoder
    image = torch.randn(1, 3, 64, 64)
    before = encoder(image)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.randn_like(parameter)
    assert not torch.allclose(encoder(image), before, atol=1e-4)


def test_an_added_modality_leaves_the_others_bit_identical(small_network):
    network = small_network("a", "b")
    image = torch.randn(2, 3, 64, 64)
    before = [network(image, name) for name in "ab"]
    network.encoder.add("c")
    network.decoder.add("c")
    network.eval()
    for old, name in zip(before, "ab", strict=True):
        assert all(torch.equal(x, y) for x, y in zip(old, network(image, name), strict=True))
    assert network.modalities == ["a", "b", "c"]
    assert not torch.equal(network(image, "c").masks, before[0].masks)
    assert len(network.own_parts("c")) == 3


# --- the network ---------------------------------------------------------------------------------


def test_the_mask_loss_does_not_reach_the_patches(small_network):
    network = small_network("a")
    out = network(torch.randn(2, 3, 64, 64), "a")
    mask_loss(out.masks, torch.ones_like(out.masks)).backward()
    assert all(p.grad is None for p in network.prompter.patches.parameters())
    assert any(p.grad is not None and p.grad.any() for p in network.prompter.prompt.parameters())


def test_prompts_are_hard_and_change_the_mask(small_network):
    network = small_network("a")
    embedding = torch.randn(1, 16, 4, 4)
    nn.init.constant_(network.prompter.patches[-1].bias, 50.0)
    on = network.decode(embedding, "a")
    nn.init.constant_(network.prompter.patches[-1].bias, -50.0)
    off = network.decode(embedding, "a")
    assert not torch.allclose(on.masks, off.masks, atol=1e-5)
    without = network.decode(embedding, "a", prompted=False)
    assert not torch.allclose(off.masks, without.masks, atol=1e-5)


def test_a_batch_of_mixed_modalities_is_the_loop_over_images(small_network):
    network = small_network("a", "b", "c")
    image = torch.randn(5, 3, 64, 32, generator=torch.Generator().manual_seed(3))
    names = ["b", "a", "c", "a", "b"]
    together = network(image, names)
    alone = [network(x[None], name) for x, name in zip(image, names, strict=True)]
    for place, tensor in enumerate(together):
        expected = torch.cat([out[place] for out in alone])
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 32)])
def test_any_size_of_whole_patches(small_network, size):
    network = small_network("a")
    height, width = size
    masks, patches, embedding = network(torch.randn(1, 3, *size), "a")
    assert masks.shape == (1, 1, height, width)
    assert patches.shape == (1, 1, height // 32, width // 32)
    assert embedding.shape == (1, 16, height // 16, width // 16)


def test_bad_input_is_one_line(small_network):
    network = small_network("ultrasound", "fundus")
    with pytest.raises(
        InputError, match=r"unknown modality 'ultrasond', did you mean 'ultrasound'"
    ):
        network(torch.zeros(1, 3, 64, 64), "ultrasond")
    with pytest.raises(InputError, match="divisible by 32"):
        network(torch.zeros(1, 3, 64, 65), "fundus")
    with pytest.raises(InputError, match=r"expected \(B, 3, H, W\)"):
        network(torch.zeros(1, 1, 64, 64), "fundus")
    with pytest.raises(InputError, match="2 names for 1 images"):
        network(torch.zeros(1, 3, 64, 64), ["fundus", "fundus"])
    with pytest.raises(InputError, match="a name is lower-case"):
        TinyViTEncoder(["no.dots"])
    with pytest.raises(InputError, match="a name is lower-case"):
        TinyViTEncoder(["keys"])
    with pytest.raises(InputError, match="one is there twice"):
        MaskDecoder(["a", "a"], None, 16)
    with pytest.raises(InputError, match="unknown modality"):
        OneModality(network, "mri")


# --- the teacher ---------------------------------------------------------------------------------


@pytest.fixture
def vit():
    torch.manual_seed(0)
    size = ViTSize(24, 3, 3, 3, (1,), 64)
    return SAMEncoder(["a", "b"], 16, size).eval()


def test_without_controller_the_teacher_is_transformers_sam(vit):
    with torch.no_grad():
        for name, parameter in vit.vit.named_parameters():
            if "pos" in name:
                parameter.normal_()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vit(image), vit.vit(image).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(vit(image, "a"), vit(image), atol=1e-3)
    assert not torch.allclose(vit(image, "a"), vit(image, "b"), atol=1e-3)


def test_the_teacher_takes_other_sizes(vit):
    assert vit(torch.randn(1, 3, 96, 32), "a").shape == (1, 16, 6, 2)


def test_a_silenced_controller_leaves_sam(vit):
    image = torch.randn(1, 3, 64, 64)
    for controller in vit.controllers["a"]:
        nn.init.zeros_(controller.expert.fc2.weight)
        nn.init.constant_(controller.bias, float("-inf"))
    torch.testing.assert_close(vit(image, "a"), vit(image), atol=1e-6, rtol=1e-5)

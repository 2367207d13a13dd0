"""Values and gradients of the networks against arrays recorded from the official code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from cohobate.docking.aurobind import confidence, diffusion
from cohobate.docking.aurobind.heads import DistogramHead, FitnessHead
from cohobate.docking.aurobind.pairformer import PairformerBlock
from cohobate.docking.aurobind.student import ReleasedStudent

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
WIDE = {"rtol": 1e-3, "atol": 1e-3}


def weights(arrays, prefix="w."):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@pytest.mark.parametrize("number", [0, 1])
def test_noise_levels_and_preconditioning(recorded, number):
    r = recorded(f"edm_{number}")
    noise = diffusion.Noise(sigma_data=16.0, sigma_max=160.0, sigma_min=4e-4)
    assert_close(noise.schedule(int(r["T"])), r["schedule"], rtol=1e-5, atol=1e-5)
    x, update = r["x_noisy"].requires_grad_(), r["r_update"].requires_grad_()
    assert_close(noise.scale_in(x, r["t"]), r["r_noisy"], **CLOSE)
    out = noise.combine(x, update, r["t"])
    assert_close(out, r["x_out"], **CLOSE)
    # The recorded gradient holds the network fixed.
    (out * r["cotangent"]).sum().backward()
    assert_close(x.grad, r["grad_x_noisy"], **CLOSE)
    assert_close(update.grad, r["grad_r_update"], **CLOSE)


@pytest.mark.parametrize("number", [0, 1])
def test_augmentation(recorded, number):
    r = recorded(f"augment_{number}")
    rotation = diffusion.euler_rotations(r["angles"])
    assert_close(rotation, r["rotation"], **CLOSE)
    assert_close(diffusion.augment(r["x"], r["mask"], rotation, r["translation"]), r["y"], **CLOSE)


@pytest.mark.parametrize("number", [0, 1])
def test_the_whole_sampler(recorded, number):
    r = recorded(f"sampler_{number}")
    count = int(r["n_samples"])
    noise = diffusion.Noise(
        16.0, 160.0, 4e-4, gamma_0=float(r["gamma_0"]), gamma_min=float(r["gamma_min"]),
        noise_scale=float(r["noise_scale"]), step_scale=float(r["step_scale"]),
    )  # fmt: skip
    mask = r["atom_mask"].expand(count, -1)

    def denoise(x, t):
        update = 0.25 * noise.scale_in(x, t) + torch.tanh(r["mu"]) * t / (1 + t)
        return noise.combine(x, update, t)

    def move(k, x):
        turned = diffusion.euler_rotations(2 * torch.pi * r["u_rot"][k - 1])
        return diffusion.augment(x, mask, turned, r["trans"][k - 1])

    found = diffusion.sample(
        denoise, r["noise_init"].expand(count, -1, -1), noise.schedule(int(r["T"])), noise,
        added=lambda k: r["noise_steps"][k - 1], move=move,
    )  # fmt: skip
    assert_close(found, r["x_final"], rtol=1e-3, atol=1e-3)


def block(r):
    found = weights(r)
    inner = found["pair_stack.tri_mul_out.linear_z.weight"].shape[1]
    made = PairformerBlock(
        r["s"].shape[-1], r["z"].shape[-1], inner,
        int(r["heads_single"]), int(r["heads_pair"]), int(r["transition_n"]),
    )  # fmt: skip
    made.load_state_dict(found)
    return made


@pytest.mark.parametrize("number", [0, 1])
def test_a_pairformer_block_and_its_layers(recorded, number):
    r = recorded(f"pairformer_block_{number}")
    made = block(r)
    s, z, mask = r["s"].requires_grad_(), r["z"].requires_grad_(), r["single_mask"]
    pair = mask[:, :, None] * mask[:, None, :]
    stack = made.pair_stack
    for name in ("tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end"):
        assert_close(getattr(stack, name)(z, pair), r[f"out_{name}"], **CLOSE, msg=name)
    assert_close(stack.pair_transition(z, pair), r["out_pair_transition"], **CLOSE)
    assert_close(made.attention_pair_bias(s, z, mask), r["out_attention_pair_bias"], **CLOSE)
    out_s, out_z = made(s, z, mask)
    assert_close(out_s, r["out_s"], **WIDE)
    assert_close(out_z, r["out_z"], **WIDE)
    ((out_s * r["cot_s"]).sum() + (out_z * r["cot_z"]).sum()).backward()
    assert_close(s.grad, r["grad_s"], **WIDE)
    assert_close(z.grad, r["grad_z"], **WIDE)


@pytest.mark.parametrize("name", ["affinity_head_pool_0", "affinity_head_full_1"])
def test_the_fitness_head(recorded, name):
    r = recorded(name)
    found = weights(r)
    blocks = int(r["n_blocks"])
    stack = "pairformer_stack_head.blocks.0.pair_stack"
    inner = [
        found[f"{stack}.{name}.weight"].shape[1] if blocks else None
        for name in ("tri_mul_out.linear_z", "tri_att_start.mha.linear_o")
    ]
    made = FitnessHead(
        r["s"].shape[-1], r["z"].shape[-1], blocks,
        *(int(r[k]) if blocks else 1 for k in ("heads_single", "heads_pair", "transition_n")),
        *inner, pair_rows="official",
    )  # fmt: skip
    made.load_state_dict(found)
    s, z = r["s"].requires_grad_(), r["z"].requires_grad_()
    out = made(s, z, r["single_mask"], r["is_ligand"])
    assert_close(out[:, None], r["affinity"], **CLOSE)
    out.sum().backward()
    assert_close(s.grad, r["grad_s"], **WIDE)
    assert_close(z.grad, r["grad_z"], **WIDE)


def test_the_masked_fitness_head_ignores_protein_pairs(recorded):
    r = recorded("affinity_head_pool_0")
    made = FitnessHead(r["s"].shape[-1], r["z"].shape[-1], 0)
    made.load_state_dict(weights(r))
    z = r["z"].requires_grad_()
    made(r["s"], z, r["single_mask"], r["is_ligand"]).sum().backward()
    protein = ~r["is_ligand"]
    both = protein[:, :, None] & protein[:, None, :]
    assert (z.grad[both] == 0).all()
    assert (z.grad[~both] != 0).any()


@pytest.mark.parametrize("number", [0, 1])
def test_confidence(recorded, number):
    r = recorded(f"confidence_{number}")
    assert_close(confidence.expected_error(r["pae_logits"]), r["pae"], **CLOSE)
    assert_close(confidence.expected_error(r["pde_logits"]), r["pde"], **CLOSE)
    assert_close(confidence.plddt(r["plddt_logits"]), r["plddt"], **CLOSE)
    found = confidence.tm_scores(r["pae_logits"], r["asym_id"], r["frame_mask"], r["single_mask"])
    assert_close(found.ptm, r["ptm"], **CLOSE)
    assert_close(found.iptm, r["iptm"], **CLOSE)
    assert_close(found.chain_ptm, r["chain_ptm"], **CLOSE)
    assert_close(found.chain_pair_iptm, r["chain_pair_iptm"], **CLOSE)
    assert_close(found.chain_iptm, r["chain_iptm"], **CLOSE)
    assert_close(found.ranking, r["ranking_score_no_clash"], **CLOSE)


def test_distogram(recorded):
    r = recorded("distogram_0")
    assert torch.equal(confidence.distance_bins(r["x"]).to(torch.uint8), r["dgram"])
    head = DistogramHead(r["z"].shape[-1], r["logits"].shape[-1])
    head.load_state_dict(weights(r))
    assert_close(head(r["z"]), r["logits"], **CLOSE)


@pytest.mark.parametrize("number", [0, 1])
def test_the_released_student(recorded, number):
    r = recorded(f"aurofast_{number}")
    made = ReleasedStudent(
        int(r["hidden"]), int(r["esm_dim"]), int(r["fp_dim"]), int(r["num_atom_types"]),
        float(r["scaling_factor"]),
    ).eval()  # fmt: skip
    made.load_state_dict(weights(r))
    flat = [(r[k], r[f"{k}_batch"]) for k in ("atom_types", "esm", "trunk_s", "trunk_z")]
    bits = r["fp"].requires_grad_()
    out = made.ragged(*flat, bits)
    assert_close(out, r["prediction"], **CLOSE)
    out.sum().backward()
    assert_close(bits.grad, r["grad_fp"], **CLOSE)


def test_the_released_student_has_the_checkpoints_names_and_shapes():
    path = Path(__file__).parent / "golden" / "aurofast_state_dict.json"
    wanted = {k: tuple(v) for k, v in json.loads(path.read_text()).items()}
    with torch.device("meta"):
        made = ReleasedStudent()
    assert {k: tuple(v.shape) for k, v in made.state_dict().items()} == wanted

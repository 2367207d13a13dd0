"""Symmetry, padding and batch order of the structure model and the students."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from cohobate.docking.aurobind import structure
from cohobate.docking.aurobind.diffusion import Noise, random_rotations, sample
from cohobate.docking.aurobind.network import StructureModel
from cohobate.docking.aurobind.student import FastStudent
from cohobate.docking.data import ComplexData
from cohobate.docking.data.features import collate


def model(symmetry: str = "e3") -> StructureModel:
    torch.manual_seed(0)
    return StructureModel(16, 8, 1, 16, 2, 2, 1, 16, 1, "masked", symmetry, Noise()).eval()


@pytest.fixture(scope="module")
def samples():
    data = ComplexData(max_residues=12)
    data.setup()
    return [data.data[i] for i in (0, 3, 7)]


def double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def turned(batch, rotation):
    return {**batch, **{k: batch[k] @ rotation.mT for k in ("ca", "side", "pose")}}


@pytest.mark.parametrize("mirror", [False, True])
def test_poses_turn_with_the_complex(samples, mirror):
    network, batch = model().double(), double(collate(samples))
    rotation = random_rotations(1, torch.Generator().manual_seed(4))[0].double()
    rotation = -rotation if mirror else rotation
    start = torch.randn(3, batch["element"].shape[1], 3, dtype=torch.float64)
    noise = network.diffusion.noise

    def poses(seen, noise_start):
        known = network.trunk(seen)
        return sample(
            lambda x, t: network.diffusion(x, t, known, seen["ca"], seen["side"]),
            noise_start * seen["atom_mask"][..., None], noise.schedule(5).double(), noise.ode(),
        )  # fmt: skip

    plain = poses(batch, start)
    other = poses(turned(batch, rotation), start @ rotation.mT)
    assert plain.abs().max() > 0.5
    assert_close(other, plain @ rotation.mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("symmetry", ["e3", "augment"])
def test_fitness_does_not_see_the_frame(samples, symmetry):
    network, batch = model(symmetry).double(), double(collate(samples))
    rotation = -random_rotations(1)[0].double()
    moved = turned(batch, rotation)
    moved = {**moved, "ca": moved["ca"] + 5, "side": moved["side"] + 5}
    assert_close(network(moved), network(batch), rtol=1e-9, atol=1e-9)


def test_padding_and_order_change_nothing(samples):
    network = model()
    batch = collate(samples)
    fitness, (x, scores) = network(batch), structure.best_poses(network, batch, 1, 3)
    alone = torch.cat([network(collate([s])) for s in samples])
    assert_close(fitness, alone, rtol=1e-4, atol=1e-5)
    assert_close(network(collate(samples[::-1])), fitness.flip(0), rtol=1e-4, atol=1e-5)
    judged = structure.judge(network, batch, network.trunk(batch), x[:, 0])
    size = len(samples[0]["element"])
    first = collate(samples[:1])
    own = structure.judge(network, first, network.trunk(first), x[:1, 0, :size])
    for name in ("iptm", "ligand_ptm", "ligand_plddt", "ranking"):
        assert_close(judged[name][:1], own[name], rtol=1e-4, atol=1e-4)
        assert_close(scores[name][:1, 0], own[name], rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_poses(samples):
    network, batch = model(), collate(samples)
    first, _ = structure.best_poses(network, batch, 2, 3, seed=5, ode=False)
    again, _ = structure.best_poses(network, batch, 2, 3, seed=5, ode=False)
    other, _ = structure.best_poses(network, batch, 2, 3, seed=6, ode=False)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("score", ["mlp", "late"])
def test_the_student_is_two_towers(score):
    torch.manual_seed(0)
    student = FastStudent(6, 5, bits=32, elements=9, width=16, score=score).eval()
    bits, counts = torch.randint(0, 2, (4, 32)).float(), torch.randint(0, 3, (4, 9)).float()
    protein, prior = torch.randn(4, 5), torch.randn(4, 6)
    fitness, state = student(bits, counts, protein, prior)
    assert fitness.shape == (4,)
    assert state.shape == (4, 6)
    towers = student.library(bits, counts), student.target(protein, prior)
    assert_close(student.combine(*towers)[0], fitness)
    other = student(bits, counts, protein, prior + 1)[0]
    assert not torch.allclose(other, fitness), "the prior must reach the score"


def test_late_interaction_is_the_sum_of_best_matches():
    torch.manual_seed(1)
    student = FastStudent(6, 5, bits=8, elements=4, width=8, score="late", vectors=3, pockets=2)
    library, target = torch.randn(1, 16), torch.randn(1, 16)
    a = student.many(library).view(3, 2)
    b = student.places(target).view(2, 2)
    wanted = sum(max(float(x @ y) for y in b.detach()) for x in a.detach())
    assert student.eval().combine(library, target)[0].item() == pytest.approx(wanted, rel=1e-4)

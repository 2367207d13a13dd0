"""The compact structure model: trunk, pose diffusion, and the heads on them.

Tokens are the pocket's residues followed by the ligand's atoms. The receptor is rigid and its frame
is the origin; only ligand atoms move.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.docking.aurobind.diffusion import Noise
from cohobate.docking.aurobind.heads import (
    ConfidenceHead,
    DistogramHead,
    FitnessHead,
    PairRows,
)
from cohobate.docking.aurobind.pairformer import PairformerStack, attention
from cohobate.docking.data.features import ELEMENTS, TOPOLOGY, Batch

Symmetry = Literal["augment", "e3"]
RADIAL = 24


def radial(distance: Tensor) -> Tensor:
    """24 Gaussians of distances (...,), centres 0 to 16 Å, width 0.7 Å: (..., 24)."""
    centres = torch.linspace(0, 16, RADIAL, device=distance.device, dtype=distance.dtype)
    away = distance[..., None] - centres
    # In place: this is the largest tensor of a training step.
    return (away * away).mul_(-0.5 / 0.7**2).exp_()


class Embedding(NamedTuple):
    """What the trunk knows of a batch, without any position of the ligand.

    Attributes:
        s: Tokens (B, N, C_s).
        z: Pairs (B, N, N, C_z).
        mask: Which tokens there are (B, N).
        ligand: Which tokens are ligand atoms (B, N).
    """

    s: Tensor
    z: Tensor
    mask: Tensor
    ligand: Tensor

    def pooled(self) -> Tensor:
        """Mean token of the ligand and of the pocket (B, 2 C_s): the teacher's hidden state."""
        both = self.mask * self.ligand, self.mask * (1 - self.ligand)
        parts = [
            (self.s * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
            for kept in both
        ]
        return torch.cat(parts, -1)

    def repeat(self, count: int) -> Embedding:
        """Every complex ``count`` times in a row."""
        return Embedding(*(x.repeat_interleave(count, 0) for x in self))


class CompactTrunk(nn.Module):
    """Tokens and pairs of a complex from types, bonds, and the distances inside the pocket.

    Args:
        single: Channels of the tokens.
        pair: Channels of the pairs.
        blocks: Pairformer blocks.
    """

    def __init__(self, single: int = 64, pair: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.residue, self.element = nn.Embedding(21, single), nn.Embedding(ELEMENTS, single)
        self.flags = nn.Linear(5, single)
        self.left, self.right = nn.Linear(single, pair), nn.Linear(single, pair)
        self.near = nn.Linear(2 * RADIAL, pair)
        self.bond, self.topology = nn.Embedding(5, pair), nn.Embedding(TOPOLOGY + 1, pair)
        self.stack = PairformerStack(blocks, single, pair)

    def forward(self, batch: Batch) -> Embedding:
        """The trunk's answer to a batch of `cohobate.docking.data.features.collate`."""
        protein, atoms = batch["residue_mask"], batch["atom_mask"]
        s = torch.cat(
            (
                self.residue(batch["residue"]),
                self.element(batch["element"]) + self.flags(batch["flags"]),
            ),
            1,
        )
        mask = torch.cat((protein, atoms), 1)
        ligand = torch.cat((torch.zeros_like(protein), atoms), 1)
        z = self.left(s)[:, :, None] + self.right(s)[:, None, :]
        count = protein.shape[1]
        distances = [
            torch.cdist(batch["ca"], batch["ca"]), torch.cdist(batch["side"], batch["side"])
        ]  # fmt: skip
        inside = self.near(torch.cat([radial(d) for d in distances], -1))
        bonds = self.bond(batch["bond"]) + self.topology(batch["topology"])
        size = mask.shape[1] - count
        z = z + F.pad(inside, (0, 0, 0, size, 0, size)) + F.pad(bonds, (0, 0, count, 0, count, 0))
        s, z = self.stack(s, z, mask)
        return Embedding(s, z, mask, ligand)


class _Block(nn.Module):
    """Attention with a bias from pairs and distances, then a network; scaled by the noise level."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.scale = nn.Linear(width, 4 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor, bias: Tensor, level: Tensor) -> Tensor:
        gain, shift, gain2, shift2 = self.scale(level)[:, None].chunk(4, -1)
        x = self.norm(h) * (1 + gain) + shift
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(attention(q, k, v, bias).transpose(1, 2).flatten(-2))
        x = self.norm2(h) * (1 + gain2) + shift2
        gate, value = self.up(x).chunk(2, -1)
        return h + self.down(F.silu(gate) * value)


class PoseDiffusion(nn.Module):
    """Denoises ligand atoms in a rigid pocket.

    Args:
        single: Channels of the trunk's tokens.
        pair: Channels of the trunk's pairs.
        width: Channels inside.
        blocks: Attention blocks.
        heads: Attention heads.
        noise: Noise levels.
        symmetry: ``augment``: coordinates go in and come out as numbers, and training turns every
            complex at random; ``e3``: only distances go in, and the output is a sum of difference
            vectors, so that rotations and reflections of the complex carry over exactly: pushes
            between points, and pulls to the mean place of what an atom attends to.
    """

    frequency: Tensor

    def __init__(
        self,
        single: int,
        pair: int,
        width: int,
        blocks: int,
        heads: int,
        noise: Noise,
        symmetry: Symmetry,
    ) -> None:
        super().__init__()
        self.noise, self.symmetry, self.heads = noise, symmetry, heads
        self.token, self.kind = nn.Linear(single, width), nn.Embedding(2, width)
        self.register_buffer("frequency", torch.randn(32), persistent=True)
        self.level = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.pair_bias = nn.Sequential(nn.LayerNorm(pair), nn.Linear(pair, heads))
        self.near = nn.Linear(2 * RADIAL, heads)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        if symmetry == "augment":
            self.place, self.move = nn.Linear(3, width), nn.Linear(width, 3)
        else:
            self.pull_pair, self.pull_near = nn.Linear(pair, 2), nn.Linear(2 * RADIAL, 2)
            self.pull_q, self.pull_k = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
            self.own = nn.Linear(width, 1)
            self.seek_q, self.seek_k = nn.Linear(width, width), nn.Linear(width, width)
            self.seek_pair, self.seek_near = nn.Linear(pair, heads), nn.Linear(2 * RADIAL, heads)
            self.seek_gain = nn.Linear(width, 2 * heads)

    def forward(self, x: Tensor, t: Tensor, known: Embedding, ca: Tensor, side: Tensor) -> Tensor:
        """Denoised ligand coordinates (B, A, 3).

        Args:
            x: Noisy coordinates (B, A, 3) in the pocket frame, Å.
            t: Noise levels (B, 1, 1), Å.
            known: The trunk's answer for each of them, or for each of so many neighbours in a row.
            ca: Cα positions (B, P, 3), Å.
            side: Centroids of side chains (B, P, 3), Å.
        """
        count = ca.shape[1]
        scaled = self.noise.scale_in(x, t)
        # Distances are seen after preconditioning's shrinking toward the data, so that far noise
        # still lies within the radial functions.
        seen = scaled * self.noise.sigma_data
        points, others = torch.cat((ca, seen), 1), torch.cat((side, seen), 1)
        near = torch.cat((radial(_far(points, points)), radial(_far(points, others))), -1)
        angle = 2 * torch.pi * (t.flatten(1) / self.noise.sigma_data).log() / 4 * self.frequency
        level = self.level(torch.cat((angle.sin(), angle.cos()), -1))
        draws = len(x) // len(known.s)
        mask = known.mask.repeat_interleave(draws, 0)
        token = self.token(known.s) + self.kind(known.ligand.long())
        h = token.repeat_interleave(draws, 0) + level[:, None]
        if self.symmetry == "augment":
            own = torch.cat((ca / self.noise.sigma_data, scaled), 1)
            h = h + self.place(own)
        closed = (mask[:, None, None, :] - 1) * 1e9
        pairs = self.pair_bias(known.z).repeat_interleave(draws, 0)
        bias = (pairs + self.near(near)).permute(0, 3, 1, 2) + closed
        near = near[:, count:]
        for block in self.blocks:
            h = block(h, bias, level)
        h = self.norm(h)
        update = (
            self.move(h[:, count:])
            if self.symmetry == "augment"
            else self._push(h, known.z, mask, near, points, others)
            + self._pull(h, known.z, mask, near, points, others)
        )
        return self.noise.combine(x, update, t)

    def _push(
        self, h: Tensor, z: Tensor, mask: Tensor, near: Tensor, points: Tensor, others: Tensor
    ) -> Tensor:
        """Sum of directions to all other points, each with an invariant weight."""
        first = points.shape[1] - near.shape[1]
        q = self.pull_q(h[:, first:]).unflatten(-1, (2, -1)).transpose(1, 2)
        k = self.pull_k(h).unflatten(-1, (2, -1)).transpose(1, 2)
        weight = q @ k.mT / q.shape[-1] ** 0.5
        pairs = self.pull_pair(z[:, first:]).repeat_interleave(len(h) // len(z), 0)
        weight = weight + (pairs + self.pull_near(near)).permute(0, 3, 1, 2)
        weight = weight * mask[:, None, None, :]
        x = points[:, first:]
        total = self.own(h[:, first:]) * x / self.noise.sigma_data
        number = mask.sum(1)[:, None, None]
        for channel, place in enumerate((points, others)):
            vector = x[:, :, None] - place[:, None]
            unit = vector / ((vector.square().sum(-1, keepdim=True) + 1e-8).sqrt() + 1)
            total = total + (weight[:, channel, :, :, None] * unit).sum(2) / number.sqrt()
        return total

    def _pull(
        self, h: Tensor, z: Tensor, mask: Tensor, near: Tensor, points: Tensor, others: Tensor
    ) -> Tensor:
        """Vectors to the mean places of what each atom attends to.

        Directions alone cannot say how far; with these the network can name a place, which is all
        it has to go by where the noise hides the atom's own.
        """
        first = points.shape[1] - near.shape[1]
        q, k = (
            v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for v in (self.seek_q(h[:, first:]), self.seek_k(h))
        )
        pairs = self.seek_pair(z[:, first:]).repeat_interleave(len(h) // len(z), 0)
        bias = (pairs + self.seek_near(near)).permute(0, 3, 1, 2)
        bias = bias + (mask[:, None, None, :] - 1) * 1e9
        gain = self.seek_gain(h[:, first:]).unflatten(-1, (2, self.heads, 1)).permute(2, 0, 3, 1, 4)
        x, both = points[:, None, first:], torch.cat((points, others), -1)[:, None]
        mean = attention(q, k, both.expand(-1, self.heads, -1, -1), bias)
        vectors = sum(g * (m - x) for g, m in zip(gain, mean.split(3, -1), strict=True))
        return vectors.sum(1) / self.noise.sigma_data


class StructureModel(nn.Module):
    """Trunk, pose diffusion, and the distogram, confidence and fitness heads.

    Args:
        single: Channels of the tokens.
        pair: Channels of the pairs.
        trunk_blocks: Pairformer blocks of the trunk.
        width: Channels of the diffusion network.
        diffusion_blocks: Its blocks.
        heads: Its attention heads.
        fitness_blocks: Pairformer blocks of the fitness head.
        fitness_hidden: Units of its networks.
        confidence_blocks: Pairformer blocks of the confidence head.
        pair_rows: As for `FitnessHead`.
        symmetry: As for `PoseDiffusion`.
        noise: Noise levels.

    Raises:
        InputError: Channels cannot be shared by attention heads.
    """

    def __init__(
        self,
        single: int,
        pair: int,
        trunk_blocks: int,
        width: int,
        diffusion_blocks: int,
        heads: int,
        fitness_blocks: int,
        fitness_hidden: int,
        confidence_blocks: int,
        pair_rows: PairRows,
        symmetry: Symmetry,
        noise: Noise,
    ) -> None:
        super().__init__()
        for name, size, parts in (
            ("single", single, 4),
            ("pair", pair, 2),
            ("width", width, heads),
        ):
            if parts < 1 or size < 1 or size % parts:
                raise InputError(f"model.{name} {size} is not a multiple of its {parts} heads")
        self.trunk = CompactTrunk(single, pair, trunk_blocks)
        self.diffusion = PoseDiffusion(
            single, pair, width, diffusion_blocks, heads, noise, symmetry
        )
        self.distogram = DistogramHead(pair)
        self.confidence = ConfidenceHead(single, pair, confidence_blocks, distances=RADIAL)
        self.fitness = FitnessHead(
            single, pair, fitness_blocks, hidden=fitness_hidden, pair_rows=pair_rows
        )

    def forward(self, batch: Batch) -> Tensor:
        """Fitness (B,) of a batch."""
        known = self.trunk(batch)
        return self.fitness(*known)


def _far(a: Tensor, b: Tensor) -> Tensor:
    return ((a[:, :, None] - b[:, None]).square().sum(-1) + 1e-8).sqrt()

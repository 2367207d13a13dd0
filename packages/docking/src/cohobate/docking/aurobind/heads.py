"""What is read off the trunk: fitness, distances, confidence."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cohobate.docking.aurobind.pairformer import PairformerStack

PairRows = Literal["masked", "official"]


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, 1),
    )  # fmt: skip


class FitnessHead(nn.Module):
    """Fitness (pK) from the trunk's tokens and pairs; sees no coordinates.

    A gated number for each token and each pair; the pairs are averaged over partners, and tokens
    are averaged with two thirds of the weight on the ligand. With n tokens i of a pair j:
    ``a_i = σ(g(s_i)) m(s_i)``, ``b_i = Σ_j σ(g(z_ij)) m(z_ij) / n_i``, ``ŷ = Σ_i w_i (a_i + b_i)``.

    Args:
        single: Channels of the tokens.
        pair: Channels of the pairs.
        blocks: The head's own pairformer blocks.
        heads: Attention heads of their tokens.
        pair_heads: Attention heads of their pairs.
        factor: Of their transitions.
        inner: Channels of their triangle products.
        attention: Channels of all heads of their pairs together.
        hidden: Units of the two networks.
        ligand_weight: Weight of the ligand relative to the protein's.
        pair_rows: ``masked`` leaves protein-protein pairs out, as the text says; ``official`` adds
            them up as the released code does (and divides by the other pairs' number).

    References:
        AuroBind, fitness head. In the released code the blocks' output, which contains its input,
        is added to that input once more; released weights need that, so it is kept.
    """

    def __init__(
        self,
        single: int,
        pair: int,
        blocks: int = 4,
        heads: int = 4,
        pair_heads: int = 2,
        factor: int = 2,
        inner: int | None = None,
        attention: int | None = None,
        hidden: int = 512,
        ligand_weight: float = 2.0,
        pair_rows: PairRows = "masked",
    ) -> None:
        super().__init__()
        self.pairformer_stack_head = (
            PairformerStack(blocks, single, pair, inner, heads, pair_heads, factor, attention)
            if blocks
            else None
        )
        self.gate_linear, self.mlp = nn.Linear(single, 1), _mlp(single, hidden)
        self.z_gate_linear, self.z_mlp = nn.Linear(pair, 1), _mlp(pair, hidden)
        self.ligand_weight, self.pair_rows = ligand_weight, pair_rows

    @torch.no_grad()
    def start_at(self, fitness: float) -> None:
        """Let training begin near the labels' mean; before training the gates are about one half.

        Otherwise the first hundreds of steps go into the distance between 0 and the usual pK.
        """
        layer: Any = self.mlp[-1]
        layer.bias.fill_(2 * fitness)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, ligand: Tensor) -> Tensor:
        """Fitness (B,).

        Args:
            s: Tokens (B, N, C_s).
            z: Pairs (B, N, N, C_z).
            mask: Which tokens there are (B, N).
            ligand: Which of them are the ligand's (B, N).
        """
        if self.pairformer_stack_head is not None:
            more_s, more_z = self.pairformer_stack_head(s, z, mask.to(s.dtype))
            s, z = s + more_s, z + more_z
        s, z = F.layer_norm(s, s.shape[-1:]), F.layer_norm(z, z.shape[-1:])
        own = (torch.sigmoid(self.gate_linear(s)) * self.mlp(s)).squeeze(-1)
        pair = (torch.sigmoid(self.z_gate_linear(z)) * self.z_mlp(z)).squeeze(-1)
        here, there = mask.bool()[:, :, None], mask.bool()[:, None, :]
        rows = ligand.bool()[:, :, None] | ligand.bool()[:, None, :]
        kept = here & there if self.pair_rows == "official" else here & there & rows
        partners = (here & there & rows).sum(-1).clamp(min=1)
        terms = own + (pair * kept).sum(-1) / partners
        return (self.token_weights(mask, ligand).to(terms) * terms).sum(-1)

    def token_weights(self, mask: Tensor, ligand: Tensor) -> Tensor:
        """Weight of each token (B, N): the ligand's sum is ``ligand_weight`` × the pocket's."""
        lig, pro = mask.bool() & ligand.bool(), mask.bool() & ~ligand.bool()
        number = lig.sum(-1, keepdim=True).clamp(min=1)
        weight = lig * self.ligand_weight * pro.sum(-1, keepdim=True) / number + pro
        return weight / weight.sum(-1, keepdim=True).clamp(min=1e-8)


class DistogramHead(nn.Module):
    """Logits of binned distances from the pairs, the same both ways.

    Args:
        pair: Channels of the pairs.
        bins: Number of bins.
    """

    def __init__(self, pair: int, bins: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(pair, bins, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Logits (B, N, N, bins) from pairs (B, N, N, C)."""
        logits = self.linear(z)
        return logits + logits.transpose(1, 2)


class ConfidenceHead(nn.Module):
    """How good a pose is: pLDDT of each token, PDE of each pair.

    Args:
        single: Channels of the tokens.
        pair: Channels of the pairs.
        blocks: Pairformer blocks.
        distances: Radial functions of the pose's distances.
    """

    def __init__(self, single: int, pair: int, blocks: int = 1, distances: int = 39) -> None:
        super().__init__()
        self.distance = nn.Linear(distances, pair, bias=False)
        self.stack = PairformerStack(blocks, single, pair)
        self.plddt, self.pde = nn.Linear(single, 50), nn.Linear(pair, 64)

    def forward(self, s: Tensor, z: Tensor, near: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Logits by name: plddt (B, N, 50), pde (B, N, N, 64).

        Args:
            s: Tokens (B, N, C_s).
            z: Pairs (B, N, N, C_z).
            near: Binned distances of the pose (B, N, N, distances).
            mask: Which tokens there are (B, N).
        """
        s, z = self.stack(s, z + self.distance(near), mask)
        return {"plddt": self.plddt(s), "pde": self.pde(z + z.transpose(1, 2))}

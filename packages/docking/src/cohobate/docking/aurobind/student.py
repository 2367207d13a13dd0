"""AuroFast: a student that scores a molecule by its fingerprint, one target at a time.

Everything of a molecule is one vector (the library tower), everything of a target another (the
target tower), so that a library is encoded once and a new target costs a matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError

Score = Literal["mlp", "late"]


class FastStudent(nn.Module):
    """Fitness and hidden state of pairs of molecule and target.

    Args:
        prior: Channels of the nearest centroid's trunk embedding.
        protein: Channels of the protein embedding.
        bits: Length of the fingerprint.
        elements: Kinds of atoms.
        width: Channels inside.
        score: ``mlp``: one vector of each, then a network; ``late``: ``vectors`` of a molecule meet
            ``pockets`` of a target, and each adds its best match.
        vectors: Vectors of a molecule, for ``late``.
        pockets: Vectors of a target, for ``late``.
        dropout: In the combining network.
        hidden: Channels of the teacher's hidden state; default those of the prior.

    References:
        AuroBind, AuroFast. The paper has a transformer with the nearest centroid's trunk embedding
        as a prior; the released code (`ReleasedStudent`) reduces that prior to one number.
    """

    def __init__(
        self,
        prior: int,
        protein: int,
        bits: int = 1024,
        elements: int = 119,
        width: int = 128,
        score: Score = "mlp",
        vectors: int = 8,
        pockets: int = 16,
        dropout: float = 0.2,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.width, self.score = width, score
        self.shape = (vectors, pockets)
        self.fingerprint = nn.Sequential(
            nn.Linear(bits, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
        )
        self.atoms = nn.Embedding(elements, width, padding_idx=0)
        self.protein, self.prior = nn.Linear(protein, width), nn.Linear(prior, width)
        self.mix = nn.Sequential(
            nn.Linear(4 * width, 2 * width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(2 * width, width), nn.ReLU(),
        )  # fmt: skip
        self.hidden = nn.Linear(width, hidden or prior)
        if score == "mlp":
            self.out = nn.Linear(width, 1)
        else:
            self.many = nn.Linear(2 * width, vectors * (width // 4))
            self.places = nn.Linear(2 * width, pockets * (width // 4))
            self.bias = nn.Parameter(torch.zeros(()))

    def library(self, bits: Tensor, counts: Tensor) -> Tensor:
        """The library tower: molecules (B, 2 width).

        Args:
            bits: ECFP4 (B, bits), 0 or 1.
            counts: Number of atoms of each kind (B, elements).
        """
        table = self.atoms.weight
        mean = counts @ table / counts.sum(-1, keepdim=True).clamp(min=1)
        return torch.cat((self.fingerprint(bits), mean), -1)

    def target(self, protein: Tensor, prior: Tensor) -> Tensor:
        """The target tower (B, 2 width).

        Args:
            protein: Protein embedding (B, protein).
            prior: Trunk embedding of the nearest centroid's complex (B, prior).
        """
        return torch.cat((self.protein(protein), self.prior(prior)), -1)

    def combine(self, library: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Fitness (B,) and hidden state (B, hidden) from the two towers (B, 2 width)."""
        mixed = self.mix(torch.cat((library, target), -1))
        if self.score == "mlp":
            return self.out(mixed).squeeze(-1), self.hidden(mixed)
        vectors, pockets = self.shape
        a = self.many(library).unflatten(-1, (vectors, -1))
        b = self.places(target).unflatten(-1, (pockets, -1))
        return (a @ b.mT).amax(-1).sum(-1) + self.bias, self.hidden(mixed)

    def forward(
        self, bits: Tensor, counts: Tensor, protein: Tensor, prior: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fitness (B,) and hidden state (B, hidden) of pairs."""
        return self.combine(self.library(bits, counts), self.target(protein, prior))


class ReleasedStudent(nn.Module):
    """The student as released; names and shapes are those of its checkpoint.

    Args:
        hidden: Channels.
        esm: Channels of the protein language model.
        bits: Length of the fingerprint.
        elements: Kinds of atoms.
        scale: Factor of the trunk's single number.
        dropout: In the combining networks.
    """

    def __init__(
        self,
        hidden: int = 1024,
        esm: int = 2560,
        bits: int = 1024,
        elements: int = 119,
        scale: float = 0.01,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.hidden, self.scale = hidden, scale
        self.atom_encoder = nn.Embedding(elements, hidden)
        self.fp_encoder = nn.Sequential(
            nn.Linear(bits, hidden), nn.ReLU(), nn.Linear(hidden, hidden)
        )
        self.esm_proj = nn.Linear(esm, hidden)
        self.global_combiner = nn.Sequential(
            nn.Linear(3 * hidden, 2 * hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(2 * hidden, hidden),
        )  # fmt: skip
        self.trunk_encoder = nn.Linear(hidden, hidden, bias=False)
        self.graph_predictor = nn.Sequential(
            nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden // 2, 1),
        )  # fmt: skip

    def forward(
        self,
        atoms: tuple[Tensor, Tensor],
        esm: tuple[Tensor, Tensor],
        trunk_s: tuple[Tensor, Tensor],
        trunk_z: tuple[Tensor, Tensor],
        fingerprint: Tensor,
    ) -> Tensor:
        """Fitness (B, 1).

        Args:
            atoms: Atomic numbers (all atoms,) and the sample of each.
            esm: Residue embeddings (all residues, esm) and the sample of each.
            trunk_s: Trunk tokens (all tokens, C_s) and the sample of each.
            trunk_z: Trunk pairs, already averaged over one axis (all tokens, C_z), likewise.
            fingerprint: ECFP4 (B, bits).
        """
        count = len(fingerprint)
        number = _mean(trunk_s[0].mean(-1, keepdim=True), trunk_s[1], count)
        number = number + _mean(trunk_z[0].mean(-1, keepdim=True), trunk_z[1], count)
        prior = self.trunk_encoder(number.expand(-1, self.hidden))
        prior = torch.sigmoid(prior) * prior
        protein = self.esm_proj(_mean(esm[0], esm[1], count)) + self.scale * prior
        mean_atom = _mean(self.atom_encoder(atoms[0]), atoms[1], count)
        parts = torch.cat((self.fp_encoder(fingerprint), protein, mean_atom), -1)
        return self.graph_predictor(self.global_combiner(parts))

    def load_released(self, weights: Mapping[str, Tensor]) -> None:
        """Take a released checkpoint's ``model_state_dict``.

        Raises:
            InputError: A tensor is missing, too many, or has another shape.
        """
        own = self.state_dict()
        for name in [*own, *weights]:
            if name not in weights:
                raise InputError(f"released student: {name} is missing")
            if name not in own:
                raise InputError(f"released student: {name} is unknown")
            if weights[name].shape != own[name].shape:
                raise InputError(
                    f"released student: {name} has shape {tuple(weights[name].shape)}, not "
                    f"{tuple(own[name].shape)}"
                )
        self.load_state_dict(dict(weights))


def _mean(values: Tensor, sample: Tensor, count: int) -> Tensor:
    """Mean of the rows (n, C) of each sample (count, C)."""
    total = values.new_zeros(count, values.shape[-1]).index_add(0, sample, values)
    return total / sample.bincount(minlength=count).clamp(min=1)[:, None]

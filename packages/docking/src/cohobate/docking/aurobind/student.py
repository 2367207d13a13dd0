"""AuroFast: a student that scores a molecule by its fingerprint, one target at a time.

Everything of a molecule is one vector (the library tower), everything of a target another (the
target tower), so that a library is encoded once and a new target costs a matrix product. The two
layouts, the paper's and the released one, have the same methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights
from cohobate.docking.aurobind.network import Embedding
from cohobate.docking.data.features import BITS, ELEMENTS

Layout = Literal["paper", "released"]
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

    Attributes:
        channels: Of the protein embedding and of the prior.

    References:
        AuroBind, AuroFast. The paper has a transformer with the nearest centroid's trunk embedding
        as a prior; the released code (`ReleasedStudent`) reduces that prior to one number.
    """

    def __init__(
        self,
        prior: int,
        protein: int,
        bits: int = BITS,
        elements: int = ELEMENTS,
        width: int = 128,
        score: Score = "mlp",
        vectors: int = 8,
        pockets: int = 16,
        dropout: float = 0.2,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = protein, prior
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

    @staticmethod
    def prior_of(known: Embedding) -> Tensor:
        """What the student sees of the trunk's answer (B, prior): pooled tokens."""
        return known.pooled()

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

    The first layer after the concatenation, W [f, e, a], is W_f f + W_a a of the molecule, the
    library tower, plus W_e e of the target, so that the towers compute what the released network
    does.

    Args:
        hidden: Channels.
        esm: Channels of the protein embedding; the released one is of ESM-2 3B.
        bits: Length of the fingerprint.
        elements: Kinds of atoms.
        scale: Factor of the trunk's single number.
        dropout: In the combining networks.

    Attributes:
        channels: Of the protein embedding and of the prior.

    Differences:
        The trunk's number is mean(s) + mean(z) over the tokens and pairs of one complex. The
        released program takes it from its own large trunk, once for a protein; here it is the
        number of this package's trunk for the nearest centroid's complex, as it is at hand when a
        library is screened. Released weights scale what they make of it by 0.01.
    """

    def __init__(
        self,
        hidden: int = 1024,
        esm: int = 2560,
        bits: int = BITS,
        elements: int = ELEMENTS,
        scale: float = 0.01,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.channels = esm, 1
        self.width, self.scale = hidden, scale
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

    @staticmethod
    def prior_of(known: Embedding) -> Tensor:
        """What the student sees of the trunk's answer (B, 1): mean of tokens plus mean of pairs."""
        pairs = known.mask[:, :, None] * known.mask[:, None, :]
        s = (known.s.mean(-1) * known.mask).sum(1) / known.mask.sum(1)
        z = (known.z.mean(-1) * pairs).sum((1, 2)) / pairs.sum((1, 2))
        return (s + z)[:, None]

    def library(self, bits: Tensor, counts: Tensor) -> Tensor:
        """The library tower: molecules (B, 2 hidden).

        Args:
            bits: ECFP4 (B, bits), 0 or 1.
            counts: Number of atoms of each kind (B, elements).
        """
        mean = counts @ self.atom_encoder.weight / counts.sum(-1, keepdim=True).clamp(min=1)
        of_bits, _, of_atoms, _ = self._first()
        return F.linear(self.fp_encoder(bits), of_bits) + F.linear(mean, of_atoms)

    def target(self, protein: Tensor, prior: Tensor) -> Tensor:
        """The target tower (B, 2 hidden).

        Args:
            protein: Mean residue embedding (B, esm).
            prior: The trunk's number (B, 1).
        """
        gate = self.trunk_encoder(prior.expand(-1, self.width))
        known = self.esm_proj(protein) + self.scale * torch.sigmoid(gate) * gate
        _, of_target, _, bias = self._first()
        return F.linear(known, of_target, bias)

    def combine(self, library: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Fitness (B,) and hidden state (B, hidden) from the two towers (B, 2 hidden)."""
        mixed = self.global_combiner[1:](library + target)
        return self.graph_predictor(mixed).squeeze(-1), mixed

    def forward(
        self, bits: Tensor, counts: Tensor, protein: Tensor, prior: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fitness (B,) and hidden state (B, hidden) of pairs."""
        return self.combine(self.library(bits, counts), self.target(protein, prior))

    def ragged(
        self,
        atoms: tuple[Tensor, Tensor],
        esm: tuple[Tensor, Tensor],
        trunk_s: tuple[Tensor, Tensor],
        trunk_z: tuple[Tensor, Tensor],
        bits: Tensor,
    ) -> Tensor:
        """Fitness (B, 1) from what the released program gives its network.

        Args:
            atoms: Atomic numbers (all atoms,) and the sample of each.
            esm: Residue embeddings (all residues, esm) and the sample of each.
            trunk_s: Trunk tokens (all tokens, C_s) and the sample of each.
            trunk_z: Trunk pairs, already averaged over one axis (all tokens, C_z), likewise.
            bits: ECFP4 (B, bits).
        """
        count = len(bits)
        kinds = F.one_hot(atoms[0], self.atom_encoder.num_embeddings).to(bits)
        counts = bits.new_zeros(count, kinds.shape[1]).index_add(0, atoms[1], kinds)
        number = _mean(trunk_s[0].mean(-1, keepdim=True), trunk_s[1], count)
        number = number + _mean(trunk_z[0].mean(-1, keepdim=True), trunk_z[1], count)
        return self(bits, counts, _mean(*esm, count), number)[0][:, None]

    def load_released(self, path: Path) -> None:
        """Take a released checkpoint: its ``model_state_dict``, or safetensors.

        Raises:
            InputError: The file cannot be read; a tensor is missing, too many, or has another
                shape; or it takes another protein embedding.
        """
        weights = load_weights(Path(path))
        esm = weights.get("esm_proj.weight")
        if esm is not None and esm.ndim == 2 and esm.shape[1] != self.channels[0]:
            raise InputError(
                f"{path}: takes protein embeddings of {esm.shape[1]} channels, not of "
                f"{self.channels[0]}: --data.protein_embeddings FILE.npz"
            )
        self.load_state_dict(fitting_weights(self, weights, Path(path)))

    def _first(self) -> tuple[Tensor, ...]:
        """Of the first combining layer the columns of fingerprint, target, atoms, and the bias."""
        first = cast(nn.Linear, self.global_combiner[0])
        return *first.weight.split(self.width, 1), first.bias


def make_student(
    layout: Layout,
    prior: int,
    protein: int,
    width: int | None,
    score: Score,
    hidden: int,
    weights: Path | None,
) -> FastStudent | ReleasedStudent:
    """A student for fingerprints and atom counts of this package.

    Args:
        layout: ``paper`` or ``released``.
        prior: Channels of the trunk's pooled tokens, for ``paper``.
        protein: Channels of the protein embedding.
        width: Channels inside; default 128, of ``released`` those of the file, else 1024.
        score: Score head, for ``paper``.
        hidden: Channels of the teacher's hidden state, for ``paper``.
        weights: Released checkpoint that the student will start from, for ``released``; only its
            width is taken from it here, where the file is at hand.

    Raises:
        InputError: The options do not fit each other.
    """
    if layout == "paper":
        if weights is not None:
            raise InputError("model.student_weights: released weights need --model.layout released")
        return FastStudent(prior, protein, width=width or 128, score=score, hidden=hidden)
    if score != "mlp":
        raise InputError(f"model.score {score}: the released layout has mlp alone")
    if width is None and weights is not None and Path(weights).exists():
        atoms = load_weights(Path(weights)).get("atom_encoder.weight")
        width = None if atoms is None else atoms.shape[-1]
    return ReleasedStudent(width or 1024, protein)


def _mean(values: Tensor, sample: Tensor, count: int) -> Tensor:
    """Mean of the rows (n, C) of each sample (count, C)."""
    total = values.new_zeros(count, values.shape[-1]).index_add(0, sample, values)
    return total / sample.bincount(minlength=count).clamp(min=1)[:, None]

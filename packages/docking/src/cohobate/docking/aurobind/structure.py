"""Stages 1 and 2 in functions: the structure loss, poses with confidence, self-labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rdkit import Chem
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking.aurobind import confidence, diffusion, losses
from cohobate.docking.aurobind.network import Embedding, StructureModel, radial
from cohobate.docking.aurobind.relax import relaxed
from cohobate.docking.data.features import Batch, Complex
from cohobate.docking.metrics import molecule_rmsd

log = logging.getLogger("cohobate")


@dataclass(frozen=True)
class Keep:
    """Which of the model's own poses become labels, and when none do.

    Args:
        samples: Poses sampled for each complex.
        steps: Of the sampler.
        iptm: Least ipTM.
        ligand_ptm: Least pTM of the ligand.
        plddt: Least mean pLDDT of the ligand's atoms, 0 to 100 (the paper asks it of the protein,
            which is rigid here; default none).
        min_keep: When fewer pass, the best by ranking score are kept instead …
        keep_fraction: … this share of all.
        gate: Self-labels are mixed in only when those kept of the validation complexes have a
            median RMSD of at most this, Å.
        override_gate: Mix them in all the same.
    """

    samples: int = 4
    steps: int = 20
    iptm: float = 0.8
    ligand_ptm: float = 0.5
    plddt: float = 0.0
    min_keep: int = 16
    keep_fraction: float = 0.5
    gate: float = 2.0
    override_gate: bool = False

    def passing(self, scores: dict[str, Tensor]) -> Tensor:
        """Which complexes are kept (n,), from their scores (n,) each."""
        good = (
            (scores["iptm"] > self.iptm)
            & (scores["ligand_ptm"] > self.ligand_ptm)
            & (scores["ligand_plddt"] >= self.plddt)
        )
        if int(good.sum()) >= self.min_keep or not len(good):
            return good
        count = max(round(self.keep_fraction * len(good)), 1)
        log.info(
            "self-distillation: %d of %d poses pass the thresholds; keeping the best %d",
            int(good.sum()), len(good), count,
        )  # fmt: skip
        best = torch.zeros_like(good)
        best[scores["ranking"].argsort(descending=True)[:count]] = True
        return best


def structure_terms(
    model: StructureModel, batch: Batch, known: Embedding, draws: int, turn: bool
) -> dict[str, Tensor]:
    """The terms of stage 1 on a batch whose poses are known.

    Of a ligand's equivalent atoms each takes the place that is nearest to where it was predicted.
    ``diffusion`` is ``w(t) L_mse + L_slddt`` and ``bond`` is ``w(t) L_bond``, means over several
    noise levels for one pass of the trunk.

    Args:
        model: The network.
        batch: From `collate`.
        known: The trunk's answer.
        draws: Noise levels for each complex.
        turn: Whether each is turned at random.
    """
    noise = model.diffusion.noise
    ca, side, pose, mask, bonds, same = (
        batch[k].repeat_interleave(draws, 0)
        for k in ("ca", "side", "pose", "atom_mask", "bond", "same")
    )
    pose = torch.nan_to_num(pose)
    if turn:
        rotation = diffusion.random_rotations(len(ca)).to(ca).mT
        ca, side, pose = ca @ rotation, side @ rotation, pose @ rotation
    t = noise.draw(len(pose)).to(pose)[:, None, None]
    noisy = (pose + t * torch.randn_like(pose)) * mask[..., None]
    x = model.diffusion(noisy, t, known, ca, side)
    pose = losses.nearest_order(x, pose, mask, same)
    weight = losses.edm_weight(t.flatten(), noise.sigma_data)
    mse = losses.pose_mse(x, pose, mask)
    smooth = losses.smooth_lddt(
        x, pose, mask, ca, batch["residue_mask"].repeat_interleave(draws, 0)
    )
    bond = losses.bond_loss(x, pose, (bonds > 0).to(x))
    return {"diffusion": (weight * mse + smooth).mean(), "bond": (weight * bond).mean()}


def distogram_term(model: StructureModel, batch: Batch, known: Embedding) -> Tensor:
    """Cross-entropy of the distances between the ligand and everything; 64 bins, 2 to 22 Å."""
    points = torch.cat((batch["side"], torch.nan_to_num(batch["pose"])), 1)
    pair = known.mask[:, :, None] * known.mask[:, None, :]
    pair = pair * (known.ligand[:, :, None] + known.ligand[:, None, :]).clamp(max=1)
    return losses.distogram(model.distogram(known.z), torch.cdist(points, points), pair, 2.0, 22.0)


def confidence_term(model: StructureModel, batch: Batch, known: Embedding, steps: int) -> Tensor:
    """Cross-entropies of pLDDT and PDE on poses the model makes itself, without gradient."""
    with torch.no_grad():
        x = roll_out(model, batch, known, 1, steps)[:, 0]
    found = model.confidence(known.s, known.z, _near(batch, x), known.mask)
    pose = torch.nan_to_num(batch["pose"])
    pose = losses.nearest_order(x, pose, batch["atom_mask"], batch["same"])
    count = batch["ca"].shape[1]
    lddt = losses.lddt_of_atoms(x, pose, batch["ca"], batch["residue_mask"])
    plddt = losses.binned(
        found["plddt"][:, count:], (lddt * 50).long().clamp(max=49), batch["atom_mask"]
    )
    ours, true = (torch.cat((batch["side"], p), 1) for p in (x, pose))
    error = (torch.cdist(ours, ours) - torch.cdist(true, true)).abs()
    step = confidence.MAX_ERROR / 62
    pair = known.mask[:, :, None] * known.ligand[:, None, :]
    return plddt + losses.binned(found["pde"], (error / step).long().clamp(max=63), pair)


def roll_out(
    model: StructureModel,
    batch: Batch,
    known: Embedding,
    count: int,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    ode: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Sample poses (B, count, A, 3) in the pocket frame; noise comes from the CPU's generator.

    With ``ode`` no noise is added on the way.
    """
    noise = model.diffusion.noise.ode() if ode else model.diffusion.noise
    levels = noise.schedule(steps)
    ca, side, mask = (batch[k].repeat_interleave(count, 0) for k in ("ca", "side", "atom_mask"))

    def normal(_: int = 0) -> Tensor:
        return torch.randn((*mask.shape, 3), generator=generator).to(ca) * mask[..., None]

    x = diffusion.sample(
        lambda x, t: model.diffusion(x, t, known, ca, side), normal(), levels, noise,
        added=normal, steps=progress,
    )  # fmt: skip
    return (x * mask[..., None]).unflatten(0, (-1, count))


def judge(model: StructureModel, batch: Batch, known: Embedding, x: Tensor) -> dict[str, Tensor]:
    """Confidence in poses (B, A, 3): ``plddt`` (B, A), and (B,) each ``ligand_plddt`` (0 to 100),
    ``iptm``, ``ligand_ptm``, ``ranking``.

    The TM scores are taken from the expected errors of distances between pocket and ligand, with
    d₀ of the whole complex: a ligand has no frames, and its own d₀ would be 0.17 Å.
    """  # noqa: D205 (the list is the summary)
    found = model.confidence(known.s, known.z, _near(batch, x), known.mask)
    plddt = confidence.plddt(found["plddt"])[:, batch["ca"].shape[1] :]
    atoms = batch["atom_mask"]
    mean = (plddt * atoms).sum(1) / atoms.sum(1).clamp(min=1)
    terms = confidence.tm_weights(found["pde"], known.mask)
    ligand, pocket = known.ligand.bool(), (known.mask * (1 - known.ligand)).bool()
    across = ligand[:, :, None] & pocket[:, None, :] | pocket[:, :, None] & ligand[:, None, :]
    inside = ligand[:, :, None] & ligand[:, None, :]
    iptm = confidence.best_frame(terms, ligand | pocket, across)
    own = confidence.best_frame(terms, ligand, inside)
    return {
        "plddt": plddt, "ligand_plddt": 100 * mean, "iptm": iptm, "ligand_ptm": own,
        "ranking": 0.8 * iptm + 0.2 * own,
    }  # fmt: skip


def best_poses(
    model: StructureModel,
    batch: Batch,
    count: int,
    steps: int,
    *,
    seed: int = 0,
    ode: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sampled poses (B, count, A, 3), best first by ranking score, with scores (B, count)."""
    known = model.trunk(batch)
    x = roll_out(
        model, batch, known, count, steps, generator=torch.Generator().manual_seed(seed), ode=ode
    )
    spread = {k: v.repeat_interleave(count, 0) for k, v in batch.items()}
    scores = judge(model, spread, known.repeat(count), x.flatten(0, 1))
    scores = {k: v.unflatten(0, (-1, count)) for k, v in scores.items()}
    order = scores["ranking"].argsort(1, descending=True)
    x = x.gather(1, order[:, :, None, None].expand_as(x))
    return x, {k: _along(v, order) for k, v in scores.items()}


def self_labels(
    model: StructureModel, batches: Iterable[Batch], keep: Keep, seed: int
) -> tuple[list[int], list[Tensor], dict[str, Tensor]]:
    """The best pose of each complex with its scores, before any is dropped.

    Returns:
        Places, poses (A, 3) each, scores (n,) each.
    """
    places: list[int] = []
    found: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {
        k: [] for k in ("iptm", "ligand_ptm", "ligand_plddt", "ranking")
    }
    for batch in batches:
        x, scores = best_poses(model, batch, keep.samples, keep.steps, seed=seed)
        places += batch["index"].tolist()
        sizes = batch["atom_mask"].sum(1).long().tolist()
        found += [pose[0, :n].cpu() for pose, n in zip(x, sizes, strict=True)]
        for name, values in kept.items():
            values.append(scores[name][:, 0].cpu())
    return places, found, {k: torch.cat(v) if v else torch.zeros(0) for k, v in kept.items()}


@torch.no_grad()
def own_poses(
    model: StructureModel, data: Any, keep: Keep, path: Path, device: torch.device
) -> dict[int, Tensor]:
    """The model's own poses (A, 3) of complexes whose pose is hidden, by place; empty when refused.

    They are made once, judged by the validation complexes, and kept in a file.

    Args:
        model: The network.
        data: The data module.
        keep: Which are kept, and when none are.
        path: The file.
        device: Where the network is.

    Raises:
        InputError: No validation complex can be judged by.
    """

    def made() -> dict[str, np.ndarray]:
        hidden = data.hidden_poses()
        if not hidden:
            log.warning("self-distillation: every pose is shown (data.posed); nothing to label")
            return {}
        if not own_poses_allowed(model, data, keep, len(hidden), device):
            return {}
        batches = moved(data.batches_of(hidden), device)
        places, poses, scores = self_labels(model, batches, keep, data.seed + 1)
        chosen = zip(places, poses, keep.passing(scores).tolist(), strict=True)
        found = {str(i): x.numpy() for i, x, good in chosen if good}
        log.info("self-distillation: %d of %d poses kept", len(found), len(hidden))
        return found

    return {int(name): pose for name, pose in _kept(path, made).items()}


@torch.no_grad()
def own_poses_allowed(
    model: StructureModel, data: Any, keep: Keep, hidden: int, device: torch.device
) -> bool:
    """What the gate says of the validation complexes, of which as large a share is kept."""
    held = data.places("val", pose=True)
    places, poses, scores = self_labels(
        model, moved(data.batches_of(held), device), keep, data.seed
    )
    fewer = replace(keep, min_keep=round(keep.min_keep * len(held) / hidden))
    chosen = zip(places, poses, fewer.passing(scores).tolist(), strict=True)
    return open_gate(keep, [error_of(data.data.complexes[i], x) for i, x, good in chosen if good])


@torch.no_grad()
def confidences(
    model: StructureModel, data: Any, keep: Keep, path: Path, device: torch.device
) -> Tensor:
    """The ranking score, 0 to 1, of the best sampled pose of every labelled training complex.

    The others have 0 (n,). As for `own_poses`, the answer is kept in a file.
    """

    def made() -> Mapping[str, np.ndarray]:
        places = data.places("train", label=True)
        found = torch.zeros(len(data.data))
        batches = moved(data.batches_of(places), device)
        found[places] = self_labels(model, batches, keep, data.seed)[2]["ranking"]
        return {"confidence": found.numpy()}

    return _kept(path, made)["confidence"]


@torch.no_grad()
def references(model: StructureModel, data: Any, path: Path, device: torch.device) -> Tensor:
    """The fitness (n,) of every complex by the model as it is now, kept in a file."""

    def made() -> Mapping[str, np.ndarray]:
        batches = moved(data.batches_of(range(len(data.data))), device)
        return {"fitness": torch.cat([model(batch).cpu() for batch in batches]).numpy()}

    return _kept(path, made)["fitness"]


def _kept(path: Path, made: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Arrays of an ``.npz`` that is whole or absent; made where it is absent."""
    if not path.exists():
        arrays = made()
        with save_atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    with np.load(path) as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device."""
    return ({k: v.to(device) for k, v in batch.items()} for batch in batches)


def open_gate(keep: Keep, rmsd: Sequence[float]) -> bool:
    """Whether self-labels may be mixed in, from the RMSD of those kept of the validation set.

    Raises:
        InputError: There is no validation complex to judge by.
    """
    if not len(rmsd):
        raise InputError("self-distillation: no validation complex with a pose to judge by")
    median = float(np.median(rmsd))
    if median <= keep.gate or keep.override_gate:
        log.info("self-distillation: kept validation poses have median RMSD %.2f Å", median)
        return True
    log.warning(
        "self-distillation refused: kept validation poses have median RMSD %.2f Å, above %.1f Å; "
        "training goes on without self-labels (--model.keep.override_gate true mixes them in)",
        median, keep.gate,
    )  # fmt: skip
    return False


def error_of(one: Complex, pose: Tensor) -> float:
    """Symmetry-corrected RMSD of a pose (A, 3) in the pocket frame."""
    posed = Chem.Mol(one.molecule)
    posed.GetConformer().SetPositions(pose.double().numpy() + one.pocket.centre)
    return float(molecule_rmsd(one.molecule, posed)[0])


@torch.no_grad()
def pose_errors(
    model: StructureModel,
    batch: Batch,
    complexes: Sequence[Complex],
    count: int,
    steps: int,
    *,
    seed: int,
    ode: bool,
) -> list[dict[str, float]]:
    """How far sampled poses are from the true ones, for each complex whose pose is known.

    Args:
        model: The network.
        batch: Of the data.
        complexes: All of the data.
        count: Poses of each.
        steps: Of the sampler.
        seed: Of the noise.
        ode: As for `roll_out`.

    Returns:
        Symmetry-corrected RMSD, Å, of the pose ranked first as the network makes it (``rmsd``) and
        as it is written, with bond lengths put right (``relaxed_rmsd``), and of the best of all
        (``best_rmsd``).
    """
    x, _ = best_poses(model, batch, count, steps, seed=seed, ode=ode)
    found = []
    for row, place in enumerate(batch["index"].tolist()):
        one = complexes[place]
        if not one.molecule.GetNumConformers():
            continue
        poses = x[row, :, : one.molecule.GetNumAtoms()].double().cpu()
        every = [error_of(one, pose) for pose in poses]
        plain = Chem.Mol(one.molecule)
        plain.RemoveAllConformers()
        whole = relaxed(plain, poses[0].numpy(), seed).GetConformer().GetPositions()
        found.append(
            {"rmsd": every[0], "best_rmsd": min(every),
             "relaxed_rmsd": error_of(one, torch.from_numpy(whole))}
        )  # fmt: skip
    return found


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of what `pose_errors` found, and the shares of at most 2 Å."""
    every = {k: np.array([row[k] for row in rows]) for k in rows[0]}
    shares = {f"{k}success": every[f"{k}rmsd"] <= 2 for k in ("", "relaxed_")}
    return {
        **{k: float(np.median(v)) for k, v in every.items()},
        **{k: float(v.mean()) for k, v in shares.items()},
    }


def _near(batch: Batch, x: Tensor) -> Tensor:
    points = torch.cat((batch["side"], x), 1)
    return radial(torch.cdist(points, points))


def _along(values: Tensor, order: Tensor) -> Tensor:
    if values.ndim == 2:
        return values.gather(1, order)
    return values.gather(1, order[..., None].expand_as(values))

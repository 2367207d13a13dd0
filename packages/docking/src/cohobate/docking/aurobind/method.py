# ruff: noqa: B008 (the defaults are frozen dataclasses)
"""AuroBind: structure, self-distillation, fitness, preference, and the student that screens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.core.module import DistillModule
from cohobate.core.training.schedules import Schedule, Step
from cohobate.docking.aurobind import losses, structure
from cohobate.docking.aurobind.average import MovingAverage
from cohobate.docking.aurobind.diffusion import Noise
from cohobate.docking.aurobind.heads import PairRows
from cohobate.docking.aurobind.network import Embedding, StructureModel, Symmetry
from cohobate.docking.aurobind.programs import Kind
from cohobate.docking.aurobind.student import Layout, ReleasedStudent, Score, make_student
from cohobate.docking.aurobind.targets import Answers, ask
from cohobate.docking.data.features import BITS, ELEMENTS, POCKET_CHANNELS, Batch
from cohobate.docking.metrics import ranking

Stage = Literal["structure", "self-distil", "fitness", "preference", "student"]


class AuroBind(DistillModule):
    """One module for all stages; each trains its own part and leaves the earlier ones as they are.

    ``structure``: trunk, pose diffusion, distogram and confidence head from experimental poses.
    ``self-distil``: the same, with half of each batch the model's own confident poses.
    ``fitness``: the fitness head alone, squared error. ``preference``: the fitness head alone,
    Plackett-Luce over the molecules of one target (or pairwise DPO). ``student``: the fast student
    alone, from the teacher's hidden state and fitness.

    ``distill=False`` leaves out the self-labels of stage 2 and the teacher of the last stage.

    Args:
        stage: Which.
        distill: Whether to distil.
        single: Channels of the tokens.
        pair: Channels of the pairs.
        trunk_blocks: Pairformer blocks of the trunk.
        width: Channels of the pose diffusion.
        diffusion_blocks: Its blocks.
        heads: Its attention heads.
        fitness_blocks: Pairformer blocks of the fitness head; the released one has 4.
        fitness_hidden: Units of its networks; the released one has 512.
        confidence_blocks: Pairformer blocks of the confidence head; the released one has 4.
        pair_rows: Pairs the fitness head adds up: ``masked`` as the text says, ``official`` as the
            released code does.
        symmetry: Of the pose diffusion: ``augment`` as published, or exactly equivariant ``e3``.
        noise: Noise levels.
        draws: Noise levels for each pass of the trunk.
        diffusion: Weight of the diffusion loss.
        distogram: Weight of the distogram loss.
        confidence: Weight of the confidence loss.
        confidence_share: Share of each batch that has a confidence loss; it needs a roll-out.
        average: Decay of the weights' moving average in the structure stages, after a warm-up of
            ``(1 + k) / (10 + k)``; poses are sampled with the average, and it goes into the next
            stage.
        sample_steps: Steps of the sampler.
        ode: Whether the test's sampler adds no noise on the way.
        poses: Poses sampled for each complex in the test.
        keep: Which self-labels are used.
        smoothness: λ of the gradient penalty in ``fitness``.
        preference: ``list`` is the paper's loss; ``pairs`` is pairwise DPO.
        tau: τ of the lists.
        ties: ``stable`` or, anew each step, ``shuffle``.
        confidence_weight: Weigh each term of a list by the confidence in the best of the poses
            that the model samples as for self-labels.
        min_confidence: Leave less confident complexes out of the preference; the paper has 0.5 in
            one place and 0.9 in another, for a model that is calibrated.
        mse_anchor: Weight of a squared error beside the preference; 0 as published.
        beta: β of pairwise DPO.
        margin: Least difference of labels of a pair, pK.
        layout: Of the student: the ``paper``'s with the nearest centroid's embedding as prior, or
            as ``released``, where that is one number.
        student_width: Channels of the student; default 128, of the released layout those of
            ``student_weights``, else 1024.
        student_weights: Released checkpoint that a student of the released layout starts from.
        score: Score head of the paper's student.
        centroids: Molecules of each target whose complexes the student knows.
        alpha: Weight of the hidden state.
        label_mix: Share of the measured label in what the student learns, where there is one.
        teacher_files: Folder of another model's answers, instead of the structure model's …
        teacher_kind: … and whose: ``files`` of any (`FilesTeacher`), or the output folder of
            ``boltz``, ``openfold3`` or ``aurobind``.
        teacher_run: How that program is started, to make the answers that are missing, with options
            of it: ``boltz predict --use_msa_server``. It wants an environment of its own.
        hidden: Length of that model's hidden state; default that of the structure model.
        protein_channels: Of the protein embedding, where the data has one of a language model.
        lr: Learning rate of Adam, after a warm-up.
        warmup: Steps until ``lr``.

    References:
        AuroBind, arXiv 2508.02137.
    """

    from_data: ClassVar[tuple[str, ...]] = ("protein_channels",)
    monitor: ClassVar[str] = "val/score"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        stage: Stage = "structure",
        distill: bool = True,
        single: int = 64,
        pair: int = 32,
        trunk_blocks: int = 2,
        width: int = 64,
        diffusion_blocks: int = 4,
        heads: int = 4,
        fitness_blocks: int = 1,
        fitness_hidden: int = 128,
        confidence_blocks: int = 1,
        pair_rows: PairRows = "masked",
        symmetry: Symmetry = "augment",
        noise: Noise = Noise(),
        draws: int = 4,
        diffusion: float = 4.0,
        distogram: float = 0.03,
        confidence: float = 1e-4,
        confidence_share: float = 0.25,
        average: float = 0.999,
        sample_steps: int = 20,
        ode: bool = False,
        poses: int = 1,
        keep: structure.Keep = structure.Keep(),
        smoothness: float = 0.0,
        preference: Literal["list", "pairs"] = "list",
        tau: float = 0.1,
        ties: Literal["stable", "shuffle"] = "stable",
        confidence_weight: bool = False,
        min_confidence: float = 0.0,
        mse_anchor: float = 0.0,
        beta: float = 1.0,
        margin: float = 0.3,
        layout: Layout = "paper",
        student_width: int | None = None,
        student_weights: Path | None = None,
        score: Score = "mlp",
        centroids: int = 16,
        alpha: float = 1.0,
        label_mix: float = 0.0,
        teacher_files: Path | None = None,
        teacher_kind: Kind = "files",
        teacher_run: str | None = None,
        hidden: int | None = None,
        protein_channels: int | None = None,
        lr: float = 1.5e-3,
        warmup: int = 50,
    ) -> None:
        weights: dict[str, float | Schedule] = {
            "diffusion": diffusion, "bond": Step([0.0, diffusion], [2 / 3]),
            "distogram": distogram, "confidence": confidence,
            "mse": mse_anchor if stage == "preference" else 1.0, "hidden": alpha,
        }  # fmt: skip
        super().__init__(distill=distill, weights=weights)
        counts = {"tau": tau, "draws": draws, "centroids": centroids, "poses": poses}
        for name, value in counts.items():
            if value <= 0:
                raise InputError(f"model.{name} {value:g} is not above 0")
        self.network = StructureModel(
            single, pair, trunk_blocks, width, diffusion_blocks, heads, fitness_blocks,
            fitness_hidden, confidence_blocks, pair_rows, symmetry, noise,
        )  # fmt: skip
        self.single, self.hidden = single, hidden or 2 * single
        self.fast = (
            make_student(
                layout, 2 * single, protein_channels or POCKET_CHANNELS, student_width, score,
                self.hidden, student_weights,
            )
            if stage == "student"
            else None
        )  # fmt: skip
        # The released network has no output for a hidden state; what it lacks stays out of it.
        self.adapter: nn.Module = nn.Identity()
        if isinstance(self.fast, ReleasedStudent) and distill:
            self.adapter = nn.Linear(self.fast.width, self.hidden)
        self.stage, self.draws, self.poses = stage, draws, poses
        self.sample_steps, self.ode = sample_steps, ode
        self.average, self.confidence_share = average, confidence_share
        self.keep, self.smoothness = keep, smoothness
        self.preference, self.tau, self.ties = preference, tau, ties
        self.confidence_weight, self.min_confidence = confidence_weight, min_confidence
        self.beta, self.margin = beta, margin
        self.centroids, self.label_mix, self.lr, self.warmup = centroids, label_mix, lr, warmup
        self.mse_anchor, self.protein_channels = mse_anchor, protein_channels
        self.student_weights = student_weights
        self.teacher_files, self.teacher_kind = teacher_files, teacher_kind
        self.teacher_run = teacher_run
        self._freeze()
        self._own: dict[int, Tensor] = {}
        self._answers: Answers | None = None
        self._reference: Tensor | None = None
        self._confidence: Tensor | None = None
        self._seen: list[dict[str, Any]] = []

    # --- what is trained ---------------------------------------------------------------------

    @property
    def student(self) -> nn.Module:
        """The fast student in the last stage, the structure model before."""
        return self.network if self.fast is None else self.fast

    def trained(self) -> nn.Module:
        """The part this stage trains."""
        return self.network.fitness if self.stage in ("fitness", "preference") else self.student

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.trained().requires_grad_(True)
        self.adapter.requires_grad_(True)
        if self.stage in ("structure", "self-distil"):
            self.network.fitness.requires_grad_(False)

    def train(self, mode: bool = True) -> AuroBind:
        """Only what is trained leaves eval mode."""
        super().train(False)
        self.training = mode
        self.trained().train(mode)
        return self

    def load_stage(self, weights: dict[str, Tensor]) -> None:
        """Take an earlier stage's structure model.

        Raises:
            InputError: A tensor is missing or has another shape.
        """
        own = {
            k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")
        }
        for name, tensor in self.network.state_dict().items():
            if name not in own or own[name].shape != tensor.shape:
                raise InputError(f"the earlier stage has no fitting weights for network.{name}")
        self.network.load_state_dict(own)

    def example_input(self) -> tuple[Tensor, ...]:
        """One pair for the student; the structure model itself has no export."""
        if self.fast is None:
            raise InputError(f"stage {self.stage}: only the student of the last stage is exported")
        sizes = BITS, ELEMENTS, *self.fast.channels
        return tuple(torch.ones(1, size) for size in sizes)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The moving average of the structure stages."""
        return [MovingAverage(self.average)] if self.stage in ("structure", "self-distil") else []

    def configure_optimizers(self) -> Any:
        """Adam with warm-up, then a cosine to zero."""
        used = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(used, self.lr, betas=(0.9, 0.95))
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warm = min(self.warmup, total // 4)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(total - warm, 1))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- before training ---------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Ask the teacher once for what this stage learns; the run folder keeps the answers."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "batches_of"):
            return
        self.to(self.trainer.strategy.root_device)
        folder = Path(self.trainer.default_root_dir)
        if self.fast is not None:
            if stage == "fit" and isinstance(self.fast, ReleasedStudent) and self.student_weights:
                self.fast.load_released(self.student_weights)
            self._answers = self._answers or ask(self, data, folder, stage)
        if self.stage == "fitness" and stage == "fit":
            shown = data.places("train", label=True)
            labels = [data.data.complexes[i].label for i in shown]
            if not labels:
                raise InputError("data: no training complex has a label to learn from")
            self.network.fitness.start_at(float(np.mean(labels)))
        if self.stage == "self-distil" and self.distill and stage == "fit":
            self._own = structure.own_poses(
                self.network, data, self.keep, folder / "self_labels.npz", self.device
            )
            data.self_labelled = sorted(self._own)
        if self.stage == "preference" and stage == "fit":
            if self.confidence_weight or self.min_confidence > 0:
                self._confidence = structure.confidences(
                    self.network, data, self.keep, folder / "confidence.npz", self.device
                )
            if self.preference == "pairs":
                self._reference = structure.references(
                    self.network, data, folder / "reference.npz", self.device
                )

    # --- training ----------------------------------------------------------------------------

    def forward_train(self, batch: Batch) -> Any:
        """What the stage's losses need."""
        if self.fast is not None:
            assert self._answers is not None
            prior = self._answers.prior[batch["index"].cpu()].to(self.device)
            return self.fast(batch["bits"], batch["counts"], batch["embedding"], prior)
        if self.stage in ("fitness", "preference"):
            with torch.no_grad():
                known = self.network.trunk(batch)
            s, z = known.s, known.z
            if self.smoothness > 0:
                s, z = s.requires_grad_(), z.requires_grad_()
            return self.network.fitness(s, z, known.mask, known.ligand), (s, z), known
        if self._own:
            batch["pose"] = self._with_own(batch)
        return self.network.trunk(batch)

    def _with_own(self, batch: Batch) -> Tensor:
        pose = batch["pose"].clone()
        for row, place in enumerate(batch["index"].tolist()):
            if place in self._own and bool(pose[row, 0].isnan().any()):
                own = self._own[place]
                pose[row, : len(own)] = own.to(pose)
        return pose

    def task_loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The stage's loss."""
        if self.fast is not None:
            fitness, _ = outputs
            known = batch["label"].isfinite()
            share = self.label_mix if self.distill else 1.0
            if share == 0.0:
                return {}
            return {"label": share * losses.score(fitness, batch["label"].nan_to_num(), known)}
        if self.stage == "fitness":
            fitness, inputs, _ = outputs
            return {
                "mse": losses.sft(fitness, batch["label"], batch["sigma"], inputs, self.smoothness)
            }
        if self.stage == "preference":
            return self._preference(outputs, batch)
        turn = self.network.diffusion.symmetry == "augment"
        terms = structure.structure_terms(self.network, batch, outputs, self.draws, turn)
        terms["distogram"] = structure.distogram_term(self.network, batch, outputs)
        some = max(round(self.confidence_share * len(batch["label"])), 1)
        terms["confidence"] = structure.confidence_term(
            self.network, {k: v[:some] for k, v in batch.items()},
            Embedding(*(v[:some] for v in outputs)), self.sample_steps,
        )  # fmt: skip
        return terms

    def _preference(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        fitness = outputs[0]
        rows, mask = losses.rows_of(batch["list"])
        score, label = fitness[rows], batch["label"][rows]
        weight = None
        if self._confidence is not None:
            confidence = self._confidence[batch["index"].cpu()].to(score)[rows]
            mask = mask & (confidence > self.min_confidence)
            weight = confidence if self.confidence_weight else None
        if self._reference is not None:
            reference = self._reference[batch["index"].cpu()].to(score)[rows]
            found = losses.pairwise_dpo(
                score, reference, label, mask, beta=self.beta, margin=self.margin
            )
        else:
            ties = torch.rand_like(label) if self.ties == "shuffle" else None
            found = losses.plackett_luce(
                score, label, mask, tau=self.tau, confidence=weight, ties=ties
            )
        terms = {"preference": found}
        if self.mse_anchor > 0:
            terms["mse"] = losses.sft(fitness, batch["label"], batch["sigma"])
        return terms

    def distill_loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The student's distance from the teacher: fitness and hidden state."""
        if self.fast is None:
            return {}
        assert self._answers is not None
        fitness, state = outputs
        place = batch["index"].cpu()
        wanted = self._answers.fitness[place].to(fitness)
        # Where a label is mixed in, the teacher keeps the rest of the weight.
        share = 1 - self.label_mix * batch["label"].isfinite()
        return {
            "teacher": (share * (fitness - wanted).abs()).mean(),
            "hidden": losses.hidden(self.adapter(state), self._answers.hidden[place].to(state)),
        }

    # --- evaluation --------------------------------------------------------------------------

    def score(self, batch: Batch) -> Tensor:
        """Predicted pK (B,) of complexes of the data, by the student where there is one."""
        return self.network(batch) if self.fast is None else self.forward_train(batch)[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Negative denoising loss at fixed noise, or the labels' negative RMSE and ranking."""
        if self.stage in ("structure", "self-distil"):
            if not batch["pose"][batch["atom_mask"] > 0].isfinite().all():
                return
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(batch_idx)
                known = self.network.trunk(batch)
                terms = structure.structure_terms(self.network, batch, known, 8, False)
            self.log("val/score", -terms["diffusion"], batch_size=len(batch["label"]))
        else:
            self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        """Ranking inside targets."""
        if self._seen:
            # Few complexes are held out for validation: two of a target are enough to compare.
            found = self._scores(least=2)
            best = -found["rmse"] if self.stage == "fitness" else found["spearman"]
            self.log_dict({"val/score": best, **{f"val/{k}": v for k, v in found.items()}})

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Poses in the structure stages; ranking in the others."""
        if self.stage not in ("structure", "self-distil"):
            self._collect(batch)
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._seen += structure.pose_errors(
            self.network, batch, data.data.complexes, self.poses, self.sample_steps,
            seed=batch_idx, ode=self.ode,
        )  # fmt: skip

    def on_test_epoch_end(self) -> None:
        """Log what was collected."""
        if not self._seen:
            return
        if "rmsd" in self._seen[0]:
            found = structure.summary(self._seen)
            self._seen.clear()
        else:
            found = self._scores()
        self.log_dict({f"test/{k}": v for k, v in found.items()})

    def _collect(self, batch: Batch) -> None:
        known = batch["label"].isfinite()
        values = {"score": self.score(batch), "label": batch["label"], "group": batch["group"]}
        self._seen.append({k: v[known].detach().cpu().numpy() for k, v in values.items()})

    def _scores(self, least: int = 5) -> dict[str, float]:
        score, label, group = (
            np.concatenate([s[k] for s in self._seen]) for k in ("score", "label", "group")
        )
        self._seen.clear()
        rmse = float(np.sqrt(np.mean((score - label) ** 2)))
        return {**ranking(score, label, group, least), "rmse": rmse}

    # --- use ---------------------------------------------------------------------------------

    def predict_files(  # type: ignore[override]
        self,
        inputs: list[Path],
        out: Path,
        *,
        receptor: Path,
        ligand: Path | None = None,
        centre: tuple[float, float, float] | None = None,
        size: tuple[float, float, float] = (20.0, 20.0, 20.0),
        residues: list[str] | None = None,
        max_residues: int | None = None,
        poses: int = 1,
        steps: int = 20,
        seed: int = 0,
        ode: bool = False,
    ) -> list[Path]:
        """Pose molecules in a receptor's pocket: one SDF for each file, best pose first.

        Args:
            inputs: .sdf, .mol2, .smi, .csv or .parquet, also .gz.
            out: Folder for the SDF files, with tags score, pK_pred (from the stage fitness on),
                pK_source, confidence, rank, seed.
            receptor: .pdb, .cif or .pdbqt, also .gz.
            ligand: File of a reference ligand in the site …
            centre: … or the centre of a box, Å …
            size: … and its size …
            residues: … or the site's residues, A:123.
            max_residues: The pocket is cut to these nearest to its centre; default as in training.
            poses: Poses of each molecule.
            steps: Of the sampler.
            seed: Same seed, same file.
            ode: Add no noise on the way; default is the paper's sampler.

        Returns:
            The files written.
        """
        from cohobate.docking.aurobind.predict import Site, pocket_size, predict_poses

        cut = pocket_size(self, max_residues)
        site = Site(receptor, ligand, centre, size, residues, cut)
        return predict_poses(self, inputs, out, site, poses=poses, steps=steps, seed=seed, ode=ode)

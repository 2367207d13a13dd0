"""MACIL-SD: multiple-instance learning, contrast between semi-bags, and a weight merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.avviolence import metrics
from cohobate.avviolence.macil_sd import losses
from cohobate.avviolence.macil_sd.network import AudioVisualNet, VisualNet
from cohobate.avviolence.nets import Streams
from cohobate.core.module import DistillModule

TERMS = losses.Contrast._fields


class MACILSD(DistillModule):
    """Trains the audio-visual network; a visual-only partner trains alongside and is merged in.

    The loss is ``BCE(P, y) + lambda (a2v_b + v2a_b + a2v_n + v2a_n)`` for the audio-visual network
    and ``BCE(P_v, y)`` for the partner, which learns at a fifth of the rate and is never changed by
    the other. After every epoch, or every ``merge_every`` steps, the audio-visual network moves
    towards its partner: ``theta <- m theta + (1 - m) theta_v``.

    ``distill=False`` leaves multiple-instance learning alone: no contrast, no partner.

    Any two networks with the calls of `cohobate.avviolence.nets.TwoStream` and ``VisualStream`` can
    be trained so; parameters of equal name and shape are merged.

    Args:
        visual_width: Width of the visual features.
        audio_width: Width of the audio features.
        visual_extractor: What made the visual features.
        audio_extractor: What made the audio features.
        hidden: Width of the representations.
        heads: Attention heads.
        ffn: Width inside the feed-forward part; ``hidden`` when not given.
        dropout: Dropout everywhere.
        network: Another network to train instead, by class path.
        partner: Its visual-only partner, by class path; none leaves the merge out.
        distill: Whether to contrast and merge.
        merge: Whether to train the partner and merge; contrast alone when false.
        swap_representations: Let audio scores choose visual representations and vice versa, as
            the released training loop does. The paper describes the opposite.
        split_by: Whether a bag counts as violent by the network's prediction or by its label.
        temperature: tau of InfoNCE.
        contrast_weight: Largest lambda.
        ramp_steps: Steps in which lambda grows linearly; by default 0.1 an epoch, from 0.
        merge_every: Steps between merges; by default an epoch.
        merge_start: m of the first merge.
        merges: Number of merges after which m is 1.
        lr: Learning rate of Adam.
        partner_lr_ratio: The partner's learning rate as a share of ``lr``.
        lr_epochs: Epochs in which a cosine takes the rate to 0; by default the whole training, step
            by step.

    References:
        Yu, Liu, Cheng, Feng, Zhang: Modality-Aware Contrastive Instance Learning with
        Self-Distillation for Weakly-Supervised Audio-Visual Violence Detection, ACM MM 2022,
        arXiv 2207.05500.

    Differences:
        One Adam with two groups of parameters stands for the two optimisers of the released code;
        their parameters are disjoint, so the steps are the same.
    """

    from_data: ClassVar[tuple[str, ...]] = (
        "visual_width",
        "audio_width",
        "visual_extractor",
        "audio_extractor",
    )
    monitor: ClassVar[str] = "val/bag_loss"

    def __init__(
        self,
        visual_width: int = 1024,
        audio_width: int = 128,
        visual_extractor: str = "unknown",
        audio_extractor: str = "unknown",
        *,
        hidden: int = 128,
        heads: int = 4,
        ffn: int | None = None,
        dropout: float = 0.1,
        network: nn.Module | None = None,
        partner: nn.Module | None = None,
        distill: bool = True,
        merge: bool = True,
        swap_representations: bool = False,
        split_by: Literal["prediction", "label"] = "prediction",
        temperature: float = 0.1,
        contrast_weight: float = 1.5,
        ramp_steps: int | None = None,
        merge_every: int | None = None,
        merge_start: float = 0.91,
        merges: int = 50,
        lr: float = 4e-4,
        partner_lr_ratio: float = 0.2,
        lr_epochs: int | None = None,
    ) -> None:
        # lambda follows epochs or steps, which the share of the training done does not tell
        super().__init__(distill=distill, weights=dict.fromkeys(TERMS, self._contrast_weight))
        self.widths = (visual_width, audio_width)
        self.extractors = (visual_extractor, audio_extractor)
        sizes: dict[str, Any] = {
            "hidden": hidden,
            "heads": heads,
            "ffn": ffn or hidden,
            "dropout": dropout,
        }
        self.network = network or AudioVisualNet(visual_width, audio_width, **sizes)
        if network is None and partner is None:
            partner = VisualNet(visual_width, **sizes)
        self.partner = partner if distill and merge else None
        self.swap_representations, self.split_by = swap_representations, split_by
        self.temperature = temperature
        self.contrast_weight, self.ramp_steps = contrast_weight, ramp_steps
        self.merge_every, self.merge_start, self.merges = merge_every, merge_start, merges
        self.lr, self.partner_lr_ratio, self.lr_epochs = lr, partner_lr_ratio, lr_epochs
        self._seen: dict[str, list[_Seen]] = {}
        self._peak = 0.0

    @property
    def student(self) -> nn.Module:
        """The audio-visual network."""
        return self.network

    def example_input(self) -> tuple[Tensor, ...]:
        """One bag of 32 snippets."""
        return tuple(torch.randn(1, 32, width) for width in self.widths)

    def open_axes(self) -> tuple[dict[int, str], ...]:
        """Videos have any number of snippets."""
        return ({0: "batch", 1: "snippets"},) * 2

    # --- training ----------------------------------------------------------------------------

    def forward_train(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Score the bags with both networks."""
        streams: Streams = self.network(batch["visual"], batch["audio"])
        outputs = {"streams": streams, "bag": losses.bag_logits(streams.logits, batch["length"])}
        if self.partner is not None:
            visual = self.partner(batch["visual"])
            outputs["visual_bag"] = losses.bag_logits(visual, batch["length"])
        return outputs

    def task_loss(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Binary cross-entropy of the bag probabilities."""
        bags = {"mil": "bag", "visual_mil": "visual_bag"}
        return {
            name: F.binary_cross_entropy_with_logits(outputs[key].float(), batch["label"])
            for name, key in bags.items()
            if key in outputs
        }

    def distill_loss(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The four contrastive terms."""
        streams: Streams = outputs["streams"]
        by_label = self.split_by == "label"
        violent = batch["label"] > 0.5 if by_label else outputs["bag"] > 0
        reps = (streams.audio_rep, streams.visual_rep)
        terms = losses.contrast_semi_bags(
            violent,
            streams.audio_logits,
            streams.visual_logits,
            batch["length"],
            *(reversed(reps) if self.swap_representations else reps),
            temperature=self.temperature,
        )
        return terms._asdict()

    def _contrast_weight(self, progress: float) -> float:
        if self.ramp_steps is None:
            tick = self.current_epoch if self._trainer else 0
            return losses.contrast_weight(tick, most=self.contrast_weight)
        step = self.global_step if self._trainer else 0
        slope = self.contrast_weight / max(self.ramp_steps, 1)
        return losses.contrast_weight(step, slope, self.contrast_weight)

    def after_step(self) -> None:
        """Merge when it is time: before the epoch's evaluation, like the released loop."""
        super().after_step()
        if self.partner is None:
            return
        if self.merge_every is None:
            due, merged = self.trainer.is_last_batch, self.current_epoch
        else:
            # The trainer counts this step only when it has returned.
            merged, rest = divmod(self.trainer.global_step + 1, self.merge_every)
            due, merged = rest == 0, merged - 1
        if due:
            m = losses.merge_coefficient(merged, self.merges, self.merge_start)
            losses.merge_(self.network, self.partner, m)
            self.log("train/m", m)

    def configure_optimizers(self) -> Any:
        """Adam over both networks, each with its own rate, and a cosine to 0."""
        groups = [{"params": list(self.network.parameters()), "lr": self.lr}]
        if self.partner is not None:
            rate = self.lr * self.partner_lr_ratio
            groups.append({"params": list(self.partner.parameters()), "lr": rate})
        optimizer = torch.optim.Adam(groups)
        by_epoch = self.lr_epochs is not None
        length = self.lr_epochs if by_epoch else int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(length or 1, 1))
        interval = "epoch" if by_epoch else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval},
        }

    # --- evaluation --------------------------------------------------------------------------

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a whole video; the second loader, where there is one, holds the test videos."""
        self._score("watch" if dataloader_idx else "val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score a whole video."""
        self._score("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; of the watched test videos remember the best."""
        self._log("val")
        watched = self._log("watch")
        if "ap" in watched:
            self._peak = max(self._peak, watched["ap"])

    def on_test_epoch_end(self) -> None:
        """Log the test metrics, and what choosing the epoch on test data would have reported."""
        self._log("test")
        if self._peak:
            self.log("test/ap_peak", self._peak)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best watched value too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["peak"] = self._peak

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the best watched value back."""
        super().on_load_checkpoint(checkpoint)
        self._peak = checkpoint.get("peak", 0.0)

    def _score(self, split: str, batch: dict[str, Any]) -> None:
        visual = batch["visual"]
        audio = batch["audio"].expand(len(visual), -1, -1)
        logits = self.network(visual, audio).logits.float()
        truth = batch["truth"]
        self._seen.setdefault(split, []).append(
            _Seen(
                metrics.video_scores(logits.cpu().numpy()),
                float(_bag_probability(logits).mean()),
                batch["label"],
                None if truth is None else truth.cpu().numpy(),
            )
        )

    def _log(self, split: str) -> dict[str, float]:
        """Log the metrics of a split's videos and forget the videos."""
        seen = self._seen.pop(split, [])
        if not seen:
            return {}
        found = metrics.bag_metrics(
            np.array([video.probability for video in seen]),
            np.array([video.label for video in seen]),
        )
        truths = [video.truth for video in seen if video.truth is not None]
        if len(truths) == len(seen):
            found |= metrics.frame_metrics([video.scores for video in seen], truths)
        self.log_dict({f"{split}/{name}": value for name, value in found.items()})
        return found

    def predict_files(
        self,
        inputs: list[Path],
        out: Path,
        *,
        threshold: float = 0.5,
        min_length: float = 0.0,
        max_gap: float = 0.0,
        visual: str | None = None,
        audio: str | None = None,
        visual_weights: Path | None = None,
        audio_weights: Path | None = None,
        crops: int = 1,
        picture: bool = True,
        force: bool = False,
    ) -> list[Path]:
        """Score videos, or features of ``extract``.

        Args:
            inputs: Files or folders.
            out: Folder for the results.
            threshold: A snippet counts as violent from this score on.
            min_length: Shorter intervals are dropped, in seconds.
            max_gap: Intervals closer than this are joined, in seconds.
            visual: Visual extractor; the one of the training features when not given.
            audio: Audio extractor; the one of the training features when not given.
            visual_weights: Local weights of the visual extractor.
            audio_weights: Local weights of the audio extractor.
            crops: 1 for the centre, 5 for centre and corners.
            picture: Whether to draw the timeline.
            force: Score features of other extractors than those trained on.

        Returns:
            The files written.
        """
        # Decoders and extractors take seconds to import and are of no use in training.
        from cohobate.avviolence.features.extract import Choice
        from cohobate.avviolence.predict import Rule, score_files

        names = [own.partition("@")[0] for own in self.extractors]
        choice = Choice(
            visual or names[0],
            audio or names[1],
            visual_weights,
            audio_weights,
            crops,
            str(self.device),
        )
        return score_files(
            inputs,
            out,
            network=self.network,
            bag_probability=_bag_probability,
            trained_on=self.extractors,
            widths=self.widths,
            choice=choice,
            rule=Rule(threshold, min_length, max_gap),
            force=force,
            picture=picture,
        )


class _Seen(NamedTuple):
    """An evaluated video."""

    scores: np.ndarray
    probability: float
    label: float
    truth: np.ndarray | None


def _bag_probability(logits: Tensor) -> Tensor:
    """Probability ``(C,)`` of whole videos with logits ``(C, T)``."""
    lengths = torch.full((len(logits),), logits.shape[1], device=logits.device)
    return losses.bag_logits(logits, lengths).sigmoid()

"""The whole loss of D-FINE: which output learns what, from which match, divided by what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cohobate.core.errors import InputError
from cohobate.core.losses import forward_kl
from cohobate.detection.boxes import Targets, overlap, to_xyxy
from cohobate.detection.d_fine.losses import (
    bin_targets,
    decoupled_distillation_focal,
    fine_grained_localization,
    varifocal,
    weighting,
)
from cohobate.detection.d_fine.matching import MatchCost, hungarian, union

Distillation = Literal["go_lsd", "localization", "logits", "none"]
Terms = dict[str, Tensor]


class Outputs(NamedTuple):
    """Predictions of one set of queries, all outputs stacked.

    Attributes:
        logits: ``(O, B, Q, C)`` class logits: of the L decoder layers, then of the others.
        boxes: ``(O, B, Q, 4)`` cxcywh, normalised.
        edges: ``(L, B, Q, 4, N + 1)`` edge logits; None for plain regression.
        reference: ``(B, Q, 4)`` b⁰, the initial box of all layers; None for plain regression.
        others: Names of the outputs after the layers, such as ``pre`` and ``enc_0``.
    """

    logits: Tensor
    boxes: Tensor
    edges: Tensor | None
    reference: Tensor | None
    others: tuple[str, ...]

    @property
    def layers(self) -> int:
        """L."""
        return len(self.logits) - len(self.others)

    def names(self, prefix: str = "") -> list[str]:
        """What is appended to a loss's name for each output, as the official log has it."""
        if prefix:
            return [f"_{prefix}_{n}" for n in (*range(self.layers), *self.others)]
        last = self.layers - 1
        return [*(f"_aux_{n}" for n in range(last)), "", *(f"_{name}" for name in self.others)]


class Pairs(NamedTuple):
    """Queries and objects that were matched for boxes and edges, flat over outputs and images.

    Attributes:
        place: Output, image and query ``(P,)`` of each pair.
        boxes: Ground truth ``(P, 4)`` cxcywh.
        iou: Overlap of the predicted with the true box, ``(P,)``, detached.
        giou: Generalised IoU ``(P,)``, with gradient.
    """

    place: tuple[Tensor, Tensor, Tensor]
    boxes: Tensor
    iou: Tensor
    giou: Tensor


class Matched(NamedTuple):
    """One set of queries with its matches.

    Attributes:
        outputs: The predictions, in float32.
        own: ``(O, B, Q)``: the object of each query in each output's own match, -1 for none.
        shared: The same for boxes and edges: the union where GO-LSD is on.
        pairs: The pairs of ``shared``.
        num_targets: What VFL is divided by.
        num_pairs: What the terms of boxes and edges are divided by.
        prefix: Part of the terms' names.
    """

    outputs: Outputs
    own: Tensor
    shared: Tensor
    pairs: Pairs
    num_targets: Tensor
    num_pairs: Tensor
    prefix: str


@dataclass(frozen=True)
class Criterion:
    """VFL, L1, GIoU and FGL against ground truth; the last layer's lessons to earlier ones.

    All terms come unweighted and by the official names: ``vfl``, ``bbox``, ``giou``, ``fgl`` and
    ``ddf``, then the output. Computed in float32, whatever the network runs in.

    Args:
        distillation: ``go_lsd`` matches boxes by the union over all outputs and adds DDF;
            ``localization`` adds a KL of the last layer's edges over its matched queries;
            ``logits`` a KL of its class logits; ``none`` nothing. All but ``go_lsd`` match each
            output on its own.
        up: a of the weighting function.
        reg_scale: s of the weighting function.
        temperature: T of the distillation.
        cost: Cost of a match.
        alpha: Weight of negatives in VFL.
        gamma: Focus of negatives in VFL.

    References:
        arXiv 2410.13842, equations 5 to 9; Zheng et al. Localization distillation. CVPR 2022,
        arXiv 2102.12252 (``localization``).
    """

    distillation: Distillation = "go_lsd"
    up: float = 0.5
    reg_scale: float = 4.0
    temperature: float = 5.0
    cost: MatchCost = field(default_factory=MatchCost)
    alpha: float = 0.75
    gamma: float = 2.0

    def match(
        self,
        outputs: Outputs,
        targets: Targets,
        denoising: tuple[Outputs, Tensor, int] | None = None,
    ) -> list[Matched]:
        """Match the queries of a batch.

        Args:
            outputs: Of the matching queries.
            targets: The batch's objects.
            denoising: Outputs of the denoising queries, the object of each ``(B, D)``, and the
                number of groups.

        Returns:
            The matching queries, then the denoising ones.

        Raises:
            InputError: A label is not below the number of classes.
        """
        _check_labels(targets, outputs.logits.shape[-1])
        outputs = _float(outputs)
        own = hungarian(self.cost(outputs.logits, outputs.boxes, targets), targets)
        shared = own
        if self.distillation == "go_lsd":
            shared = union(own, targets.labels.shape[1]).expand_as(own)
        total = _over_ranks(own.new_tensor([targets.total, int((shared >= 0).sum())]).float())
        num_targets = total[0].clamp(min=1)
        num_pairs = (total[1] / len(own)).clamp(min=1)
        pairs = _pairs(outputs, shared, targets)
        found = [Matched(outputs, own, shared, pairs, num_targets, num_pairs, "")]
        if denoising is not None:
            noised, match, groups = _float(denoising[0]), denoising[1], denoising[2]
            match = match.expand(len(noised.logits), -1, -1)
            number = num_targets * groups
            pairs = _pairs(noised, match, targets)
            found.append(Matched(noised, match, match, pairs, number, number, "dn"))
        return found

    def task(self, matched: list[Matched], targets: Targets) -> Terms:
        """VFL, L1 and GIoU of every output, FGL of every layer.

        Args:
            matched: From `match`.
            targets: The batch's objects.
        """
        terms: Terms = {}
        for part in matched:
            names = part.outputs.names(part.prefix)
            with torch.autocast(part.outputs.logits.device.type, enabled=False):
                found = {"vfl": self._vfl(part, targets), **self._boxes(part)}
                if part.outputs.edges is not None:
                    found["fgl"] = self._fgl(part)
            terms |= _named(found, names)
        return terms

    def distill(self, matched: list[Matched]) -> Terms:
        """What the last layer teaches the earlier ones, by the name ``ddf``, ``ld`` or ``kd``.

        Args:
            matched: From `match`.
        """
        terms: Terms = {}
        counts = _counts(matched[0].shared)
        for part in matched:
            with torch.autocast(part.outputs.logits.device.type, enabled=False):
                if self.distillation == "go_lsd":
                    found = {"ddf": self._ddf(part, counts)}
                elif self.distillation == "localization":
                    found = {"ld": self._localization(part)}
                elif self.distillation == "logits":
                    found = {"kd": self._logits(part)}
                else:
                    return {}
            terms |= _named(found, part.outputs.names(part.prefix))
        return terms

    # --- the terms, each (outputs,) -----------------------------------------------------------

    def _vfl(self, part: Matched, targets: Targets) -> Tensor:
        logits = part.outputs.logits
        place = (part.own >= 0).nonzero(as_tuple=True)
        image, target = place[1], part.own[place]
        with torch.no_grad():
            found, true = part.outputs.boxes[place], targets.boxes[image, target]
            iou = overlap(to_xyxy(found), to_xyxy(true))[0]
            positive = torch.zeros_like(logits, dtype=torch.bool)
            quality = torch.zeros_like(logits)
            slot = (*place, targets.labels[image, target])
            positive[slot], quality[slot] = True, iou
        loss = varifocal(logits, quality, positive, alpha=self.alpha, gamma=self.gamma)
        return loss.flatten(1).sum(1) / part.num_targets

    def _boxes(self, part: Matched) -> Terms:
        pairs, outputs = part.pairs, len(part.outputs.logits)
        l1 = (part.outputs.boxes[pairs.place] - pairs.boxes).abs().sum(-1)
        both = torch.stack([l1, 1 - pairs.giou], -1)
        total = both.new_zeros(outputs, 2).index_add(0, pairs.place[0], both) / part.num_pairs
        return {"bbox": total[:, 0], "giou": total[:, 1]}

    def _fgl(self, part: Matched) -> Tensor:
        edges, reference = part.outputs.edges, part.outputs.reference
        assert edges is not None
        assert reference is not None
        layer, image, query = part.pairs.place
        among = layer < len(edges)
        layer, image, query = layer[among], image[among], query[among]
        weights = weighting(edges.shape[-1] - 1, self.up, self.reg_scale).to(edges)
        true = to_xyxy(part.pairs.boxes[among])
        target = bin_targets(reference[image, query], true, weights, self.reg_scale)
        loss = fine_grained_localization(edges[layer, image, query], target).sum(-1)
        loss = loss * part.pairs.iou[among]
        return loss.new_zeros(len(edges)).index_add(0, layer, loss) / part.num_pairs

    def _ddf(self, part: Matched, counts: tuple[Tensor, Tensor]) -> Tensor:
        edges, last = part.outputs.edges, part.outputs.layers - 1
        assert edges is not None
        confidence = part.outputs.logits[last].detach().sigmoid().amax(-1)
        weight = confidence.expand(last, -1, -1).clone()
        layer, image, query = part.pairs.place
        among = layer < last
        weight[layer[among], image[among], query[among]] = part.pairs.iou[among]
        loss = decoupled_distillation_focal(
            edges[:last], edges[last], part.shared[last] >= 0, weight, counts,
            temperature=self.temperature,
        )  # fmt: skip
        # the last denoising layer has the term in the official log too, as its own teacher
        return F.pad(loss, (0, 1)) if part.prefix else loss

    def _localization(self, part: Matched) -> Tensor:
        edges, last = part.outputs.edges, part.outputs.layers - 1
        assert edges is not None
        image, query = (part.own[last] >= 0).nonzero(as_tuple=True)
        student, teacher = edges[:last, image, query], edges[last, image, query].detach()
        kl = forward_kl(
            student, teacher.expand_as(student), temperature=self.temperature,
            class_dim=-1, reduction="none",
        )  # fmt: skip
        return kl.flatten(1).sum(1) / (4 * max(len(image), 1))

    def _logits(self, part: Matched) -> Tensor:
        last = part.outputs.layers - 1
        student = part.outputs.logits[:last] / self.temperature
        p = (part.outputs.logits[last].detach() / self.temperature).sigmoid().expand_as(student)
        bce = F.binary_cross_entropy_with_logits(student, p, reduction="none")
        entropy = F.binary_cross_entropy(p, p, reduction="none")
        return self.temperature**2 * (bce - entropy).flatten(1).sum(1) / part.num_targets


def total_by_kind(terms: Terms) -> Terms:
    """Add up the outputs' terms of each kind: ``vfl_aux_0`` and ``vfl_pre`` go to ``vfl``.

    Example:
        >>> one = torch.ones(())
        >>> {k: v.item() for k, v in total_by_kind({"vfl": one, "vfl_pre": one}).items()}
        {'vfl': 2.0}
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, value in terms.items():
        kinds.setdefault(name.partition("_")[0], []).append(value)
    return {kind: torch.stack(values).sum() for kind, values in kinds.items()}


def _named(found: Terms, names: list[str]) -> Terms:
    return dict(_each(found, names))


def _each(found: Terms, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for kind, values in found.items():
        for name, value in zip(names, values.nan_to_num(nan=0.0), strict=False):
            yield f"{kind}{name}", value


def _pairs(outputs: Outputs, match: Tensor, targets: Targets) -> Pairs:
    output, image, query = (match >= 0).nonzero(as_tuple=True)
    place = output, image, query
    true = targets.boxes[image, match[place]]
    iou, giou = overlap(to_xyxy(outputs.boxes[place]), to_xyxy(true))
    return Pairs(place, true, iou.detach(), giou)


def _counts(match: Tensor) -> tuple[Tensor, Tensor]:
    """Matched and unmatched edges of a batch."""
    on = (match[0] >= 0).sum() * 4
    return on, match[0].numel() * 4 - on


def _float(outputs: Outputs) -> Outputs:
    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype == torch.float64 else x.float()

    logits, boxes = cast(outputs.logits), cast(outputs.boxes)
    assert logits is not None
    assert boxes is not None
    return Outputs(logits, boxes, cast(outputs.edges), cast(outputs.reference), outputs.others)


def _over_ranks(total: Tensor) -> Tensor:
    """Mean over the processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total


def _check_labels(targets: Targets, num_classes: int) -> None:
    highest = int(targets.labels.max()) if targets.labels.numel() else 0
    if highest >= num_classes or int(targets.labels.min()) < 0:
        raise InputError(
            f"label {highest} is not below the number of classes, {num_classes}: "
            "class indices run from 0 to C - 1"
        )

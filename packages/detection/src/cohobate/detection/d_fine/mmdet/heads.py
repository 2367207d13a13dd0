"""mmdet's heads with edge distributions; classes, boxes and matches are learnt as configured."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from mmdet.models.dense_heads import DABDETRHead, DeformableDETRHead, DETRHead, DINOHead
from mmdet.models.losses import QualityFocalLoss
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean
from mmengine.model import bias_init_with_prob
from mmengine.structures import InstanceData
from torch import Tensor, nn

from cohobate.detection.boxes import Targets, overlap, pad_targets, to_cxcywh, to_xyxy
from cohobate.detection.d_fine.criterion import Criterion, Matched, Outputs
from cohobate.detection.d_fine.losses import weighting
from cohobate.detection.d_fine.mmdet.refinement import Refined

Losses = dict[str, Tensor]


class FDRHead(DETRHead):
    """What the heads below share.

    Each layer has its own class and box losses of the config. With ``loss_ddf`` the boxes and
    edges of all outputs learn the union of their matches (GO-LSD), without it each output its own.

    Args:
        *args: The parent's.
        reg_max: N, intervals of an edge's distribution.
        up: a of the weighting function.
        reg_scale: s of the weighting function.
        loss_fgl: The loss of the distributions.
        loss_ddf: The self-distillation; None leaves FDR without GO-LSD.
        **kwargs: The parent's.
    """

    pre_branch: Any
    reg_branches: Any

    def __init__(
        self,
        *args: Any,
        reg_max: int = 32,
        up: float = 0.5,
        reg_scale: float = 4.0,
        loss_fgl: Any = {"type": "FineGrainedLocalizationLoss"},  # noqa: B006 (as mmdet has it)
        loss_ddf: Any = {"type": "DecoupledDistillationFocalLoss"},  # noqa: B006
        **kwargs: Any,
    ) -> None:
        self.reg_max, self.up, self.reg_scale = reg_max, up, reg_scale
        super().__init__(*args, **kwargs)
        bins = {"up": up, "reg_scale": reg_scale}
        self.loss_fgl = MODELS.build(loss_fgl, default_args=bins)
        self.loss_ddf = None if loss_ddf is None else MODELS.build(loss_ddf)
        self.criterion = Criterion("none" if loss_ddf is None else "go_lsd")
        self.register_buffer("bins", weighting(reg_max, up, reg_scale), persistent=False)

    def _branch(self, numbers: int) -> nn.Sequential:
        width = self.embed_dims
        hidden = [(nn.Linear(width, width), nn.ReLU()) for _ in range(self.num_reg_fcs)]
        return nn.Sequential(*chain.from_iterable(hidden), nn.Linear(width, numbers))

    def _edge_branches(self, layers: int) -> list[nn.Sequential]:
        self.pre_branch = self._branch(4)
        return [self._branch(4 * (self.reg_max + 1)) for _ in range(layers)]

    def _reset_edges(self) -> None:
        """The first distributions are flat, the initial box is the reference."""
        for branch in (self.pre_branch, *self.reg_branches):
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)

    def classify(self, states: Tensor, layer: int) -> Tensor:
        """Class logits ``(B, Q, C)`` of a layer.

        Args:
            states: Hidden states of all layers ``(L, B, Q, D)``.
            layer: From 0.
        """
        return self.cls_branches[layer](states[layer])

    def forward(self, hidden_states: Tensor, references: Refined) -> tuple[Tensor, Tensor]:
        """Class logits ``(L, B, Q, C)`` and normalised boxes ``(L, B, Q, 4)`` of all layers."""
        layers = range(len(hidden_states))
        return torch.stack([self.classify(hidden_states, n) for n in layers]), references.boxes

    def predict(
        self,
        hidden_states: Tensor,
        references: Refined,
        batch_data_samples: Any,
        rescale: bool = True,
    ) -> Any:
        """Detections of the last layer, as mmdet gives them."""
        logits = self.classify(hidden_states, len(hidden_states) - 1)
        return self.predict_by_feat(
            logits[None],
            references.boxes[-1:],
            batch_img_metas=[sample.metainfo for sample in batch_data_samples],
            rescale=rescale,
        )

    def loss(
        self,
        hidden_states: Tensor,
        references: Refined,
        batch_data_samples: Any,
        enc_outputs_class: Tensor | None = None,
        enc_outputs_coord: Tensor | None = None,
        dn_meta: dict[str, int] | None = None,
    ) -> Losses:
        """Losses by mmdet's names: ``d0.`` is the first layer, ``pre_`` the initial boxes.

        Args:
            hidden_states: ``(L, B, D + Q, width)``, D denoising queries first.
            references: From the decoder.
            batch_data_samples: The batch.
            enc_outputs_class: ``(B, Q, C)`` logits that the queries were chosen by.
            enc_outputs_coord: ``(B, Q, 4)`` the boxes of the choice.
            dn_meta: Numbers of denoising queries and groups.
        """
        logits, _ = self(hidden_states, references)
        sizes = _sizes(batch_data_samples, logits)
        targets = _targets(batch_data_samples, sizes)
        split = 0 if dn_meta is None else int(dn_meta["num_denoising_queries"])
        outputs = _outputs(logits, references, slice(split, None))
        if enc_outputs_class is not None and enc_outputs_coord is not None:
            outputs = outputs._replace(
                logits=torch.cat([outputs.logits, enc_outputs_class[None]]),
                boxes=torch.cat([outputs.boxes, enc_outputs_coord[None]]),
                others=(*outputs.others, "enc"),
            )
        noised = None
        if dn_meta is not None and split:
            groups = int(dn_meta["num_denoising_groups"])
            match = _denoised(targets, split, groups)
            noised = _outputs(logits, references, slice(split)), match, groups
        own = self._assign(outputs, batch_data_samples, sizes)
        matched = self.criterion.match(outputs, targets, noised, own)
        losses: Losses = {}
        with torch.autocast(logits.device.type, enabled=False):
            for part in matched:
                losses |= self._losses(part, targets, sizes, matched[0].counts)
        return losses

    @torch.no_grad()
    def _assign(self, outputs: Outputs, samples: Any, sizes: Tensor) -> Tensor:
        """``(O, B, Q)``: the object of each query by the config's assigner, -1 for none."""
        logits = outputs.logits.float()
        own: list[Tensor] = []
        corners = to_xyxy(outputs.boxes.float()) * sizes[:, None]
        for found in zip(logits.flatten(0, 1), corners.flatten(0, 1), strict=True):
            sample = samples[len(own) % len(samples)]
            result = self.assigner.assign(
                pred_instances=InstanceData(scores=found[0], bboxes=found[1]),
                gt_instances=sample.gt_instances,
                img_meta=sample.metainfo,
            )
            own.append(result.gt_inds - 1)
        return torch.stack(own).reshape(logits.shape[:3])

    def _losses(
        self, part: Matched, targets: Targets, sizes: Tensor, counts: tuple[Tensor, Tensor]
    ) -> Losses:
        dn = "dn_" if part.prefix else ""
        before = [f"d{n}.{dn}" for n in range(part.outputs.layers - 1)]
        names = [*before, dn, *(f"{name}_{dn}" for name in part.outputs.others)]
        losses: Losses = {}
        for n, name in enumerate(names):
            losses[f"{name}loss_cls"] = self._class_loss(n, part, targets)
            losses[f"{name}loss_bbox"], losses[f"{name}loss_iou"] = self._box_losses(n, part, sizes)
        for name, value in zip(names, self.loss_fgl(part), strict=False):
            losses[f"{name}loss_fgl"] = value
        if self.loss_ddf is not None:
            for name, value in zip(names, self.loss_ddf(part, counts), strict=False):
                losses[f"{name}loss_ddf"] = value
        return losses

    def _class_loss(self, n: int, part: Matched, targets: Targets) -> Tensor:
        own, logits = part.own[n], part.outputs.logits[n].flatten(0, 1)
        positive, object_ = own >= 0, own.clamp(min=0)
        labels = targets.labels.gather(1, object_).where(positive, self.num_classes).flatten()
        number = positive.sum().to(logits.dtype)
        number = number + (own.numel() - number) * self.bg_cls_weight
        if self.sync_cls_avg_factor:
            number = reduce_mean(number)
        target: Any = labels
        if isinstance(self.loss_cls, QualityFocalLoss):
            true = targets.boxes.gather(1, object_[..., None].expand(-1, -1, 4))
            iou = overlap(to_xyxy(part.outputs.boxes[n].detach()), to_xyxy(true))[0]
            target = labels, (iou * positive).flatten()
        weight = torch.ones_like(labels, dtype=logits.dtype)
        return self.loss_cls(logits, target, weight, avg_factor=number.clamp(min=1))

    def _box_losses(self, n: int, part: Matched, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The configured losses of normalised cxcywh, and of corners in pixels."""
        output, image, query = part.pairs.place
        here = output == n
        image, true = image[here], part.pairs.boxes[here]
        found, size = part.outputs.boxes[n][image, query[here]], sizes[image]
        pixels = to_xyxy(found) * size, to_xyxy(true) * size
        return (
            self.loss_bbox(found, true, avg_factor=part.num_pairs),
            self.loss_iou(*pixels, avg_factor=part.num_pairs),
        )


@MODELS.register_module()
class FDRDeformableDETRHead(FDRHead, DeformableDETRHead):
    """Head of Deformable-DETR, with one stage or two."""

    def _init_layers(self) -> None:
        super()._init_layers()
        layers = self.num_pred_layer - int(self.as_two_stage)
        proposals = self.reg_branches[layers:]
        self.reg_branches = nn.ModuleList([*self._edge_branches(layers), *proposals])

    def init_weights(self) -> None:
        """As the parent, flat distributions, and small boxes where queries begin as points."""
        super().init_weights()
        self._reset_edges()
        if not self.as_two_stage:
            nn.init.constant_(self.pre_branch[-1].bias[2:], -2.0)

    def loss(
        self,
        hidden_states: Tensor,
        references: Refined,
        batch_data_samples: Any,
        enc_outputs_class: Tensor | None = None,
        enc_outputs_coord: Tensor | None = None,
        dn_meta: dict[str, int] | None = None,
    ) -> Losses:
        """As `FDRHead.loss`.

        The proposals of two stages are boxes of all tokens and learn as the parent's do.
        """
        losses = super().loss(hidden_states, references, batch_data_samples, dn_meta=dn_meta)
        if enc_outputs_class is not None:
            objects = [copy.copy(sample.gt_instances) for sample in batch_data_samples]
            for each in objects:
                each.labels = torch.zeros_like(each.labels)  # an object, of whatever class
            metas = [sample.metainfo for sample in batch_data_samples]
            found = self.loss_by_feat_single(enc_outputs_class, enc_outputs_coord, objects, metas)
            names = ("enc_loss_cls", "enc_loss_bbox", "enc_loss_iou")
            losses |= dict(zip(names, found, strict=True))
        return losses


@MODELS.register_module()
class FDRDINOHead(FDRHead, DINOHead):
    """Head of DINO: the chosen proposals and the denoising queries take part."""

    def _init_layers(self) -> None:
        super()._init_layers()
        layers = self.num_pred_layer - 1
        self.reg_branches = nn.ModuleList([*self._edge_branches(layers), self.reg_branches[-1]])

    def init_weights(self) -> None:
        """As the parent, and flat distributions."""
        super().init_weights()
        self._reset_edges()


@MODELS.register_module()
class FDRDABDETRHead(FDRHead, DABDETRHead):
    """Head of DAB-DETR: one class branch for all layers, edges have one each.

    Args:
        *args: As `FDRHead`.
        num_pred_layer: Decoder layers, given by the detector.
        **kwargs: As `FDRHead`.
    """

    def __init__(self, *args: Any, num_pred_layer: int = 6, **kwargs: Any) -> None:
        self.num_pred_layer = num_pred_layer
        super().__init__(*args, **kwargs)

    def _init_layers(self) -> None:
        super()._init_layers()
        del self.fc_reg
        self.reg_branches = nn.ModuleList(self._edge_branches(self.num_pred_layer))

    def init_weights(self) -> None:
        """As the parent, and flat distributions."""
        if self.loss_cls.use_sigmoid:
            nn.init.constant_(self.fc_cls.bias, bias_init_with_prob(0.01))
        self._reset_edges()

    def classify(self, states: Tensor, layer: int) -> Tensor:
        """Class logits ``(B, Q, C)`` of a layer."""
        return self.fc_cls(states[layer])


def _sizes(samples: Any, like: Tensor) -> Tensor:
    """Width, height, width, height of each image ``(B, 4)``, in pixels without padding."""
    shapes = [(w, h, w, h) for h, w in (sample.img_shape[:2] for sample in samples)]
    return torch.tensor(shapes, device=like.device, dtype=torch.float32)


def _targets(samples: Any, sizes: Tensor) -> Targets:
    objects = [sample.gt_instances for sample in samples]
    boxes = [to_cxcywh(each.bboxes / size) for each, size in zip(objects, sizes, strict=True)]
    return pad_targets([each.labels for each in objects], boxes)


def _outputs(logits: Tensor, refined: Refined, queries: slice) -> Outputs:
    """Of some queries: all layers, then the initial boxes with the first layer's classes."""
    initial = refined.initial[:, queries]
    return Outputs(
        torch.cat([logits, logits[:1]])[:, :, queries],
        torch.cat([refined.boxes[:, :, queries], initial[None]]),
        refined.edges[:, :, queries],
        initial.detach(),
        ("pre",),
    )


def _denoised(targets: Targets, queries: int, groups: int) -> Tensor:
    """``(B, D)``: the object of each denoising query of mmdet's generator, -1 for none."""
    place = torch.arange(queries, device=targets.boxes.device) % (queries // groups)
    positive = place < targets.labels.shape[1]
    target = place.where(positive, 0)
    return target.where(positive & targets.valid[:, target], -1)

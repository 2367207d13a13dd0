"""mmdet's decoders, refining distributions of the edges instead of boxes.

Each gives the hidden states ``(L, B, Q, D)`` and `Refined`.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.layers import (
    DABDetrTransformerDecoder,
    DeformableDetrTransformerDecoder,
    DinoTransformerDecoder,
)
from mmdet.models.layers.transformer.utils import coordinate_to_encoding
from mmdet.registry import MODELS
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.detection.d_fine.mmdet.refinement import Refined, Refinement

_SMALLEST = 1e-3  # the side that DAB-DETR's attention divides by at least


@MODELS.register_module()
class FDRDeformableDetrTransformerDecoder(DeformableDetrTransformerDecoder):
    """Decoder of Deformable-DETR."""

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        reference_points: Tensor,
        valid_ratios: Tensor,
        head: Any,
        **inputs: Any,
    ) -> tuple[Tensor, Refined]:
        """Run all layers.

        Args:
            query: ``(B, Q, D)``.
            query_pos: ``(B, Q, D)``.
            reference_points: ``(B, Q, 4)``, or ``(B, Q, 2)`` with one stage.
            valid_ratios: ``(B, levels, 2)`` width and height that is image, not padding.
            head: The box head.
            **inputs: What the layers take.
        """
        refine, states = Refinement(head, reference_points), []
        for layer in self.layers:
            query = layer(
                query,
                query_pos=query_pos,
                reference_points=_on_levels(reference_points, valid_ratios),
                valid_ratios=valid_ratios,
                **inputs,
            )
            reference_points = refine(query)
            states.append(query)
        return torch.stack(states), refine.result


@MODELS.register_module()
class FDRDinoTransformerDecoder(DinoTransformerDecoder):
    """Decoder of DINO: the position of a query is that of its box."""

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        valid_ratios: Tensor,
        head: Any,
        **inputs: Any,
    ) -> tuple[Tensor, Refined]:
        """Run all layers.

        Args:
            query: ``(B, Q, D)``, denoising queries first.
            reference_points: ``(B, Q, 4)``.
            valid_ratios: ``(B, levels, 2)`` width and height that is image, not padding.
            head: The box head.
            **inputs: What the layers take.
        """
        refine, states = Refinement(head, reference_points), []
        for layer in self.layers:
            places = _on_levels(reference_points, valid_ratios)
            query = layer(
                query,
                query_pos=self.ref_point_head(coordinate_to_encoding(places[:, :, 0])),
                reference_points=places,
                valid_ratios=valid_ratios,
                **inputs,
            )
            states.append(self.norm(query))
            reference_points = refine(states[-1])
        return torch.stack(states), refine.result


@MODELS.register_module()
class FDRDABDetrTransformerDecoder(DABDetrTransformerDecoder):
    """Decoder of DAB-DETR: attention is modulated by the sides of the boxes."""

    def forward(
        self, query: Tensor, key: Tensor, query_pos: Tensor, head: Any, **inputs: Any
    ) -> tuple[Tensor, Refined]:
        """Run all layers.

        Args:
            query: ``(B, Q, D)``.
            key: ``(B, S, D)``.
            query_pos: Boxes before the sigmoid ``(B, Q, 4)``.
            head: The box head.
            **inputs: What the layers take.

        Raises:
            InputError: The queries have no boxes.
        """
        if self.query_dim != 4:
            raise InputError(f"query_dim: FDR refines boxes and needs 4, got {self.query_dim}")
        box = query_pos.sigmoid()
        refine, states = Refinement(head, box), []
        for n, layer in enumerate(self.layers):
            encoded = coordinate_to_encoding(box, num_feats=self.embed_dims // 2)
            query = layer(
                query,
                key,
                query_pos=self.ref_point_head(encoded),
                ref_sine_embed=self._modulated(encoded[..., : self.embed_dims], query, box, n),
                is_first=n == 0,
                **inputs,
            )
            states.append(self.post_norm(query))
            box = refine(states[-1])
        return torch.stack(states), refine.result

    def _modulated(self, encoded: Tensor, query: Tensor, box: Tensor, layer: int) -> Tensor:
        """Encoded centres, y before x, on the scale of the content and the boxes' sides."""
        if self.query_scale_type == "fix_elewise":
            encoded = encoded * self.query_scale.weight[layer]
        elif layer:
            encoded = encoded * self.query_scale(query)
        if self.with_modulated_hw_attn:
            wide, high = (self.ref_anchor_head(query).sigmoid() / _sides(box)).unbind(-1)
            y, x = encoded.chunk(2, -1)
            encoded = torch.cat([y * high[..., None], x * wide[..., None]], -1)
        return encoded


def _sides(box: Tensor) -> Tensor:
    """Width and height; two edges of a refined box may meet or pass each other."""
    return box[..., 2:].clamp(min=_SMALLEST)


def _on_levels(reference: Tensor, valid_ratios: Tensor) -> Tensor:
    """References ``(B, Q, levels, 2 or 4)`` in the padded maps of each level."""
    ratios = valid_ratios.tile(reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]

"""mmdet's detectors with a decoder that refines distributions of the edges."""

from __future__ import annotations

from typing import Any

from mmdet.models import DABDETR, DINO, DeformableDETR
from mmdet.registry import MODELS
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.detection.d_fine.mmdet.decoders import (
    FDRDABDetrTransformerDecoder,
    FDRDeformableDetrTransformerDecoder,
    FDRDinoTransformerDecoder,
)


@MODELS.register_module()
class FDRDeformableDETR(DeformableDETR):
    """Deformable-DETR, with one stage or two.

    Raises:
        InputError: The config has ``with_box_refine=False``.
    """

    decoder: Any

    def _init_layers(self) -> None:
        if not self.with_box_refine:
            raise InputError("FDRDeformableDETR refines in every layer: set with_box_refine=True")
        decoder = self.decoder
        super()._init_layers()
        self.decoder = FDRDeformableDetrTransformerDecoder(**decoder)

    def forward_decoder(self, memory: Tensor, memory_mask: Tensor, **inputs: Any) -> dict[str, Any]:
        """Hidden states and, as ``references``, all layers' boxes and edges."""
        states, refined = self.decoder(
            value=memory, key_padding_mask=memory_mask, head=self.bbox_head, **inputs
        )
        return {"hidden_states": states, "references": refined}


@MODELS.register_module()
class FDRDINO(DINO):
    """DINO."""

    decoder: Any

    def _init_layers(self) -> None:
        decoder = self.decoder
        super()._init_layers()
        self.decoder = FDRDinoTransformerDecoder(**decoder)

    def forward_decoder(
        self,
        query: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        dn_mask: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Hidden states and, as ``references``, all layers' boxes and edges."""
        states, refined = self.decoder(
            query=query,
            value=memory,
            key_padding_mask=memory_mask,
            self_attn_mask=dn_mask,
            head=self.bbox_head,
            **inputs,
        )
        if query.shape[1] == self.num_queries:
            # without an object in the batch: the other processes wait for a gradient all the same
            states = states + 0.0 * self.dn_query_generator.label_embedding.weight[0, 0]
        return {"hidden_states": states, "references": refined}


@MODELS.register_module()
class FDRDABDETR(DABDETR):
    """DAB-DETR.

    Args:
        *args: The parent's.
        decoder: The parent's.
        bbox_head: The parent's.
        **kwargs: The parent's.
    """

    decoder: Any

    def __init__(self, *args: Any, decoder: Any, bbox_head: Any, **kwargs: Any) -> None:
        bbox_head["num_pred_layer"] = decoder["num_layers"]
        super().__init__(*args, decoder=decoder, bbox_head=bbox_head, **kwargs)

    def _init_layers(self) -> None:
        decoder = self.decoder
        super()._init_layers()
        self.decoder = FDRDABDetrTransformerDecoder(**decoder)

    def forward_decoder(
        self,
        query: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        memory_pos: Tensor,
    ) -> dict[str, Any]:
        """Hidden states and, as ``references``, all layers' boxes and edges."""
        states, refined = self.decoder(
            query=query,
            key=memory,
            query_pos=query_pos,
            key_pos=memory_pos,
            key_padding_mask=memory_mask,
            head=self.bbox_head,
        )
        return {"hidden_states": states, "references": refined}

"""The two losses of D-FINE as an mmdet config names them."""

from __future__ import annotations

from mmdet.registry import MODELS
from torch import Tensor, nn

from cohobate.detection.d_fine.criterion import Criterion, Matched


@MODELS.register_module()
class FineGrainedLocalizationLoss(nn.Module):
    """FGL: every layer's edge distributions learn the two bins around the true edges.

    Args:
        loss_weight: Factor.
        up: a of the weighting function; the head gives its own.
        reg_scale: s of the weighting function; the head gives its own.

    References:
        arXiv 2410.13842, equations 5 and 6.
    """

    def __init__(self, loss_weight: float = 0.15, up: float = 0.5, reg_scale: float = 4.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.criterion = Criterion(up=up, reg_scale=reg_scale)

    def forward(self, part: Matched) -> Tensor:
        """``(L,)``, the loss of each layer.

        Args:
            part: Matching or denoising queries with their matches.
        """
        return self.loss_weight * self.criterion.fgl(part)


@MODELS.register_module()
class DecoupledDistillationFocalLoss(nn.Module):
    """DDF: the last layer's edge distributions teach those of all layers before it.

    Args:
        loss_weight: Factor.
        temperature: T.

    References:
        arXiv 2410.13842, equation 8.
    """

    def __init__(self, loss_weight: float = 1.5, temperature: float = 5.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.criterion = Criterion(temperature=temperature)

    def forward(self, part: Matched, counts: tuple[Tensor, Tensor]) -> Tensor:
        """``(L - 1,)``, the loss of each layer but the last.

        Args:
            part: Matching or denoising queries with their matches.
            counts: Matched and unmatched edges of the matching queries.
        """
        taught = part.outputs.layers - 1
        return self.loss_weight * self.criterion.ddf(part, counts)[:taught]

"""Networks that judge images: VGG features for a loss, from local torchvision weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torchvision.models import vgg

from cohobate.core.io import fitting_weights, load_weights

_LAYERS = 15  # up to features[14], the third convolution of block 3, before its ReLU


class VGGFeatures(nn.Module):
    """VGG-19 up to the third convolution of its third block; inputs are not normalised.

    Args:
        weights: torchvision's file of ``vgg19`` (ImageNet); random without.

    Raises:
        InputError: The file does not fit.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["E"], batch_norm=False)[:_LAYERS]
        if weights is not None:
            tensors = load_weights(weights)
            own = {name: tensors[name] for name in tensors if name in self.state_dict()}
            self.load_state_dict(fitting_weights(self, own, weights))

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, 256, H/4, W/4)`` of images ``(B, 3, H, W)``."""
        return self.features(images)

"""Frozen image networks whose pixels teach points: dilated ResNets, DINO transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cohobate.core.errors import InputError
from cohobate.core.io import fitting_weights, load_weights
from cohobate.lidar.nets.pixels import UnitPixels

Architecture = Literal[
    "resnet50", "resnet50-stride32", "resnet18-stride32", "resnet18-half",
    "vit_small_p16", "vit_small_p8", "vit_base_p16", "vit_base_p8",
]  # fmt: skip
WeightsOf = Literal["plain", "moco", "swav", "pixpro", "obow"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Shape(NamedTuple):
    channels: int
    stride: int


SHAPES: dict[str, _Shape] = {
    "resnet50": _Shape(2048, 4),
    "resnet50-stride32": _Shape(2048, 32),
    "resnet18-stride32": _Shape(512, 32),
    "resnet18-half": _Shape(128, 4),
    "vit_small_p16": _Shape(384, 16),
    "vit_small_p8": _Shape(384, 8),
    "vit_base_p16": _Shape(768, 16),
    "vit_base_p8": _Shape(768, 8),
}


class ImageNetwork(nn.Module):
    """Unit features of every pixel: a frozen encoder, a trainable product, upsampling.

    Args:
        architecture: ``resnet50``: strides of the stages 2 to 4 replaced by dilation, output stride
            4; ``resnet…-stride32``: as it is; ``resnet18-half``: its first two stages at output
            stride 4, for small experiments; ``vit_…``: DINO's transformers, patch tokens after the
            last normalisation.
        out_channels: D.
        weights: Local file with the encoder's weights; without, they are random.
        weights_of: Who wrote the file: ``plain`` has the encoder's own names (torchvision, timm,
            DINO), the others wrap them.

    Raises:
        InputError: The file does not fit.

    References:
        Sautier et al., arXiv:2203.16258, section 3.3; Caron et al., arXiv:2104.14294 (DINO).
    """

    def __init__(
        self,
        architecture: Architecture = "resnet50",
        out_channels: int = 64,
        weights: Path | None = None,
        weights_of: WeightsOf = "plain",
    ) -> None:
        super().__init__()
        shape = SHAPES[architecture]
        self.architecture = architecture
        self.encoder = _encoder(architecture)
        if weights is not None:
            self.encoder.load_state_dict(encoder_weights(self.encoder, weights, weights_of))
        self.decoder = ImageHead(shape.channels, out_channels, shape.stride)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    mean: Tensor
    std: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → (B, C, H / stride, W / stride)."""
        return self.encoder((images - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → unit features (B, D, H, W)."""
        return self.decoder(self.encode(images)).dense()


class ImageHead(nn.Sequential):
    """A product on every place of the encoder's grid; features of pixels lie between them.

    Args:
        in_channels: C of the encoder.
        out_channels: D.
        scale: Pixels a place, along either axis.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 1))
        self.scale = scale

    def forward(self, features: Tensor) -> UnitPixels:
        """(B, C, h, w) → unit features (B, D, scale·h, scale·w), bilinear, not held."""
        # Channels last: whole feature vectors are then read without a copy.
        coarse = self[0](features.contiguous(memory_format=torch.channels_last))
        height, width = coarse.shape[2:]
        return UnitPixels(coarse, (self.scale * height, self.scale * width))


def encoder_weights(encoder: nn.Module, path: Path, weights_of: WeightsOf) -> dict[str, Tensor]:
    """Read an encoder's weights out of what a self-supervised method saved.

    Args:
        encoder: The network they shall fit.
        path: The file.
        weights_of: Who wrote it.

    Returns:
        Tensors under the encoder's own names.

    Raises:
        InputError: A weight is missing or has another shape.
    """
    prefix, dropped = {
        "plain": ("", ("fc.", "head.")),
        "moco": ("module.encoder_q.", ("fc.",)),
        "swav": ("module.", ("projection_head.", "prototypes.")),
        "pixpro": ("module.encoder.", ()),
        "obow": ("", ("fc.",)),
    }[weights_of]
    found = load_weights(path) if weights_of != "obow" else _network_entry(path)
    renamed = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    own = {k: v for k, v in renamed.items() if not k.startswith(dropped)}
    if not own:
        raise InputError(f"{path}: has no tensor named {prefix}…; is it from {weights_of}?")
    return fitting_weights(encoder, own, path)


def _network_entry(path: Path) -> dict[str, Tensor]:
    from cohobate.core.io import load_checkpoint

    content = load_checkpoint(path).get("network")
    if not isinstance(content, dict):
        raise InputError(f"{path}: has no entry 'network'; is it from obow?")
    return content


def _encoder(architecture: str) -> nn.Module:
    if architecture.startswith("vit"):
        return dino_encoder(architecture)
    return ResNetEncoder(architecture)


class ResNetEncoder(torchvision.models.ResNet):
    """A ResNet without pooling and classifier, under torchvision's names.

    Args:
        architecture: One of `Architecture` that starts with ``resnet``.
    """

    def __init__(self, architecture: str) -> None:
        kind, _, form = architecture.partition("-")
        if kind == "resnet50":
            super().__init__(Bottleneck, [3, 4, 6, 3], replace_stride_with_dilation=[not form] * 3)
        else:
            super().__init__(BasicBlock, [2, 2, 2, 2])
        del self.fc, self.avgpool
        if form == "half":
            del self.layer3, self.layer4
            first = self.layer2[0]
            first.conv1.stride = first.downsample[0].stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) → (B, C, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def dino_encoder(architecture: str) -> nn.Module:
    """Patch tokens of a vision transformer, under the names that DINO and timm share.

    Position embeddings are interpolated by a factor of (size + 0.1) / 14, as DINO does; timm alone
    would resize to the exact size.

    Args:
        architecture: ``vit_small_p16`` and the like.
    """
    size, patch = architecture.split("_")[1], int(architecture.rsplit("p", 1)[1])
    network = timm.create_model(
        f"vit_{size}_patch{patch}_224", num_classes=0, dynamic_img_size=True
    )
    network.__class__ = type("DinoEncoder", (_DinoForward, type(network)), {})
    return network


class _DinoForward:
    """Replaces a timm transformer's forward pass."""

    patch_embed: nn.Module
    blocks: nn.Module
    norm: nn.Module
    cls_token: Tensor
    pos_embed: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) → (B, C, H / patch, W / patch)."""
        tokens = self.patch_embed(images)  # (B, h, w, C)
        batch, height, width, channels = tokens.shape
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        square = self.pos_embed[:, 1:].reshape(1, side, side, channels).permute(0, 3, 1, 2)
        if (height, width) != (side, side):
            factors = ((height + 0.1) / side, (width + 0.1) / side)
            square = F.interpolate(square, scale_factor=factors, mode="bicubic")
        tokens = (tokens + square.permute(0, 2, 3, 1)).flatten(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        tokens = self.norm(self.blocks(torch.cat((first, tokens), 1)))[:, 1:]
        return tokens.mT.unflatten(2, (height, width))

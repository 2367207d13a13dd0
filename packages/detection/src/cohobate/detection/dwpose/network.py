"""RTMPose: the CSPNeXt backbone and the RTMCC head, under the names of released weights.

References:
    Jiang et al., RTMPose, arXiv 2303.07399; Lyu et al., RTMDet (CSPNeXt), arXiv 2212.07784; Hua et
    al., Transformer Quality in Linear Time (gated attention unit), arXiv 2202.10447.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.detection.dwpose.codec import SPLIT
from cohobate.detection.dwpose.losses import SimCC

Variant = Literal["x", "l", "m", "s", "t", "mini", "micro"]

# factors of width and depth; the last two are not in the paper, they are for CPUs and tests
VARIANTS: dict[Variant, tuple[float, float]] = {
    "x": (1.25, 1.33), "l": (1.0, 1.0), "m": (0.75, 0.67), "s": (0.5, 0.33), "t": (0.375, 0.167),
    "mini": (0.25, 0.167), "micro": (0.125, 0.167),
}  # fmt: skip
STRIDE = 32


def channels_of(variant: Variant) -> int:
    """Channels of the last feature map.

    Example:
        >>> channels_of("l"), channels_of("t")
        (1024, 384)
    """
    return int(1024 * VARIANTS[variant][0])


class RTMPose(nn.Module):
    """Key points of one person in the middle of an image.

    Args:
        variant: Size of the backbone.
        points: K.
        size: Width and height of the input, multiples of 32.
        hidden: Width of the head.
        attention: Width of the head's queries and keys.

    Raises:
        InputError: The size is no multiple of 32.
    """

    def __init__(
        self, variant: Variant, points: int, size: Sequence[int], hidden: int = 256,
        attention: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        width, height = size
        if width % STRIDE or height % STRIDE or min(size) < STRIDE:
            raise InputError(f"size: needs two multiples of {STRIDE}, got {width} × {height}")
        self.size = (width, height)
        self.backbone = CSPNeXt(*VARIANTS[variant])
        cells = width // STRIDE * (height // STRIDE)
        self.head = RTMCCHead(
            self.backbone.channels, points, self.size, cells, hidden=hidden, attention=attention
        )

    def forward(self, input: Tensor) -> SimCC:
        """Logits of normalised images ``(B, 3, height, width)``."""
        return self.head(self.backbone(input))


# --- backbone ------------------------------------------------------------------------------------


class ConvModule(nn.Module):
    """Convolution without bias, batch normalisation, SiLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)
        self.activate = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the input's size over the stride."""
        return self.activate(self.bn(self.conv(x)))


class _Separable(nn.Module):
    """Depthwise, then pointwise convolution."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(channels, channels, kernel, groups=channels)
        self.pointwise_conv = ConvModule(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class _Block(nn.Module):
    def __init__(self, channels: int, add: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3)
        self.conv2 = _Separable(channels, 5)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        return out + x if self.add else out


class _ChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.act = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.act(self.fc(x.mean((2, 3), keepdim=True)))


class _CSPLayer(nn.Module):
    """Half of the channels pass the blocks; both halves are weighed by channel and joined."""

    def __init__(self, channels: int, blocks: int, add: bool) -> None:
        super().__init__()
        half = channels // 2
        self.main_conv = ConvModule(channels, half, 1)
        self.short_conv = ConvModule(channels, half, 1)
        self.final_conv = ConvModule(2 * half, channels, 1)
        self.blocks = nn.Sequential(*(_Block(half, add) for _ in range(blocks)))
        self.attention = _ChannelAttention(2 * half)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.blocks(self.main_conv(x)), self.short_conv(x)], 1)
        return self.final_conv(self.attention(joined))


class _SPP(nn.Module):
    """Max pools of three sizes beside the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvModule(channels, half, 1)
        self.poolings = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (5, 9, 13))
        self.conv2 = ConvModule(4 * half, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(torch.cat([x, *(pool(x) for pool in self.poolings)], 1))


class CSPNeXt(nn.Module):
    """The backbone; its last map has a 32nd of the input's sides.

    Args:
        widen: Factor of the channels.
        deepen: Factor of the blocks.
    """

    def __init__(self, widen: float, deepen: float) -> None:
        super().__init__()
        c = [int(n * widen) for n in (64, 128, 256, 512, 1024)]
        self.channels = c[-1]
        self.stem = nn.Sequential(
            ConvModule(3, c[0] // 2, 3, 2), ConvModule(c[0] // 2, c[0] // 2, 3),
            ConvModule(c[0] // 2, c[0], 3),
        )  # fmt: skip
        for n, depth in enumerate((3, 6, 6, 3)):
            last = n == 3
            layers: list[nn.Module] = [ConvModule(c[n], c[n + 1], 3, 2)]
            if last:
                layers.append(_SPP(c[n + 1]))
            layers.append(_CSPLayer(c[n + 1], max(round(depth * deepen), 1), add=not last))
            setattr(self, f"stage{n + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, C, height / 32, width / 32)`` of images ``(B, 3, height, width)``."""
        x = self.stem(x)
        for n in range(1, 5):
            x = getattr(self, f"stage{n}")(x)
        return x


# --- head ----------------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """A vector divided by its length, times one learned number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Of the last axis."""
        length = x.norm(dim=-1, keepdim=True) * self.scale
        return x / length.clamp(min=1e-5) * self.g


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class GatedAttention(nn.Module):
    """Gated attention unit over the key points, with a scaled shortcut.

    Args:
        width: Of the tokens.
        attention: Width of queries and keys.
    """

    def __init__(self, width: int, attention: int) -> None:
        super().__init__()
        self.parts = (2 * width, 2 * width, attention)
        self.gamma = nn.Parameter(torch.rand(2, attention))
        self.beta = nn.Parameter(torch.rand(2, attention))
        self.o = nn.Linear(2 * width, width, bias=False)
        self.uv = nn.Linear(width, sum(self.parts), bias=False)
        self.ln = ScaleNorm(width)
        self.act = nn.SiLU(inplace=True)
        self.res_scale = _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, K, width)`` of tokens of the same shape."""
        u, v, base = self.act(self.uv(self.ln(x))).split(self.parts, -1)
        q, k = (base[:, :, None] * self.gamma + self.beta).unbind(2)
        kernel = (q @ k.transpose(1, 2) * self.parts[2] ** -0.5).relu().square()
        return self.res_scale(x) + self.o(u * (kernel @ v))


class RTMCCHead(nn.Module):
    """SimCC logits of a feature map.

    Args:
        channels: Of the map.
        points: K.
        size: Width and height of the network's input.
        cells: Places of the map.
        kernel: Side of the convolution.
        hidden: Width of the tokens.
        attention: Width of queries and keys.
    """

    def __init__(
        self, channels: int, points: int, size: Sequence[int], cells: int, *, kernel: int = 7,
        hidden: int = 256, attention: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.final_layer = nn.Conv2d(channels, points, kernel, padding=kernel // 2)
        self.mlp = nn.Sequential(ScaleNorm(cells), nn.Linear(cells, hidden, bias=False))
        self.gau = GatedAttention(hidden, attention)
        self.cls_x = nn.Linear(hidden, SPLIT * size[0], bias=False)
        self.cls_y = nn.Linear(hidden, SPLIT * size[1], bias=False)
        nn.init.normal_(self.final_layer.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)  # type: ignore[arg-type]
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)

    def forward(self, features: Tensor) -> SimCC:
        """Logits of features ``(B, C, h, w)``."""
        tokens = self.gau(self.mlp(self.final_layer(features).flatten(2)))
        return SimCC(self.cls_x(tokens), self.cls_y(tokens))

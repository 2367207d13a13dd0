"""The correction network: two reversed rolling-shutter images in, three global-shutter frames out.

Names of the parts are those of the released weights, so that these load as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.video.warp import backward_warp

FRAMES = 3  # at 0, t and 1


class Corrected(NamedTuple):
    """What the network gives.

    Attributes:
        frames: Global-shutter frames at 0, t and 1, ``(B, 3, 3, H, W)`` in [0, 1].
        flows: Half-size flows of each level, coarse to fine, ``(B, 12, H/2, W/2)``: from the three
            frames into t2b, then into b2t, x and y each.
    """

    frames: Tensor
    flows: tuple[Tensor, ...]


class CorrectionNet(nn.Module):
    """Estimates the motion that row times explain, then merges both warped images.

    Args:
        scales: Shrinking of each flow block's input, coarse to fine.
        widths: Channels of each flow block.
        depth: Convolutions inside a flow block.
        features: Channels n of context and synthesis; the small synthesis has no context.
        small: One small U-net for the synthesis.
        double_encode_first: Encode the first level's flow twice in all later levels, as the
            released code does by an operation in place.
        start_at_average: Start with no flow and no residual: the first output is the plain average
            of both images.

    References:
        Shang et al., arXiv 2305.19862, section 3.2; the network is IFED's (Zhong et al., ECCV 2022,
        arXiv 2203.06451).
    """

    def __init__(
        self,
        scales: tuple[int, ...] = (8, 4, 2, 1),
        widths: tuple[int, ...] = (192, 128, 96, 48),
        depth: int = 6,
        features: int = 32,
        small: bool = False,
        double_encode_first: bool = True,
        start_at_average: bool = False,
    ) -> None:
        super().__init__()
        self.flow_net = FlowNet(scales, widths, depth, double_encode_first)
        self.multiple = 4 * max(scales)
        """Height and width must be a multiple of this."""
        self.warped_context_net = None if small else ContextNet(features)
        self.ife_net = SmallSynthesisNet(features) if small else SynthesisNet(features)
        if start_at_average:
            self.flow_net.start_at_zero()
            for tensor in self.ife_net.conv1[0].parameters():
                nn.init.zeros_(tensor)

    def forward(self, images: Tensor, encoding: Tensor) -> Tensor:
        """The frames alone, ``(B, 3, 3, H, W)``; arguments as for `correct`."""
        return self.correct(images, encoding).frames

    def correct(self, images: Tensor, encoding: Tensor) -> Corrected:
        """Frames and flows.

        Args:
            images: t2b and b2t, ``(B, 2, 3, H, W)`` in [0, 1].
            encoding: Row times less frame times, ``(B, 6, H, 1)`` or ``(B, 6, H, W)``.
        """
        encoding = encoding.to(images.dtype).expand(-1, -1, -1, images.shape[-1])
        flows = self.flow_net(images, encoding)
        last = flows[-1].unflatten(1, (2, -1))
        context: list[tuple[Tensor, Tensor]] = []
        if self.warped_context_net is not None:
            # Both directions share the weights: one pass over twice the batch.
            found = self.warped_context_net(images.flatten(0, 1), last.flatten(0, 1))
            context = [level.unflatten(0, (-1, 2)).unbind(1) for level in found]
        flow = enlarge(flows[-1])
        warped = warp_both(images, flow)
        out = self.ife_net(torch.cat((warped, flow.to(warped.dtype)), 1), context).float()
        residual = out[:, : 3 * FRAMES].sigmoid().mul(2).sub(1).unflatten(1, (FRAMES, 3))
        share = out[:, 3 * FRAMES :].sigmoid()[:, :, None]
        t2b, b2t = warped.float().unflatten(1, (2, FRAMES, 3)).unbind(1)
        frames = (share * t2b + (1 - share) * b2t + residual).clamp(0, 1)
        return Corrected(frames.to(images.dtype), flows)


def preset(name: str, double_encode_first: bool = True) -> CorrectionNet:
    """A network by name: ``paper`` (28.8 M parameters) or ``tiny`` (0.4 M, for a CPU)."""
    if name == "tiny":
        return CorrectionNet((4, 2, 1), (32, 24, 16), 4, 16, True, double_encode_first, True)
    return CorrectionNet(double_encode_first=double_encode_first)


class FlowNet(nn.Module):
    """Flows from each of the three frames into both images, coarse to fine."""

    def __init__(
        self, scales: tuple[int, ...], widths: tuple[int, ...], depth: int, double_encode: bool
    ) -> None:
        super().__init__()
        self.levels, self.double_encode = len(scales), double_encode
        inputs = 6 + 2 * FRAMES  # images and encoding
        for level, (scale, width) in enumerate(zip(scales, widths, strict=True)):
            self.add_module(f"block{level}", FlowBlock(inputs, scale, width, depth))
            self.add_module(f"conv{level}", nn.Sequential(nn.Conv2d(4 * FRAMES, 4 * FRAMES, 1)))
            inputs = 12 * FRAMES  # warped images, encoding, flow

    def start_at_zero(self) -> None:
        """Make every flow 0 and the 1×1 convolutions the identity."""
        for level in range(self.levels):
            for tensor in self.get_submodule(f"block{level}.conv1").parameters():
                nn.init.zeros_(tensor)
            mix = self.get_submodule(f"conv{level}.0")
            nn.init.dirac_(mix.get_parameter("weight"))
            nn.init.zeros_(mix.get_parameter("bias"))

    def forward(self, images: Tensor, encoding: Tensor) -> tuple[Tensor, ...]:
        """Half-size flows of each level, float32."""
        half = F.interpolate(encoding, scale_factor=0.5, mode="bilinear").float()
        factor = half.repeat_interleave(2, 1)  # each map for x and y of its flow
        flows: list[Tensor] = []
        total: Tensor | None = None
        seen = torch.cat((images.flatten(1, 2), encoding), 1)
        for level in range(self.levels):
            if flows:
                flow = enlarge(flows[-1])
                warped = warp_both(images, flow)
                seen = torch.cat((warped, encoding, flow.to(warped.dtype)), 1)
            found = self.get_submodule(f"block{level}")(seen).float()
            total = found if total is None else total + found
            encoded = factor * total
            if level == 0 and self.double_encode:
                total = encoded
            flows.append(self.get_submodule(f"conv{level}")(encoded).float())
        return tuple(flows)


class FlowBlock(nn.Module):
    """Looks at a shrunk input, gives flows at half of the input's size."""

    def __init__(self, inputs: int, scale: int, width: int, depth: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv0 = nn.Sequential(_conv(inputs, width, 2), _conv(width, 2 * width, 2))
        self.convblock = nn.Sequential(*(_conv(2 * width, 2 * width) for _ in range(depth)))
        self.conv1 = nn.ConvTranspose2d(2 * width, 4 * FRAMES, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Flows ``(B, 12, H/2, W/2)``."""
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=1 / self.scale, mode="bilinear")
        flow = self.conv1(self.convblock(self.conv0(x)))
        if self.scale > 1:
            flow = F.interpolate(flow, scale_factor=float(self.scale), mode="bilinear")
        return flow


class ContextNet(nn.Module):
    """Features of one image at four sizes, each warped by the three flows and fused."""

    def __init__(self, n: int) -> None:
        super().__init__()
        widths = (n, 2 * n, 4 * n, 8 * n)
        self.conv0_0 = _Down(3, n)
        for level, (before, width) in enumerate(zip((n, *widths), widths, strict=False), 1):
            self.add_module(f"conv{level}_0", _Down(before, width))
            self.add_module(f"conv{level}_1", _conv(FRAMES * width, width, kernel=1))

    def forward(self, image: Tensor, flow: Tensor) -> list[Tensor]:
        """Features at 1/4, 1/8, 1/16, 1/32.

        Args:
            image: ``(B, 3, H, W)``.
            flow: Half-size flows, ``(B, 6, H/2, W/2)``.
        """
        x, found = self.conv0_0(image), []
        for level in range(1, 5):
            x = self.get_submodule(f"conv{level}_0")(x)
            flow = F.interpolate(flow, scale_factor=0.5, mode="bilinear") * 0.5
            found.append(self.get_submodule(f"conv{level}_1")(backward_warp(x, flow)))
        return found


class SynthesisNet(nn.Module):
    """U-net over warped images and flows that takes in the contexts on its way down."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv0, self.down0 = _Down(10 * FRAMES, n), _Down(n, 2 * n)
        self.down1, self.down2 = _Down(4 * n, 4 * n), _Down(8 * n, 8 * n)
        self.down3 = _Down(16 * n, 16 * n)
        self.up0, self.up1 = _up(32 * n, 8 * n), _up(16 * n, 4 * n)
        self.up2, self.up3 = _up(8 * n, 2 * n), _up(4 * n, n)
        self.conv1 = _up(n, 4 * FRAMES)

    def forward(self, x: Tensor, context: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Residuals and shares before their sigmoids, ``(B, 12, H, W)``."""
        d0 = self.down0(self.conv0(x))
        d1 = self.down1(torch.cat((d0, *context[0]), 1))
        d2 = self.down2(torch.cat((d1, *context[1]), 1))
        d3 = self.down3(torch.cat((d2, *context[2]), 1))
        out = self.up0(torch.cat((d3, *context[3]), 1))
        out = self.up1(torch.cat((out, d2), 1))
        out = self.up2(torch.cat((out, d1), 1))
        return self.conv1(self.up3(torch.cat((out, d0), 1)))


class SmallSynthesisNet(nn.Module):
    """The same on two levels and without contexts."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv0, self.down0 = _Down(10 * FRAMES, n), _Down(n, 2 * n)
        self.up0, self.conv1 = _up(2 * n, n), _up(2 * n, 4 * FRAMES)

    def forward(self, x: Tensor, context: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Residuals and shares before their sigmoids, ``(B, 12, H, W)``."""
        top = self.conv0(x)
        return self.conv1(torch.cat((self.up0(self.down0(top)), top), 1))


class _Down(nn.Module):
    """Halves the size."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(before, after, 2), _conv(after, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


def enlarge(flows: Tensor) -> Tensor:
    """Flows of half size at full size, values doubled."""
    return 2 * F.interpolate(flows, scale_factor=2.0, mode="bilinear")


def warp_both(images: Tensor, flows: Tensor) -> Tensor:
    """Warp t2b by the first and b2t by the second half of flows.

    Args:
        images: ``(B, 2, 3, H, W)``.
        flows: ``(B, 12, H, W)``.

    Returns:
        ``(B, 18, H, W)``, t2b first.
    """
    return (
        backward_warp(images.flatten(0, 1), flows.unflatten(1, (2, -1)).flatten(0, 1))
        .unflatten(0, (-1, 2))
        .flatten(1, 2)
    )


def _conv(before: int, after: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, kernel // 2), nn.PReLU(after))


def _up(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(before, after, 4, 2, 1), nn.PReLU(after))

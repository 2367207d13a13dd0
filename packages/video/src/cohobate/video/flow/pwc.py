"""PWC-Net in the layout of the released weights, with the correlation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.video.warp import masked_warp

_LEVELS = {"One": 16, "Two": 32, "Thr": 64, "Fou": 96, "Fiv": 128, "Six": 196}
_DECODER = (128, 128, 96, 64, 32)
_REACH = 4  # of the correlation, in pixels
_VOLUME = (2 * _REACH + 1) ** 2
_FLOW_SCALE = 20.0  # the network's unit, in pixels of the full size


class PWCNet(nn.Module):
    """Optical flow between two images of any size.

    Args:
        official_warp: Warp features as the released code does, shifted by up to half a pixel.

    References:
        Sun, Yang, Liu, Kautz: PWC-Net, CVPR 2018, arXiv 1709.02371; layout of the PyTorch
        reimplementation by S. Niklaus.
    """

    def __init__(self, *, official_warp: bool = False) -> None:
        super().__init__()
        self.moduleNetwork = _Network(official_warp)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow from the first image to the second.

        Args:
            first: ``(B, 3, H, W)`` in [0, 1].
            second: The same.

        Returns:
            ``(B, 2, H, W)``.
        """
        return self.pairs(torch.stack((first, second), 1), ((0, 1),))[:, 0]

    def pairs(self, frames: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
        """Flows of several pairs of frames; features of each frame are computed once.

        Args:
            frames: ``(B, N, 3, H, W)``.
            pairs: Numbers of the frames.

        Returns:
            ``(B, len(pairs), 2, H, W)``.
        """
        b, n, _, h, w = frames.shape
        height, width = -(-h // 64) * 64, -(-w // 64) * 64
        resized = F.interpolate(frames.flatten(0, 1).float(), (height, width), mode="bilinear")
        flow = self.moduleNetwork(resized, n, pairs)
        flow = F.interpolate(flow, (h, w), mode="bilinear").view(b, len(pairs), 2, h, w)
        unit = flow.new_tensor([w / width, h / height]) * _FLOW_SCALE
        return flow * unit[:, None, None]


class _Network(nn.Module):
    def __init__(self, official_warp: bool) -> None:
        super().__init__()
        self.moduleExtractor = _Extractor()
        for name in ("Two", "Thr", "Fou", "Fiv", "Six"):
            self.add_module(f"module{name}", _Decoder(name, official_warp))
        self.moduleRefiner = _Refiner()

    def forward(self, frames: Tensor, n: int, pairs: tuple[tuple[int, int], ...]) -> Tensor:
        first, second = [list(side) for side in zip(*pairs, strict=True)]
        pyramid = self.moduleExtractor(frames)
        flow = features = None
        for name in ("Six", "Fiv", "Fou", "Thr", "Two"):
            level = pyramid[name].unflatten(0, (-1, n))
            one, other = level[:, first].flatten(0, 1), level[:, second].flatten(0, 1)
            flow, features = self.get_submodule(f"module{name}")(one, other, flow, features)
        return flow + self.moduleRefiner(features)


class _Extractor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        before = 3
        for name, width in _LEVELS.items():
            layers: list[nn.Module] = []
            for step in range(3):
                conv = nn.Conv2d(width if step else before, width, 3, 1 if step else 2, 1)
                layers += [conv, nn.LeakyReLU(0.1)]
            self.add_module(f"module{name}", nn.Sequential(*layers))
            before = width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name in _LEVELS:
            found[name] = x = self.get_submodule(f"module{name}")(x)
        return found


class _Decoder(nn.Module):
    def __init__(self, level: str, official_warp: bool) -> None:
        super().__init__()
        self.official_warp = official_warp
        names = list(_LEVELS)
        place = names.index(level)
        width = _VOLUME
        if level != "Six":
            width += _LEVELS[level] + 2 + 2
            coarser = _VOLUME if place == 4 else _VOLUME + _LEVELS[names[place + 1]] + 4
            self.moduleUpflow = nn.ConvTranspose2d(2, 2, 4, 2, 1)
            self.moduleUpfeat = nn.ConvTranspose2d(coarser + sum(_DECODER), 2, 4, 2, 1)
            self.unit = _FLOW_SCALE / 2 ** (place + 1)  # pixels of this level
        for name, after in zip(_LEVELS, _DECODER, strict=False):
            conv = nn.Conv2d(width, after, 3, 1, 1)
            self.add_module(f"module{name}", nn.Sequential(conv, nn.LeakyReLU(0.1)))
            width += after
        self.moduleSix = nn.Sequential(nn.Conv2d(width, 2, 3, 1, 1))

    def forward(
        self, one: Tensor, other: Tensor, flow: Tensor | None, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if flow is None:
            x = F.leaky_relu(correlation(one, other), 0.1)
        else:
            flow, features = self.moduleUpflow(flow), self.moduleUpfeat(features)
            warped, _ = masked_warp(other, flow * self.unit, official=self.official_warp)
            x = torch.cat((F.leaky_relu(correlation(one, warped), 0.1), one, flow, features), 1)
        for name in list(_LEVELS)[:5]:
            x = torch.cat((self.get_submodule(f"module{name}")(x), x), 1)
        return self.moduleSix(x), x


class _Refiner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = _VOLUME + 32 + 4 + sum(_DECODER)
        for after, dilation in ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1)):
            conv = nn.Conv2d(before, after, 3, 1, dilation, dilation)
            layers += [conv, nn.LeakyReLU(0.1)]
            before = after
        self.moduleMain = nn.Sequential(*layers, nn.Conv2d(before, 2, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.moduleMain(x)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Mean product of features with those up to four pixels away.

    Args:
        one: ``(B, C, H, W)``.
        other: The same.

    Returns:
        ``(B, 81, H, W)``; channel ``9 (dy + 4) + dx + 4``, 0 outside the image.
    """
    h, w = one.shape[-2:]
    padded = F.pad(other, [_REACH] * 4)
    return torch.stack(
        [
            (one * padded[..., dy : dy + h, dx : dx + w]).mean(1)
            for dy in range(2 * _REACH + 1)
            for dx in range(2 * _REACH + 1)
        ],
        1,
    )

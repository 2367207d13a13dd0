"""Residual U-Nets on sparse voxels: Res16UNet34C with its official names, and smaller ones."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.core.errors import InputError
from cohobate.lidar.sparse import Backend, BasicBlock, Grid, KernelMap, Norm, Pointwise, SparseConv


class ResUNet(nn.Module):
    """A U-Net of residual blocks on sparse voxels.

    A stem at full resolution; for each width in ``encoder`` a convolution with stride 2 and blocks;
    for each width in ``decoder`` a transposed convolution back, the skip, and blocks; one product
    to ``out_channels``. Parameters are named as in MinkowskiEngine's networks, so the defaults load
    the official Res16UNet34C (37.85 million parameters with 64 outputs).

    Args:
        in_channels: Features of a voxel.
        out_channels: D, outputs of a voxel.
        stem: Width of the stem.
        encoder: Width of each stage on the way down.
        encoder_blocks: Blocks of each of them.
        decoder: Width of each stage on the way up.
        decoder_blocks: Blocks of each of them.
        momentum: Batch-normalisation momentum outside the residual blocks.
        normalize: Whether outputs are scaled to norm 1.
        backend: What computes the sparse convolutions.

    Raises:
        InputError: Encoder and decoder do not have the same number of stages.

    References:
        Choy, Gwak, Savarese, "4D Spatio-Temporal ConvNets", 2019, arXiv:1904.08755.
        Sautier et al., arXiv:2203.16258, section 4.1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 64,
        stem: int = 32,
        encoder: tuple[int, ...] = (32, 64, 128, 256),
        encoder_blocks: tuple[int, ...] = (2, 3, 4, 6),
        decoder: tuple[int, ...] = (256, 128, 96, 96),
        decoder_blocks: tuple[int, ...] = (2, 2, 2, 2),
        momentum: float = 0.05,
        normalize: bool = False,
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        stages = len(encoder)
        if {len(encoder_blocks), len(decoder), len(decoder_blocks)} != {stages}:
            raise InputError(
                f"network: {stages} encoder stages need as many encoder_blocks, decoder widths and "
                "decoder_blocks"
            )
        self.normalize, self.stages, self.in_channels = normalize, stages, in_channels
        self.conv0p1s1 = SparseConv(in_channels, stem, 27, backend=backend)
        self.bn0 = Norm(stem, momentum)
        self._down: list[tuple[str, str, str]] = []
        self._up: list[tuple[str, str, str]] = []

        def add(name: str, module: nn.Module) -> str:
            self.add_module(name, module)
            return name

        def blocks(name: str, width: int, out: int, count: int) -> str:
            widths = [width, *[out] * count]
            made = [BasicBlock(a, b, momentum, backend) for a, b in pairwise(widths)]
            return add(name, nn.ModuleList(made))

        width, skips = stem, [stem]
        for i, (out, count) in enumerate(zip(encoder, encoder_blocks, strict=True), start=1):
            conv = SparseConv(width, width, 8, backend=backend)
            self._down.append(
                (
                    add(f"conv{i}p{2 ** (i - 1)}s2", conv),
                    add(f"bn{i}", Norm(width, momentum)),
                    blocks(f"block{i}", width, out, count),
                )
            )
            skips.append(out)
            width = out
        for i, (out, count) in enumerate(zip(decoder, decoder_blocks, strict=True), start=stages):
            conv = SparseConv(width, out, 8, transposed=True, backend=backend)
            self._up.append(
                (
                    add(f"convtr{i}p{2 ** (2 * stages - i)}s2", conv),
                    add(f"bntr{i}", Norm(out, momentum)),
                    blocks(f"block{i + 1}", out + skips[2 * stages - 1 - i], out, count),
                )
            )
            width = out
        self.final = Pointwise(width, out_channels, bias=True)

    @property
    def out_channels(self) -> int:
        """D."""
        return self.final.kernel.shape[1]

    def forward(self, coordinates: Tensor, features: Tensor) -> Tensor:
        """Compute an output for every voxel.

        Args:
            coordinates: Batch index and three axes of each voxel (N, 4), integers, none twice.
            features: (N, in_channels).

        Returns:
            (N, D) in the order of the input.
        """
        if torch.compiler.is_exporting():
            raise InputError(
                "a sparse network has no ONNX form (its maps depend on the voxels); "
                "export safetensors or hub"
            )
        _check(coordinates, features, self.in_channels)
        grid, order = Grid.of(coordinates)
        out = self.on_grid(grid, features.index_select(0, order))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return out.index_select(0, back)

    def on_grid(self, grid: Grid, features: Tensor) -> Tensor:
        """The same on a grid that exists, features and outputs in its order."""
        x = self.bn0(self.conv0p1s1(features, grid.neighbours())).relu_()
        skips: list[Tensor] = []
        levels: list[tuple[Grid, KernelMap]] = []
        for conv, norm, blocks in self._down:
            skips.append(x)
            finer, (grid, down) = grid, grid.coarser()
            levels.append((finer, down))
            x = self._unit(x, conv, norm, down)
            x = self._blocks(x, blocks, grid)
        for conv, norm, blocks in self._up:
            finer, down = levels.pop()
            x = self._unit(x, conv, norm, down.transposed())
            x = self._blocks(torch.cat((x, skips.pop()), 1), blocks, finer)
        out = self.final(x)
        return F.normalize(out, dim=1) if self.normalize else out

    def _unit(self, x: Tensor, conv: str, norm: str, pairs: KernelMap) -> Tensor:
        return self.get_submodule(norm)(self.get_submodule(conv)(x, pairs)).relu_()

    def _blocks(self, x: Tensor, name: str, grid: Grid) -> Tensor:
        for block in self.get_submodule(name).children():
            x = block(x, grid.neighbours())
        return x


def _check(coordinates: Tensor, features: Tensor, channels: int) -> None:
    if not len(coordinates):
        raise InputError("coordinates: no voxel at all")
    if features.shape != (len(coordinates), channels):
        raise InputError(
            f"features: {tuple(features.shape)} for {len(coordinates)} voxels, expected "
            f"({len(coordinates)}, {channels})"
        )

"""The U-Net of `bench_sparse` in spconv's own layers."""

from __future__ import annotations

from itertools import pairwise

import spconv.pytorch as sp
import spconv.pytorch.ops
import torch
from torch import Tensor, nn

from cohobate.lidar.nets import ResUNet

if not torch.cuda.is_available():  # its backward pass asks for a CUDA stream all the same
    spconv.pytorch.ops.get_current_stream = lambda: 0
NATIVE = sp.ConvAlgo.Native
Sparse = sp.SparseConvTensor


class SpconvUNet(nn.Module):
    """Three levels, one residual block a stage, as `ResUNet` with the same widths."""

    def __init__(self, stem: int, encoder: tuple[int, ...], decoder: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = sp.SubMConv3d(1, stem, 3, bias=False, indice_key="same0", algo=NATIVE)
        self.stem_norm = nn.BatchNorm1d(stem)
        widths = (stem, *encoder)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (a, b) in enumerate(pairwise(widths), start=1):
            conv = sp.SparseConv3d(a, a, 2, 2, bias=False, indice_key=f"down{level}", algo=NATIVE)
            self.down.append(nn.ModuleList([conv, nn.BatchNorm1d(a), _Block(a, b, level)]))
        for place, (a, b) in enumerate(pairwise((widths[-1], *decoder))):
            level = len(encoder) - place
            conv = sp.SparseInverseConv3d(a, b, 2, f"down{level}", bias=False, algo=NATIVE)
            block = _Block(b + widths[level - 1], b, level - 1)
            self.up.append(nn.ModuleList([conv, nn.BatchNorm1d(b), block]))
        self.final = nn.Linear(decoder[-1], 64)

    def take(self, ours: ResUNet) -> None:
        """Copy the weights of our network, which are stored in the same order."""
        with torch.no_grad():
            for mine, theirs in zip(ours.parameters(), self.parameters(), strict=True):
                if theirs.dim() == 5:  # (C_out, kernel, C_in); our first axis is the fastest
                    edge = round(len(mine) ** (1 / 3))
                    mine = mine.reshape(edge, edge, edge, *mine.shape[1:]).permute(4, 2, 1, 0, 3)
                elif theirs.dim() == 2:
                    mine = mine.T
                theirs.copy_(mine.reshape(theirs.shape))

    def forward(self, coordinates: Tensor, features: Tensor) -> Tensor:
        """Rows (N, 64) in the order of the input; spconv wants coordinates from 0."""
        places = coordinates.int()
        low = places[:, 1:].amin(0)
        places[:, 1:] -= low - low % 4  # so that halving meets the same cells
        shape = (places[:, 1:].amax(0) // 4 * 4 + 4).tolist()
        x = Sparse(features, places, shape, int(places[:, 0].max()) + 1)
        x = _on(x, self.stem, self.stem_norm)
        skips = []
        for conv, norm, block in self.down:
            skips.append(x)
            x = block(_on(x, conv, norm))
        for conv, norm, block in self.up:
            x = _on(x, conv, norm)
            x = block(x.replace_feature(torch.cat((x.features, skips.pop().features), 1)))
        return self.final(x.features)


class _Block(nn.Module):
    def __init__(self, a: int, b: int, level: int) -> None:
        super().__init__()
        key = {"bias": False, "indice_key": f"same{level}", "algo": NATIVE}
        self.conv1, self.norm1 = sp.SubMConv3d(a, b, 3, **key), nn.BatchNorm1d(b)
        self.conv2, self.norm2 = sp.SubMConv3d(b, b, 3, **key), nn.BatchNorm1d(b)
        self.around = nn.Sequential(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b))
        if a == b:
            self.around = nn.Sequential()

    def forward(self, x: Sparse) -> Sparse:
        around = self.around(x.features)
        x = self.conv2(_on(x, self.conv1, self.norm1))
        return x.replace_feature((self.norm2(x.features) + around).relu_())


def _on(x: Sparse, conv: nn.Module, norm: nn.Module) -> Sparse:
    x = conv(x)
    return x.replace_feature(norm(x.features).relu_())

"""Which voxel meets which: active cells of one resolution and the kernel maps between them.

Cells are 64-bit keys in ascending order, so a neighbour is one addition and one binary search:
there is no hash table and nothing to compile. Each map is made once and kept with its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from cohobate.core.errors import InputError

BITS = 16
SIDE = 1 << BITS
ORIGIN = SIDE // 2
"""Stored value of coordinate 0; even, so that halving a stored value rounds down as it should."""

Triple = tuple[int, int, int]


class KernelMap(NamedTuple):
    """Pairs of rows for every element of a kernel.

    Attributes:
        inputs: For each of the K elements the rows read (P_k,).
        outputs: For each of the K elements the rows added to (P_k,); no row twice in one element.
        size_in: Number of input rows.
        size_out: Number of output rows.
        centre: The element that maps every row to itself, where there is one.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    size_in: int
    size_out: int
    centre: int | None = None

    def transposed(self) -> KernelMap:
        """The same pairs the other way round: the map of the transposed convolution."""
        return KernelMap(self.outputs, self.inputs, self.size_out, self.size_in, self.centre)


class Grid:
    """The active cells of one resolution.

    Args:
        keys: Packed coordinates (N,), ascending, each once.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self._maps: dict[object, KernelMap] = {}
        self._coarser: tuple[Grid, KernelMap] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, coordinates: Tensor) -> tuple[Grid, Tensor]:
        """Sort coordinates into a grid.

        Args:
            coordinates: Batch index and three axes (N, 4), integers; axes may be negative.

        Returns:
            The grid, and the order (N,): row i of the grid is row ``order[i]`` of the coordinates.

        Raises:
            InputError: Shape, range, or two rows with the same coordinates.
        """
        keys, order = pack(coordinates).sort()
        if bool((keys[1:] == keys[:-1]).any()):
            row = int((keys[1:] == keys[:-1]).nonzero()[0, 0])
            place = coordinates[order[row]].tolist()
            raise InputError(f"coordinates: {place} stands there twice; a voxel is one row")
        return cls(keys), order

    def coordinates(self) -> Tensor:
        """Batch index and three axes (N, 4)."""
        return unpack(self.keys)

    def neighbours(self) -> KernelMap:
        """3 × 3 × 3 around every cell; element k is the offset (k % 3, k // 3 % 3, k // 9) − 1.

        The first axis varies fastest. Half of the elements are searched, the others mirror them.
        """
        return self._cached("neighbours", self._neighbours)

    def _neighbours(self) -> KernelMap:
        rows = torch.arange(len(self), device=self.keys.device)
        pairs = [(rows, rows)] * 27
        for k in range(14, 27):
            shift = _shift((k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1))
            found, there = self.find(self.keys + shift)
            here = found.nonzero().flatten()
            there = there.index_select(0, here)
            pairs[k], pairs[26 - k] = (there, here), (here, there)
        size = len(self)
        inputs, outputs = zip(*pairs, strict=True)
        return KernelMap(inputs, outputs, size, size, 13)

    def coarser(self) -> tuple[Grid, KernelMap]:
        """Every 2 × 2 × 2 cells become one; element k is the place (k % 2, k // 2 % 2, k // 4).

        Returns:
            The grid of half the resolution, and the map of the convolution with stride 2 onto it.
        """
        if self._coarser is None:
            fields = _fields(self.keys)
            parents = _join([fields[0], *((axis >> 1) + ORIGIN // 2 for axis in fields[1:])])
            keys, parent = parents.unique(return_inverse=True)
            element = (fields[1] & 1) + 2 * (fields[2] & 1) + 4 * (fields[3] & 1)
            inputs = tuple((element == k).nonzero().flatten() for k in range(8))
            outputs = tuple(parent.index_select(0, rows) for rows in inputs)
            self._coarser = Grid(keys), KernelMap(inputs, outputs, len(self), len(keys))
        return self._coarser

    def strided(
        self, size: Triple, stride: Triple, padding: Triple, shape: Triple
    ) -> tuple[Grid, KernelMap]:
        """Any kernel on a box of cells, as in a dense convolution.

        An output is active where any input under the kernel is. Element k counts the last axis
        fastest, as a dense kernel laid flat.

        Args:
            size: Kernel size along each axis.
            stride: Stride along each axis.
            padding: Zeros around the box along each axis.
            shape: Size of the *output* box; outputs outside are left out.

        Returns:
            The grid of the outputs, and the map onto it.
        """
        batch, *axes = _fields(self.keys)
        axes = [axis - ORIGIN for axis in axes]
        rows, outputs = [], []
        for offset in product(*map(range, size)):
            shifted = [a + p - o for a, p, o in zip(axes, padding, offset, strict=True)]
            inside = torch.ones_like(batch, dtype=torch.bool)
            for axis, step, extent in zip(shifted, stride, shape, strict=True):
                inside &= (axis % step == 0) & (axis >= 0) & (axis < extent * step)
            here = inside.nonzero().flatten()
            places = [
                a.index_select(0, here) // s + ORIGIN for a, s in zip(shifted, stride, strict=True)
            ]
            rows.append(here)
            outputs.append(_join([batch.index_select(0, here), *places]))
        keys, found = torch.cat(outputs).unique(return_inverse=True)
        split = found.split([len(part) for part in outputs])
        return Grid(keys), KernelMap(tuple(rows), split, len(self), len(keys))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Where keys stand in the grid.

        Args:
            keys: Packed coordinates (M,).

        Returns:
            Which of them are active (M,), and their rows (M,), arbitrary where not.
        """
        place = torch.searchsorted(self.keys, keys).clamp_(max=max(len(self) - 1, 0))
        if not len(self):
            return torch.zeros_like(keys, dtype=torch.bool), place
        return self.keys.index_select(0, place) == keys, place

    def _cached(self, name: object, make: object) -> KernelMap:
        if name not in self._maps:
            self._maps[name] = make()  # type: ignore[operator]
        return self._maps[name]


def pack(coordinates: Tensor) -> Tensor:
    """One 64-bit key for each cell, in the order of (batch, first, second, third axis).

    Args:
        coordinates: Batch index in [0, 32768) and three axes within ±32766, integers (N, 4).

    Raises:
        InputError: Shape, type or range.

    Example:
        >>> pack(torch.tensor([[0, -1, 0, 0], [0, 0, 0, 0]])).diff().tolist()
        [4294967296]
    """
    if coordinates.dim() != 2 or coordinates.shape[1] != 4 or coordinates.is_floating_point():
        raise InputError(
            f"coordinates: {tuple(coordinates.shape)} {coordinates.dtype}, expected integers "
            "(N, 4) with the batch index first"
        )
    wide = coordinates.long()
    if len(wide) and not torch.compiler.is_compiling():
        low, high = wide.amin(0), wide.amax(0)
        far = max(-int(low[1:].min()), int(high[1:].max()))
        # one cell is kept free on either side, so that a neighbour never carries into another axis
        if far > ORIGIN - 2 or int(low[0]) < 0 or int(high[0]) >= ORIGIN:
            raise InputError(
                f"coordinates: from {low.tolist()} to {high.tolist()}; voxels must lie within "
                f"±{ORIGIN - 2}: is the voxel size right, is a point far away?"
            )
    return _join([wide[:, 0], *(wide[:, axis] + ORIGIN for axis in (1, 2, 3))])


def unpack(keys: Tensor) -> Tensor:
    """Coordinates (N, 4) of packed keys (N,)."""
    batch, *axes = _fields(keys)
    return torch.stack([batch, *(axis - ORIGIN for axis in axes)], 1)


def _fields(keys: Tensor) -> list[Tensor]:
    return [(keys >> (BITS * place)) & (SIDE - 1) for place in (3, 2, 1, 0)]


def _join(fields: Sequence[Tensor]) -> Tensor:
    total = fields[0]
    for field in fields[1:]:
        total = (total << BITS) + field
    return total


def _shift(offset: Triple) -> int:
    return (offset[0] * SIDE + offset[1]) * SIDE + offset[2]

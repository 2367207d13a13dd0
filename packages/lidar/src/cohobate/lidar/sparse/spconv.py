"""The same convolution by the library spconv (or spconv-triton), on our own kernel maps."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cohobate.core.errors import InputError
from cohobate.lidar.sparse.geometry import KernelMap


def convolve(features: Tensor, kernel: Tensor, pairs: KernelMap) -> Tensor:
    """As `cohobate.lidar.sparse.ops.sparse_conv`, which checks the arguments.

    Args:
        features: Rows (N, C_in).
        kernel: (K, C_in, C_out).
        pairs: Which rows meet.

    Raises:
        InputError: spconv is not installed, or would compute something wrong.
    """
    library = _library()
    if features.dtype == torch.float64:
        raise InputError("backend spconv: float64 is not computed; use float32, or backend torch")
    if not features.is_cuda and torch.get_num_threads() > 1:
        # its threads add to the same rows at once, and some of the sums are lost
        raise InputError(
            "backend spconv: on a CPU it is right with one thread only; set OMP_NUM_THREADS=1, "
            "or use backend torch"
        )
    indices, counts = _indices(pairs, features.device)
    # spconv's filters are (C_out, three kernel axes, C_in)
    filters = kernel.permute(2, 0, 1)[:, :, None, None, :].contiguous()
    algorithm = library.core.ConvAlgo.Native
    return library.pytorch.functional.indice_conv(
        features.contiguous(), filters, indices, counts, pairs.size_out, algorithm
    )


@cache
def _library() -> Any:
    try:
        import spconv
        import spconv.pytorch
        import spconv.pytorch.functional
        import spconv.pytorch.ops
    except ImportError:
        raise InputError(
            "backend spconv: the library is not installed (pip install cohobate-lidar[spconv])"
        ) from None
    if not torch.cuda.is_available() and hasattr(spconv.pytorch.ops, "get_current_stream"):
        # Its backward pass asks for the CUDA stream even in the build without CUDA.
        spconv.pytorch.ops.get_current_stream = lambda: 0
    return spconv


_MADE: dict[int, tuple[Any, Tensor, Tensor]] = {}


def _indices(pairs: KernelMap, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map as spconv keeps it: pairs (2, K, N) padded with −1, and their counts (K,)."""
    key = id(pairs.inputs)
    if key in _MADE and _MADE[key][0]() is pairs.inputs[0]:
        return _MADE[key][1:]
    sizes = [len(rows) for rows in pairs.inputs]
    indices = torch.full((2, len(sizes), max(sizes)), -1, dtype=torch.int32, device=device)
    for k, size in enumerate(sizes):
        indices[0, k, :size] = pairs.inputs[k]
        indices[1, k, :size] = pairs.outputs[k]
    counts = torch.tensor(sizes, dtype=torch.int32, device=device)
    for old in [k for k, (alive, *_) in _MADE.items() if alive() is None]:
        del _MADE[old]
    _MADE[key] = (weakref.ref(pairs.inputs[0]), indices, counts)
    return indices, counts

"""Sparse 3-D convolution in plain PyTorch."""

from cohobate.lidar.sparse.geometry import Grid, KernelMap
from cohobate.lidar.sparse.layers import BasicBlock, Norm, Pointwise, SparseConv
from cohobate.lidar.sparse.ops import Backend, sparse_conv

__all__ = [
    "Backend",
    "BasicBlock",
    "Grid",
    "KernelMap",
    "Norm",
    "Pointwise",
    "SparseConv",
    "sparse_conv",
]

"""Networks: sparse ones for points, frozen ones for images."""

from cohobate.lidar.nets.build import Network, build
from cohobate.lidar.nets.image import Architecture, ImageHead, ImageNetwork, WeightsOf
from cohobate.lidar.nets.pixels import UnitPixels
from cohobate.lidar.nets.unet import ResUNet
from cohobate.lidar.nets.voxelnet import VoxelNet

__all__ = [
    "Architecture",
    "ImageHead",
    "ImageNetwork",
    "Network",
    "ResUNet",
    "UnitPixels",
    "VoxelNet",
    "WeightsOf",
    "build",
]

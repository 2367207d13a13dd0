"""Networks: sparse ones for points, frozen ones for images."""

from cohobate.lidar.nets.image import ImageHead, ImageNetwork
from cohobate.lidar.nets.unet import ResUNet
from cohobate.lidar.nets.voxelnet import VoxelNet

__all__ = ["ImageHead", "ImageNetwork", "ResUNet", "VoxelNet"]

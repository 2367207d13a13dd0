"""Sweeps, images, labels: readers, pairing, superpixels, the simulator, data modules."""

from cohobate.lidar.data.module import ImageCloudData, LabelledCloudData
from cohobate.lidar.data.nuscenes import Frame, NuScenes
from cohobate.lidar.data.projection import Camera, Pairing, pair
from cohobate.lidar.data.sets import Batch, Intensity
from cohobate.lidar.data.simulator import Simulator
from cohobate.lidar.data.superpixels import Precomputed, Slic, Superpixels
from cohobate.lidar.data.transforms import Augment
from cohobate.lidar.data.voxels import Voxels, voxelize

__all__ = [
    "Augment",
    "Batch",
    "Camera",
    "Frame",
    "ImageCloudData",
    "Intensity",
    "LabelledCloudData",
    "NuScenes",
    "Pairing",
    "Precomputed",
    "Simulator",
    "Slic",
    "Superpixels",
    "Voxels",
    "pair",
    "voxelize",
]

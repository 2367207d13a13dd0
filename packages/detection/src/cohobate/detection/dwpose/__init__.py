"""DWPose: whole-body pose by two stages of distillation (arXiv 2307.15880)."""

from cohobate.detection.dwpose.codec import decode, encode, flip_back
from cohobate.detection.dwpose.data import PoseData
from cohobate.detection.dwpose.keypoints import BODY, WHOLEBODY, KeypointSet, to_openpose
from cohobate.detection.dwpose.losses import SimCC, feature_loss, simcc_distillation, simcc_loss
from cohobate.detection.dwpose.method import DWPose
from cohobate.detection.dwpose.network import RTMPose

__all__ = [
    "BODY",
    "WHOLEBODY",
    "DWPose",
    "KeypointSet",
    "PoseData",
    "RTMPose",
    "SimCC",
    "decode",
    "encode",
    "feature_loss",
    "flip_back",
    "simcc_distillation",
    "simcc_loss",
    "to_openpose",
]

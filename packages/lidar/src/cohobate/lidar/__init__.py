"""Lidar networks taught by cameras: papers, data, sparse networks, metrics."""

__version__ = "0.1.0"

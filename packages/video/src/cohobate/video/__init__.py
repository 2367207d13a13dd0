"""Rolling-shutter video: papers, networks, data, warping, metrics."""

__version__ = "0.1.0"

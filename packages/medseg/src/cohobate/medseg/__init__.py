"""Medical image segmentation: papers, data readers, networks and metrics of the domain."""

__version__ = "0.1.0"

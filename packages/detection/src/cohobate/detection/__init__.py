"""Object detection: papers, data readers, COCO metrics and drawing of the domain."""

__version__ = "0.1.0"

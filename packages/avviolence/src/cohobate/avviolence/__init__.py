"""Weakly supervised audio-visual violence detection: papers, features, data, metrics."""

__version__ = "0.1.0"

"""Proteins and small molecules: papers, readers, docking, screening, metrics."""

__version__ = "0.1.0"

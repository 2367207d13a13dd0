"""Fitness aligned structural modeling enables scalable virtual screening (arXiv:2508.02137)."""

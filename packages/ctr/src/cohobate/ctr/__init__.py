"""Click-through rate on behaviour sequences: papers, streaming data, networks and metrics."""

__version__ = "0.1.0"

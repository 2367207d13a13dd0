"""Bags of snippet features: the published layout, own features, and a seeded synthetic set."""

from cohobate.avviolence.data.bags import BagData
from cohobate.avviolence.data.features import Features, read_features, write_features
from cohobate.avviolence.data.synthetic import SyntheticBags

__all__ = ["BagData", "Features", "SyntheticBags", "read_features", "write_features"]

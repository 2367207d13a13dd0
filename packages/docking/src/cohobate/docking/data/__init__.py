"""Receptors, ligands, libraries and complexes."""

from cohobate.docking.data.module import ComplexData, Lists, Split

__all__ = ["ComplexData", "Lists", "Split"]

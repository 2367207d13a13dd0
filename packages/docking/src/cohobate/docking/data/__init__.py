"""Receptors, ligands, libraries and complexes."""

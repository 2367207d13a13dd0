"""What buyers filter by."""

from __future__ import annotations

import pytest
from rdkit import Chem

from cohobate.docking.data.features import bit_vector
from cohobate.docking.properties import Filters


@pytest.mark.parametrize("ion", ["[Na+]", "OS(=O)(=O)C(F)(F)F", "[Br-].[K+]"])
def test_counter_ions_change_nothing(ion):
    acid = Chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)[O-]")
    salt = Chem.MolFromSmiles(f"{ion}.{Chem.MolToSmiles(acid)}")
    known = [bit_vector(acid)]
    assert Filters().describe(salt, known) == Filters().describe(acid, known)
    assert Filters().describe(salt, known)["weight"] == pytest.approx(179.15, abs=0.01)
    assert not Filters(similarity=1.0).describe(salt, [])["passed"]


def test_without_known_actives_no_similarity_is_made_up():
    molecule = Chem.MolFromSmiles("CCOc1ccc(NC(C)=O)cc1OCC")
    found = Filters().describe(molecule, [])
    assert found["similarity_to_known"] is None
    assert found["passed"]
    assert not Filters().describe(molecule, [bit_vector(molecule)])["passed"]

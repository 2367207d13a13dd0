"""Metrics and fingerprints against the libraries' recorded numbers."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import DataStructs

from cohobate.docking import metrics
from cohobate.docking.data.features import atom_counts, bit_vector, fingerprint
from cohobate.docking.data.molecules import parse_smiles


@pytest.mark.parametrize("number", [0, 1])
def test_screening(recorded, number):
    r = recorded(f"screen_metrics_{number}")
    score, label = r["score"].numpy(), r["label"].numpy()
    found = metrics.enrichment(score, label, r["fractions"].tolist())
    np.testing.assert_allclose(found, r["ef"].numpy(), rtol=1e-9)
    every = metrics.screening(score, label)
    for ours, name in (
        ("bedroc20", "bedroc_20"), ("bedroc80", "bedroc_80_5"), ("auc", "roc_auc"),
        ("aupr", "aupr"),
    ):  # fmt: skip
        assert every[ours] == pytest.approx(float(r[name]), rel=1e-9), name


def test_constant_scores_enrich_nothing():
    label = np.zeros(5000)
    label[:500] = 1
    found = [metrics.enrichment(np.zeros(5000), label, [0.05], seed=s)[0] for s in range(20)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.1)


def test_no_actives_have_no_enrichment():
    assert all(np.isnan(v) for v in metrics.screening([1.0, 2.0], [0, 0]).values())


@pytest.mark.parametrize("number", [0, 1])
def test_rmsd(recorded, number):
    r = recorded(f"symm_rmsd_{number}")
    args = [r[k].numpy() for k in ("ref", "poses", "atomic_numbers", "adjacency")]
    for name, options in (
        ("rmsd_plain", {"symmetry": False}), ("rmsd_symm", {}),
        ("rmsd_symm_minimized", {"superpose": True}),
    ):  # fmt: skip
        found = metrics.pose_rmsd(*args, **options)
        np.testing.assert_allclose(found, r[name].numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


def test_fingerprints(recorded):
    r = recorded("ecfp4_0")
    molecules = [parse_smiles(str(s))[0] for s in r["smiles"]]
    assert [m is not None for m in molecules] == r["valid"].tolist()
    packed = np.array([np.packbits(fingerprint(m)) if m else np.zeros(128) for m in molecules])
    assert (packed == r["fp_packed"].numpy()).all()
    for i, a in enumerate(molecules):
        for j, b in enumerate(molecules):
            if a is not None and b is not None:
                found = DataStructs.TanimotoSimilarity(bit_vector(a), bit_vector(b))
                assert found == pytest.approx(float(r["tanimoto"][i, j]))
        if a is not None:
            numbers = r["atomic_numbers"][i].numpy()
            assert (atom_counts(a) == np.bincount(numbers[numbers > 1], minlength=119)).all()


def test_ranking_is_inside_targets():
    score, label = [1.0, 2, 3, 4, 5, 50, 40, 30, 20, 10], [1.0, 2, 3, 4, 5] * 2
    found = metrics.ranking(score, label, [0] * 5 + [1] * 5)
    assert found == {"spearman": 0.0, "kendall": 0.0, "targets": 2.0}
    constant = metrics.ranking([1.0] * 5, label[:5], [0] * 5)
    assert constant["spearman"] == 0.0

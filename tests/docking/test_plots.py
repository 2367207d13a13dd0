"""Pictures, and what is drawn in them."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import image

from cohobate.docking import plots
from cohobate.docking.metrics import enrichment, recovery
from cohobate.docking.plots import Scene, closest, enrichment_plot, pocket_view, principal_plane


def test_the_enrichment_curve_by_hand():
    x, y = recovery([0.1, 0.9, 0.4, 0.8, 0.3], [0, 1, 1, 0, 0])
    np.testing.assert_allclose(x, [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(y, [0, 0.5, 0.5, 1, 1, 1])


def test_the_enrichment_curve_over_its_diagonal_is_the_enrichment():
    rng = np.random.default_rng(3)
    label = rng.random(400) < 0.1
    score = rng.normal(size=400).round(1) + label
    x, y = recovery(score, label)
    np.testing.assert_allclose(
        y[[4, 20, 40]] / x[[4, 20, 40]], enrichment(score, label, [0.01, 0.05, 0.1])
    )


def test_the_closest_pair_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(5, 3))
    residues = [rng.normal(size=(n, 3)) * 4 for n in (1, 7, 3)]
    distance, pairs = closest(atoms, residues)
    for residue, far, (own, other) in zip(residues, distance, pairs, strict=True):
        every = np.linalg.norm(atoms[:, None] - residue, axis=-1)
        assert far == every.min()
        a, b = np.unravel_index(every.argmin(), every.shape)
        assert (own == atoms[a]).all()
        assert (other == residue[b]).all()
    assert closest(atoms, [])[1].shape == (0, 2, 3)


def test_the_view_is_the_plane_of_a_flat_molecule():
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    flat = np.pad(rng.normal(size=(9, 2)), ((0, 0), (0, 1))) @ turn.T + 7
    plane = principal_plane(flat)
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(plane @ turn[:, 2], 0, atol=1e-12)
    one, two = (flat - flat.mean(0)) @ plane.T @ plane, flat - flat.mean(0)
    np.testing.assert_allclose(one, two, atol=1e-12)
    assert np.isfinite(principal_plane(np.zeros((1, 3)))).all(), "one atom"


@pytest.fixture
def scene():
    rng = np.random.default_rng(2)
    residues = rng.normal(size=(4, 2, 3)) * 5
    atoms = np.array([[0.0, 0, 0], [1.5, 0, 0], [2.2, 1.2, 0]])
    contacts = np.stack((np.tile(atoms[0], (4, 1)), residues[:, 1] * 0.5), 1)
    labels = [f"ASP {i}" for i in range(4)]
    return Scene(
        "m", atoms, ["C", "O", "Cl"], np.array([[0, 1], [1, 2]]), labels, residues, contacts
    )


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 3, 2), (9, 3, 2)])
def test_a_pose_is_drawn_in_the_colours_of_its_elements(scene, tmp_path, count, columns, rows):
    seen = image.imread(pocket_view([scene] * count, tmp_path / "pocket.png"))
    assert seen.shape[1] / seen.shape[0] == pytest.approx(4.6 * columns / (4.4 * rows), rel=0.01)
    for colour in ((0xD6, 0x20, 0x20), (0x30, 0xA0, 0x30), (0x40, 0x40, 0x40)):
        assert (np.abs(seen[..., :3] - np.array(colour) / 255) < 0.01).all(-1).sum() > 50


def test_an_atom_without_bonds_and_a_pocket_out_of_reach_are_drawn(scene, tmp_path):
    none = np.zeros((0, 2), dtype=np.int64)
    alone = Scene("water", scene.atoms[:1], ["O"], none, [], *np.zeros((2, 0, 2, 3)))
    assert image.imread(pocket_view([alone], tmp_path / "a.png")).std() > 0


def test_every_target_has_a_panel_with_every_scorer(tmp_path):
    share = np.geomspace(1e-3, 1, 5)
    curves = {"student": share**0.5, "size": share}
    few = image.imread(enrichment_plot(share, {"a": curves}, tmp_path / "few.png"))
    panels = {f"target {i}": curves for i in range(7)}
    many = image.imread(enrichment_plot(share, panels, tmp_path / "many.png"))
    blue = np.array([0x1F, 0x77, 0xB4]) / 255
    one, seven = ((np.abs(x[..., :3] - blue) < 0.02).all(-1).sum() for x in (few, many))
    assert one > 100
    assert seven > 5 * one


def test_the_legend_has_the_title_it_was_given_and_panels_have_theirs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    share = np.geomspace(1e-3, 1, 5)
    enrichment_plot(share, {"a": {"student": share}}, tmp_path / "x.png", title="labels of Vina")
    enrichment_plot(share, {"a": {"student": share}}, tmp_path / "x.png")
    assert [f.legends[0].get_title().get_text() for f in drawn] == ["labels of Vina", ""]
    assert [f.axes[0].get_title() for f in drawn] == ["a", "a"]

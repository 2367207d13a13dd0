"""What is hidden, what the model may label for itself, and what lists hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cohobate.core.errors import InputError
from cohobate.docking.data import ComplexData, Lists, Split
from cohobate.docking.data.module import identity
from cohobate.docking.data.receptors import Chain

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def chain(count: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list(RESIDUES), count))


def test_what_is_shown_is_said():
    data = ComplexData(posed=0.5, labelled=0.25)
    text = data.describe()
    count = len(data.parts["train"])
    poses, labels = round(0.5 * count), round(0.25 * count)
    assert f"training sees {poses} poses and {labels} labels (data.posed 0.5, data.l" in text


def test_a_complex_that_never_had_a_pose_is_hidden_too():
    data = ComplexData(posed=1.0)
    data.setup()
    assert data.hidden_poses() == []
    place, held = data.parts["train"][3], data.parts["test"][0]
    for i in (place, held):
        data.data.complexes[i].molecule.RemoveAllConformers()
    assert data.hidden_poses() == [place]
    assert place not in data.places("train", pose=True)


@pytest.mark.parametrize("by", ["protein", "ligand"])
@pytest.mark.parametrize("limit", [0.6, None])
def test_proteins_like_a_held_out_one_are_not_labelled(by, limit):
    data = ComplexData(split=Split(by=by), posed=0.2, max_identity=limit)
    data.setup()
    every = data.data.complexes
    train = sorted({every[i].target for i in data.parts["train"]})
    test = every[data.parts["test"][0]].target
    whole = chain(300, 0)
    chains = {train[0]: Chain(chain(50, 1) + whole), test: Chain(whole)}
    for place, one in enumerate(every):
        own = chains.get(
            one.target,
            Chain(chain(300, 2 + train.index(one.target) if one.target in train else 99)),
        )
        every[place].pocket = replace(one.pocket, chains=(own,))
    hidden = [every[i].target for i in data.hidden_poses()]
    if by == "protein" and limit is not None:
        assert set(hidden) == set(train[1:])
    else:
        assert len(hidden) == len(data.data.no_pose)


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        (chain(300, 1), chain(300, 1), 1.0, 1.0),
        (chain(300, 1), chain(50, 2) + chain(300, 1) + chain(200, 3), 1.0, 1.0),
        (chain(300, 1), chain(300, 2), 0.0, 0.3),
        (chain(40, 1), chain(300, 2), 0.0, 0.6),
        (chain(12, 1), chain(12, 1), 0.4, 0.4),
        ("J" + chain(59, 1), chain(60, 2), 0.0, 0.5),
    ],
    ids=["same", "inside", "other", "short", "peptide", "unknown letter"],
)
def test_identity_is_that_of_the_shorter_chain(a, b, low, high):
    assert low <= identity(Chain(a), Chain(b)) <= high
    assert low <= identity(Chain(b), Chain(a)) <= high


def test_limits_of_affinity_keep_what_is_inside():
    options = [{}, {"ic50_min_nM": 1e3}, {"ic50_max_nM": 1e3}, {"ic50_max_nM": 1e-9}]
    found = []
    for one in options:
        data = ComplexData(posed=0.5, labelled=0.5, **one)
        data.setup()
        found.append({i: data.data.complexes[i].label for i in data.hidden_poses()})
    every, weak, strong, none = found
    known = set(data.places("train", label=True))
    assert weak.keys() | strong.keys() == every.keys() & known
    assert max(weak.values()) <= 6.0 <= min(strong.values())
    assert weak
    assert strong
    assert none == {}


def test_close_lists_are_neighbours_by_label():
    labels = np.random.default_rng(0).permutation(np.linspace(4, 10, 300))
    spread = [np.ptp(labels[Lists(size=16).draw(labels, s)]) for s in range(20)]
    drawn = [Lists(size=16, close=True).draw(labels, s) for s in range(20)]
    assert all(len(set(d.tolist())) == 16 for d in drawn)
    assert max(np.ptp(labels[d]) for d in drawn) < min(spread)
    assert max(np.bincount((labels[d] / 0.15).astype(int)).max() for d in drawn) == 5
    assert len({labels[d].min() for d in drawn}) > 10
    assert sorted(Lists(size=16, close=True).draw(labels[:7], 0).tolist()) == list(range(7))


@pytest.mark.parametrize("option", ["max_residues", "max_atoms", "batch_size", "epoch_samples"])
def test_counts_below_one_are_one_line(option):
    with pytest.raises(InputError, match=f"data: {option} 0 is below 1"):
        ComplexData(**{option: 0})
    with pytest.raises(InputError, match=r"data: lists\.size 0 is below 1"):
        ComplexData(lists=Lists(size=0))

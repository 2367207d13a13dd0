"""The screening engine: any size, any time killed, any number of targets."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.docking import screen as engine
from cohobate.docking.properties import Filters

SMILES = ["CCO", "c1ccccc1", "CC(=O)Nc1ccccc1", "C1CC1(", "CCN", "O=C(O)c1ccccc1", "CCCl", "CCBr"]


class Linear:
    """A scorer whose code is eight of the bits; it counts what it encodes."""

    key = "linear"

    def __init__(self, seed: int = 0) -> None:
        self.weight = np.random.default_rng(seed).normal(size=8)
        self.encoded = 0

    def encode(self, bits: np.ndarray, counts: np.ndarray) -> np.ndarray:
        self.encoded += len(bits)
        return bits[:, :1024].reshape(len(bits), 8, 128).sum(-1)

    def score(self, codes: np.ndarray) -> np.ndarray:
        assert codes.dtype == np.float16
        return (codes @ self.weight).astype(np.float32)


class Killed(Linear):
    """Stops in the middle."""

    def score(self, codes: np.ndarray) -> np.ndarray:
        if self.encoded > 20:
            raise KeyboardInterrupt
        return super().score(codes)


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "library.smi"
    chains = [f"{'C' * (1 + i % 7)}{s} m{i}" for i, s in enumerate(SMILES * 8)]
    path.write_text("\n".join(chains))
    return path


def run(library, scorer, folder, **options):
    return engine.screen(
        library, scorer, cache=library.parent / "cache", state=folder / "state.json", top=10,
        chunk=8, progress=False, **options,
    )  # fmt: skip


def best(found):
    return found.top.rows, found.top.score.tolist(), found.top.place.tolist()


def test_the_top_is_that_of_a_full_sort(library, tmp_path):
    scorer = Linear()
    found = run(library, scorer, tmp_path / "a")
    lines = library.read_text().splitlines()
    good = [i for i, line in enumerate(lines) if Chem.MolFromSmiles(line.split()[0]) is not None]
    bits, counts, bad = engine.features([line.split()[0] for line in lines])
    score = scorer.score(scorer.encode(bits, counts).astype(np.float16))
    order = np.lexsort((good, -score))[:10]
    assert found.top.place.tolist() == [good[i] for i in order]
    assert found.read == 64
    assert len(found.problems.found) == len(bad) > 8
    assert found.problems.lines()[0].startswith("library.smi: line 4: not SMILES")


def test_a_killed_run_goes_on_to_the_same_ranking(library, tmp_path):
    whole = run(library, Linear(), tmp_path / "whole")
    for path in (library.parent / "cache").iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(library, Killed(), tmp_path / "stopped")
    again = Linear()
    resumed = run(library, again, tmp_path / "stopped")
    assert best(resumed) == best(whole)
    assert resumed.problems.found == whole.problems.found
    assert resumed.read == whole.read
    assert 0 < again.encoded < 56, "what was done is not done again"


def test_a_second_target_computes_no_fingerprint(library, tmp_path, monkeypatch):
    run(library, Linear(0), tmp_path / "first")
    monkeypatch.setattr(engine, "_features", None)
    second = Linear(1)
    found = run(library, second, tmp_path / "second")
    assert (second.encoded, found.encoded) == (0, 0)
    assert len(found.top.score) == 10


def test_another_target_does_not_take_up_a_stopped_run(library, tmp_path):
    first = run(library, Linear(0), tmp_path / "same")
    other = Linear(1)
    other.key = "other"
    assert best(run(library, other, tmp_path / "same")) != best(first)


def test_processes_share_the_work(library, tmp_path):
    alone = engine.features(SMILES)
    with engine.ProcessPoolExecutor(2) as pool:
        shared = engine.features(SMILES, pool)
    assert (alone[0] == shared[0]).all()
    assert (alone[1] == shared[1]).all()
    assert alone[2] == shared[2]


def test_an_empty_library_is_one_line(tmp_path):
    path = tmp_path / "empty.smi"
    path.write_text("\n\n")
    with pytest.raises(InputError, match="no molecule could be read"):
        run(path, Linear(), tmp_path)


def test_filters_say_why_and_keep_the_similarity():
    aspirin = Chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)O")
    from cohobate.docking.data.features import bit_vector

    found = Filters().describe(aspirin, [bit_vector(aspirin)])
    assert found["similarity_to_known"] == 1.0
    assert not found["passed"]
    assert Filters(weight=100).describe(aspirin, [])["passed"]

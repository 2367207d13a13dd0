"""The screening engine: any size, any time killed, any number of targets."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from cohobate.core.errors import InputError
from cohobate.docking import screen as engine
from cohobate.docking.data.molecules import Problems, rows
from cohobate.docking.properties import Filters

SMILES = ["CCO", "c1ccccc1", "CC(=O)Nc1ccccc1", "C1CC1(", "CCN", "O=C(O)c1ccccc1", "CCCl", "CCBr"]


class Linear:
    """A scorer whose code is eight of the bits; it counts what it encodes."""

    key = "linear"
    target = "one"

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


class Shot(Linear):
    """Its process is killed in the middle."""

    def score(self, codes: np.ndarray) -> np.ndarray:
        if self.encoded > 12:
            os.kill(os.getpid(), signal.SIGKILL)
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
        chunk=8, progress=False, **{"accelerator": "cpu", **options},
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
    other.target = "other"
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


def test_two_processes_rank_as_one_also_after_a_kill(library, tmp_path):
    whole = run(library, Linear(), tmp_path / "whole")
    for path in (library.parent / "cache").iterdir():
        path.unlink()
    program = [sys.executable, __file__, library, tmp_path / "two"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two" / "found.json").read_text())
    assert found["left"] == 3, "chunks 0 and 2 were done when the first process was killed"
    assert found["best"] == json.loads(json.dumps(best(whole)))
    assert found["problems"] == [list(one) for one in whole.problems.found]
    assert found["read"] == whole.read
    assert found["encoded"] < whole.encoded, "what was done is not done again"
    other = run(library, Linear(), tmp_path / "one again")
    assert other.encoded == 0, "processes share the cache"


def test_a_library_that_breaks_off_is_one_line(tmp_path):
    path = tmp_path / "library.smi.gz"
    path.write_bytes(
        gzip.compress("".join(f"{'C' * i}O m{i}\n" for i in range(1, 99)).encode())[:-9]
    )
    with pytest.raises(InputError, match=r"library\.smi\.gz: Compressed file ended"):
        run(path, Linear(), tmp_path)


def test_devices_that_are_not_there_are_one_line(library, tmp_path):
    with pytest.raises(InputError, match="1 × 99 × gpu: "):
        run(library, Linear(), tmp_path, accelerator="gpu", devices=99)


def test_a_part_of_an_sdf_is_read_without_the_rest(tmp_path):
    path = tmp_path / "library.sdf"
    names = "CCO", "CCN", "CCC", "CCF"
    blocks = [Chem.SDWriter.GetText(Chem.MolFromSmiles(s)) for s in names]
    blocks[1] = blocks[1].replace("V2000", "Vxxxx")
    path.write_text("".join(blocks))
    problems = Problems()
    assert [row and row[0] for row in rows(path, problems)] == ["CCO", None, "CCC", "CCF"]
    assert problems.lines() == ["library.sdf: record 2: not an SDF record"]
    some = list(rows(path, problems, lambda place: place > 1))
    assert some == [None, None, ("CCC", "3", "record 3"), ("CCF", "4", "record 4")]
    assert len(problems.found) == 1, "what is not asked for is not parsed"
    found = run(path, Linear(), tmp_path)
    assert (found.read, found.problems.lines()) == (4, problems.lines())
    assert sorted(found.top.place.tolist()) == [0, 2, 3]


def one_of_two(rank: int, port: int, library: Path, folder: Path, scorer: Linear) -> None:
    """A process as a launcher starts it."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    left = folder / "state-0-of-2.json"
    done = json.loads(left.read_text())["done"] if left.exists() else 0
    found = run(library, scorer, folder, devices=2)
    if found is not None:
        about = {"left": done, "best": best(found), "problems": found.problems.found}
        about |= {"read": found.read, "encoded": found.encoded}
        (folder / "found.json").write_text(json.dumps(about))


def main(library: str, folder: str) -> None:
    """Two processes, of which the first is killed; then two again. They share the imports."""
    for scorer in (Shot(), Linear()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [
            multiprocessing.get_context("fork").Process(
                target=one_of_two,
                args=(rank, port, Path(library), Path(folder), Linear() if rank else scorer),
            )
            for rank in range(2)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in started))


if __name__ == "__main__":
    main(*sys.argv[1:])

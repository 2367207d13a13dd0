"""Libraries of any size: read in chunks, encoded once, scored for one target after another.

A chunk of a library is encoded by the student's library tower and kept on disk as float16 under a
key of its content, the featuriser and the tower's weights. A second target, or a run that was
killed, finds it there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rdkit import Chem, rdBase
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking.data.features import BITS, ELEMENTS, VERSION, atom_counts, fingerprint
from cohobate.docking.data.molecules import Problems, parse_smiles, rows

Row = tuple[str, str, str]


class Scorer(Protocol):
    """A student and one target."""

    key: str
    """Hash of the library tower's weights and of what else a chunk's code depends on."""

    def encode(self, bits: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Codes (n, D) of molecules from fingerprints (n, bits) and atom counts (n, elements)."""
        ...

    def score(self, codes: np.ndarray) -> np.ndarray:
        """Scores (n,), higher is better, from codes (n, D) float16."""
        ...


@dataclass
class Top:
    """The best of what was seen.

    Attributes:
        size: How many are kept.
        score: (n,), falling.
        place: Place in the library (n,); of equal scores the earlier stands first.
        rows: SMILES and name of each.
    """

    size: int
    score: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    place: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, score: np.ndarray, place: np.ndarray, found: list[tuple[str, str]]) -> None:
        """Take in a chunk."""
        scores, places = np.concatenate((self.score, score)), np.concatenate((self.place, place))
        order = np.lexsort((places, -scores))[: self.size]
        both = self.rows + found
        self.score, self.place = scores[order], places[order]
        self.rows = [both[i] for i in order]


@dataclass
class Screened:
    """The result of a screen.

    Attributes:
        top: The best molecules.
        read: Rows of the library.
        problems: What could not be read: file, place, reason.
        encoded: Chunks encoded in this run; 0 when all came from the cache.
    """

    top: Top
    read: int
    problems: Problems
    encoded: int


def screen(
    library: Path,
    scorer: Scorer,
    *,
    cache: Path,
    state: Path,
    top: int = 1000,
    chunk: int = 8192,
    workers: int = 0,
    progress: bool = True,
) -> Screened:
    """Score a library; go on where a killed run stopped.

    Args:
        library: See `cohobate.docking.data.molecules.read`.
        scorer: Student and target.
        cache: Folder for encoded chunks, shared by targets.
        state: File that holds how far this target's run came; left when finished.
        top: How many molecules are kept.
        chunk: Rows of a chunk.
        workers: Further processes for fingerprints; 0 works in this one.
        progress: Whether to show a bar.

    Raises:
        InputError: The library has no molecule, or cannot be read.
    """
    cache.mkdir(parents=True, exist_ok=True)
    result = Screened(Top(top), 0, Problems(), 0)
    mark = hashlib.sha256(f"{scorer.key} {chunk} {top} {library.resolve()}".encode()).hexdigest()
    done = _resume(state, mark, result)
    unread = Problems()
    bar = tqdm(unit="molecule", disable=not progress, desc=library.name)
    pool = ProcessPoolExecutor(workers) if workers > 0 else nullcontext()
    with pool as executor, rdBase.BlockLogs():
        for number, piece in enumerate(_chunks(rows(library, unread), chunk)):
            bar.update(len(piece))
            if number < done:
                continue
            _take(piece, number * chunk, library, scorer, cache, executor, result)
            result.read += len(piece)
            _save(state, mark, number + 1, result)
    bar.close()
    result.problems.found += [p for p in unread.found if p not in result.problems.found]
    if not len(result.top.score):
        raise InputError(f"{library}: no molecule could be read")
    return result


def _take(
    piece: list[Row],
    start: int,
    library: Path,
    scorer: Scorer,
    cache: Path,
    executor: Executor | None,
    result: Screened,
) -> None:
    text = "\n".join(smiles for smiles, _, _ in piece)
    key = hashlib.sha256(f"{VERSION} {scorer.key}\n{text}".encode()).hexdigest()[:32]
    path, errors = cache / f"{key}.npy", cache / f"{key}.json"
    if not (path.exists() and errors.exists()):
        bits, counts, bad = features([smiles for smiles, _, _ in piece], executor)
        codes: np.ndarray = scorer.encode(bits, counts).astype(np.float16)
        with save_atomic(path) as temporary, temporary.open("wb") as file:
            np.save(file, codes)
        with save_atomic(errors) as temporary:
            temporary.write_text(json.dumps(bad))
        result.encoded += 1
    bad = {int(place): reason for place, reason in json.loads(errors.read_text()).items()}
    for place, reason in bad.items():
        result.problems.add(library, piece[place][2], reason)
    good = np.array([i for i in range(len(piece)) if i not in bad], dtype=np.int64)
    if len(good):
        score = scorer.score(np.load(path, mmap_mode="r"))
        result.top.add(score, start + good, [(piece[i][0], piece[i][1]) for i in good])


def features(
    smiles: list[str], executor: Executor | None = None
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Fingerprints (n, bits), atom counts (n, elements) of what parses, and why the rest does not.

    Args:
        smiles: (m,).
        executor: Processes to share the work.
    """
    if executor is None:
        return _features(smiles)
    size = -(-len(smiles) // getattr(executor, "_max_workers", 1))
    starts = range(0, len(smiles), max(size, 1))
    parts = list(executor.map(_features, [smiles[i : i + size] for i in starts]))
    bad = {
        start + place: why
        for start, part in zip(starts, parts, strict=True)
        for place, why in part[2].items()
    }
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), bad


def _features(smiles: list[str]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    bits, counts, bad = [], [], {}
    with rdBase.BlockLogs():
        for place, text in enumerate(smiles):
            molecule, reason = parse_smiles(text)
            if molecule is None:
                bad[place] = " ".join(reason.split())
                continue
            bits.append(fingerprint(molecule))
            counts.append(atom_counts(molecule))
    if not bits:
        return np.zeros((0, BITS), np.uint8), np.zeros((0, ELEMENTS), np.float32), bad
    return np.stack(bits), np.stack(counts), bad


def first_molecules(library: Path, count: int) -> list[Chem.Mol]:
    """The first readable molecules of a library."""
    with rdBase.BlockLogs():
        parsed = (parse_smiles(smiles)[0] for smiles, _, _ in rows(library, Problems()))
        return list(itertools.islice((m for m in parsed if m is not None), count))


def _chunks(stream: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while piece := list(itertools.islice(stream, size)):
        yield piece


def _save(state: Path, mark: str, done: int, result: Screened) -> None:
    content: dict[str, Any] = {
        "mark": mark, "done": done, "read": result.read, "problems": result.problems.found,
        "score": result.top.score.tolist(), "place": result.top.place.tolist(),
        "rows": result.top.rows,
    }  # fmt: skip
    state.parent.mkdir(parents=True, exist_ok=True)
    with save_atomic(state) as temporary:
        temporary.write_text(json.dumps(content))


def _resume(state: Path, mark: str, result: Screened) -> int:
    """Take back what a stopped run of the same screen had; how many chunks that were."""
    if not state.exists():
        return 0
    found = json.loads(state.read_text())
    if found.get("mark") != mark:
        return 0
    result.top.score = np.array(found["score"], np.float32)
    result.top.place = np.array(found["place"], np.int64)
    result.top.rows = [(smiles, name) for smiles, name in found["rows"]]
    result.read = found["read"]
    result.problems.found = [(a, b, c) for a, b, c in found["problems"]]
    return int(found["done"])

"""Libraries of any size: read in chunks, encoded once, scored for one target after another.

A chunk of a library is encoded by the student's library tower and kept on disk as float16 under a
key of its content, the featuriser and the tower's weights. A second target, or a run that was
killed, finds it there. Lightning runs the chunks through one process or many, on any number of
machines; the ranking is the same.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rdkit import Chem, rdBase
from torch import distributed
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.docking.data.features import (
    BITS,
    ELEMENTS,
    VERSION,
    atom_counts,
    fingerprint,
    parent,
)
from cohobate.docking.data.molecules import Problems, parse_smiles, rows

log = logging.getLogger("cohobate")
Row = tuple[str, str, str]


class Scorer(Protocol):
    """A student and one target; one that is a `torch.nn.Module` is moved to the device."""

    key: str
    """Hash of the library tower's weights and of what else a chunk's code depends on."""
    target: str
    """Hash of what a score depends on beside its code: the pocket, the structure model. A stopped
    run goes on with the same alone."""

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


class Chunk(NamedTuple):
    """A piece of a library: its number, its rows, and what could not be read of them."""

    number: int
    rows: list[Row | None]
    unread: list[tuple[str, str, str]]


@dataclass
class Part:
    """What one process has of a screen.

    Attributes:
        top: The best molecules.
        done: Its chunks before this one are done.
        read: Rows of its chunks.
        problems: Number of the chunk, and file, place, reason of what could not be read.
        encoded: Chunks encoded in this run; 0 when all came from the cache.
        error: Why the library cannot be read further.
    """

    top: Top
    done: int = 0
    read: int = 0
    problems: list[tuple[int, tuple[str, str, str]]] = field(default_factory=list)
    encoded: int = 0
    error: str = ""


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
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> Screened | None:
    """Score a library; go on where a killed run stopped.

    Args:
        library: See `cohobate.docking.data.molecules.read`.
        scorer: Student and target.
        cache: Folder for encoded chunks, shared by targets.
        state: File that holds how far this target's run came; left when finished. Of several
            processes each has its own beside it.
        top: How many molecules are kept.
        chunk: Rows of a chunk.
        workers: Further processes for fingerprints, of each process; 0 works in this one.
        progress: Whether to show a bar.
        accelerator: Lightning's: ``cpu``, ``gpu``, ``auto``.
        devices: Processes on each machine.
        num_nodes: Machines. Unless a launcher (torchrun, SLURM) starts the processes, each runs
            this program again, and Lightning's environment variables name the machines.

    Returns:
        What was found; None in every process but the first.

    Raises:
        InputError: The library has no molecule, or cannot be read; or there are no such devices.
    """
    trainer = _trainer(accelerator, devices, num_nodes)
    pool = ProcessPoolExecutor(workers) if workers > 0 else nullcontext()
    with pool as executor, rdBase.BlockLogs():
        if executor is not None:
            executor.submit(int).result()  # forks while there are no threads of a process group
        screening = Screening(
            library, scorer, cache=cache, state=state, top=top, chunk=chunk, executor=executor,
            progress=progress,
        )  # fmt: skip
        try:
            trainer.predict(screening, return_predictions=False)
        except SystemExit as stop:  # Lightning's answer to an interrupt
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    if not trainer.is_global_zero:
        return None
    return _merged(screening.parts, top, library)


def _trainer(accelerator: str, devices: int, num_nodes: int) -> pl.Trainer:
    """A trainer that says and writes nothing."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    strategy: Any = "auto"
    if devices * num_nodes > 1 or TorchElasticEnvironment.detect():
        # A process may wait for hours for the others; what is sent is not on any GPU.
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=30))
    try:
        trainer = pl.Trainer(
            accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        if environment := getattr(trainer.strategy, "cluster_environment", None):
            environment.validate_settings(devices, num_nodes)
    except (MisconfigurationException, ImportError, ValueError) as error:
        what = f"{num_nodes} × {devices} × {accelerator}"
        raise InputError(f"{what}: {str(error).strip().splitlines()[0]}") from None
    return trainer


def _merged(parts: list[Part], top: int, library: Path) -> Screened:
    if error := next((part.error for part in parts if part.error), ""):
        raise InputError(error)
    best = Top(top)
    for part in parts:
        best.add(part.top.score, part.top.place, part.top.rows)
    if not len(best.score):
        raise InputError(f"{library}: no molecule could be read")
    merged = heapq.merge(*(part.problems for part in parts), key=lambda problem: problem[0])
    return Screened(
        best, sum(part.read for part in parts), Problems([found for _, found in merged]),
        sum(part.encoded for part in parts),
    )  # fmt: skip


class Screening(pl.LightningModule):
    """One process of a screen: it takes the chunks rank, rank + world size, … of the library.

    Args:
        library: Of any size.
        scorer: Student and target.
        cache: Folder for encoded chunks.
        state: File that holds how far the run came.
        top: How many molecules are kept.
        chunk: Rows of a chunk.
        executor: Processes for fingerprints.
        progress: Whether to show a bar.

    Attributes:
        part: What this process has.
        parts: What all have, when finished; in the first process.
    """

    def __init__(
        self,
        library: Path,
        scorer: Scorer,
        *,
        cache: Path,
        state: Path,
        top: int,
        chunk: int,
        executor: Executor | None,
        progress: bool,
    ) -> None:
        super().__init__()
        self.library, self.scorer, self.cache, self.file = library, scorer, cache, state
        self.chunk, self.executor, self.progress = chunk, executor, progress
        self.part, self.parts = Part(Top(top)), list[Part]()
        about = f"{VERSION} {scorer.key} {scorer.target} {chunk} {top} {library.resolve()}"
        if library.exists():
            about += f" {library.stat().st_size} {library.stat().st_mtime_ns}"
        self.mark = hashlib.sha256(about.encode()).hexdigest()
        self.parent, self.on_sigterm = os.getppid(), signal.getsignal(signal.SIGTERM)

    def setup(self, stage: str) -> None:
        """Take up what a stopped run had."""
        if (world := self.trainer.world_size) > 1:
            name = f"{self.file.stem}-{self.global_rank}-of-{world}{self.file.suffix}"
            self.file = self.file.with_name(name)
        _resume(self.file, self.mark, self.part)

    def predict_dataloader(self) -> Iterator[Chunk]:
        """This process's chunks that are left; the library is read as they are asked for."""
        size, first, problems = self.chunk, self.part.done, Problems()

        def own(number: int) -> bool:
            return number >= first and number % self.trainer.world_size == self.global_rank

        stream = rows(self.library, problems, lambda place: own(place // size))
        hidden = not self.progress or self.global_rank > 0
        with tqdm(unit="molecule", disable=hidden, desc=self.library.name) as bar:
            try:
                for number, piece in enumerate(_pieces(stream, size)):
                    bar.update(len(piece))
                    unread, problems.found = problems.found, []
                    if own(number):
                        yield Chunk(number, piece, unread)
            except InputError as error:  # every process meets it; the first one says so
                self.part.error = str(error)

    def transfer_batch_to_device(self, batch: Chunk, *_: Any) -> Chunk:
        """A chunk is text; nothing of it goes anywhere."""
        return batch

    def on_predict_start(self) -> None:
        """Let SIGTERM end the process: Lightning only takes note of it, and all is on the disk."""
        if threading.current_thread() is threading.main_thread() and self.on_sigterm is not None:
            signal.signal(signal.SIGTERM, self.on_sigterm)

    def predict_step(self, batch: Chunk, *_: Any) -> int:
        """Encode, score and note one chunk."""
        self._stop_alone()
        _take(batch, self.chunk, self.library, self.scorer, self.cache, self.executor, self.part)
        _save(self.file, self.mark, self.part)
        return batch.number

    def on_predict_end(self) -> None:
        """Send this process's part to the first."""
        self._stop_alone()
        if self.trainer.world_size == 1:
            self.parts = [self.part]
            return
        found: list[Any] | None = [None] * self.trainer.world_size
        distributed.gather_object(self.part, found if self.trainer.is_global_zero else None)
        self.parts = found or []

    def _stop_alone(self) -> None:
        """A process that was started by the first, or by a launcher, ends when that is gone."""
        if self.local_rank > 0 and os.getppid() != self.parent:
            raise SystemExit(1)


def _take(
    chunk: Chunk,
    size: int,
    library: Path,
    scorer: Scorer,
    cache: Path,
    executor: Executor | None,
    part: Part,
) -> None:
    found = [(place, row) for place, row in enumerate(chunk.rows) if row is not None]
    smiles = [row[0] for _, row in found]
    text = "\n".join(smiles)
    key = hashlib.sha256(f"{VERSION} {scorer.key}\n{text}".encode()).hexdigest()[:32]
    path, errors = cache / f"{key}.npy", cache / f"{key}.json"
    known = _cached(path, errors, len(found))
    if known is None:
        bits, counts, bad = features(smiles, executor)
        known = scorer.encode(bits, counts).astype(np.float16), bad
        with save_atomic(path) as temporary, temporary.open("wb") as file:
            np.save(file, known[0])
        with save_atomic(errors) as temporary:
            temporary.write_text(json.dumps(bad))
        part.encoded += 1
    codes, bad = known
    problems = Problems(list(chunk.unread))
    for i, reason in bad.items():
        problems.add(library, found[i][1][2], reason)
    part.problems += [(chunk.number, problem) for problem in problems.found]
    good = [one for i, one in enumerate(found) if i not in bad]
    if good:
        place = chunk.number * size + np.array([place for place, _ in good], dtype=np.int64)
        part.top.add(scorer.score(codes), place, [(row[0], row[1]) for _, row in good])
    part.read += len(chunk.rows)
    part.done = chunk.number + 1


def _cached(path: Path, errors: Path, count: int) -> tuple[np.ndarray, dict[int, str]] | None:
    """Codes of a chunk and what could not be read of it; None where they are not whole."""
    try:
        codes: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        bad = {int(place): str(why) for place, why in json.loads(errors.read_text()).items()}
    except (OSError, EOFError, ValueError, AttributeError):
        return None
    fits = codes.dtype == np.float16 and codes.ndim == 2 and len(codes) + len(bad) == count
    return (codes, bad) if fits and set(bad) <= set(range(count)) else None


def features(
    smiles: list[str], executor: Executor | None = None
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Fingerprints (n, bits), atom counts (n, elements) of what parses, and why the rest does not.

    Of a salt they are the largest fragment's, as for the structure model.

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
            molecule = parent(molecule)
            bits.append(fingerprint(molecule))
            counts.append(atom_counts(molecule))
    if not bits:
        return np.zeros((0, BITS), np.uint8), np.zeros((0, ELEMENTS), np.float32), bad
    return np.stack(bits), np.stack(counts), bad


def some_molecules(library: Path, count: int, among: int = 8192) -> list[Chem.Mol]:
    """Molecules drawn from a library's first rows; the same ones every time.

    Args:
        library: As for `screen`.
        count: At most so many.
        among: How many rows they are drawn from; the next ones where none of them is readable.

    Raises:
        InputError: The library has no molecule, or cannot be read.
    """
    with rdBase.BlockLogs():
        for piece in _pieces(rows(library, Problems()), among):
            random.Random(0).shuffle(piece)
            parsed = (parse_smiles(row[0])[0] for row in piece if row is not None)
            if found := list(itertools.islice((m for m in parsed if m is not None), count)):
                return found
    raise InputError(f"{library}: no molecule could be read")


def _pieces(stream: Iterator[Row | None], size: int) -> Iterator[list[Row | None]]:
    while piece := list(itertools.islice(stream, size)):
        yield piece


def _save(state: Path, mark: str, part: Part) -> None:
    content: dict[str, Any] = {
        "mark": mark, "done": part.done, "read": part.read, "problems": part.problems,
        "score": part.top.score.tolist(), "place": part.top.place.tolist(), "rows": part.top.rows,
    }  # fmt: skip
    with save_atomic(state) as temporary:
        temporary.write_text(json.dumps(content))


def _resume(state: Path, mark: str, part: Part) -> None:
    """Take back what a stopped run of the same screen had."""
    if not state.exists():
        return
    try:
        found = json.loads(state.read_text())
        if found["mark"] != mark:
            return
        top = Top(
            part.top.size, np.array(found["score"], np.float32), np.array(found["place"], np.int64),
            [(smiles, name) for smiles, name in found["rows"]],
        )  # fmt: skip
        problems = [(int(number), (a, b, c)) for number, (a, b, c) in found["problems"]]
        done, read = int(found["done"]), int(found["read"])
    except (ValueError, KeyError, TypeError):
        log.warning("%s: damaged; the ranking starts again, codes come from the cache", state)
        return
    part.top, part.problems, part.done, part.read = top, problems, done, read

"""Batches straight from parquet shards: never a whole file in memory, any batch at any time.

The rows of a split are cut into slices (row groups, or pieces of large ones) whose sizes are known
in advance. That fixes which rows batch number b of a process holds, as a function of seed, epoch
and b alone, so a run resumes in the middle of an epoch without reading what it has seen, and
neither the number of workers nor an interruption changes the order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cohobate.core.errors import InputError
from cohobate.core.training.data import EpochSampler
from cohobate.ctr.data.columns import Decoder, Future, Slice, check_columns
from cohobate.ctr.data.schema import Schema
from cohobate.ctr.nets.inputs import Batch, Features

SLICE_ROWS = 16_384
"""Most rows decoded at once; larger row groups are read piece by piece."""


@dataclass(frozen=True)
class Piece:
    """Where a slice lies.

    Args:
        path: the file.
        group: its row group.
        start: first row inside the group.
        rows: number of rows.
        first_row: row of ``start`` in the file.
        kept: number of rows inside the split.
    """

    path: Path
    group: int
    start: int
    rows: int
    first_row: int
    kept: int


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file for piecewise reading.

    Raises:
        InputError: it is missing or is no parquet file.
    """
    try:
        # without the buffer a row group's columns are read whole, whatever the batch size
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def plan(files: Sequence[Path], schema: Schema, low: int | None, high: int | None) -> list[Piece]:
    """Cut files into pieces and count the rows with ``low <= time < high``.

    Row groups whose statistics lie wholly inside or outside are not read.

    Args:
        files: shards in order.
        schema: roles of the columns.
        low: first time of the split in the schema's unit; None has no bound.
        high: first time after it.

    Raises:
        InputError: a file cannot be read or lacks a column.
    """
    pieces = []
    for path in files:
        with open_parquet(path) as file:
            check_columns(schema, file.schema_arrow, path)
            names = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
            column, first_row = names.index(schema.time), 0
            for group in range(file.metadata.num_row_groups):
                meta = file.metadata.row_group(group)
                inside = _inside(meta.column(column).statistics, low, high)
                kept = None if inside is None else inside * meta.num_rows
                if kept is None:
                    times = file.read_row_group(group, columns=[schema.time]).column(0).to_numpy()
                    chosen = _chosen(times, low, high)
                for start in range(0, meta.num_rows, SLICE_ROWS):
                    rows = min(SLICE_ROWS, meta.num_rows - start)
                    count = rows if kept else 0
                    if kept is None:
                        count = int(chosen[start : start + rows].sum())
                    if count:
                        pieces.append(Piece(path, group, start, rows, first_row + start, count))
                first_row += meta.num_rows
    return pieces


def _chosen(times: np.ndarray, low: int | None, high: int | None) -> np.ndarray:
    kept = np.ones(len(times), bool)
    if low is not None:
        kept &= times >= low
    if high is not None:
        kept &= times < high
    return kept


def _inside(statistics: pq.Statistics | None, low: int | None, high: int | None) -> bool | None:
    """Whether a row group lies in the split; None when only its rows can tell."""
    if low is None and high is None:
        return True
    if statistics is None or not statistics.has_min_max:
        return None
    first, last = statistics.min, statistics.max
    if (low is not None and last < low) or (high is not None and first >= high):
        return False
    if (low is None or first >= low) and (high is None or last < high):
        return True
    return None


class ClickRows(Dataset[Batch]):
    """Batches of one split by number: item i is batch ``i // world`` of process ``i % world``.

    A process has a run of adjacent rows and the same number of batches as every other, as gradient
    averaging needs; their last batches may differ by one row.

    Args:
        pieces: from :func:`plan`.
        schema: roles of the columns.
        batch_size: rows a batch in each process.
        shuffle: permute pieces and the rows in each, anew every epoch; otherwise in file order.
        first_epoch: number that the order of the first epoch is drawn for.
        seed: of the permutations.
        world: number of processes.
        future: see :class:`~cohobate.ctr.data.columns.Decoder`.
        bounds: times ``low, high`` of the split.
        permute_labels: shuffle the labels of each piece (a check: nothing can be learned).

    Raises:
        InputError: the split has no rows.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        schema: Schema,
        *,
        batch_size: int,
        shuffle: bool = False,
        first_epoch: int = 0,
        seed: int = 0,
        world: int = 1,
        future: Future = "error",
        bounds: tuple[int | None, int | None] = (None, None),
        permute_labels: bool = False,
    ) -> None:
        self.pieces, self.schema, self.batch_size = list(pieces), schema, batch_size
        self.shuffle, self.seed, self.world = shuffle, seed, world
        self.first_epoch = self.epoch = first_epoch
        self.decoder, self.bounds, self.permute_labels = (
            Decoder(schema, future),
            bounds,
            permute_labels,
        )
        self.rows = sum(p.kept for p in pieces)
        if self.rows < world:
            raise InputError(f"{schema.path.parent}: {self.rows} rows for {world} processes")
        # a rest of one row joins the last batch: batch normalisation needs two
        self.batches = max(1, -(-(self.rows // world - 1) // batch_size))
        self.dropped = 0
        self._cache: OrderedDict[int, Slice] = OrderedDict()
        self._cursor: _Cursor | None = None
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.batches * self.world

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given."""
        self.epoch = self.first_epoch + epoch

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Pieces in this epoch's order and where each starts, (pieces + 1,)."""
        if self._order is None or self._order[0] != self.epoch:
            order = np.arange(len(self.pieces))
            if self.shuffle:
                order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
            starts = np.cumsum([0, *(self.pieces[i].kept for i in order)])
            self._order = self.epoch, order, starts
            self._cache.clear()
        return self._order[1:]

    def span(self, item: int) -> tuple[int, int]:
        """First and last row (exclusive) of batch ``item`` in this epoch's order."""
        rank, number = item % self.world, item // self.world
        low, high = (self.rows * r // self.world for r in (rank, rank + 1))
        start = low + number * self.batch_size
        return start, high if number == self.batches - 1 else start + self.batch_size

    def __getitem__(self, item: int) -> Batch:
        start, stop = self.span(int(item))
        order, starts = self.order()
        first = int(np.searchsorted(starts, start, "right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(starts[first + 1]))
            index = int(order[first])
            rows = np.arange(start - starts[first], end - starts[first])
            if self.shuffle:
                rng = np.random.default_rng([self.seed, self.epoch, index])
                rows = rng.permutation(self.pieces[index].kept)[rows]
            parts.append(_gather(self._slice(index), rows, self.schema.length))
            start, first = end, first + 1
        return _batch(parts)

    def _slice(self, index: int) -> Slice:
        if index in self._cache:
            return self._cache[index]
        piece = self.pieces[index]
        if self._cursor is None or not self._cursor.ready(piece):
            self._cursor = _Cursor(piece, self.schema.columns)
        batch = self._cursor.read(piece)
        # a message must name the row in the file, so rows are decoded before they are chosen
        found = self.decoder(batch, piece.path, piece.first_row)
        keep = _chosen(batch.column(self.schema.time).to_numpy(zero_copy_only=False), *self.bounds)
        if not keep.all():
            found = _take(found, keep)
        if self.permute_labels:
            rng = np.random.default_rng([self.seed, index, 1])
            found.label = rng.permutation(found.label)
        self.dropped += found.dropped
        self._cache[index] = found
        if len(self._cache) > 2:
            self._cache.popitem(last=False)
        return found


class BatchOrder(EpochSampler):
    """The numbers of a data set's batches for this process; tells the data set its epoch.

    Args:
        rows: the data set.
        rank: this process; default from ``torch.distributed``.
    """

    def __init__(self, rows: ClickRows, rank: int | None = None) -> None:
        super().__init__(len(rows), seed=rows.seed, shuffle=False, rank=rank, world=rows.world)
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch for the order of the rows."""
        super().set_epoch(epoch)
        self.rows.set_epoch(epoch)


class _Cursor:
    """Reads the pieces of one row group in order."""

    def __init__(self, piece: Piece, columns: list[str]) -> None:
        self.path, self.group = piece.path, piece.group
        self.file = open_parquet(piece.path)
        self.batches = self.file.iter_batches(SLICE_ROWS, row_groups=[piece.group], columns=columns)
        self.position = 0
        while self.position < piece.start:
            self.position += next(self.batches).num_rows

    def ready(self, piece: Piece) -> bool:
        return (self.path, self.group, self.position) == (piece.path, piece.group, piece.start)

    def read(self, piece: Piece) -> pa.RecordBatch:
        try:
            batch = next(self.batches)
        except (OSError, pa.ArrowException, StopIteration) as error:
            text = (str(error) or "it ends early").splitlines()[0]
            raise InputError(f"{piece.path}: row group {piece.group}: {text}") from None
        self.position += batch.num_rows
        return batch


def _take(part: Slice, keep: np.ndarray) -> Slice:
    """Rows of a slice by mask."""
    lengths = np.diff(part.offsets)
    events = np.repeat(keep, lengths)
    return Slice(
        part.label[keep],
        part.time[keep],
        part.user[keep],
        part.profile[keep],
        part.candidate[keep],
        part.context[keep],
        part.dense[keep],
        part.events[events],
        part.event_time[events],
        np.concatenate([[0], lengths[keep].cumsum()]),
        part.dropped,
    )


def _gather(part: Slice, rows: np.ndarray, length: int) -> list[np.ndarray]:
    """Rows of a slice as rectangular arrays: the newest ``length`` behaviours, padded left."""
    end = part.offsets[rows + 1]
    begin = np.maximum(part.offsets[rows], end - length)
    index = end[:, None] - length + np.arange(length)
    real = index >= begin[:, None]
    index = np.where(real, index, 0)
    if len(part.events):
        history = np.where(real[..., None], part.events[index], 0)
        times = np.where(real, part.event_time[index], 0)
    else:  # not one behaviour in the slice: nothing to index
        history = np.zeros((*index.shape, part.events.shape[1]), np.int64)
        times = np.zeros(index.shape, np.int64)
    return [
        part.profile[rows], part.candidate[rows], part.context[rows], history, times,
        part.time[rows], part.dense[rows], part.label[rows], part.user[rows],
    ]  # fmt: skip


def gather(part: Slice, rows: np.ndarray, length: int) -> Batch:
    """Some rows of a slice as a batch, with the newest ``length`` behaviours."""
    return _batch([_gather(part, rows, length)])


def _batch(parts: list[list[np.ndarray]]) -> Batch:
    """Join parts and cut the padding that no row needs."""
    arrays = parts[0] if len(parts) == 1 else [np.concatenate(a) for a in zip(*parts, strict=True)]
    tensors: list[Tensor] = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    *features, label, user = tensors
    history, times = features[3], features[4]
    used = int((history[..., 0] != 0).any(0).sum().clamp(min=1))
    features[3], features[4] = history[:, -used:].contiguous(), times[:, -used:].contiguous()
    return Batch(Features(*features), label, user)

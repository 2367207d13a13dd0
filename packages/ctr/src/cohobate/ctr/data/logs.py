"""From event logs to training rows: join each impression with the behaviours before it.

Logs are read as a stream and split by user into parts that fit into memory; the joined rows of all
parts are then gathered by time, so that the shards are in the order of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import yaml
from tqdm import tqdm

from cohobate.core.errors import InputError
from cohobate.ctr.data.generator import SPLITS
from cohobate.ctr.data.schema import hash_ids

Columns = dict[str, np.ndarray]
GROUP_ROWS = 16_384
DAY = 86_400
INT, FLOAT, STR = pa.int64(), pa.float64(), pa.string()


def read_csv(
    path: Path, columns: Mapping[str, pa.DataType], names: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Stream a CSV file.

    Args:
        path: the file.
        columns: the columns that are needed, with their types.
        names: names of all columns of a file without a header line.

    Raises:
        InputError: the file is missing, lacks a column or has a value of another type.
    """
    try:
        reader = pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=list(names) if names else None),
            convert_options=pacsv.ConvertOptions(
                column_types=dict(columns), include_columns=list(columns)
            ),
        )
        yield from reader
    except (OSError, KeyError, pa.ArrowException) as error:
        text = str(error.args[0] if error.args else error).splitlines()[0]
        raise InputError(f"{path}: {text}") from None


def read_columns(path: Path, columns: Mapping[str, pa.DataType]) -> Columns:
    """Read a small CSV file whole, as arrays by name; strings become Python objects.

    Raises:
        InputError: see :func:`read_csv`; or there are no rows.
    """
    table = pa.Table.from_batches(
        read_csv(path, columns), schema=pa.schema([*columns.items()])
    ).combine_chunks()
    if not table.num_rows:
        raise InputError(f"{path}: there are no rows")
    return {name: table[name].to_numpy() for name in columns}


def split_by_user(
    batches: Iterable[pa.RecordBatch], user: str, parts: int, folder: Path, name: str
) -> list[Path]:
    """Write record batches to one file for each part of the users.

    Args:
        batches: with an integer column ``user``.
        user: its name.
        parts: number of parts.
        folder: for the files.
        name: start of their names.
    """
    paths = [folder / f"{name}-{i}.parquet" for i in range(parts)]
    writers: list[pq.ParquetWriter] = []
    for batch in tqdm(batches, f"split {name}", leave=False):
        if not writers:
            writers = [pq.ParquetWriter(path, batch.schema) for path in paths]
        part = hash_ids(batch.column(user).to_numpy()) % np.uint64(parts)
        for i, writer in enumerate(writers):
            chosen = batch.filter(pa.array(part == i)) if parts > 1 else batch
            if chosen.num_rows:
                writer.write_batch(chosen)
    for writer in writers:
        writer.close()
    if not writers:
        raise InputError(f"{folder}: {name}: the log has no rows")
    return paths


def load_part(path: Path) -> Columns:
    """Read a part as arrays by name."""
    table = pq.read_table(path).combine_chunks()
    return {name: table[name].to_numpy() for name in table.column_names}


def sort_events(events: Columns, *keys: str) -> Columns:
    """Order events by keys, the first key first."""
    order = np.lexsort([events[key] for key in reversed(keys)])
    return {name: values[order] for name, values in events.items()}


@dataclass(frozen=True)
class History:
    """Behaviours of a part of the users, sorted by user and time.

    Args:
        user: (E,) int64, sorted.
        time: (E,) seconds, sorted inside a user.
        fields: list column → (E,) values.
    """

    user: np.ndarray
    time: np.ndarray
    fields: Columns

    def before(self, user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last (exclusive) behaviour of each user strictly before each time."""
        begin = np.searchsorted(self.user, user)
        # one sorted key for both: users as their rank, then the time
        ranks, index = np.unique(self.user, return_inverse=True)
        low = int(min(self.time.min(initial=0), time.min(initial=0)))
        width = int(max(self.time.max(initial=0), time.max(initial=0))) - low + 2
        rank = np.searchsorted(ranks, user).clip(max=max(len(ranks) - 1, 0))
        known = (ranks[rank] == user) if len(ranks) else np.zeros(len(user), bool)
        end = np.searchsorted(index * width + self.time - low, rank * width + time - low)
        return begin, np.where(known, np.maximum(end, begin), begin)

    def lists(self, begin: np.ndarray, end: np.ndarray, length: int) -> dict[str, pa.Array]:
        """List columns of the newest ``length`` behaviours in each range, and their times."""
        begin = np.maximum(begin, end - length)
        count = end - begin
        offsets = np.concatenate([[0], count.cumsum()])
        index = np.repeat(begin - offsets[:-1], count) + np.arange(offsets[-1])
        bounds = pa.array(offsets.astype(np.int32))
        columns = {**self.fields, "hist_timestamp": self.time}

        def values(of: np.ndarray) -> pa.Array:
            # text needs its type: a part of the log without behaviours shows none
            return pa.array(of[index], STR if of.dtype == object else None)

        return {k: pa.ListArray.from_arrays(bounds, values(v)) for k, v in columns.items()}


class ShardWriter:
    """Takes joined rows in any order and leaves shards in order of time.

    Args:
        folder: for ``train``, ``valid`` and ``test``.
        time: name of the time column (seconds).
        valid_from: first second of validation; None takes the split from a column ``split``.
        test_from: first second of test.
        bucket: seconds that are sorted at once.
    """

    def __init__(
        self,
        folder: Path,
        time: str,
        valid_from: int | None,
        test_from: int | None,
        bucket: int = 6 * 3600,
    ) -> None:
        self.folder, self.time, self.bucket = folder, time, bucket
        self.valid_from, self.test_from = valid_from, test_from
        self._writers: dict[tuple[int, int], pq.ParquetWriter] = {}
        (folder / "work").mkdir(parents=True, exist_ok=True)

    def add(self, table: pa.Table) -> None:
        """Take the rows of a part."""
        times = table[self.time].to_numpy()
        if self.valid_from is not None and self.test_from is not None:
            split = (times >= self.valid_from).astype(int) + (times >= self.test_from)
        else:
            split = table["split"].to_numpy()
            table = table.drop_columns(["split"])
        bucket = times // self.bucket
        order = np.lexsort([bucket, split])
        edges = np.flatnonzero(np.diff(split[order]) | np.diff(bucket[order])) + 1
        for rows in np.split(order, edges):
            key = int(split[rows[0]]), int(bucket[rows[0]])
            if key not in self._writers:
                path = self.folder / "work" / f"{key[0]}-{key[1]}.parquet"
                self._writers[key] = pq.ParquetWriter(path, table.schema)
            self._writers[key].write_table(table.take(pa.array(rows)))

    def close(self) -> None:
        """Sort each span of time and write the shards.

        Raises:
            InputError: a split has no rows.
        """
        for writer in self._writers.values():
            writer.close()
        for number, name in enumerate(SPLITS):
            spans = sorted(bucket for split, bucket in self._writers if split == number)
            if not spans:
                raise InputError(f"no rows for {name}: valid_from or test_from is out of range")
            (self.folder / name).mkdir()
            writer = None
            for bucket in tqdm(spans, f"sort {name}", leave=False):
                path = self.folder / "work" / f"{number}-{bucket}.parquet"
                table = pq.read_table(path)
                table = table.take(pc.sort_indices(table, [(self.time, "ascending")]))
                if writer is None:
                    target = self.folder / name / "part-0.parquet"
                    writer = pq.ParquetWriter(target, table.schema, compression="zstd")
                writer.write_table(table, GROUP_ROWS)
                path.unlink()
            assert writer is not None
            writer.close()
        (self.folder / "work").rmdir()


def lookup(keys: np.ndarray, table: Columns, key: str) -> Callable[[str], Any]:
    """Join by key: a function from a column of ``table`` to its value for each of ``keys``.

    Args:
        keys: (N,) keys.
        table: columns by name.
        key: its key column.

    Unknown keys give null.
    """
    order = np.argsort(table[key], kind="stable")
    at = np.searchsorted(table[key], keys, sorter=order).clip(max=len(order) - 1)
    row = order[at]
    known = table[key][row] == keys

    def column(name: str) -> Any:
        values = table[name][row]
        if values.dtype == object:
            return pa.array(values, pa.string(), mask=~known)
        return pa.array(values, mask=~known)

    return column


def hashed(**sizes: int) -> dict[str, dict[str, Any]]:
    """Vocabularies that hash to so many buckets, by field."""
    return {name: {"encoding": "hash", "size": size} for name, size in sizes.items()}


def write_schema(
    folder: Path, roles: dict[str, Any], fields: dict[str, Any], length: int, about: str
) -> None:
    """Write ``schema.yaml``."""
    content = {**roles, "length": length, "about": about, "fields": fields}
    (folder / "schema.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

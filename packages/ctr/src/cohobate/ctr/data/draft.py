"""Draft a schema from a file: roles by names and by what the values do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic
from cohobate.ctr.data.stream import open_parquet

LABELS = ("label", "click", "clicked", "is_click", "clk", "y", "target")
TIMES = ("timestamp", "time", "time_stamp", "time_ms", "ts", "event_time", "datetime")
USERS = ("user_id", "user", "uid", "userid", "member_id")
SAMPLE_ROWS = 200_000
AFFIX = re.compile(r"^(hist|history|seq|click|past)_|_(hist|history|list|seq|sequence)$")


def draft_schema(path: Path, *, min_count: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Guess the schema of a parquet file, or of the first in a folder.

    The label, the time and the user are found by name; a list column is a behaviour field, paired
    with the column of the same name without ``hist_`` or ``_list``; an id column that never changes
    within a user describes the user, one that does the candidate; floats are dense features. The
    split is at 80 and 90 % of the time.

    Args:
        path: a parquet file or a folder of shards.
        min_count: with 1 or more, ids become vocabularies in files: those seen so often before
            the validation part; else, and where no id is, ids are hashed, or used as they are
            when they are small.
        out: folder for the vocabularies (``vocabulary/<field>.parquet``).

    Returns:
        The content of ``schema.yaml``.

    Raises:
        InputError: no label, time or behaviours can be found.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no *.parquet in this folder")
    with open_parquet(files[0]) as file:
        table = pa.Table.from_batches(_some(file), schema=file.schema_arrow).combine_chunks()
    content = _roles(table, files[0])
    singles = [*content["profile"], *content["candidate"]]
    names = dict.fromkeys([*singles, *content["history"].values()])
    source = {v: k for k, v in content["history"].items() if v not in table.column_names}
    content["fields"] = {name: _encoding(table, source.get(name, name)) for name in names}
    if min_count > 0:
        if out is None:
            raise InputError("min_count: needs a folder for the vocabularies")
        for name in names:
            target = Path("vocabulary") / f"{name}.parquet"
            if _vocabulary(files, source.get(name, name), content, min_count, out / target):
                content["fields"][name] = {"encoding": "list", "file": str(target)}
    return content


def _some(file: pq.ParquetFile) -> list[pa.RecordBatch]:
    batches, rows = [], 0
    for batch in file.iter_batches(16_384):
        batches.append(batch)
        rows += batch.num_rows
        if rows >= SAMPLE_ROWS:
            break
    return batches


def _find(table: pa.Table, names: tuple[str, ...]) -> str | None:
    lower = {name.lower(): name for name in table.column_names}
    return next((lower[name] for name in names if name in lower), None)


def _roles(table: pa.Table, path: Path) -> dict[str, Any]:
    label, time, user = (_find(table, names) for names in (LABELS, TIMES, USERS))
    for found, role, names in ((label, "label", LABELS), (time, "time", TIMES)):
        if found is None:
            raise InputError(f"{path}: no column for the {role}; looked for {', '.join(names)}")
    assert label is not None
    assert time is not None
    lists = [f.name for f in table.schema if pa.types.is_nested(f.type)]
    times = [name for name in lists if re.search(r"time|_ts$", name)]
    content: dict[str, Any] = {"label": label}
    if user is not None:
        content["user"] = user
    values = table[time].to_numpy()
    largest = int(values.max())
    units = ((10**14, "us"), (10**11, "ms"), (10**8, "s"))
    unit = next((name for bound, name in units if largest >= bound), "hour")
    content |= {"time": time, "time_unit": unit, "profile": [], "candidate": [], "dense": []}
    for field in table.schema:
        if field.name in (label, time, *lists):
            continue
        if pa.types.is_floating(field.type):
            content["dense"].append(field.name)
        else:
            constant = field.name == user or _constant(table, user, field.name)
            content["profile" if constant else "candidate"].append(field.name)
    content["history"] = {
        name: _pair(name, table.column_names) for name in lists if name not in times
    }
    if not content["history"]:
        raise InputError(f"{path}: no list column with behaviours")
    if times:
        content["history_time"] = times[0]
    longest = max(int(pc.max(pc.list_value_length(table[n])).as_py() or 1) for n in lists)
    content["length"] = max(longest, 1)
    if unit != "hour":
        valid, test = np.quantile(values, [0.8, 0.9])
        content |= {"valid_from": int(valid), "test_from": int(test)}
    return content


def _constant(table: pa.Table, user: str | None, name: str) -> bool:
    """Whether a column has one value per user, among users with several rows."""
    if user is None or user == name:
        return user == name
    pairs = table.select([user, name]).group_by([user, name]).aggregate([])
    users = len(pc.unique(table[user]))
    return users < table.num_rows and pairs.num_rows == users


def _pair(name: str, columns: list[str]) -> str:
    """Field of a list column: the column of the same name without its affix, else its own."""
    core = AFFIX.sub("", name)
    return next((c for c in (core, f"{core}_id") if c in columns), core)


def _encoding(table: pa.Table, name: str) -> dict[str, Any]:
    values = pc.drop_null(_flat(table[name]))
    if len(values) == 0:
        return {"encoding": "hash", "size": 1024}
    distinct = len(pc.unique(values))
    if pa.types.is_integer(values.type):
        low, high = (f(values).as_py() for f in (pc.min, pc.max))
        if low >= 0 and high < max(64, 4 * distinct):
            return {"encoding": "identity", "size": int(high) + 1}
    return {"encoding": "hash", "size": max(64, 3 * distinct)}


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.list_flatten(column) if pa.types.is_nested(column.type) else column


def _vocabulary(
    files: list[Path], name: str, content: dict[str, Any], min_count: int, target: Path
) -> bool:
    """Write the ids seen at least ``min_count`` times before validation, most frequent first.

    Returns:
        Whether there are any.
    """
    time, until = content["time"], content.get("valid_from")
    seen: pa.Table | None = None
    for path in files:
        with open_parquet(path) as file:
            for batch in file.iter_batches(65_536, columns=list({name, time})):
                table = pa.Table.from_batches([batch])
                if until is not None:
                    table = table.filter(pc.less(table[time], until))
                values = pc.drop_null(_flat(table[name]))
                new = pa.table({"id": values, "n": pa.array(np.ones(len(values), np.int64))})
                joined = new if seen is None else pa.concat_tables([seen, new])
                total = joined.group_by("id").aggregate([("n", "sum")])
                seen = pa.table({"id": total["id"], "n": total["n_sum"]})
    assert seen is not None
    kept = seen.filter(pc.greater_equal(seen["n"], min_count))
    if kept.num_rows == 0:
        return False
    kept = kept.sort_by([("n", "descending"), ("id", "ascending")])
    with save_atomic(target) as temporary:
        pq.write_table(kept.select(["id"]), temporary)
    return True

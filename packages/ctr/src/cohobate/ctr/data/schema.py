"""The schema of a click log: which column plays which role, and how raw ids become table rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow.parquet as pq
import yaml

from cohobate.core.errors import InputError
from cohobate.ctr.data.ids import hash_ids, id_values
from cohobate.ctr.nets.inputs import Layout

Encoding = Literal["identity", "hash", "list"]
TimeUnit = Literal["s", "ms", "us", "hour"]

SCALE: dict[str, int] = {"s": 1, "ms": 1_000, "us": 1_000_000, "hour": 1}
"""How many of a unit make a second; ``hour`` holds an hour of the day and no date."""


@dataclass(frozen=True)
class Vocabulary:
    """An id space. It owns ``size + 1`` rows of the table; the first is for unknown ids.

    Args:
        encoding: ``identity``: ids are 0 … size - 1; ``hash``: any id or string, to one of ``size``
            buckets; ``list``: the ids in ``file``, the rest is unknown.
        size: number of ids or buckets; for ``list`` it is the file's.
        file: parquet file with one column of the known ids, relative to the schema.
        start: row of the unknown id in the table.
        known: sorted ids of ``file`` (strings hashed), and the place of each in the file.
    """

    encoding: Encoding
    size: int
    file: str | None = None
    start: int = 1
    known: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False, compare=False)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Table rows of non-negative int64 ids; missing ids (-1) and unknown ones share a row."""
        if self.encoding == "hash":
            found = (hash_ids(ids) % np.uint64(self.size)).astype(np.int64)
        elif self.encoding == "identity":
            found = np.where(ids < self.size, ids, -1)
        else:
            assert self.known is not None
            ids_sorted, place = self.known
            at = np.searchsorted(ids_sorted, ids).clip(max=len(ids_sorted) - 1)
            found = np.where(ids_sorted[at] == ids, place[at], -1)
        return np.where(ids < 0, -1, found) + (self.start + 1)


@dataclass(frozen=True)
class Schema:
    """Roles of the columns.

    Args:
        path: where it was read from, for messages.
        label: column of 0 and 1.
        time: when the candidate was shown.
        time_unit: unit of both time columns.
        user: column that groups rows for GAUC; None makes one group.
        profile: columns of the user.
        candidate: columns of the candidate.
        history: list column of behaviours → the field whose ids it holds.
        fields: vocabulary of each field.
        context: further id columns, seen by the head alone.
        dense: real-valued columns, seen by the head alone.
        history_time: list column of their times, oldest first; None when there is none.
        length: newest behaviours kept.
        valid_from: rows from this time on are for validation (flat folders), in ``time_unit``.
        test_from: rows from this time on are for test.
        sample_rate: share of the negatives that is in the data.
        about: a line that describes the data.
        best_auc: best reachable AUC on the test part, where the clicks' probabilities are known.
    """

    path: Path
    label: str
    time: str
    candidate: tuple[str, ...]
    history: Mapping[str, str]
    fields: Mapping[str, Vocabulary]
    user: str | None = None
    time_unit: TimeUnit = "s"
    profile: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    history_time: str | None = None
    length: int = 50
    valid_from: int | None = None
    test_from: int | None = None
    sample_rate: float = 1.0
    about: str = ""
    best_auc: float | None = None

    @cached_property
    def columns(self) -> list[str]:
        """Every column that is read."""
        single = [self.label, self.time, self.user, self.history_time]
        names = [
            *(name for name in single if name),
            *self.profile,
            *self.candidate,
            *self.context,
            *self.dense,
            *self.history,
        ]
        return list(dict.fromkeys(names))

    @cached_property
    def layout(self) -> Layout:
        """Sizes for a network."""
        order = {name: i for i, name in enumerate(self.candidate)}
        return Layout(
            ids=1 + sum(v.size + 1 for v in self.fields.values()),
            profile=len(self.profile),
            candidate=len(self.candidate),
            context=len(self.context),
            pairs=tuple(order.get(name, -1) for name in self.history.values()),
            dense=len(self.dense),
            length=self.length,
        )


def _fault(path: Path, text: str) -> InputError:
    return InputError(f"{path}: {text}")


def _vocabulary(path: Path, name: str, entry: Any, start: int) -> Vocabulary:
    if not isinstance(entry, dict) or entry.get("encoding") not in get_args(Encoding):
        raise _fault(path, f"fields.{name}: needs encoding: {' | '.join(get_args(Encoding))}")
    extra = set(entry) - {"encoding", "size", "file"}
    if extra:
        raise _fault(path, f"fields.{name}: unknown key {min(extra)!r}")
    if entry["encoding"] == "list":
        if "file" not in entry:
            raise _fault(path, f"fields.{name}: encoding list needs a file")
        known = _read_ids(path.parent / str(entry["file"]))
        return Vocabulary("list", len(known[0]), str(entry["file"]), start, known)
    size = entry.get("size")
    if not isinstance(size, int) or size < 1:
        raise _fault(path, f"fields.{name}: size {size!r} is not a positive number")
    return Vocabulary(entry["encoding"], size, None, start)


def _read_ids(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise _fault(path, f"vocabulary cannot be read: {str(error).splitlines()[0]}") from None
    ids = id_values(table.column(0).combine_chunks(), path, table.column_names[0])
    if len(ids) == 0 or len(np.unique(ids)) != len(ids):
        raise _fault(path, f"column {table.column_names[0]!r}: empty, or an id stands twice")
    order = np.argsort(ids)
    return ids[order], order


_NAMES = {"profile", "candidate", "context", "dense"}
_PLAIN: dict[str, type | tuple[type, ...]] = {
    "label": str, "user": str, "time": str, "time_unit": str, "history_time": str, "length": int,
    "valid_from": int, "test_from": int, "sample_rate": (int, float), "about": str,
    "best_auc": float,
}  # fmt: skip


def parse_schema(content: Any, path: Path) -> Schema:
    """Check a schema.

    Args:
        content: what the YAML holds.
        path: of the YAML; messages name it, vocabulary files are relative to its folder.

    Raises:
        InputError: a key is missing, unknown or has a wrong value.
    """
    if not isinstance(content, dict):
        raise _fault(path, "a schema is a mapping of roles to columns")
    known = {*_NAMES, *_PLAIN, "history", "fields"}
    for key in content:
        if key not in known:
            close = get_close_matches(str(key), known, 1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise _fault(path, f"unknown key {key!r}{hint}")
    for key in ("label", "time", "candidate", "history", "fields"):
        if not content.get(key):
            raise _fault(path, f"key {key!r} is missing")
    values: dict[str, Any] = {k: v for k, v in content.items() if v is not None}
    for key, kind in _PLAIN.items():
        if key in values and not isinstance(values[key], kind):
            raise _fault(path, f"{key}: {values[key]!r} has the wrong type")
    for key in _NAMES & set(values):
        if not isinstance(values[key], list) or not all(isinstance(x, str) for x in values[key]):
            raise _fault(path, f"{key}: needs a list of column names")
        values[key] = tuple(values[key])
    if values.get("time_unit", "s") not in SCALE:
        raise _fault(path, f"time_unit: {values['time_unit']!r} is not one of {', '.join(SCALE)}")
    if not 0 < values.get("sample_rate", 1.0) <= 1:
        raise _fault(path, f"sample_rate: {values['sample_rate']} is not in (0, 1]")
    if values.get("length", 50) < 1:
        raise _fault(path, f"length: {values['length']} is not positive")
    if not isinstance(values["fields"], dict) or not isinstance(values["history"], dict):
        raise _fault(path, "fields and history are mappings")
    fields, start = {}, 1
    for name, entry in values["fields"].items():
        fields[name] = _vocabulary(path, name, entry, start)
        start += fields[name].size + 1
    used = [*(n for k in _NAMES - {"dense"} for n in values.get(k, ()))]
    for name in [*used, *values["history"].values()]:
        if name not in fields:
            raise _fault(path, f"fields.{name}: missing, though {name!r} is used")
    return Schema(**{**values, "path": path, "fields": fields})


def read_schema(path: Path) -> Schema:
    """Read a schema file.

    Raises:
        InputError: it cannot be read or is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError:
        raise _fault(path, "no such schema") from None
    except yaml.YAMLError as error:
        raise _fault(path, f"not YAML: {' '.join(str(error).split())}") from None
    return parse_schema(content, path)

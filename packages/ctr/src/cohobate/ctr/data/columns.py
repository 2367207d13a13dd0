"""Decode and check columns of a parquet file; every fault names file, column and row."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cohobate.core.errors import InputError
from cohobate.ctr.data.ids import id_values, integers, is_string, nulls
from cohobate.ctr.data.schema import SCALE, Schema

Future = Literal["error", "drop"]

LATEST = 7_258_118_400
"""1 January 2200 in seconds: a later time stamp is in another unit."""
EARLIEST = 86_400 * 365
"""1 January 1971: an earlier one, other than 0, too."""


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def check_columns(schema: Schema, arrow: pa.Schema, path: Path, *, labelled: bool = True) -> None:
    """Check that a file has every column and that types fit the roles.

    Args:
        schema: roles of the columns.
        arrow: columns of the file.
        path: for messages.
        labelled: the label is needed too.

    Raises:
        InputError: the first fault, by file and column.
    """

    def kind(name: str) -> pa.DataType:
        if name not in arrow.names:
            close = get_close_matches(name, arrow.names, 1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{path}: column {name!r} is missing{hint}")
        return arrow.field(name).type

    def expect(name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise InputError(f"{path}: column {name!r}: type {kind(name)}, expected {wanted}")

    def expect_ids(name: str, vocabulary: str, found: pa.DataType, wanted: str) -> None:
        strings = schema.fields[vocabulary].encoding != "identity" and is_string(found)
        expect(name, pa.types.is_integer(found) or strings, wanted)

    if labelled:
        label = kind(schema.label)
        expect(schema.label, _is_number(label) or pa.types.is_boolean(label), "0 or 1")
    for name in (schema.time, schema.history_time):
        if name is None:
            continue
        found = kind(name)
        if name == schema.history_time:
            expect(name, _is_list(found), "a list of integers")
            found = found.value_type
        expect(name, pa.types.is_integer(found), "integer times")
    for name in (*schema.profile, *schema.candidate, *schema.context):
        expect_ids(name, name, kind(name), "integer ids")
    if schema.user is not None:
        found = kind(schema.user)
        expect(schema.user, pa.types.is_integer(found) or is_string(found), "ids")
    for name, vocabulary in schema.history.items():
        expect(name, _is_list(kind(name)), "a list of ids")
        expect_ids(name, vocabulary, kind(name).value_type, "a list of integer ids")
    for name in schema.dense:
        expect(name, _is_number(kind(name)), "numbers")


@dataclass
class Slice:
    """Decoded rows: every id a row of the embedding table, behaviours ragged.

    ``events`` (E, n1) and ``event_time`` (E,) hold the behaviours of all rows one after the other;
    row i owns ``offsets[i]`` … ``offsets[i + 1]``.
    """

    label: np.ndarray
    time: np.ndarray
    user: np.ndarray
    profile: np.ndarray
    candidate: np.ndarray
    context: np.ndarray
    dense: np.ndarray
    events: np.ndarray
    event_time: np.ndarray
    offsets: np.ndarray
    dropped: int = 0
    """Behaviours left out because they lay after the impression."""


class Decoder:
    """Turns record batches into slices.

    Args:
        schema: roles of the columns.
        future: a behaviour later than its impression is an ``error``, or is left out (``drop``).
        labelled: False for data to predict; labels are then 0.
    """

    def __init__(self, schema: Schema, future: Future = "error", *, labelled: bool = True) -> None:
        self.schema, self.future, self.labelled = schema, future, labelled

    def __call__(self, batch: pa.RecordBatch, path: Path, first_row: int) -> Slice:
        """Decode a batch whose first row is row ``first_row`` of the file ``path``.

        Raises:
            InputError: the first fault, by file, column and row.
        """
        schema, n = self.schema, batch.num_rows
        rows = first_row + np.arange(n)
        time = self._times(batch.column(schema.time), path, schema.time, rows, required=True)

        def ids(names: tuple[str, ...]) -> np.ndarray:
            out = np.empty((n, len(names)), np.int64)
            for i, name in enumerate(names):
                values = id_values(batch.column(name), path, name, rows)
                out[:, i] = schema.fields[name].rows(values)
            return out

        user = np.zeros(n, np.int64)
        if schema.user is not None:
            user = id_values(batch.column(schema.user), path, schema.user, rows)
        events, event_time, offsets, dropped = self._history(batch, path, rows, time)
        label = np.zeros(n, np.float32)
        if self.labelled:
            label = self._label(batch.column(schema.label), path, rows)
        return Slice(
            label,
            time,
            user,
            ids(schema.profile),
            ids(schema.candidate),
            ids(schema.context),
            self._dense(batch, path, rows),
            events,
            event_time,
            offsets,
            dropped,
        )

    def _label(self, array: pa.Array, path: Path, rows: np.ndarray) -> np.ndarray:
        values = pc.cast(array, pa.float32()).fill_null(float("nan")).to_numpy(zero_copy_only=False)
        bad = (values != 0) & (values != 1)
        if bad.any():
            at = int(bad.argmax())
            raise InputError(
                f"{path}: column {self.schema.label!r}, row {rows[at]}: label {values[at]:g} "
                "is not 0 or 1"
            )
        return values

    def _dense(self, batch: pa.RecordBatch, path: Path, rows: np.ndarray) -> np.ndarray:
        out = np.empty((batch.num_rows, len(self.schema.dense)), np.float32)
        for i, name in enumerate(self.schema.dense):
            array = pc.cast(batch.column(name), pa.float32()).fill_null(float("nan"))
            out[:, i] = array.to_numpy(zero_copy_only=False)
            bad = ~np.isfinite(out[:, i])
            if bad.any():
                row = rows[int(bad.argmax())]
                raise InputError(f"{path}: column {name!r}, row {row}: not a finite number")
        return out

    def _times(
        self, array: pa.Array, path: Path, column: str, rows: np.ndarray, *, required: bool = False
    ) -> np.ndarray:
        """Seconds; a value that is no date in the schema's unit is a fault."""
        unit = self.schema.time_unit
        if required and array.null_count:
            row = rows[int(nulls(array).argmax())]
            raise InputError(f"{path}: column {column!r}, row {row}: no time")
        raw = integers(array)
        if unit == "hour":
            bad = (raw < 0) | (raw > 23)
            hint = "is no hour of the day"
        else:
            seconds = raw // SCALE[unit]
            bad = (seconds > LATEST) | ((seconds < EARLIEST) & (raw != 0))
            hint = f"is no date in {unit!r} (mixed time units?)"
        if bad.any():
            at = int(bad.argmax())
            raise InputError(f"{path}: column {column!r}, row {rows[at]}: time {raw[at]} {hint}")
        return raw * 3600 if unit == "hour" else seconds

    def _history(
        self, batch: pa.RecordBatch, path: Path, rows: np.ndarray, time: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        schema, n = self.schema, batch.num_rows
        columns = [*schema.history, *([schema.history_time] if schema.history_time else [])]
        lengths: np.ndarray | None = None
        flat: dict[str, Any] = {}
        for name in columns:
            array = batch.column(name)
            own = integers(pc.list_value_length(array))
            if lengths is None:
                lengths = own
            if (own != lengths).any():
                at = int((own != lengths).argmax())
                raise InputError(
                    f"{path}: column {name!r}, row {rows[at]}: {own[at]} behaviours, "
                    f"{columns[0]!r} has {lengths[at]}"
                )
            flat[name] = array.flatten()
        assert lengths is not None
        offsets = np.concatenate([[0], lengths.cumsum()])
        owner = np.repeat(np.arange(n), lengths)
        events = np.empty((len(owner), len(schema.history)), np.int64)
        for i, (name, vocabulary) in enumerate(schema.history.items()):
            values = id_values(flat[name], path, name, rows[owner])
            events[:, i] = schema.fields[vocabulary].rows(values)
        if schema.history_time is None:
            return events, time[owner], offsets, 0
        times = self._times(flat[schema.history_time], path, schema.history_time, rows[owner])
        if schema.time_unit == "hour":
            return events, times, offsets, 0
        return self._past(events, times, offsets, owner, path, rows, time)

    def _past(
        self,
        events: np.ndarray,
        times: np.ndarray,
        offsets: np.ndarray,
        owner: np.ndarray,
        path: Path,
        rows: np.ndarray,
        time: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Check that behaviours stand oldest first and before their impression."""
        column = self.schema.history_time
        unordered = (times[1:] < times[:-1]) & (owner[1:] == owner[:-1])
        if unordered.any():
            row = rows[owner[int(unordered.argmax())]]
            raise InputError(f"{path}: column {column!r}, row {row}: behaviours not oldest first")
        future = times > time[owner]
        if not future.any():
            return events, times, offsets, 0
        if self.future == "error":
            at = int(future.argmax())
            raise InputError(
                f"{path}: column {column!r}, row {rows[owner[at]]}: behaviour at {times[at]} is "
                f"later than the impression at {time[owner[at]]} (future: drop leaves it out)"
            )
        kept = ~future
        lengths = np.bincount(owner[kept], minlength=len(rows))
        return events[kept], times[kept], np.concatenate([[0], lengths.cumsum()]), int(future.sum())

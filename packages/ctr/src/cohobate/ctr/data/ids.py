"""Ids in columns: integers as they are, strings by their hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cohobate.core.errors import InputError


def hash_ids(values: np.ndarray) -> np.ndarray:
    """Mix int64 ids to uint64 so that a remainder of them is uniform (splitmix64).

    Args:
        values: int64 of any shape.

    Example:
        >>> hash_ids(np.array([1, 2])) % 1000
        array([465, 110], dtype=uint64)
    """
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_strings(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Hash UTF-8 strings to non-negative int64 without a loop over them.

    Args:
        data: uint8 bytes of all strings, one after the other.
        offsets: (N + 1,) int64 where each string starts.

    Returns:
        (N,) int64.
    """
    data, offsets = data[offsets[0] : offsets[-1]], offsets - offsets[0]
    length = np.diff(offsets)
    place = np.arange(len(data)) - np.repeat(offsets[:-1], length)
    powers = np.full(int(length.max(initial=0)) + 1, 0x100000001B3, dtype=np.uint64).cumprod()
    terms = (data.astype(np.uint64) + np.uint64(1)) * powers[place]
    total = np.concatenate([[np.uint64(0)], terms.cumsum(dtype=np.uint64)])
    sums = total[offsets[1:]] - total[offsets[:-1]]
    return (hash_ids(sums.view(np.int64)) >> np.uint64(1)).view(np.int64)


def is_string(kind: pa.DataType) -> bool:
    """Whether a column holds strings, also by a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def id_values(
    array: pa.Array, path: Path, column: str, rows: np.ndarray | None = None
) -> np.ndarray:
    """Ids as int64, strings by their hash; a missing id is -1.

    Args:
        array: integers or strings.
        path: for messages.
        column: for messages.
        rows: row in the file of each value; None counts from 0.

    Raises:
        InputError: an id is negative.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_string(array.type):
        text = pc.cast(array.fill_null(""), pa.large_string())
        _, offsets, data = text.buffers()
        bounds = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
        ids = hash_strings(np.frombuffer(data or b"", np.uint8), bounds)
        return np.where(nulls(array), -1, ids)
    ids = integers(array)
    bad = ids < 0
    if bad.any():
        at = int(bad.argmax())
        row = at if rows is None else int(rows[at])
        raise InputError(f"{path}: column {column!r}, row {row}: negative id {ids[at]}")
    return np.where(nulls(array), -1, ids) if array.null_count else ids


def nulls(array: pa.Array) -> np.ndarray:
    """Where values are missing."""
    return array.is_null().to_numpy(zero_copy_only=False)


def integers(array: pa.Array) -> np.ndarray:
    """Values as int64; missing ones are 0."""
    return array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)

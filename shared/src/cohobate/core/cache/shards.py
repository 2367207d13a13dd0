"""Shards: safetensors files that are either whole or not there, read by memory map.

A shard holds the records of some samples one after the other (``data``) and, for each of them, its
place (``offset``), shape, key, checksum and name. The index has a checksum of its own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from cohobate.core.cache.spec import keys_of
from cohobate.core.errors import InputError
from cohobate.core.io import save_atomic

_INDEX = ("offset", "shape", "key", "crc", "name")


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard."""
    return folder / f"{number:06d}.safetensors"


def write_shard(
    path: Path, names: Sequence[str], records: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]
) -> None:
    """Write a shard in one step.

    Args:
        path: Its file.
        names: Names of the samples.
        records: Their bytes, each uint8 of one axis.
        shapes: The shape each comes back in.

    Raises:
        InputError: It cannot be written.
    """
    ends = np.cumsum([0, *(len(record) for record in records)])
    arrays: dict[str, np.ndarray] = {
        "offset": ends.astype(np.int64),
        "shape": np.array(shapes, dtype=np.int64).reshape(len(names), -1),
        "key": keys_of(names).view(np.int64),
        "crc": np.array(
            [zlib.crc32(record.numpy().tobytes()) for record in records], dtype=np.int64
        ),
        "name": np.frombuffer("\0".join(names).encode(), dtype=np.uint8),
    }
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    tensors["data"] = torch.cat(list(records))
    with save_atomic(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"index": str(_index_crc(arrays))}))


def _index_crc(arrays: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in _INDEX:
        crc = zlib.crc32(arrays[name].tobytes(), crc)
    return crc


class Shard:
    """A shard open for reading; checksums are verified as samples are read.

    Args:
        path: Its file.

    Raises:
        InputError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            arrays, crc = _map(path)
            sound = _index_crc(arrays) == crc and arrays["offset"][-1] == len(arrays["data"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path}: damaged shard: {error}") from None
        if not sound:
            raise InputError(f"{path}: damaged shard: its index has another checksum")
        self.data = arrays["data"]
        # copies: the index is asked all the time, and is small
        self.offset, self.shape = arrays["offset"].copy(), arrays["shape"].copy()
        self.key, self.crc = arrays["key"].view(np.uint64).copy(), arrays["crc"].copy()
        self.sizes = np.diff(self.offset)
        self._name = arrays["name"]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def names(self) -> list[str]:
        """Names of the samples."""
        return self._name.tobytes().decode().split("\0") if len(self) else []

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy records of one size.

        Args:
            rows: Places in the shard (n,).
            out: Where they go (n, bytes), uint8.

        Raises:
            InputError: A record differs from its checksum.
        """
        size = out.shape[1]
        if len(self) and self.sizes.min() == self.sizes.max():
            np.take(self.data.reshape(len(self), size), rows, axis=0, out=out)
        else:
            for record, row in zip(out, rows, strict=True):
                record[:] = self.data[self.offset[row] : self.offset[row] + size]
        crc32, expected = zlib.crc32, self.crc[rows].tolist()
        for place, record in enumerate(out):
            if crc32(record) != expected[place]:
                name = self.names[rows[place]].replace("\x1f", " ")
                raise InputError(f"{self.path}: sample {name}: damaged, its checksum differs")


def _map(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a safetensors file as a memory map, and the checksum of its index."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("its header does not fit the file")
        header: dict[str, Any] = json.loads(file.read(length))
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length, shape=(size - 8 - length,))
    dtypes: dict[str, type[np.generic]] = {"I64": np.int64, "U8": np.uint8}
    crc = int(header.pop("__metadata__")["index"])
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop <= len(raw):
            raise ValueError("it is cut short")
        arrays[name] = raw[start:stop].view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return arrays, crc

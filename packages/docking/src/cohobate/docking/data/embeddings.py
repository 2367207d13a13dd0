"""What a protein language model says of a protein, from files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cohobate.core.catalog import suggestion
from cohobate.core.errors import InputError


class ProteinEmbeddings:
    """Residue embeddings of a protein language model, such as ESM-2, by protein.

    Args:
        path: ``.npz`` with an array for each protein: its residues' embeddings (L, C) or their mean
            (C,). Or ``.npy`` with one.

    Attributes:
        names: Of the proteins; that of a ``.npy`` is its file's.
        channels: C, the same for all.

    Raises:
        InputError: The file is missing, damaged, of another kind or empty, or the first array is no
            embedding.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with _arrays(self.path) as arrays:
            self.names = list(arrays)
        if not self.names:
            raise InputError(f"{path}: no array")
        self.channels = len(self._mean(self.names[0]))

    def of(self, name: str) -> np.ndarray:
        """Mean embedding of a protein (C,), float32.

        Raises:
            InputError: There is none, it is no embedding, or it has other channels.
        """
        if name not in self.names:
            known = suggestion(name, self.names)
            raise InputError(f"{self.path}: no protein embedding for {name}{known}")
        mean = self._mean(name)
        if len(mean) != self.channels:
            raise InputError(
                f"{self.path}: {name} has {len(mean)} channels, {self.names[0]} {self.channels}"
            )
        return mean

    def of_file(self, path: Path) -> np.ndarray:
        """Mean embedding (C,) of a receptor's file: the only one, or the one of the file's name.

        Raises:
            InputError: As `of`.
        """
        return self.of(self.names[0] if len(self.names) == 1 else path.name.split(".")[0])

    def _mean(self, name: str) -> np.ndarray:
        with _arrays(self.path) as arrays:
            found = arrays[name]
        if found.dtype.kind != "f" or found.ndim not in (1, 2) or not found.size:
            what = f"{found.dtype} {found.shape}"
            raise InputError(f"{self.path}: {name} is {what}, not real numbers (L, C) or (C,)")
        mean = found.astype(np.float32) if found.ndim == 1 else found.mean(0, dtype=np.float32)
        if not np.isfinite(mean).all():
            raise InputError(f"{self.path}: {name} has values that are not finite")
        return mean


@contextmanager
def _arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            yield {path.stem: found}
            return
        with found:
            yield found
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{path}: no .npz or .npy of numbers: {reason}") from None

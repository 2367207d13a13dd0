"""Files as people have them: compressed, with a byte order mark, damaged."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cohobate.core.errors import InputError


def kind(path: Path) -> str:
    """The suffix in lower case, without that of gzip.

    Example:
        >>> kind(Path("a.SMI.gz")), kind(Path("b.c.PDB"))
        ('.smi', '.pdb')
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_gzip(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() == ".gz"


def open_text(path: Path) -> IO[str]:
    """Open UTF-8 text, also compressed, with or without a byte order mark."""
    if is_gzip(path):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While a file is read, what is wrong with it is one line.

    Raises:
        InputError: It is missing, damaged, not UTF-8, or not CSV.
    """
    try:
        yield
    except (OSError, EOFError, UnicodeError, zlib.error, csv.Error, SystemError) as error:
        # rdkit reads in C++, which wraps what went wrong in the file.
        cause = error.__cause__ if isinstance(error, SystemError) and error.__cause__ else error
        why = getattr(cause, "strerror", None) or " ".join(str(cause).split())
        raise InputError(f"{path}: {why}") from None


def table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV with a head, as (number, fields without blanks around them).

    Raises:
        InputError: As for `reading`.
    """
    with reading(path), open_text(path) as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield number, {k.strip(): (v or "").strip() for k, v in row.items() if k is not None}

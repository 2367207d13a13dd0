"""Readers of public click logs as they are downloaded; each makes shards and a schema."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cohobate.core.errors import InputError
from cohobate.ctr.data.cache import prepared
from cohobate.ctr.data.layouts import eleme, kuairand, movielens, taobao

LAYOUTS = {
    "movielens": (movielens.SIGN, movielens.convert),
    "kuairand": (kuairand.LOGS[0], kuairand.convert),
    "taobao": (taobao.SIGN, taobao.convert),
    "eleme": (eleme.SIGN, eleme.convert),
}
"""A file that tells the layout, and the function that reads it, by name."""


def prepare(root: Path, cache: Path | None, length: int | None) -> Path:
    """Prepare a downloaded set once; return the folder with shards and schema.

    Args:
        root: the folder as downloaded.
        cache: where prepared data are kept.
        length: newest behaviours kept; default 50.

    Raises:
        InputError: the folder is no layout that is known here.
    """
    for name, (sign, convert) in LAYOUTS.items():
        if list(root.glob(sign)):
            size = length or 50
            stats = [(p.name, p.stat()) for p in sorted(root.iterdir())]
            stamps = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
            key = [4, str(root.resolve()), stamps, size]
            return prepared(name, key, partial(convert, root, length=size), cache)
    signs = ", ".join(f"{sign} ({name})" for name, (sign, _) in LAYOUTS.items())
    raise InputError(f"{root}: no schema.yaml and no known layout; looked for {signs}")

"""Where prepared data are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """Folder of prepared data: ``$COHOBATE_CACHE``, or ``cohobate`` in the user's cache."""
    given = os.environ.get("COHOBATE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "cohobate"


def prepared(name: str, key: object, make: Callable[[Path], None], root: Path | None) -> Path:
    """Folder made by ``make`` for ``key``; made once, whole or not at all.

    Args:
        name: start of the folder's name.
        key: what the content depends on; anything ``json`` can write.
        make: fills an empty folder.
        root: where; default :func:`cache_root`.
    """
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]
    folder = (root or cache_root()) / "ctr" / f"{name}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        make(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.exists():  # another process was quicker otherwise
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder

"""Compiled code by the hash of what it was made from.

An entry is a file that appears by a rename when it is complete, so that any number of processes
may use the cache at once and a killed one leaves at most a temporary file, swept up later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .. import knobs

_STALE_SECONDS = 3600.0  # after which a temporary file is taken for an orphan


def cache_key(parts: Iterable[str | bytes]) -> str:
    """Return the hash of `parts`, each delimited by its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def cached(key: str, suffix: str, make: Callable[[], bytes]) -> bytes:
    """Return the entry of `key`, made and kept by `make` where there is none.

    A cache that cannot be written is no error: the work is only done again next time.
    """
    data = find_cached(key, suffix)
    if data is None:
        data = make()
        with contextlib.suppress(OSError):
            _store(_place(key, suffix), data)
    return data


def find_cached(key: str, suffix: str) -> bytes | None:
    """Return the entry of `key`, None where there is none."""
    try:
        return _place(key, suffix).read_bytes()
    except OSError:
        return None


def _place(key: str, suffix: str) -> Path:
    return knobs.CACHE.get() / key[:2] / f"{key}{suffix}"


def _store(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what killed processes left."""
    now = time.time()
    for orphan in folder.glob(".new-*"):
        with contextlib.suppress(OSError):
            if now - orphan.stat().st_mtime > _STALE_SECONDS:
                orphan.unlink()

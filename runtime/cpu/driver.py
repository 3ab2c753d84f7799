"""The driver of CPU artifacts: a shared library, its thread pool and its arena.

Invariant: one call of a function is one native call. The library sees addresses only; whoever
calls `run` keeps the arrays behind them alive.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DiluError, Loc
from .memory import zeros


class _Call(ctypes.Structure):
    """`dilu_call` of the module's C interface."""

    _fields_ = [
        ("sizes", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("constants", ctypes.c_void_p),
        ("results", ctypes.c_void_p),
        ("arena", ctypes.c_void_p),
        ("host", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    ]


class Library:
    """A loaded module with a pool of `threads` threads."""

    def __init__(self, content: Path | bytes, threads: int) -> None:
        self.threads = threads
        self._arena = zeros(0)
        self._pool: int | None = None
        self._native = _opened(content)
        self._pool = self._native.dilu_pool_create(threads)
        if not self._pool:
            raise DiluError(
                f"cannot start {threads} threads", hint="ask for fewer with DILU_THREADS"
            )

    def arena_bytes(self, function: int, sizes: Sequence[int]) -> int:
        """Return the bytes of working memory that a call of a function needs."""
        array = np.array(sizes, np.int64)
        return int(self._native.dilu_arena_bytes(function, address(array), self.threads))

    def run(
        self,
        function: int,
        sizes: Sequence[int],
        parameters: Sequence[np.ndarray],
        states: Sequence[np.ndarray],
        constants: np.ndarray,
        results: Sequence[np.ndarray],
        host: int = 0,
        counts: np.ndarray | None = None,
    ) -> None:
        """Run a function. `constants` is u64[n]: the address of every constant's table; `host`
        that of the `dilu_host` of a function whose rows travel. The entries of every expert of
        every block, one after another, are added to `counts`, i64.
        """
        if self._pool is None:
            raise DiluError("the session is closed")
        size_array = np.array(sizes, np.int64)
        needed = self.arena_bytes(function, sizes)
        if needed > self._arena.nbytes:
            self._arena = zeros(0)  # the old one first, so that both never stand side by side
            self._arena = zeros(needed)
        tables = [addresses(arrays) for arrays in (parameters, states, results)]
        call = _Call(
            address(size_array),
            address(tables[0]),
            address(tables[1]),
            address(constants),
            address(tables[2]),
            address(self._arena),
            host,
            None if counts is None else address(counts),
        )
        code = self._native.dilu_run(self._pool, function, ctypes.byref(call))
        if code:
            raise DiluError(f"the compiled function failed with code {code}")

    def close(self) -> None:
        """Stop the threads and free the arena."""
        if self._pool is not None:
            self._native.dilu_pool_destroy(self._pool)
            self._pool = None
        self._arena = zeros(0)


def address(array: np.ndarray) -> int:
    """Return where an array starts (as `array.ctypes.data` does, in an eighth of the time)."""
    return array.__array_interface__["data"][0]


def addresses(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return u64[n]: where each array starts."""
    return np.array([address(array) for array in arrays], np.uint64)


def _opened(content: Path | bytes) -> Any:
    try:
        native = _load(content)
        native.dilu_pool_create.restype = ctypes.c_void_p
        native.dilu_pool_create.argtypes = [ctypes.c_int]
        native.dilu_pool_destroy.restype = None
        native.dilu_pool_destroy.argtypes = [ctypes.c_void_p]
        native.dilu_arena_bytes.restype = ctypes.c_int64
        native.dilu_arena_bytes.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        native.dilu_run.restype = ctypes.c_int
        native.dilu_run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise DiluError(
            f"the kernels cannot be loaded: {error}",
            Loc(str(content)) if isinstance(content, Path) else None,
            hint="compile the model again on this machine",
        ) from error
    return native


def _load(content: Path | bytes) -> ctypes.CDLL:
    if isinstance(content, Path):
        return ctypes.CDLL(os.fspath(content.resolve()))
    # The loader knows libraries by their name, so each needs a name of its own.
    with tempfile.NamedTemporaryFile(prefix="dilu-", suffix=".so") as file:
        file.write(content)
        file.flush()
        return ctypes.CDLL(file.name)

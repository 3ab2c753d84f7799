"""What native code asks of other ranks while a function runs: rows for experts, sums, gathering.

No exception may pass through native code: the first one is kept and raised once the function has
run to its end, and nothing is asked of other ranks after it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .exchange import Exchange, view
from .ranks import AXES, Ranks

#: Up to so many bytes, ranks send all they have to each other, which takes one step instead of two.
_SMALL = 1 << 16


class Routed(ctypes.Structure):
    """`dilu_routed` of the module's C interface."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("tokens", "choices", "width", "itemsize")),
        *((n, ctypes.c_int64) for n in ("ranks", "slots", "capacity")),
        *((n, ctypes.c_void_p) for n in ("x", "indices", "placement", "result")),
        *((n, ctypes.c_void_p) for n in ("rows", "slots_of", "made")),
    ]


class Collective(ctypes.Structure):
    """`dilu_collective`."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("gather", "axis", "itemsize", "bfloat", "rows", "width")),
        *((n, ctypes.c_void_p) for n in ("x", "result")),
    ]


_Next = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(Routed))
_Collect = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(Collective))


class _Host(ctypes.Structure):
    """`dilu_host`."""

    _fields_ = [
        ("next", _Next),
        ("collect", _Collect),
        ("context", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("lent", ctypes.c_void_p * 3),
    ]


class Host:
    """Answers native code; `sent_bytes` counts what sums and gathering sent from this rank."""

    def __init__(self, ranks: Ranks, wire: str = "exact") -> None:
        self.ranks = ranks
        self.exchange = Exchange(ranks, wire)
        self.sent_bytes = 0
        self._error: BaseException | None = None
        self._next, self._collect = _Next(self.next), _Collect(self.collect)
        self._host = _Host(self._next, self._collect, None, 0)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._host)

    def begin(self) -> None:
        """Get ready for a run of a function."""
        self._error = None
        self.exchange.begin()

    def finish(self) -> None:
        """Raise what went wrong while a function ran."""
        if self._error is not None:
            raise self._error

    def next(self, _: Any, routed: Any) -> int:
        """Answer `dilu_host_next`: how many rows to work on, -1 for no more."""
        if self._error is not None:
            return -1
        try:
            return self.exchange.next(routed.contents)
        except BaseException as error:
            self._error = error
            return -1

    def collect(self, _: Any, collective: Any) -> None:
        """Answer `dilu_host_collect`."""
        if self._error is not None:
            return
        try:
            self._collected(collective.contents)
        except BaseException as error:
            self._error = error

    def _collected(self, c: Any) -> None:
        axis = AXES[c.axis]
        shape, bits = (c.rows, c.width), np.dtype(f"u{c.itemsize}")
        x = view(c.x, shape, bits)
        if not x.size:
            return
        if c.gather:
            parts = self._gather(axis, x)
            result = view(c.result, (c.rows, len(parts), c.width), bits)
            result[...] = parts.transpose(1, 0, 2)
        else:
            result = view(c.result, shape, bits)
            result[...] = self._sum(axis, x.reshape(-1), bool(c.bfloat)).reshape(shape)

    def _gather(self, axis: str, x: np.ndarray) -> np.ndarray:
        count = len(self.ranks.groups[axis])
        self.sent_bytes += (count - 1) * x.nbytes
        return self.ranks.gather_along(axis, x, "the gathering of parts")

    def _sum(self, axis: str, x: np.ndarray, bfloat: bool) -> np.ndarray:
        """Return the sum of all ranks' `x`, added in the order of the ranks, so that it is the
        same on all of them and does not depend on how much is added at once."""
        count = len(self.ranks.groups[axis])
        if count == 2 or x.nbytes <= _SMALL:
            return _added(self._gather(axis, x), bfloat)
        part = -(-x.size // count)
        padded = np.zeros(count * part, x.dtype)
        padded[: x.size] = x
        rows = np.empty((count, part), x.dtype)
        sizes = np.ones((count, count), np.int64)
        self.sent_bytes += self.ranks.sent_rows(axis, sizes) * rows[0].nbytes
        what = "the summing of parts"
        works = self.ranks.all_to_all(axis, rows, sizes, padded.reshape(rows.shape), what)
        self.ranks.wait(works, what)
        return self._gather(axis, _added(rows, bfloat)).reshape(-1)[: x.size]


def _added(parts: np.ndarray, bfloat: bool) -> np.ndarray:
    """Return the sum over the first dimension of floats given as raw bits, as raw bits."""
    if not bfloat:
        return _in_order(parts.view(f"f{parts.itemsize}")).view(parts.dtype)
    total = _in_order((parts.astype(np.uint32) << 16).view(np.float32))
    bits = total.view(np.uint32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(total), 0x7FC0, even).astype(np.uint16)


def _in_order(parts: np.ndarray) -> np.ndarray:
    total = parts[0]
    for other in parts[1:]:
        total = total + other
    return total

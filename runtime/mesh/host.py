"""What native code asks of other ranks while a function runs: rows for experts, sums, gathering.

No exception may pass through native code: the first one is kept and raised once the function has
run to its end, and nothing is asked of other ranks after it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .exchange import Exchange, view
from .ranks import AXES, Ranks
from .rounds import rounds_of

#: Up to so many bytes, ranks send all they have to each other, which takes one step instead of two.
ONE_STEP = 1 << 16
_GATHERING, _SUMMING = "the gathering of parts", "the summing of parts"
_MOST_KEPT = 256  # small collectives that are kept ready


class Collective(ctypes.Structure):
    """`dilu_collective`."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("gather", "axis", "itemsize", "bfloat", "rows", "width")),
        *((n, ctypes.c_void_p) for n in ("x", "result")),
    ]


_Next = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
_Collect = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


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
        self.exchange = Exchange(ranks, rounds_of, wire)
        self.sent_bytes = 0
        self._ready: dict[bytes, Callable[[], None]] = {}
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

    def next(self, _: Any, routed: int) -> int:
        """Answer `dilu_host_next`, of the `dilu_routed` at an address: how many rows to work on,
        -1 for no more."""
        if self._error is not None:
            return -1
        try:
            return self.exchange.next(routed)
        except BaseException as error:
            self._error = error
            return -1

    def collect(self, _: Any, collective: int) -> None:
        """Answer `dilu_host_collect`: do what the `dilu_collective` at an address says."""
        if self._error is not None:
            return
        try:
            asked = ctypes.string_at(collective, ctypes.sizeof(Collective))
            (self._ready.get(asked) or self._prepared(asked))()
        except BaseException as error:
            self._error = error

    def _prepared(self, asked: bytes) -> Callable[[], None]:
        """Return what does a collective; one of few bytes is kept for the next step's."""
        c = Collective.from_buffer_copy(asked)
        axis, count = AXES[c.axis], len(self.ranks.groups[AXES[c.axis]])
        shape, bits = (c.rows, c.width), np.dtype(f"u{c.itemsize}")
        x = view(c.x, shape, bits)
        if not x.size:
            return _nothing
        if c.gather:
            result = view(c.result, (c.rows, count, c.width), bits)
            finish = partial(_put_side_by_side, result)
        else:
            result = view(c.result, shape, bits)
            finish = partial(_add, result, bool(c.bfloat))
        one_step = c.gather or count == 2 or x.nbytes <= ONE_STEP
        if not one_step:
            return partial(self._sum_in_two_steps, axis, x, result, bool(c.bfloat))
        ready = self.ranks.small_gather(axis, (x.nbytes,) * count)
        if ready is None:
            return lambda: finish(self._gather(axis, x))
        parts = [memory.view(bits).reshape(count, *shape) for memory in ready.all]
        meet = partial(ready.meet, x.reshape(-1).view(np.uint8))
        what = _GATHERING if c.gather else _SUMMING
        sent = (count - 1) * x.nbytes

        def run() -> None:
            self.sent_bytes += sent
            finish(parts[self.ranks.guarded(meet, what)])

        if len(self._ready) >= _MOST_KEPT:
            self._ready.clear()
        self._ready[asked] = run
        return run

    def _gather(self, axis: str, x: np.ndarray) -> np.ndarray:
        count = len(self.ranks.groups[axis])
        self.sent_bytes += (count - 1) * x.nbytes
        return self.ranks.gather_along(axis, x, _GATHERING)

    def _sum_in_two_steps(self, axis: str, x: np.ndarray, result: np.ndarray, bfloat: bool) -> None:
        """Every rank adds up a part, and gets the other parts' sums: less to send than all of x."""
        count = len(self.ranks.groups[axis])
        part = -(-x.size // count)
        padded = np.zeros((count, part), x.dtype)
        padded.reshape(-1)[: x.size] = x.reshape(-1)
        rows, total = np.empty_like(padded), np.empty(part, x.dtype)
        sizes = np.ones((count, count), np.int64)
        self.sent_bytes += self.ranks.sent_rows(axis, sizes) * total.nbytes
        works = self.ranks.all_to_all(axis, rows, sizes, padded, _SUMMING)
        self.ranks.wait(works, _SUMMING)
        _add(total, bfloat, rows)
        result.reshape(-1)[...] = self._gather(axis, total).reshape(-1)[: x.size]


def _nothing() -> None:
    pass


def _put_side_by_side(result: np.ndarray, parts: np.ndarray) -> None:
    result[...] = parts.transpose(1, 0, 2)


def _add(result: np.ndarray, bfloat: bool, parts: np.ndarray) -> None:
    """Put the sum over the first dimension into `result`: floats given as raw bits.

    They are added in the order of the ranks, so that the sum is the same on all of them and does
    not depend on how much is added at once.
    """
    if not bfloat:
        dtype = f"f{parts.itemsize}"
        _add_in_order(parts.view(dtype), result.view(dtype))
        return
    total = np.empty(result.shape, np.float32)
    _add_in_order((parts.astype(np.uint32) << 16).view(np.float32), total)
    bits = total.view(np.uint32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    result[...] = np.where(np.isnan(total), 0x7FC0, even)


def _add_in_order(parts: np.ndarray, out: np.ndarray) -> None:
    np.add(parts[0], parts[1], out=out)
    for other in parts[2:]:
        out += other

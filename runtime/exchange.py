"""Rows on their way to experts: what native code asks for while a function runs.

For every block of experts, native code asks for rows again and again, at most `capacity` at a time.
With no more ranks than a token has experts, every rank gets all rows and which experts they chose,
at once: that is less than to send a row for each of its experts. With more, ranks tell each other
how many rows go where, and rows travel in rounds by one all-to-all each; a round is under way while
the one before it is worked on. What becomes of rows goes back likewise. No row is dropped: skew
makes more rounds, not larger ones.

Invariants: all ranks take part in every round, with rows or without; what a row becomes does not
depend on who holds its expert, nor on the rows that came with it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from .ranks import Ranks
from .wire import FORMATS, decode, encode, is_plain, row_bytes

_WHAT = "the exchange of rows"
_MOST_GATHERED = 4  # times the capacity: so many rows a rank has room for
_INDEX = np.dtype(np.int32)


class Exchange:
    """Sends a session's rows to experts and back, in a format of `wire.FORMATS`.

    `sent_bytes` counts what left this rank; `load[n]`, how often this rank's tokens chose each
    expert in the n-th block of experts.
    """

    def __init__(self, ranks: Ranks, form: str = "exact") -> None:
        self.ranks = ranks
        self.out, self.back = FORMATS[form]
        self.sent_bytes = 0
        self.load: list[np.ndarray] = []
        self.rounds = 0
        self._block = 0
        self._job: _Job | None = None
        self._tokens: list[int] | None = None
        self._holders: dict[int, _Holders] = {}
        self._memory: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Get ready for a run of a function."""
        self._block, self._job, self._tokens = 0, None, None

    def next(self, routed: Any) -> int:
        """Return how many rows native code is to work on; -1 where there are no more.

        `routed` is the `dilu_routed` of the block of experts.
        """
        if self._job is None:
            self._job = self._begun(routed)
        count = self._job.step(routed)
        if count < 0:
            self._job = None
        return count

    def _begun(self, routed: Any) -> _Job:
        holders = self._holders.get(routed.placement)
        if holders is None:
            shape = (routed.ranks, routed.slots)
            holders = _Holders(view(routed.placement, shape, np.dtype(np.int64)))
            self._holders[routed.placement] = holders
        few = routed.ranks <= routed.choices
        few = few and sum(self.tokens(routed.tokens)) <= _MOST_GATHERED * routed.capacity
        job = (_Gathered if few else _Sent)(self, routed, holders)
        if self._block == len(self.load):
            self.load.append(np.zeros(holders.experts, np.int64))
        self.load[self._block] += np.bincount(job.experts, minlength=holders.experts)
        self._block += 1
        return job

    def tokens(self, own: int) -> list[int]:
        """Return how many tokens each rank works on in this run of a function."""
        found = self._tokens
        if found is None:
            counts = self.ranks.gather_along("ep", np.array([own], np.int64), _WHAT)
            found = self._tokens = [int(n) for n in counts[:, 0]]
        return found

    def memory(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return an array whose memory is kept from block to block."""
        size = prod(shape) * dtype.itemsize
        found = self._memory.get(name)
        if found is None or found.size < size:
            found = self._memory[name] = np.empty(size, np.uint8)
        return found[:size].view(dtype).reshape(shape)


class _Holders:
    """Where every expert is: `keys[e, n]` is rank · slots + slot of the n-th of `copies[e]`."""

    def __init__(self, placement: np.ndarray) -> None:
        self.experts = int(placement.max()) + 1
        self.copies = np.bincount(placement.reshape(-1), minlength=self.experts)
        self.keys = np.zeros((self.experts, int(self.copies.max())), np.int64)
        order = np.argsort(placement.reshape(-1), kind="stable")
        first = np.cumsum(self.copies) - self.copies
        for number in range(self.keys.shape[1]):
            has = self.copies > number
            self.keys[has, number] = order[first[has] + number]

    def keys_of(self, experts: np.ndarray, tokens: np.ndarray, source: Any) -> np.ndarray:
        """Return the keys that experts of tokens have: those of a rank take turns with copies."""
        return self.keys[experts, (tokens + source) % self.copies[experts]]


class _Job:
    """One block of experts: who sends what to whom, round by round.

    `counts[n, m]`: how many rows of the n-th rank's tokens are for experts of the m-th; `slots`:
    those of the experts that rows here are for, in the order of their ranks.
    """

    slots: np.ndarray

    def __init__(self, exchange: Exchange, routed: Any, holders: _Holders) -> None:
        self.exchange, self.ranks = exchange, exchange.ranks
        self.me = self.ranks.groups["ep"].index(self.ranks.rank)
        tokens, choices, width = routed.tokens, routed.choices, routed.width
        self.dtype = np.dtype(f"u{routed.itemsize}")
        self.capacity, self.width = routed.capacity, width
        self.plain = is_plain(exchange.out, routed.itemsize)
        self.x = view(routed.x, (tokens, width), self.dtype)
        self.result = view(routed.result, (tokens * choices, width), self.dtype)
        indices = view(routed.indices, (tokens, choices), np.dtype(np.int64)).reshape(-1)
        self.experts = np.clip(indices, 0, holders.experts - 1)
        token = np.arange(tokens * choices) // max(choices, 1)
        keys = holders.keys_of(self.experts, token, self.me)
        self.order = np.argsort(keys, kind="stable")
        self.token = token[self.order]
        self.counts = self.learn(routed, holders, keys)
        self.starts = np.cumsum(self.counts, 0) - self.counts
        self.rounds = -(-int(self.counts.sum(0).max()) // self.capacity)
        self.offsets = np.cumsum(self.counts[self.me]) - self.counts[self.me]
        self.done = 0
        self.coming: dict[int, Any] = {}  # by round: what became of rows, on its way back
        exchange.rounds += self.rounds

    def learn(self, routed: Any, holders: _Holders, keys: np.ndarray) -> np.ndarray:
        """Return `counts`, given the keys of this rank's assignments; find `slots`."""
        raise NotImplementedError

    def dispatch(self, number: int) -> None:
        """Start sending the rows of a round to their experts."""

    def arrive(self, number: int, rows: np.ndarray) -> None:
        """Put the rows of a round into `rows`."""
        raise NotImplementedError

    def step(self, routed: Any) -> int:
        """Do what is to be done between two rounds; return the rows of the next."""
        number = self.done
        if number == 0:
            self.dispatch(0)
        else:
            self.combine(number - 1)
        if number >= self.rounds:
            for left in list(self.coming):
                self.finish(left)
            return -1
        self.dispatch(number + 1)
        if number >= 2:
            self.finish(number - 2)  # its memory is used again now
        rows, slots, made = self.lent(number)
        low = number * self.capacity
        own = self.slots[low : low + self.capacity]
        self.arrive(number, rows[: len(own)])
        slots[: len(own)] = own
        routed.rows, routed.slots_of, routed.made = (a.ctypes.data for a in (rows, slots, made))
        self.done += 1
        return len(own)

    def combine(self, number: int) -> None:
        """Start sending what became of the rows of a round back to where they are from."""
        sizes, chosen = self.traffic(number)
        form = self.exchange.back
        made = encode(form, self.lent(number)[2][: int(sizes[:, self.me].sum())])
        rows = np.empty((len(chosen), self.width), self.dtype)
        back = self.landing(form, f"back{number % 2}", rows)
        self.count(form, sizes.T)
        works = self.ranks.all_to_all("ep", back, sizes.T, made, _WHAT)
        self.coming[number] = (works, made, back, rows, chosen)

    def finish(self, number: int) -> None:
        """Put the outcomes of a round where they belong."""
        works, _, back, rows, chosen = self.coming.pop(number)
        self.ranks.wait(works, _WHAT)
        if not self.plain:
            decode(self.exchange.back, back, rows)
        self.result[self.order[chosen]] = rows

    def traffic(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many rows each rank sends to each in a round, and which ones this one does.

        A rank's rows come in the order of their sources; round n takes `capacity` of them from
        the n-th multiple of it on.
        """
        low, high = (
            np.clip(edge - self.starts, 0, self.counts)
            for edge in (number * self.capacity, (number + 1) * self.capacity)
        )
        mine = zip(self.offsets, low[self.me], high[self.me], strict=True)
        chosen = np.concatenate([np.arange(o + a, o + b) for o, a, b in mine])
        return high - low, chosen

    def lent(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the memory of a round: rows, their slots, and what they become."""
        turn, get = number % 2, self.exchange.memory
        shape = (self.capacity, self.width)
        return (
            get(f"rows{turn}", shape, self.dtype),
            get(f"slots{turn}", (self.capacity,), np.dtype(np.int64)),
            get(f"made{turn}", shape, self.dtype),
        )

    def landing(self, form: str, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the memory for bytes that are to become `rows`: their own, if they are rows."""
        if self.plain:
            return rows
        size = row_bytes(form, self.width, self.dtype.itemsize)
        memory = self.exchange.memory(name, (self.capacity, size), np.dtype(np.uint8))
        return memory[: len(rows)]

    def count(self, form: str, sizes: np.ndarray) -> None:
        row = row_bytes(form, self.width, self.dtype.itemsize)
        self.exchange.sent_bytes += self.ranks.sent_rows("ep", sizes) * row


class _Sent(_Job):
    """Rows travel to the ranks that hold their experts, one for each of them."""

    def learn(self, routed: Any, holders: _Holders, keys: np.ndarray) -> np.ndarray:
        shape = (routed.ranks, routed.slots)
        counts = np.bincount(keys, minlength=routed.ranks * routed.slots).reshape(shape)
        counts_SDE = self.ranks.gather_along("ep", counts, "routing")
        slots = np.tile(np.arange(routed.slots), routed.ranks)
        self.slots = np.repeat(slots, counts_SDE[:, self.me].reshape(-1))
        self.going: dict[int, Any] = {}
        return counts_SDE.sum(-1)

    def dispatch(self, number: int) -> None:
        if number >= self.rounds:
            return
        sizes, chosen = self.traffic(number)
        form = self.exchange.out
        rows = encode(form, np.take(self.x, self.token[chosen], axis=0))
        here = int(sizes[:, self.me].sum())
        came = self.landing(form, f"came{number % 2}", self.lent(number)[0][:here])
        self.count(form, sizes)
        works = self.ranks.all_to_all("ep", came, sizes, rows, _WHAT)
        self.going[number] = (works, rows, came)

    def arrive(self, number: int, rows: np.ndarray) -> None:
        works, _, came = self.going.pop(number)
        self.ranks.wait(works, _WHAT)
        if not self.plain:
            decode(self.exchange.out, came, rows)


class _Gathered(_Job):
    """Every rank gets all rows, each followed by its experts, and takes those that are for it."""

    def learn(self, routed: Any, holders: _Holders, keys: np.ndarray) -> np.ndarray:
        tokens, choices, places = routed.tokens, routed.choices, routed.ranks * routed.slots
        form = self.exchange.out
        size = row_bytes(form, self.width, self.dtype.itemsize)
        own = np.empty((tokens, size + _INDEX.itemsize * choices), np.uint8)
        own[:, :size] = encode(form, self.x).view(np.uint8)
        chosen = self.experts.astype(_INDEX).reshape(tokens, choices)
        own[:, size:] = chosen.view(np.uint8)
        counts = self.exchange.tokens(tokens)
        everyones = self.exchange.memory("came", (sum(counts), own.shape[1]), own.dtype)
        self.exchange.sent_bytes += (len(counts) - 1) * own.nbytes
        self.ranks.gather_rows_along("ep", own, counts, everyones, _WHAT)
        experts = np.ascontiguousarray(everyones[:, size:]).view(_INDEX).reshape(-1)
        source = np.repeat(np.arange(len(counts)), np.array(counts) * choices)
        first = np.repeat(np.cumsum(counts) - counts, np.array(counts) * choices)
        token = np.arange(len(experts)) // max(choices, 1)
        keys = holders.keys_of(experts, token - first, source)
        mine = np.flatnonzero(keys // routed.slots == self.me)
        mine = mine[np.argsort((source * places + keys)[mine], kind="stable")]
        self.slots = keys[mine] % routed.slots
        self.row, self.came = token[mine], everyones[:, :size]
        each = np.bincount(source * routed.ranks + keys // routed.slots, minlength=routed.ranks**2)
        return each.reshape(routed.ranks, routed.ranks)

    def arrive(self, number: int, rows: np.ndarray) -> None:
        low = number * self.capacity
        came = self.came[self.row[low : low + len(rows)]]
        decode(self.exchange.out, came, rows)


@lru_cache(4096)
def view(address: int | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return native memory as an array; whoever asks again, gets the same one."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size or not address:
        return np.empty(shape, dtype)
    raw: Any = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)

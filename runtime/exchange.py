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
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from .ranks import Ranks
from .swap import SmallExchange
from .wire import FORMATS, decode, encode, is_plain, row_bytes

_WHAT = "the exchange of rows"
_MOST_GATHERED = 4  # times the capacity: so many rows a rank has room for
_MOST_KEPT = 256  # blocks and batches of which something is known from the last step
_INDEX = np.dtype(np.int32)


class Routed(ctypes.Structure):
    """`dilu_routed` of the module's C interface."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("tokens", "choices", "width", "itemsize")),
        *((n, ctypes.c_int64) for n in ("ranks", "slots", "capacity")),
        *((n, ctypes.c_void_p) for n in ("x", "indices", "placement", "result")),
        *((n, ctypes.c_void_p) for n in ("rows", "slots_of", "made")),
    ]


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
        #: What makes the jobs of blocks, where it is not for the exchange to choose.
        self.make_job: Callable[[Exchange, Block], Job] | None = None
        self._number = 0
        self._job: Job | None = None
        self._tokens: tuple[int, ...] | None = None
        self._blocks: dict[bytes, Block] = {}
        self._holders: dict[int, _Holders] = {}
        self._turns: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self._memory: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Get ready for a run of a function."""
        self._number, self._job, self._tokens = 0, None, None

    def next(self, address: int) -> int:
        """Return how many rows native code is to work on; -1 where there are no more.

        The block of experts is described by a `Routed` at `address`.
        """
        if self._job is None:
            self._job = self._begun(address)
        count = self._job.step(Routed.from_address(address))
        if count < 0:
            self._job = None
        return count

    def _begun(self, address: int) -> Job:
        asked = ctypes.string_at(address, Routed.rows.offset)
        block = self._blocks.get(asked)
        if block is None:
            block = _kept(self._blocks, asked, self._block(Routed.from_address(address)))
        job = (self.make_job or _job)(self, block)
        if self._number == len(self.load):
            self.load.append(np.zeros(block.holders.experts, np.int64))
        self.load[self._number] += np.bincount(job.experts, minlength=block.holders.experts)
        self._number += 1
        return job

    def _block(self, routed: Routed) -> Block:
        holders = self._holders.get(routed.placement)
        if holders is None:
            shape = (routed.ranks, routed.slots)
            holders = _Holders(view(routed.placement, shape, np.dtype(np.int64)))
            self._holders[routed.placement] = holders
        return Block(routed, holders)

    def tokens(self, own: int) -> tuple[int, ...]:
        """Return how many tokens each rank works on in this run of a function."""
        found = self._tokens
        if found is None:
            counts = self.ranks.gather_along("ep", np.array([own], np.int64), _WHAT)
            found = self._tokens = tuple(counts[:, 0].tolist())
        return found

    def turns(self, choices: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, of every choice of the tokens of all ranks, the rank that it is from, and whose
        turn it is among the copies of an expert."""
        assert self._tokens is not None
        found = self._turns.get((self._tokens, choices))
        if found is None:
            source = np.repeat(np.arange(len(self._tokens)), np.array(self._tokens) * choices)
            own = [np.arange(n * choices) // choices for n in self._tokens]
            found = _kept(
                self._turns, (self._tokens, choices), (source, np.concatenate(own) + source)
            )
        return found

    def memory(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return an array whose memory is kept from block to block."""
        size = prod(shape) * dtype.itemsize
        found = self._memory.get(name)
        if found is None or found.size < size:
            found = self._memory[name] = np.empty(size, np.uint8)
        return found[:size].view(dtype).reshape(shape)


def _job(exchange: Exchange, block: Block) -> Job:
    few = block.ranks <= block.choices
    few = few and sum(exchange.tokens(block.tokens)) <= _MOST_GATHERED * block.capacity
    return (Gathered if few else Sent)(exchange, block)


def _kept(memory: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(memory) >= _MOST_KEPT:
        memory.clear()
    memory[key] = value
    return value


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

    def keys_of(self, experts: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Return the keys that experts of tokens have, which take turns with copies."""
        if self.keys.shape[1] == 1:
            return self.keys[experts, 0]
        return self.keys[experts, turns % self.copies[experts]]


class Block:
    """A block of experts and a batch for it: sizes, who holds what, and where numbers lie."""

    def __init__(self, routed: Routed, holders: _Holders) -> None:
        self.holders = holders
        self.tokens, self.choices, self.width = routed.tokens, routed.choices, routed.width
        self.ranks, self.slots, self.capacity = routed.ranks, routed.slots, routed.capacity
        self.dtype = np.dtype(f"u{routed.itemsize}")
        count = self.tokens * self.choices
        self.x = view(routed.x, (self.tokens, self.width), self.dtype)
        self.result = view(routed.result, (count, self.width), self.dtype)
        self.indices = view(routed.indices, (count,), np.dtype(np.int64))


class Job:
    """One block of experts: who sends what to whom, round by round.

    `counts[n, m]`: how many rows of the n-th rank's tokens are for experts of the m-th; `order`:
    this rank's choices in the order of the ranks that they are for; `slots`: those of the experts
    that rows here are for, in the order of the ranks that they are from.
    """

    order: np.ndarray
    slots: np.ndarray

    def __init__(self, exchange: Exchange, block: Block) -> None:
        self.exchange, self.ranks, self.block = exchange, exchange.ranks, block
        self.me = self.ranks.groups["ep"].index(self.ranks.rank)
        self.experts = np.clip(block.indices, 0, block.holders.experts - 1)
        self.counts = self.learn()
        self.rounds = -(-int(self.counts.sum(0).max()) // block.capacity)
        self.done = 0
        self.coming: dict[int, Any] = {}  # by round: what became of rows, on its way back
        exchange.rounds += self.rounds

    def learn(self) -> np.ndarray:
        """Return `counts`; find `order` and `slots`."""
        raise NotImplementedError

    def dispatch(self, number: int) -> None:
        """Start sending the rows of a round to their experts."""

    def arrive(self, number: int, rows: np.ndarray) -> None:
        """Put the rows of a round into `rows`."""
        raise NotImplementedError

    def step(self, routed: Routed) -> int:
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
        low = number * self.block.capacity
        own = self.slots[low : low + self.block.capacity]
        self.hand_over(number, own, routed)
        self.done += 1
        return len(own)

    def hand_over(self, number: int, own: np.ndarray, routed: Routed) -> None:
        """Lend native code the rows of a round, which are for these slots."""
        rows, slots, made = self.lent(number)
        self.arrive(number, rows[: len(own)])
        slots[: len(own)] = own
        routed.rows, routed.slots_of, routed.made = (a.ctypes.data for a in (rows, slots, made))

    def combine(self, number: int) -> None:
        """Start sending what became of the rows of a round back to where they are from."""
        sizes, places = self.traffic(number)
        form = self.exchange.back
        made = encode(form, self.lent(number)[2][: int(sizes[:, self.me].sum())])
        rows = np.empty((len(places), self.block.width), self.block.dtype)
        back = self.landing(form, f"back{number % 2}", rows)
        self.count(form, sizes.T)
        works = self.ranks.all_to_all("ep", back, sizes.T, made, _WHAT)
        self.coming[number] = (works, made, back, rows, places)

    def finish(self, number: int) -> None:
        """Put the outcomes of a round where they belong."""
        works, _, back, rows, places = self.coming.pop(number)
        self.ranks.wait(works, _WHAT)
        if not self.is_plain(self.exchange.back):
            decode(self.exchange.back, back, rows)
        self.block.result[places] = rows

    def traffic(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many rows each rank sends to each in a round, and which choices those of this
        one are.

        A rank's rows come in the order of their sources; round n takes `capacity` of them from
        the n-th multiple of it on.
        """
        if self.rounds == 1:
            return self.counts, self.order
        starts = np.cumsum(self.counts, 0) - self.counts
        offsets = np.cumsum(self.counts[self.me]) - self.counts[self.me]
        low, high = (
            np.clip(edge - starts, 0, self.counts)
            for edge in (number * self.block.capacity, (number + 1) * self.block.capacity)
        )
        mine = zip(offsets, low[self.me], high[self.me], strict=True)
        chosen = np.concatenate([np.arange(o + a, o + b) for o, a, b in mine])
        return high - low, self.order[chosen]

    def lent(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the memory of a round: rows, their slots, and what they become."""
        turn, get = number % 2, self.exchange.memory
        shape = (self.block.capacity, self.block.width)
        return (
            get(f"rows{turn}", shape, self.block.dtype),
            get(f"slots{turn}", shape[:1], np.dtype(np.int64)),
            get(f"made{turn}", shape, self.block.dtype),
        )

    def landing(self, form: str, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the memory for bytes that are to become `rows`: their own, if they are rows."""
        if self.is_plain(form):
            return rows
        shape = (self.block.capacity, self.row_bytes(form))
        return self.exchange.memory(name, shape, np.dtype(np.uint8))[: len(rows)]

    def is_plain(self, form: str) -> bool:
        """Whether rows are sent as they are."""
        return is_plain(form, self.block.dtype.itemsize)

    def row_bytes(self, form: str) -> int:
        return row_bytes(form, self.block.width, self.block.dtype.itemsize)

    def count(self, form: str, sizes: np.ndarray) -> None:
        self.exchange.sent_bytes += self.ranks.sent_rows("ep", sizes) * self.row_bytes(form)


class Sent(Job):
    """Rows travel to the ranks that hold their experts, one for each of them."""

    def learn(self) -> np.ndarray:
        block = self.block
        self.token = np.arange(len(self.experts)) // max(block.choices, 1)
        keys = block.holders.keys_of(self.experts, self.token + self.me)
        self.order = np.argsort(keys, kind="stable")
        shape = (block.ranks, block.slots)
        counts = np.bincount(keys, minlength=block.ranks * block.slots).reshape(shape)
        counts_SDE = self.ranks.gather_along("ep", counts, "routing")
        slots = np.tile(np.arange(block.slots), block.ranks)
        self.slots = np.repeat(slots, counts_SDE[:, self.me].reshape(-1))
        self.going: dict[int, Any] = {}
        return counts_SDE.sum(-1)

    def dispatch(self, number: int) -> None:
        if number >= self.rounds:
            return
        sizes, places = self.traffic(number)
        form = self.exchange.out
        rows = encode(form, np.take(self.block.x, self.token[places], axis=0))
        here = int(sizes[:, self.me].sum())
        came = self.landing(form, f"came{number % 2}", self.lent(number)[0][:here])
        self.count(form, sizes)
        works = self.ranks.all_to_all("ep", came, sizes, rows, _WHAT)
        self.going[number] = (works, rows, came)

    def arrive(self, number: int, rows: np.ndarray) -> None:
        works, _, came = self.going.pop(number)
        self.ranks.wait(works, _WHAT)
        if not self.is_plain(self.exchange.out):
            decode(self.exchange.out, came, rows)


class Gathered(Job):
    """Every rank gets all rows, each followed by its experts, and takes those that are for it."""

    def learn(self) -> np.ndarray:
        block, form = self.block, self.exchange.out
        tokens, choices = block.tokens, max(block.choices, 1)
        size = self.row_bytes(form)
        shape = (tokens, size + _INDEX.itemsize * block.choices)
        own = self.exchange.memory("own", shape, np.dtype(np.uint8))
        own[:, :size] = encode(form, block.x).view(np.uint8)
        chosen = self.experts.astype(_INDEX).reshape(tokens, block.choices)
        own[:, size:] = chosen.view(np.uint8)
        everyones = self.exchange.tokens(tokens)
        self.exchange.sent_bytes += (len(everyones) - 1) * own.nbytes
        rows = self.ranks.gather_rows_along("ep", own, everyones, _WHAT)
        experts = np.ascontiguousarray(rows[:, size:]).view(_INDEX).reshape(-1)
        source, turns = self.exchange.turns(block.choices)
        rank, slot = np.divmod(block.holders.keys_of(experts, turns), block.slots)
        mine = np.flatnonzero(rank == self.me)
        self.slots, self.row, self.came = slot[mine], mine // choices, rows[:, :size]
        first = sum(everyones[: self.me]) * block.choices
        self.order = np.argsort(rank[first : first + len(self.experts)], kind="stable")
        each = np.bincount(source * block.ranks + rank, minlength=block.ranks**2)
        return each.reshape(block.ranks, block.ranks)

    def arrive(self, number: int, rows: np.ndarray) -> None:
        low = number * self.block.capacity
        decode(self.exchange.out, self.came[self.row[low : low + len(rows)]], rows)

    def combine(self, number: int) -> None:
        size = self.row_bytes(self.exchange.back)
        most = tuple(n * self.block.choices * size for n in self.exchange.tokens(self.block.tokens))
        ready = self.ranks.small_exchange("ep", most) if self.rounds == 1 else None
        if ready is None:
            super().combine(number)
        else:
            self.give_back(ready, size)

    def give_back(self, ready: SmallExchange, size: int) -> None:
        """Give few rows back, all at once."""
        form, result = self.exchange.back, self.block.result
        here, away = self.counts[:, self.me].tolist(), self.counts[self.me].tolist()
        made = encode(form, self.lent(0)[2][: sum(here)]).view(np.uint8)
        self.exchange.sent_bytes += (sum(here) - here[self.me]) * size
        ends = np.cumsum(here).tolist()
        given = [made[end - n : end].reshape(-1) for n, end in zip(here, ends, strict=True)]
        came = [*self.ranks.guarded(lambda: ready.meet(given), _WHAT)]
        came[self.me] = given[self.me]
        end = 0
        for n, part in zip(away, came, strict=True):
            first, end = end, end + n
            if n and self.is_plain(form):
                rows = part[: n * size].view(result.dtype).reshape(n, -1)
                result[self.order[first:end]] = rows
            elif n:
                rows = np.empty((n, self.block.width), result.dtype)
                decode(form, part[: n * size].reshape(n, size), rows)
                result[self.order[first:end]] = rows


@lru_cache(4096)
def view(address: int | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return native memory as an array; whoever asks again, gets the same one."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size or not address:
        return np.empty(shape, dtype)
    raw: Any = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)

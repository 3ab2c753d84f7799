"""One block of experts at a time: who sends which rows to whom, round by round, and back.

Ranks tell each other how many rows go where, or all of them; then rows travel in rounds by one
all-to-all each. A round is under way while the one before it is worked on, and what becomes of rows
goes back likewise. No row is dropped: skew makes more rounds, not larger ones.

Invariants: all ranks take part in every round, with rows or without; what a row becomes does not
depend on who holds its expert, nor on the rows that came with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .exchange import EXCHANGE, Block, Exchange, Routed
from .swap import SmallExchange
from .wire import decode, encode, is_plain, row_bytes

_MOST_GATHERED = 4  # times the capacity: so many rows a rank has room for
_INDEX = np.dtype(np.int32)


class Rounds:
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
        rows = np.empty((len(places), self.block.width), self.block.made_dtype)
        back = self.landing(form, f"back{number % 2}", rows)
        self.count(made, sizes.T)
        works = self.ranks.all_to_all("ep", back, sizes.T, made, EXCHANGE)
        self.coming[number] = (works, made, back, rows, places)

    def finish(self, number: int) -> None:
        """Put the outcomes of a round where they belong."""
        works, _, back, rows, places = self.coming.pop(number)
        self.ranks.wait(works, EXCHANGE)
        if back is not rows:
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
            get(f"made{turn}", shape, self.block.made_dtype),
        )

    def landing(self, form: str, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the memory for bytes that are to become `rows`: their own, if they are rows."""
        if is_plain(form, rows.itemsize):
            return rows
        shape = (self.block.capacity, row_bytes(form, self.block.width, rows.itemsize))
        return self.exchange.memory(name, shape, np.dtype(np.uint8))[: len(rows)]

    def count(self, sent: np.ndarray, sizes: np.ndarray) -> None:
        """Count the bytes of rows like `sent`, of which every rank sends so many to each."""
        self.exchange.sent_bytes += self.ranks.sent_rows("ep", sizes) * sent.shape[1]


class Sent(Rounds):
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
        self.count(rows, sizes)
        works = self.ranks.all_to_all("ep", came, sizes, rows, EXCHANGE)
        self.going[number] = (works, rows, came)

    def arrive(self, number: int, rows: np.ndarray) -> None:
        works, _, came = self.going.pop(number)
        self.ranks.wait(works, EXCHANGE)
        if not is_plain(self.exchange.out, rows.itemsize):
            decode(self.exchange.out, came, rows)


class Gathered(Rounds):
    """Every rank gets all rows, each followed by its experts, and takes those that are for it."""

    def learn(self) -> np.ndarray:
        block, form = self.block, self.exchange.out
        tokens, choices = block.tokens, max(block.choices, 1)
        size = row_bytes(form, block.width, block.dtype.itemsize)
        shape = (tokens, size + _INDEX.itemsize * block.choices)
        own = self.exchange.memory("own", shape, np.dtype(np.uint8))
        own[:, :size] = encode(form, block.x).view(np.uint8)
        chosen = self.experts.astype(_INDEX).reshape(tokens, block.choices)
        own[:, size:] = chosen.view(np.uint8)
        everyones = self.exchange.tokens(tokens)
        self.exchange.sent_bytes += (len(everyones) - 1) * own.nbytes
        rows = self.ranks.gather_rows_along("ep", own, everyones, EXCHANGE)
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
        size = row_bytes(self.exchange.back, self.block.width, self.block.made_dtype.itemsize)
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
        came = [*self.ranks.guarded(lambda: ready.meet(given), EXCHANGE)]
        came[self.me] = given[self.me]
        end = 0
        for n, part in zip(away, came, strict=True):
            first, end = end, end + n
            if n and is_plain(form, result.itemsize):
                rows = part[: n * size].view(result.dtype).reshape(n, -1)
                result[self.order[first:end]] = rows
            elif n:
                rows = np.empty((n, self.block.width), result.dtype)
                decode(form, part[: n * size].reshape(n, size), rows)
                result[self.order[first:end]] = rows


def rounds_of(exchange: Exchange, block: Block) -> Rounds:
    """Return how rows travel for a block.

    With no more ranks than a token has experts, every rank gets all rows and which experts they
    chose, at once: that is less than to send a row for each of its experts. With more, rows are
    sent.
    """
    few = block.ranks <= block.choices
    few = few and sum(exchange.tokens(block.tokens)) <= _MOST_GATHERED * block.capacity
    return (Gathered if few else Sent)(exchange, block)

"""An exchange of rows in two hops: between machines, then inside each.

Of N = M·L ranks, L on each of M machines, the one in place l of a machine sends to those in place l
of the others, all that is for their machine at once; these pass it on. So a rank sends M + L - 2
messages instead of N - 1, and as many bytes over the network.

Sizes: `sizes[n, m]`, the rows that the n-th rank sends to the m-th; rows are bytes, `u8[rows, R]`,
in the order of the ranks that they are for, and arrive in the order of those that they are from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
#: Starts sending the n-th of the first arrays to the n-th rank, and receiving the n-th of the
#: second from it; empty ones are not sent. Returns what is to be waited for.
Swap = Callable[[Arrays, Arrays], Sequence[Any]]
#: From so many messages less on, two hops are worth that the second waits for the first.
_WORTH = 3


def worth_two_hops(ranks: int, local: int) -> bool:
    """Return whether ranks, `local` of them on each machine, should send in two hops."""
    if local < 2 or ranks % local or ranks == local:
        return False
    return (ranks - 1) - (ranks // local - 1) - (local - 1) >= _WORTH


def sent_rows(sizes: np.ndarray, own: int, local: int) -> int:
    """Return how many rows the rank `own` sends to others, those that it passes on included."""
    machine, place = divmod(own, local)
    grid = _grid(sizes, local)
    first = sizes[own].sum() - grid[machine, place, machine].sum()
    passed = grid[:, place, machine]  # [machine, place]
    return int(first + passed.sum() - passed[:, place].sum())


class TwoHops:
    """An exchange that is under way once it is made; `wait` ends it."""

    def __init__(
        self, swap: Swap, out: np.ndarray, sizes: np.ndarray, rows: np.ndarray, own: int, local: int
    ) -> None:
        self.swap, self.out, self.sizes = swap, out, sizes
        self.own, self.local = own, local
        self.machine, self.place = divmod(own, local)
        self.none = rows[:0]
        away = _parts(rows, _grid(sizes, local)[self.machine, self.place].sum(-1))
        self.passing = _grid(sizes, local)[:, self.place, self.machine]  # [machine, place]
        self.middle = np.empty((int(self.passing.sum()), rows.shape[1]), np.uint8)
        came = _parts(self.middle, self.passing.sum(-1))
        sources, targets = self.nothing(), self.nothing()
        sources[self.place :: local], targets[self.place :: local] = away, came
        self.works = swap(sources, targets)

    def nothing(self) -> Arrays:
        return [self.none] * len(self.sizes)

    def wait(self) -> None:
        """Pass on what came for others here, and wait for what they pass on."""
        for work in self.works:
            work.wait()
        cells = _parts(self.middle, self.passing.reshape(-1))
        here = slice(self.machine * self.local, (self.machine + 1) * self.local)
        counts = _grid(self.sizes, self.local)[:, :, self.machine, self.place]
        sources, targets = self.nothing(), self.nothing()
        sources[here] = [np.concatenate(cells[p :: self.local]) for p in range(self.local)]
        targets[here] = [np.empty((int(n), *self.out.shape[1:]), np.uint8) for n in counts.sum(0)]
        for work in self.swap(sources, targets):
            work.wait()
        whole = _parts(self.out, counts.reshape(-1))
        for place, part in enumerate(targets[here]):
            pieces = _parts(part, counts[:, place])
            for target, piece in zip(whole[place :: self.local], pieces, strict=True):
                target[...] = piece


def _grid(sizes: np.ndarray, local: int) -> np.ndarray:
    """Return sizes as [machine, place, machine, place], of those that send and that receive."""
    machines = len(sizes) // local
    return sizes.reshape(machines, local, machines, local)


def _parts(rows: np.ndarray, counts: np.ndarray) -> Arrays:
    return np.split(rows, np.cumsum(counts)[:-1])

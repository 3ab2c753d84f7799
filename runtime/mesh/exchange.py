"""Rows on their way to experts: what native code asks for while a function runs.

For every block of experts, native code asks for rows again and again, at most `capacity` at a time.

Invariant: what was learnt of a block and a batch, and where its numbers lie, is kept from step to
step; everything else is a job's (`rounds.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, Protocol

import numpy as np

from .ranks import Ranks
from .wire import FORMATS

EXCHANGE = "the exchange of rows"
_MOST_KEPT = 256  # blocks and batches of which something is known from the last step


class Routed(ctypes.Structure):
    """`dilu_routed` of the module's C interface."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("tokens", "choices", "width")),
        *((n, ctypes.c_int64) for n in ("itemsize", "made_itemsize")),
        *((n, ctypes.c_int64) for n in ("ranks", "slots", "capacity")),
        *((n, ctypes.c_void_p) for n in ("x", "indices", "placement", "result")),
        *((n, ctypes.c_void_p) for n in ("rows", "slots_of", "made")),
    ]


class Job(Protocol):
    """What becomes of one block of experts; `experts`: those that this rank's tokens chose."""

    experts: np.ndarray

    def step(self, routed: Routed) -> int:
        """Do what is to be done between two rounds; return how many rows the next one has here,
        which `routed` then tells of, or -1 after the last."""
        ...


class Exchange:
    """Sends a session's rows to experts and back, in a format of `wire.FORMATS`.

    `sent_bytes` counts what left this rank; `load[n]`, how often this rank's tokens chose each
    expert in the n-th block of experts.
    """

    def __init__(self, ranks: Ranks, make_job: MakeJob, form: str = "exact") -> None:
        self.ranks = ranks
        self.make_job = make_job
        self.out, self.back = FORMATS[form]
        self.sent_bytes = 0
        self.load: list[np.ndarray] = []
        self.rounds = 0
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
        job = self.make_job(self, block)
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
            counts = self.ranks.gather_along("ep", np.array([own], np.int64), EXCHANGE)
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
        self.dtype, self.made_dtype = (
            np.dtype(f"u{n}") for n in (routed.itemsize, routed.made_itemsize)
        )
        count = self.tokens * self.choices
        self.x = view(routed.x, (self.tokens, self.width), self.dtype)
        self.result = view(routed.result, (count, self.width), self.made_dtype)
        self.indices = view(routed.indices, (count,), np.dtype(np.int64))


@lru_cache(4096)
def view(address: int | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return native memory as an array; whoever asks again, gets the same one."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size or not address:
        return np.empty(shape, dtype)
    raw: Any = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)


#: Begins what is to be done for a block.
MakeJob = Callable[[Exchange, Block], Job]

"""Bytes that the ranks of a group give each other, by sends and receives of Gloo.

Gloo's own collectives hand each message from thread to thread: this takes half the time, for any
size (benchmarks/messages.py compares). A group is the backend of a process group: the group itself
looks up on every call what it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def start_swap(
    group: Any, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> list[Any]:
    """Start sending the n-th of the bytes to the n-th rank of a group and receiving from it.

    Empty ones are not sent. Returns what is to be waited for.
    """
    import torch

    if len(targets) < 2:
        for target, source in zip(targets, sources, strict=True):
            target[...] = source
        return []
    own = group.rank()
    targets[own][...] = sources[own]
    let_others_run()
    others = _others(own, len(targets))
    works = [group.recv([torch.from_numpy(targets[n])], n, 0) for n in others if targets[n].size]
    return works + [
        group.send([torch.from_numpy(sources[n])], n, 0) for n in others if sources[n].size
    ]


class _Ahead:
    """Messages of a group, up to `sizes` bytes from each rank, that are waited for ahead.

    The next ones go to the other half of the memory. So memory and tensors are made once, and Gloo
    sends without asking first. `tag` tells these messages from others, the same on all ranks.
    """

    def __init__(self, group: Any, sizes: Sequence[int], tag: int) -> None:
        #: What came, by turn: rank by rank, each at its place even if less came.
        self.all = [np.empty(sum(sizes), np.uint8) for _ in range(2)]
        self.parts = [np.split(memory, np.cumsum(sizes)[:-1]) for memory in self.all]
        self._turn, self._tag, self._group = 0, tag, group
        self._own = group.rank() if len(sizes) > 1 else 0
        self._others = _others(self._own, len(sizes))
        self._from: list[list[tuple[list[Any], int]]] = [[], []]
        if len(sizes) > 1:
            import torch

            for turn, parts in enumerate(self.parts):
                from_them = [n for n in self._others if sizes[n]]
                self._from[turn] = [([torch.from_numpy(parts[n])], n) for n in from_them]
        self._coming = self._expect(0)

    def _expect(self, turn: int) -> list[Any]:
        return [self._group.recv(part, rank, self._tag) for part, rank in self._from[turn]]

    def _swap(self, going: Sequence[tuple[list[Any], int]]) -> int:
        """Send tensors to ranks, wait for what all others send, and return the turn."""
        turn, coming = self._turn, self._coming
        let_others_run()
        works = [self._group.send(part, rank, self._tag) for part, rank in going]
        self._turn = 1 - turn
        self._coming = self._expect(1 - turn)
        for work in coming:
            work.wait()
        for work in works:
            work.wait()
        return turn


class SmallGather(_Ahead):
    """What a group's ranks tell each other again and again, `sizes` bytes each."""

    def __init__(self, group: Any, sizes: Sequence[int], tag: int) -> None:
        super().__init__(group, sizes, tag)
        self._to: list[list[tuple[list[Any], int]]] = [[], []]
        if self._others and sizes[self._own]:
            import torch

            for turn, parts in enumerate(self.parts):
                own = [torch.from_numpy(parts[self._own])]
                self._to[turn] = [(own, n) for n in self._others]

    def meet(self, own: np.ndarray) -> int:
        """Send these bytes to all others: those of all are in `all[turn]` until the next time but
        one. Returns the turn."""
        self.parts[self._turn][self._own][...] = own
        return self._swap(self._to[self._turn])


class SmallExchange(_Ahead):
    """What a group's ranks give each other again and again, up to `sizes[n]` bytes each to the
    n-th."""

    def __init__(self, group: Any, sizes: Sequence[int], tag: int) -> None:
        own = sizes[group.rank()] if len(sizes) > 1 else 0
        super().__init__(group, [own] * len(sizes), tag)
        self._taking = [n for n in self._others if sizes[n]]

    def meet(self, given: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Send the n-th of the bytes to the n-th rank, however few; return what came from each, at
        the front of its memory, until the next time but one."""
        import torch

        return self.parts[self._swap([([torch.from_numpy(given[n])], n) for n in self._taking])]


def let_others_run() -> None:
    """Let threads run now that would otherwise interrupt a `send`.

    The thread that waits for sockets finds the pair locked then and asks the kernel again and
    again, until a tick of the clock or two (of 4 ms) let the sender go on: one message in twenty
    took 4 to 10 ms. A thread that has let others run has a slice of time of its own before it.
    """
    if hasattr(os, "sched_yield"):
        os.sched_yield()


def _others(own: int, count: int) -> list[int]:
    return [(own + step) % count for step in range(1, count)]


def let_work_go_first() -> None:
    """Keep Gloo's threads from preempting the one that computes and sends, on Linux.

    A thread of the batch policy waits until the core is free or a slice of time has ended.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that is gone, or no permission
            if "gloo" in (thread / "comm").read_text():
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))

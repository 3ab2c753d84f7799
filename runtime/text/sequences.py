"""Sequences of tokens, the cache pages that they own, and the ragged batches made of them.

Shapes: T tokens of all sequences together, S sequences, P pages of the longest, R rows whose
logits are wanted. A page holds `page_size` places of the cache.
Invariants: a page belongs to one sequence at a time; a sequence owns pages for all of its tokens
that were run.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from ...errors import DiluError


class PagePool:
    """The pages of a cache, free or owned."""

    def __init__(self, pages: int = 0) -> None:
        self.size = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.size - self.free

    def take(self, count: int) -> list[int]:
        """Return `count` pages, the lowest first; raise DiluError where too few are free."""
        if count > self.free:
            raise DiluError(f"the cache has {self.free} free pages, and {count} are needed")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: SequenceOf[int]) -> None:
        """Free pages that were taken."""
        self._free.extend(pages)
        self._free.sort(reverse=True)
        assert len(set(self._free)) == len(self._free), "a page was freed twice"

    def grow(self, pages: int) -> None:
        """Add free pages until there are `pages`."""
        self._free = [*range(pages - 1, self.size - 1, -1), *self._free]
        self.size = max(self.size, pages)


@dataclass
class Sequence:
    """Tokens, how many of them are in the cache (`done`), and the pages that hold those.

    `owner` is the part of the ranks that works on it.
    """

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    done: int = 0
    owner: int = 0


@dataclass(frozen=True)
class Step:
    """Run tokens `done … stop` of a sequence; `wanted` says which of their rows to return."""

    sequence: Sequence
    stop: int
    wanted: tuple[int, ...] = ()


def batch(steps: SequenceOf[Step], page_size: int) -> list[np.ndarray]:
    """Return the arguments of the model's function that run these steps together.

    They are `tokens[T]`, `positions[T]`, `sequence[T]`, `slots[T]`, `pages[S,P]`, `rows[R]`, i64.
    The rows wanted come in the order of the steps.
    """
    counts = [step.stop - step.sequence.done for step in steps]
    tokens = [t for s in steps for t in s.sequence.tokens[s.sequence.done : s.stop]]
    width = max((len(step.sequence.pages) for step in steps), default=0)
    pages = np.zeros((len(steps), max(width, 1)), np.int64)
    rows: list[int] = []
    start = 0
    for index, (step, count) in enumerate(zip(steps, counts, strict=True)):
        pages[index, : len(step.sequence.pages)] = step.sequence.pages
        rows += [start + at - step.sequence.done for at in step.wanted]
        start += count
    ranges = [np.arange(step.sequence.done, step.stop) for step in steps]
    positions = np.concatenate([*ranges, np.zeros(0, np.int64)]).astype(np.int64)
    sequence = np.repeat(np.arange(len(steps), dtype=np.int64), counts)
    slots = pages[sequence, positions // page_size] * page_size + positions % page_size
    return [np.array(tokens, np.int64), positions, sequence, slots, pages, np.array(rows, np.int64)]

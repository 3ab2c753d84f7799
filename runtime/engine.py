"""What runs the functions of a session: memory, weights, states and calls on one device.

Invariant: sessions and functions speak to this alone, so that they are the same on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .progress import Progress


class Engine(Protocol):
    """The kernels of one target of an artifact on a device.

    `text` says what runs here, `where` ends an error about memory, `notes` is what a user may want
    to know of how it was set up. Arrays are the engine's own; those on the host are numpy's.
    `expert_counts`, i64, adds up how many rows each expert worked on in the first function, block
    by block as the manifest lists them; None where that is not counted.
    """

    text: str
    where: str
    notes: list[str]
    expert_counts: np.ndarray | None

    @property
    def weight_bytes(self) -> int: ...
    def load(self, progress: Progress = ...) -> None:
        """Load the weights; before this nothing is allocated."""
        ...

    def available_memory(self) -> int | None:
        """Return the bytes that weights, working memory and new states may take together."""
        ...

    def arena_bytes(self, function: int, sizes: Mapping[str, int]) -> int:
        """Return the bytes of working memory that a call needs."""
        ...

    def argument(self, value: Any, dtype: str) -> tuple[Any, str]:
        """Return an argument as an array and its element type (see `arrays.to_numpy`)."""
        ...

    def on_device(self, array: Any) -> bool:
        """Return whether an array lies where numpy cannot read it."""
        ...

    def content(self, array: Any) -> np.ndarray:
        """Return an array as raw bits on the host, itself where it lies there."""
        ...

    def result(self, array: Any, dtype: str, *, torch: bool) -> Any:
        """Return a result as the caller expects it."""
        ...

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Return a new state."""
        ...

    def keep(self, old: Any, new: Any) -> None:
        """Copy what two states have in common from the old one to the new one."""
        ...

    def run(
        self,
        function: int,
        sizes: Mapping[str, int],
        parameters: Sequence[Any],
        states: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        *,
        on_device: bool = False,
    ) -> list[Any]:
        """Run a function; return results of `shapes`, on the host unless `on_device`."""
        ...

    def close(self) -> None: ...

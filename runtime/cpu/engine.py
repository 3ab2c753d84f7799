"""The engine of sessions on the CPU: mapped weights, numpy arrays, one native call per call.

Invariant: nothing is copied that native code can read where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import DiluError
from .. import machine
from ..artifact.artifact import Artifact
from ..artifact.manifest import FunctionEntry
from ..artifact.storage import storage
from ..artifact.weights import Weights, weight_bytes
from ..call.arrays import from_numpy, to_numpy
from ..progress import Progress, silent
from .driver import Library, addresses
from .memory import zeros

if TYPE_CHECKING:
    from ..mesh.host import Host


class CpuEngine:
    """The library of a CPU target and the artifact's mapped weights."""

    where = ""

    def __init__(
        self, artifact: Artifact, target: str, threads: int, host: Host | None = None
    ) -> None:
        self.host = host
        self.text = f"{threads} threads"
        self.notes: list[str] = []
        self.weight_bytes = weight_bytes(artifact)
        self._artifact = artifact
        self._functions: list[FunctionEntry] = artifact.manifest["functions"]
        blocks = artifact.manifest.get("experts", ())
        experts = [block["experts"] for block in blocks if not block["routed"]]
        self.expert_counts = np.zeros(sum(experts), np.int64) if experts else None
        self._weights: Weights | None = None
        self._tables: list[list[np.ndarray]] = []
        self._constants: list[np.ndarray] = []
        self._library = Library(_library_file(artifact, target), threads)

    def load(self, progress: Progress = silent) -> None:
        self._weights = weights = Weights(self._artifact, progress=progress)
        self._tables = [[weights.table(n) for n in f["constants"]] for f in self._functions]
        self._constants = [addresses(tables) for tables in self._tables]

    def available_memory(self) -> int | None:
        """Return what is free; mapped weights count as free, since the system drops them."""
        return machine.available_memory()

    def arena_bytes(self, function: int, sizes: Mapping[str, int]) -> int:
        return self._library.arena_bytes(function, self._order(function, sizes))

    def argument(self, value: Any, dtype: str) -> tuple[np.ndarray, str]:
        return to_numpy(value, dtype)

    def on_device(self, array: Any) -> bool:
        return False

    def content(self, array: Any) -> np.ndarray:
        return array

    def result(self, array: Any, dtype: str, *, torch: bool) -> Any:
        return from_numpy(array, dtype, torch=torch)

    def zeros(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        bits = storage(dtype)
        return zeros(prod(shape) * bits.itemsize).view(bits).reshape(shape)

    def keep(self, old: np.ndarray, new: np.ndarray) -> None:
        common = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
        new[common] = old[common]

    def run(
        self,
        function: int,
        sizes: Mapping[str, int],
        parameters: Sequence[np.ndarray],
        states: Sequence[np.ndarray],
        shapes: Sequence[Sequence[int]],
        *,
        on_device: bool = False,
    ) -> list[Any]:
        if self._weights is None:
            raise DiluError("the session is closed")
        entries = self._functions[function]["results"]
        results = [
            np.empty(shape, storage(entry["dtype"]))
            for shape, entry in zip(shapes, entries, strict=True)
        ]
        order, constants = self._order(function, sizes), self._constants[function]
        address = 0
        if self.host is not None:
            self.host.begin()
            address = self.host.address
        counts = self.expert_counts if function == 0 else None
        self._library.run(function, order, parameters, states, constants, results, address, counts)
        if self.host is not None:
            self.host.finish()
        return results

    def close(self) -> None:
        self._library.close()
        weights, self._weights = self._weights, None
        self._tables, self._constants = [], []
        if weights is not None:
            weights.close()

    def _order(self, function: int, sizes: Mapping[str, int]) -> list[int]:
        return [sizes[symbol] for symbol in self._functions[function]["symbols"]]


def _library_file(artifact: Artifact, target: str) -> Path | bytes:
    name = artifact.cpu_target(target)["library"]
    assert name is not None  # or it would not have been chosen
    content = artifact.files.get(name)
    return content if isinstance(content, Path) else artifact.read(name)

"""One function of a session: arguments checked, sizes bound, results and states allocated.

Invariant: what a call is given is checked against the manifest before native code sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DiluError
from .arrays import from_numpy, is_torch, storage, to_numpy
from .cpu.driver import addresses
from .cpu.memory import zeros
from .expression import evaluate_shape, solve, symbols
from .sequences import PARAMETERS, check_batch

if TYPE_CHECKING:
    from .session import Session
    from .weights import Weights


class Function:
    """One function of a session."""

    def __init__(self, session: Session, index: int, entry: dict[str, Any]) -> None:
        self._session = session
        self._index = index
        self.name: str = entry["name"]
        self.symbols: list[str] = entry["symbols"]
        self.parameters: list[dict[str, Any]] = entry["parameters"]
        self.states: list[dict[str, Any]] = entry["states"]
        self.results: list[dict[str, Any]] = entry["results"]
        self.constants: list[str] = entry["constants"]
        # Plain symbols first: they tell the sizes that expressions of them are checked with.
        dims = [
            (index, axis, dim)
            for index, entry in enumerate(self.parameters)
            for axis, dim in enumerate(entry["shape"])
        ]
        self._dims = sorted(dims, key=lambda d: not (isinstance(d[2], str) and d[2].isidentifier()))
        self._tables: list[np.ndarray] = []
        self._constants = addresses([])
        self._state_arrays: list[np.ndarray] | None = None
        self._state_sizes: dict[str, int] = {}

    def __call__(self, *arrays: Any) -> Any:
        """Call the function with numpy arrays, torch tensors or anything with DLPack.

        Returns one result, or a tuple of several: torch tensors where an argument was one, else
        numpy arrays (bf16 and f8 as raw bits). Raises DiluError where an argument does not fit.
        """
        torch = any(is_torch(array) for array in arrays)
        checked = self._checked(arrays)
        self._check_places(checked)
        results = self.run(*checked)
        pairs = zip(results, self.results, strict=True)
        out = tuple(from_numpy(array, entry["dtype"], torch=torch) for array, entry in pairs)
        return out[0] if len(out) == 1 else out

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Call the function with C-contiguous arrays of the right types, of raw bits each."""
        with self._session.lock:
            library = self._session.library
            sizes = self._bound(arrays)
            states = self._ready_states(sizes)
            sizes = {**self._state_sizes, **sizes}
            for symbol in self.symbols:
                if symbol not in sizes:
                    raise DiluError(
                        f"{self.name}: the arguments do not tell the size {symbol}",
                        hint=f"call allocate({{'{symbol}': …}}) first: it is the size of a state",
                    )
            results = [
                np.empty(evaluate_shape(entry["shape"], sizes), storage(entry["dtype"]))
                for entry in self.results
            ]
            order = [sizes[symbol] for symbol in self.symbols]
            library.run(self._index, order, arrays, states, self._constants, results)
            return results

    def allocate(self, sizes: Mapping[str, int], *, keep: bool = False) -> None:
        """Make the states, of the given sizes and all zero.

        With `keep`, states that exist keep their content: their elements stay at their indices.
        """
        with self._session.lock:
            made = [self._zero_state(entry, sizes) for entry in self.states]
            if keep and self._state_arrays is not None:
                for old, new in zip(self._state_arrays, made, strict=True):
                    common = tuple(
                        slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True)
                    )
                    new[common] = old[common]
            self._state_arrays, self._state_sizes = made, dict(sizes)

    def state_bytes(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes that the states have at these sizes."""
        return sum(
            int(np.prod(evaluate_shape(entry["shape"], sizes), dtype=np.int64))
            * storage(entry["dtype"]).itemsize
            for entry in self.states
        )

    def arena_bytes(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes of working memory that a call at these sizes needs."""
        return self._session.arena_bytes(self._index, [sizes[s] for s in self.symbols])

    def state(self, name: str) -> np.ndarray:
        """Return a state's array: the raw bits themselves, not a copy."""
        for entry, array in zip(self.states, self._state_arrays or (), strict=False):
            if entry["name"] == name:
                return array
        raise DiluError(f"{self.name} has no state {name!r} yet")

    @property
    def state_symbols(self) -> set[str]:
        """The symbols in the shapes of the states."""
        return {s for entry in self.states for dim in entry["shape"] for s in symbols(dim)}

    @property
    def all_symbols(self) -> set[str]:
        return self.state_symbols | set(self.symbols)

    def bind(self, weights: Weights) -> None:
        """Take the addresses of the constants."""
        self._tables = [weights.table(name) for name in self.constants]
        self._constants = addresses(self._tables)

    def release(self) -> None:
        """Forget states and constants."""
        self._tables, self._state_arrays = [], None

    def _zero_state(self, entry: dict[str, Any], sizes: Mapping[str, int]) -> np.ndarray:
        shape = evaluate_shape(entry["shape"], sizes)
        dtype = storage(entry["dtype"])
        flat = zeros(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return flat.view(dtype).reshape(shape)

    def _ready_states(self, sizes: dict[str, int]) -> list[np.ndarray]:
        if self._state_arrays is None:
            if not self.state_symbols <= sizes.keys():
                return []  # the caller names the missing symbol
            self.allocate({name: sizes[name] for name in self.state_symbols})
        assert self._state_arrays is not None
        return self._state_arrays

    def _check_places(self, arrays: Sequence[np.ndarray]) -> None:
        """Raise DiluError where a batch for a language model points outside of its cache."""
        model = self._session.artifact.manifest["language_model"]
        batch = tuple(entry["name"] for entry in self.parameters) == PARAMETERS
        if model is not None and batch and "B" in self._state_sizes:
            check_batch(
                arrays,
                vocabulary=model["vocab_size"],
                page_size=model["page_size"],
                cache_pages=self._state_sizes["B"],
            )

    def _checked(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """Return the arguments as arrays of raw bits; raise DiluError where one does not fit."""
        if len(arrays) != len(self.parameters):
            want = ", ".join(f"{p['name']}: {describe(p)}" for p in self.parameters)
            raise DiluError(
                f"{self.name} takes {len(self.parameters)} arguments, not {len(arrays)}",
                hint=f"its parameters are {want}" if want else None,
            )
        checked: list[np.ndarray] = []
        for entry, value in zip(self.parameters, arrays, strict=True):
            array, dtype = to_numpy(value, entry["dtype"])
            if dtype != entry["dtype"] or array.ndim != len(entry["shape"]):
                raise self._mismatch(entry, f"{dtype}[{','.join(map(str, array.shape))}]")
            checked.append(array)
        return checked

    def _bound(self, arrays: Sequence[np.ndarray]) -> dict[str, int]:
        """Return the size of each symbol; raise DiluError where the shapes contradict."""
        sizes: dict[str, int] = {}
        for index, axis, dim in self._dims:
            entry, array = self.parameters[index], arrays[index]
            got = array.shape[axis]
            solved = solve(dim, got, sizes)
            if solved is not None:
                sizes[solved[0]] = solved[1]
            if solved is None and evaluate_shape([dim], sizes) != [got]:
                known = ", ".join(f"{k}={v}" for k, v in sizes.items() if k in symbols(dim))
                got_text = f"{entry['dtype']}[{','.join(map(str, array.shape))}]"
                raise self._mismatch(entry, got_text + (f" where {known}" if known else ""))
        return sizes

    def _mismatch(self, entry: dict[str, Any], got: str) -> DiluError:
        return DiluError(
            f"{self.name}: the argument {entry['name']} is {got}, expected {describe(entry)}"
        )


def describe(entry: dict[str, Any]) -> str:
    """Return the type of a parameter, state or result as text."""
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"

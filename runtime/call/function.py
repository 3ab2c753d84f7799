"""One function of a session: arguments checked, sizes bound, results and states allocated.

Invariant: what a call is given is checked against the manifest before native code sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...errors import DiluError
from ..artifact.expression import evaluate_shape, solve, symbols
from ..artifact.manifest import FunctionEntry, LanguageModelEntry, ValueEntry
from ..artifact.storage import storage
from .arrays import is_torch
from .batch import PARAMETERS, check_batch
from .signature import Signature
from .write_back import require_writable, write_back

if TYPE_CHECKING:
    from ..artifact.artifact import Artifact
    from ..engine import Engine


class Owner(Protocol):
    """What a function asks of its session; `lock` is held while it runs."""

    @property
    def artifact(self) -> Artifact: ...
    @property
    def lock(self) -> AbstractContextManager[object]: ...
    @property
    def engine(self) -> Engine: ...


class Function:
    """One function of a session."""

    def __init__(self, session: Owner, index: int, entry: FunctionEntry) -> None:
        self._session = session
        self._index = index
        self.name: str = entry["name"]
        self.symbols: list[str] = entry["symbols"]
        self.parameters: list[ValueEntry] = entry["parameters"]
        self.states: list[ValueEntry] = entry["states"]
        self.results: list[ValueEntry] = entry["results"]
        self.signature = Signature(self.name, entry, [describe(p) for p in self.parameters])
        model = session.artifact.manifest["language_model"]
        names = tuple(parameter["name"] for parameter in self.parameters)
        self._model: LanguageModelEntry | None = model if names == PARAMETERS else None
        # Plain symbols first: they tell the sizes that expressions of them are checked with.
        dims = [
            (index, axis, dim)
            for index, entry in enumerate(self.parameters)
            for axis, dim in enumerate(entry["shape"])
        ]
        self._dims = sorted(dims, key=lambda d: not (isinstance(d[2], str) and d[2].isidentifier()))
        self._state_arrays: list[Any] | None = None
        self._state_sizes: dict[str, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function as the model is called, with numpy arrays, torch tensors or anything
        with DLPack in the places of its tensors.

        Returns what the model returns: torch tensors where an argument was one, arrays on the
        session's device where one lay there, else numpy arrays (bf16 and f8 as raw bits). Plain
        values that the examples had are given as they were. An argument that the model writes to
        or returns as it is gets written to, or is returned. Raises DiluError where an argument
        does not fit.
        """
        arrays = self.signature.arguments(args, kwargs)
        torch = any(is_torch(array) for array in arrays)
        with self._session.lock:
            engine = self._session.engine
            checked = self._checked(arrays)
            require_writable(self.name, self.parameters, arrays, self.signature.writes)
            on_device = any(engine.on_device(array) for array in checked)
            if self._model is not None:  # small, and looked at here
                checked = [engine.content(array) for array in checked]
            self._check_places(checked)
            sizes = self._bound(checked)
            self.signature.check(sizes)
            results = self._run(checked, on_device=on_device)

            def given(array: Any, entry: ValueEntry) -> Any:
                return engine.result(array, element(entry), torch=torch)

            pairs = zip(results, self.results, strict=True)
            out = [given(array, entry) for array, entry in pairs]
            for parameter, result in self.signature.writes.items():
                write_back(arrays[parameter], out[result])
            returned = {
                i: _returned(arrays[i], given(checked[i], self.parameters[i]))
                for i in self.signature.returned_parameters
            }
        return self.signature.structured(out, returned, sizes)

    def run(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Call the function with C-contiguous arrays of the right types, of raw bits each."""
        with self._session.lock:
            return self._run(arrays, on_device=False)

    def prepare(
        self, arrays: Sequence[Any]
    ) -> tuple[dict[str, int], Sequence[Any], list[Any], list[list[int]]]:
        """Return what an engine runs: sizes, parameters, states and the shapes of the results."""
        sizes = self._bound(arrays)
        states = self._ready_states(sizes)
        sizes = {**self._state_sizes, **sizes}
        for symbol in self.symbols:
            if symbol not in sizes:
                raise DiluError(
                    f"{self.name}: the arguments do not tell the size {symbol}",
                    hint=f"call allocate({{'{symbol}': …}}) first: it is the size of a state",
                )
        shapes = [evaluate_shape(entry["shape"], sizes) for entry in self.results]
        return sizes, arrays, states, shapes

    def _run(self, arrays: Sequence[Any], *, on_device: bool) -> list[Any]:
        engine = self._session.engine
        sizes, arrays, states, shapes = self.prepare(arrays)
        return engine.run(self._index, sizes, arrays, states, shapes, on_device=on_device)

    def allocate(self, sizes: Mapping[str, int], *, keep: bool = False) -> None:
        """Make the states, of the given sizes and all zero.

        With `keep`, states that exist keep their content: their elements stay at their indices.
        """
        with self._session.lock:
            engine = self._session.engine
            old = self._state_arrays if keep else None
            if old is None:
                self._state_arrays = None  # first, so that both never stand side by side
            made = [
                engine.zeros(evaluate_shape(entry["shape"], sizes), entry["dtype"])
                for entry in self.states
            ]
            for before, after in zip(old or (), made, strict=old is not None):
                engine.keep(before, after)
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
        return self._session.engine.arena_bytes(self._index, sizes)

    def state(self, name: str) -> np.ndarray:
        """Return a state's raw bits: themselves on the CPU, a copy of what lies on a device."""
        for entry, array in zip(self.states, self._state_arrays or (), strict=False):
            if entry["name"] == name:
                return self._session.engine.content(array)
        raise DiluError(f"{self.name} has no state {name!r} yet")

    @property
    def is_batch(self) -> bool:
        """Whether it takes a language model's batches."""
        return self._model is not None

    @property
    def state_symbols(self) -> set[str]:
        """The symbols in the shapes of the states."""
        return {s for entry in self.states for dim in entry["shape"] for s in symbols(dim)}

    @property
    def all_symbols(self) -> set[str]:
        return self.state_symbols | set(self.symbols)

    def release(self) -> None:
        """Forget the states."""
        self._state_arrays = None

    def _ready_states(self, sizes: dict[str, int]) -> list[Any]:
        if self._state_arrays is None:
            if not self.state_symbols <= sizes.keys():
                return []  # the caller names the missing symbol
            self.allocate({name: sizes[name] for name in self.state_symbols})
        assert self._state_arrays is not None
        return self._state_arrays

    def _check_places(self, arrays: Sequence[np.ndarray]) -> None:
        """Raise DiluError where a batch for a language model points outside of its cache."""
        if self._model is not None and "B" in self._state_sizes:
            check_batch(
                arrays,
                vocabulary=self._model["vocab_size"],
                page_size=self._model["page_size"],
                cache_pages=self._state_sizes["B"],
            )

    def _checked(self, arrays: Sequence[Any]) -> list[Any]:
        """Return the arguments as arrays of raw bits; raise DiluError where one does not fit."""
        if len(arrays) != len(self.parameters):
            want = ", ".join(f"{p['name']}: {describe(p)}" for p in self.parameters)
            raise DiluError(
                f"{self.name} takes {len(self.parameters)} arguments, not {len(arrays)}",
                hint=f"its parameters are {want}" if want else None,
            )
        checked: list[Any] = []
        for entry, value in zip(self.parameters, arrays, strict=True):
            wanted = element(entry)
            try:
                array, dtype = self._session.engine.argument(value, wanted)
            except DiluError as error:
                error.message = f"{self.name}: the argument {entry['name']}: {error.message}"
                raise
            if dtype != wanted or array.ndim != len(entry["shape"]):
                raise self._mismatch(entry, f"{dtype}[{','.join(map(str, array.shape))}]")
            checked.append(array)
        return checked

    def _bound(self, arrays: Sequence[Any]) -> dict[str, int]:
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
                got_text = f"{element(entry)}[{','.join(map(str, array.shape))}]"
                raise self._mismatch(entry, got_text + (f" where {known}" if known else ""))
        return sizes

    def _mismatch(self, entry: ValueEntry, got: str) -> DiluError:
        return DiluError(
            f"{self.name}: the argument {entry['name']} is {got}, expected {describe(entry)}"
        )


def _returned(value: Any, like: Any) -> Any:
    """Return an argument that comes back: itself where it is of the kind that results are."""
    if is_torch(value) or is_torch(like):
        return value if is_torch(value) else like
    return value if type(value) is type(like) and value.dtype == like.dtype else like


def element(entry: ValueEntry) -> str:
    """Return the element type of a parameter, state or result as callers see it: `dtype` is what
    the compiled code works on, which is codes where it has no such type."""
    return entry.get("element", entry["dtype"])


def describe(entry: ValueEntry) -> str:
    """Return the type of a parameter, state or result as text."""
    return f"{element(entry)}[{','.join(map(str, entry['shape']))}]"

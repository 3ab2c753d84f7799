"""A loaded artifact: its functions as Python callables, its weights, its states.

    session = load("m.dilu")
    y = session(x)

Invariants: what a call is given is checked against the manifest before native code sees it; calls
of one session run one at a time; states (caches) are the session's and outlive a call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DiluError
from . import machine
from .arrays import from_numpy, is_torch, storage, to_numpy
from .artifact import Artifact
from .cpu.driver import Library, addresses
from .cpu.memory import zeros
from .expression import evaluate_shape, solve, symbols
from .progress import Progress, silent
from .sequences import pages_for
from .targets import choose_target
from .weights import Weights, require_bound, require_memory, weight_bytes

#: Tokens of prompts that are run at once.
PREFILL_TOKENS = 512
#: Tokens that a cache must have room for, or a language model is not loaded.
NOMINAL_TOKENS = 2048

if TYPE_CHECKING:
    from .language import LanguageModel


def load(
    path: str | os.PathLike[str] | Artifact,
    *,
    threads: int | None = None,
    target: str | None = None,
    progress: Progress = silent,
) -> Session:
    """Open an artifact, check it, map its weights and return it ready to run.

    `threads` is the number of cores unless it or DILU_THREADS says otherwise; `target` is the
    best of the artifact's that this machine can run. Raises DiluError for an artifact or weights
    that were changed, a machine that cannot run it, or too little memory (before loading).
    """
    if threads is not None and threads < 1:
        raise DiluError(f"cannot run with {threads} threads", hint="threads is at least 1")
    artifact = path if isinstance(path, Artifact) else Artifact.open(path)
    return Session(artifact, threads=threads, target=target, progress=progress)


class Session:
    """The functions of an artifact. Calling the session calls its first function."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        target: str | None = None,
        progress: Progress = silent,
    ) -> None:
        self.artifact = artifact
        self.threads = threads or machine.default_threads()
        self.target, self.target_reason = choose_target(artifact, target)
        require_bound(artifact)
        self.weight_bytes = weight_bytes(artifact)
        self.lock = threading.RLock()
        self._language: LanguageModel | None = None
        self._weights: Weights | None = None
        self._library = Library(_library_file(artifact, self.target), self.threads)
        self.functions: dict[str, Function] = {
            entry["name"]: Function(self, index, entry)
            for index, entry in enumerate(artifact.manifest["functions"])
        }
        try:
            require_memory(self._needed_memory())
            self._weights = Weights(artifact, progress=progress)
        except BaseException:
            self._library.close()
            raise
        for function in self.functions.values():
            function.bind(self._weights)

    def function(self, name: str) -> Function:
        """Return a function of the artifact by its name."""
        if name not in self.functions:
            hint = f"the artifact has: {', '.join(self.functions)}"
            raise DiluError(f"there is no function {name!r}", hint=hint)
        return self.functions[name]

    def __call__(self, *arrays: Any) -> Any:
        """Call the artifact's first function: one result, or a tuple of several."""
        return next(iter(self.functions.values()))(*arrays)

    @property
    def library(self) -> Library:
        """The loaded kernels; raises DiluError where the session is closed."""
        if self._weights is None:
            raise DiluError("the session is closed")
        return self._library

    def arena_bytes(self, function: int, sizes: Sequence[int]) -> int:
        return self._library.arena_bytes(function, sizes)

    @property
    def language(self) -> LanguageModel:
        """The token loop; raises DiluError where the artifact is not a language model."""
        from .language import LanguageModel  # only here: other modules need no tokenizer

        with self.lock:
            if self._language is None:
                self._language = LanguageModel(self)
            return self._language

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Return the text that continues a prompt, or a list of texts for a list of prompts.

        Options are those of `LanguageModel.generate`: `max_tokens=64`, `temperature=0.0`,
        `top_k`, `top_p`, `seed`, `stop`, `chat=False`.
        """
        return self.language.generate(prompt, **options)

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """Yield the text that continues a prompt piece by piece; options as for `generate`."""
        return self.language.stream(prompt, **options)

    def _needed_memory(self) -> dict[str, int]:
        """Return the bytes that the smallest useful call needs, what for → how many."""
        nominal = nominal_sizes(self.artifact.manifest["language_model"])
        needed = {"weights": self.weight_bytes, "cache": 0, "working memory": 0}
        for function in self.functions.values():
            sizes = {name: nominal.get(name, 1) for name in function.all_symbols}
            needed["cache"] += function.state_bytes(sizes)
            needed["working memory"] += function.arena_bytes(sizes)
        return needed

    def close(self) -> None:
        """Stop the threads, unmap the weights and free the states."""
        with self.lock:
            weights, self._weights = self._weights, None
            if weights is None:
                return
            self._library.close()
            for function in self.functions.values():
                function.release()
            weights.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_weights", None) is not None:
            self.close()


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
        results = self.run(*self._checked(arrays))
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


def nominal_sizes(language_model: dict[str, Any] | None) -> dict[str, int]:
    """Return the sizes that a language model must at least have memory for: a prefill chunk and a
    cache for `NOMINAL_TOKENS`."""
    if language_model is None:
        return {}
    tokens = min(NOMINAL_TOKENS, language_model["max_positions"])
    pages = pages_for(tokens, language_model["page_size"])
    return {"T": min(PREFILL_TOKENS, tokens), "S": 1, "R": 1, "P": pages, "B": pages}


def describe(entry: dict[str, Any]) -> str:
    """Return the type of a parameter, state or result as text."""
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"


def _library_file(artifact: Artifact, target: str) -> Path | bytes:
    name = artifact.targets[target]["library"]
    content = artifact.files.get(name)
    return content if isinstance(content, Path) else artifact.read(name)

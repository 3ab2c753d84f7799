"""Attention masks as models ask for them, read by what they say.

transformers makes a mask from a function of a query's and a key's place. That function is evaluated
on real places here, chosen so that every window, chunk and block of the configuration shows, and
what it says is what is captured: causal, or causal within a window. Anything else is refused, by
what it is. The runtime keeps sequences apart, so the mask of one sequence from place 0 is the mask.

Sizes: Q queries, K keys.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch.overrides import TorchFunctionMode

from ...errors import Loc, UnsupportedError
from .markers import Marker, place, whose
from .reals import NotReal, compute, real

_LONGEST_ROW = 1 << 20  # keys of a row that is looked at in full
_DENSE = 40  # places from 0 on that are all looked at
_SIZES = ("window", "chunk", "block", "local", "prefix", "span", "stride", "segment", "group")
_HINT = "supported are causal attention and causal attention within a window"
_LIKELY_LENGTH = 4096  # where a configuration does not say how long a sequence can be

#: Arguments of a mask interface that cannot change what a mask says, and why.
IRRELEVANT = {
    "allow_is_causal_skip": "a promise that no mask at all may stand for this one",
    "allow_is_bidirectional_skip": "a promise that no mask at all may stand for this one",
    "allow_torch_fix": "has no effect since transformers 5",
    "dtype": "of the mask's tensor, which is not made",
    "device": "of the mask's tensor, which is not made",
    "local_size": "tells when a mask may be left out; the mask function says the same",
}
#: Those that `make_mask` uses or refuses.
USED = (
    "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function",
    "attention_mask", "use_vmap", "config",
)  # fmt: skip


@dataclass(frozen=True)
class Mask(Marker):
    """What a mask says: a token sees itself and all before it, or the last `window` of them.

    A mask that says something else is `other`, made at `loc`; models make masks that no layer
    takes, so it is refused where attention is given it.
    """

    window: int | None = None
    other: str | None = None
    loc: Loc | None = None

    def refuse(self, what: str) -> NoReturn:
        raise UnsupportedError(
            f"{whose('the model')} {what} its attention mask: a mask with content of its own, or "
            "attention to keys that the model chooses, is not supported",
            place(),
            _HINT,
        )

    def check(self) -> None:
        """Raise UnsupportedError for a mask that is not captured."""
        if self.other is not None:
            raise UnsupportedError(f"{self.other} is not supported", self.loc, _HINT)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Marker) and other is not None:
            self.refuse("compares")  # with numbers, which would be False in silence
        if not isinstance(other, Mask):
            return False
        return (self.window, self.other) == (other.window, other.other)

    def __hash__(self) -> int:
        return hash((self.window, self.other))

    def __str__(self) -> str:
        return "causal" if self.window is None else f"causal within a window of {self.window}"


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **more: Any,
) -> Mask:
    """Return what the mask says that a model asks for; an entry of transformers' mask interface."""
    for name, value in more.items():
        if name not in IRRELEVANT and value is not None:
            return _other(f"a mask with the argument {name!r}")
    if attention_mask is not None and not _Ones.made(attention_mask):
        return _other("a mask that hides padding")
    if mask_function is None:
        return _other("a mask interface without a mask function")
    if batch_size != 1 or q_length != kv_length or q_offset != 0 or kv_offset != 0:
        return _other("a mask for other keys than those of the queries' own tokens")
    return read_mask(mask_function, config, use_vmap=use_vmap)


def read_mask(function: Callable[..., Any], config: Any = None, *, use_vmap: bool = False) -> Mask:
    """Return what a mask function says, by evaluating it."""
    numbers = sizes_of(function) | sizes_in(config)
    length = max(_length(config), 2 * max(numbers, default=0) + 3)
    try:
        mask = compute(_Reading(function, use_vmap, length, numbers).mask)
        return mask if mask.other is None else _other(mask.other)  # made at this place
    except NotReal:
        made = " and ".join(sorted(set(names_of(function))))
        return _other(f"a mask that depends on the tokens, or on how they are packed ({made})")
    except Exception as error:  # of the model's own function
        text = str(error).strip().partition("\n")[0]
        return _other(f"a mask that cannot be evaluated by itself ({type(error).__name__}: {text})")


@contextlib.contextmanager
def one_sequence() -> Generator[None]:
    """Have masks made for one sequence: tokens of several are kept apart by the runtime.

    transformers looks for several packed sequences in the position ids, and always supposes them
    while it is traced. Some models make a padding mask that hides nothing; it is known as such.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda *_, **__: None)
    try:
        with _Ones():
            yield
    finally:
        setattr(masking_utils, name, before)


class _Ones(TorchFunctionMode):
    """Know the tensors that are made of ones, while it is entered."""

    _known: ClassVar[list[torch.Tensor]] = []
    _makes = frozenset({torch.ones, torch.ones_like, torch.Tensor.new_ones})
    _keeps = frozenset(
        {
            torch.Tensor.to, torch.Tensor.bool, torch.Tensor.long, torch.Tensor.expand,
            torch.Tensor.clone, torch.Tensor.contiguous, torch.Tensor.view, torch.Tensor.reshape,
        }
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        writes = name in ("__setitem__", "copy_") or (name.endswith("_") and name[-2:] != "__")
        if writes and args and self.made(args[0]):
            self._known.clear()  # all of them: they may be views of one another
        elif func in self._makes or (func in self._keeps and args and self.made(args[0])):
            self._known.append(out)
        return out

    def __exit__(self, *error: Any) -> None:
        self._known.clear()
        super().__exit__(*error)

    @classmethod
    def made(cls, x: Any) -> bool:
        """Return whether a tensor is known to hold ones only."""
        return any(x is known for known in cls._known)


# ----------------------------------------------------------------------- reading


@dataclass
class _Reading:
    """One mask function, looked at where its sizes would show."""

    function: Callable[..., Any]
    use_vmap: bool
    length: int
    numbers: set[int]

    def mask(self) -> Mask:
        last = self.length - 1
        row = self.sees([last], _last_places(self.length))[0]
        seen = _last_places(self.length)[row]
        window = None if len(seen) == 0 else last + 1 - int(seen[0])
        queries, keys = self.places(window or 0)
        grid = self.sees(queries, keys)
        q, k = torch.tensor(queries)[:, None], torch.tensor(keys)[None, :]
        full = _last_places(self.length)
        for size in (None, window):
            means = (k <= q) & (k > q - (size or self.length))
            ends = (full <= last) & (full > last - (size or self.length))
            if torch.equal(grid, means) and torch.equal(row, ends):
                return Mask(size)
        return Mask(other=_describe(grid, q, k, self.numbers))

    def sees(self, queries: list[int], keys: torch.Tensor | list[int]) -> torch.Tensor:
        """Return bool[Q,K]: whether each of the queries sees each of the keys."""
        q, k = torch.tensor(queries), torch.as_tensor(keys)
        seen = real(self.one_by_one(q, k) if self.use_vmap else self.together(q, k))
        if seen.dtype != torch.bool:
            raise NotReal(f"a mask of {seen.dtype}")
        return seen.expand(1, 1, len(q), len(k))[0, 0]

    def together(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        one = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
        return self.function(one, one, q[None, None, :, None], k[None, None, None, :])

    def one_by_one(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Evaluate a function of single places, which indexes no tensor by them: or it is the same
        for all places together."""
        by_key = torch.vmap(self.function, in_dims=(None, None, None, 0))
        by_query = torch.vmap(by_key, in_dims=(None, None, 0, None))
        zero = torch.zeros((), dtype=torch.int64)
        try:
            return by_query(zero, zero, q, k)[None, None]
        except RuntimeError:
            return self.together(q, k)

    def places(self, window: int) -> tuple[list[int], list[int]]:
        """Return the queries and keys to look at: the first ones, and around every size."""
        sizes = sorted({n for n in (*self.numbers, window) if 0 < n < self.length})
        around = [m * n + d for n in sizes for m in (1, 2, 3) for d in range(-2, 3)]
        middle = [self.length // 2, self.length // 3 + 1, self.length - 2, self.length - 1]
        queries = self._within([*range(_DENSE), *around, *middle])
        near = [q + d for q in queries for d in range(-2, 3)]
        edges = [q - n + d for q in queries for n in sizes for d in range(-1, 3)]
        begins = [q // n * n + d for q in queries for n in sizes for d in (-1, 0)]
        return queries, self._within([*range(2 * _DENSE), *around, *near, *edges, *begins])

    def _within(self, places: Iterable[int]) -> list[int]:
        return sorted({p for p in places if 0 <= p < self.length})


def _last_places(length: int) -> torch.Tensor:
    return torch.arange(max(0, length - _LONGEST_ROW), length)


def _length(config: Any) -> int:
    """Return how many tokens a sequence can have by a configuration."""
    said = getattr(config, "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else _LIKELY_LENGTH


def sizes_in(config: Any) -> set[int]:
    """Return the sizes in a configuration that a mask may be made of."""
    if config is None:
        return set()
    found = vars(config).items()
    return {
        value for name, value in found if _is_size(value) and any(part in name for part in _SIZES)
    }


def sizes_of(function: Any, depth: int = 6) -> set[int]:
    """Return the numbers that a function was made with, and those it calls."""
    if _is_size(function):
        return {function}
    if depth == 0:
        return set()
    parts: list[Any] = []
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, (list, tuple)):
        parts = list(function)
    elif callable(function):
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # a cell that nothing has filled yet
                parts.append(cell.cell_contents)
        parts += getattr(function, "__defaults__", None) or ()
        code = getattr(function, "__code__", None)
        parts += [c for c in getattr(code, "co_consts", ()) if _is_size(c)]
        if not isinstance(function, type) and hasattr(function, "__dict__"):
            parts += vars(function).values()
    return {size for part in parts for size in sizes_of(part, depth - 1)}


def names_of(function: Any, depth: int = 6) -> list[str]:
    """Return the names of what makes a mask function, and those it combines."""
    if isinstance(function, (list, tuple)) and depth:
        return [name for part in function for name in names_of(part, depth - 1)]
    if not callable(function) or not depth:
        return []
    name = getattr(function, "__qualname__", type(function).__name__).partition(".<locals>")[0]
    cells = getattr(function, "__closure__", None) or ()
    parts = [name for c in cells for name in names_of(c.cell_contents, depth - 1)]
    return parts if name in ("and_masks", "or_masks") else [name, *parts]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 < value < _LONGEST_ROW


def _describe(seen: torch.Tensor, q: torch.Tensor, k: torch.Tensor, numbers: set[int]) -> str:
    """Say what a mask that is not causal is; `seen` bool[Q,K] of places `q[Q,1]`, `k[1,K]`."""
    later = seen & (k > q)
    if bool(seen.all()):
        return "a bidirectional mask, by which every token sees all others"
    if bool(later.any()):
        row = int(later.any(1).nonzero()[0, 0])
        return (
            f"a mask by which the token at {int(q[row, 0])} sees later ones (bidirectional parts)"
        )
    if not bool(seen.any(1).all()):
        row = int((~seen.any(1)).nonzero()[0, 0])
        return f"a mask by which the token at {int(q[row, 0])} sees no token"
    for size in sorted(numbers):
        if torch.equal(seen, (k <= q) & (k // size == q // size)):
            return f"attention in chunks of {size} tokens"
    kept = _kept(seen, q, k)
    if kept:
        return f"a window that keeps the first {kept} tokens in sight (sinks)"
    row = int((seen != (k <= q)).any(1).nonzero()[0, 0])
    count, of = int(seen[row].sum()), int((k <= q[row]).sum())
    return (
        f"a mask that is neither causal nor a window: of {of} places up to its own, the token at "
        f"{int(q[row, 0])} sees {count}"
    )


def _kept(seen: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> int | None:
    """Return how many first tokens are always seen, when all else is a window."""
    last = seen[-1]
    hidden = (~last & (k[0] <= q[-1, 0])).nonzero()
    if not len(hidden):
        return None
    first, window = int(k[0, hidden[0, 0]]), int(q[-1, 0] - k[0, hidden[-1, 0]])
    means = (k <= q) & ((k > q - window) | (k < first))
    return first if torch.equal(seen, means) else None


def _other(what: str) -> Mask:
    return Mask(other=what, loc=place())

"""Names in checkpoints → parameters of a model, by transformers' own data.

The renaming and merging of tensors is `get_model_conversion_mapping`, applied as
`transformers.core_model_loading` applies it: renamings in turn, then at most one conversion; the
tensors of a conversion are taken in the natural order of their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Where a text model lies in checkpoints of models that also see or hear, and where it is alone.
_NESTED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("model.text_model.", "model."),
    ("text_model.", ""),
)


@dataclass(frozen=True)
class Merge:
    """How a parameter is made of tensors: `experts` of them (or no such axis) times `parts` along
    its rows."""

    stacked: bool = False
    parts: int = 1

    def grid(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the grid and the shape of a piece of a parameter of `shape`."""
        lead, rest = (tuple(shape[:1]), shape[1:]) if self.stacked else ((), shape)
        if self.parts == 1:
            return lead, tuple(rest)
        return (*lead, self.parts), (rest[0] // self.parts, *rest[1:])


WHOLE = Merge()


@dataclass
class Stored:
    """The tensors that a parameter is made of, by part, each in the order of the experts.

    `merge` is None where they are put together in a way that is not supported, `how` in words.
    """

    merge: Merge | None
    how: str = ""
    parts: dict[int, list[str]] = field(default_factory=dict)

    def tensors(self) -> Iterator[str]:
        for part in self.parts.values():
            yield from part


class Names:
    """The parameters of `model`, and what tensors of a checkpoint are for them."""

    def __init__(self, model: Any, parameters: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        transforms: list[Any] = list(get_model_conversion_mapping(model))
        self.merging = [t for t in transforms if hasattr(t, "operations")]
        self.renaming = [t for t in transforms if not hasattr(t, "operations")]
        self.parameters = frozenset(parameters)
        self.prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""

    def stored(self, tensors: Iterable[str]) -> dict[str, list[Stored]]:
        """Return what each parameter is made of; several ways where a checkpoint has them."""
        found: dict[str, list[Stored]] = {}
        for tensor in sorted(tensors, key=natural):
            name, transform, part = self.parameter(tensor)
            if name not in self.parameters:
                continue
            merge, how = (WHOLE, "") if transform is None else merge_of(transform)
            ways = found.setdefault(name, [])
            way = next((w for w in ways if (w.merge, w.how) == (merge, how)), None)
            if way is None:
                ways.append(way := Stored(merge, how))
            way.parts.setdefault(part, []).append(tensor)
        return {name: [_sharded(w) for w in ways] for name, ways in found.items()}

    def parameter(self, tensor: str) -> tuple[str, Any, int]:
        """Return the parameter that a tensor is of, by which conversion, and which part of it."""
        name, transform, part = self._converted(tensor)
        for candidate in self.candidates(name):
            if candidate in self.parameters:
                return candidate, transform, part
        for candidate in self.candidates(tensor):  # named as the model has it, not as files do
            if candidate in self.parameters:
                return candidate, None, 0
        return name, None, 0

    def candidates(self, name: str) -> Iterator[str]:
        """Yield names that a parameter may have in the model: with and without its prefix, and in
        a text model that is part of another in the files."""
        bases = [name, *(to + name[len(old) :] for old, to in _NESTED if name.startswith(old))]
        for base in bases:
            yield base
            if self.prefix:
                yield self.prefix + base
                yield base.removeprefix(self.prefix)

    def _converted(self, tensor: str) -> tuple[str, Any, int]:
        name = tensor
        for transform in self.renaming:
            name = transform.rename_source_key(name)[0]
        for transform in self.merging:
            renamed, pattern = transform.rename_source_key(name)
            if pattern is not None:
                return renamed, transform, list(transform.source_patterns).index(pattern)
        return name, None, 0

    def expected(self, name: str) -> Merge:
        """Return how files that are not there would store a parameter."""
        for transform in self.merging:
            merge, _ = merge_of(transform)
            if merge and any(name.endswith(t) for t in transform.target_patterns):
                return merge
        return WHOLE


def merge_of(transform: Any) -> tuple[Merge | None, str]:
    """Return what a conversion of transformers does, None where that is not supported; in words."""
    operations = [type(o).__name__ for o in transform.operations]
    dims = [getattr(o, "dim", None) for o in transform.operations]
    count = len(transform.source_patterns)
    steps = ", ".join(f"{o}(dim={d})" for o, d in zip(operations, dims, strict=True))
    how = f"{' + '.join(transform.source_patterns)} by {steps}"
    if len(transform.target_patterns) != 1:
        return None, how
    if operations == ["MergeModulelist"] and dims == [0] and count == 1:
        return Merge(True), how
    if operations == ["MergeModulelist", "Concatenate"] and dims == [0, 1]:
        return Merge(True, count), how
    if operations == ["Concatenate"] and dims == [0]:
        return Merge(False, count), how
    return None, how


def _sharded(way: Stored) -> Stored:
    """Return a parameter whose tensors one pattern finds, one below the other, as its parts."""
    only = way.parts.get(0, [])
    if way.how and way.merge == WHOLE and len(way.parts) == 1 and len(only) > 1:
        return Stored(Merge(False, len(only)), way.how, {i: [t] for i, t in enumerate(only)})
    return way


def natural(name: str) -> list[tuple[str, int, str]]:
    """Return a key that sorts names with the numbers at the ends of their parts as numbers."""
    key: list[tuple[str, int, str]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :].lstrip("0")
        key.append((text, len(digits), digits))
    return key


def numbers(tensors: Sequence[str]) -> list[int] | None:
    """Return the number by which names differ from each other; None where that is not so."""
    split = [t.split(".") for t in tensors]
    if len({len(s) for s in split}) != 1:
        return None
    differing = [column for column in zip(*split, strict=True) if len(set(column)) > 1]
    if len(differing) != 1 or not all(re.fullmatch(r"[0-9]{1,9}", n) for n in differing[0]):
        return None
    return [int(n) for n in differing[0]]

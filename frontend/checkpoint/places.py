"""Which tensors of a checkpoint each parameter of a model is made of, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import DiluError, Loc, UnsupportedError
from ..formats import Unread
from .checkpoint import Checkpoint
from .codes import Said
from .names import WHOLE, Merge, Names, Stored, numbers

_READ_NOT = "a form of weights that is not read"


class Places:
    """The tensors of `checkpoint` for the parameters of `model`, whose shapes are `shapes`."""

    def __init__(self, model: Any, checkpoint: Checkpoint, names: Names, said: Said) -> None:
        self.model = model
        self.said = said
        self.checkpoint = checkpoint
        self.names = names
        self.stored = names.stored(checkpoint.tensors)
        self.shapes = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
        self._tensors: dict[str, list[str]] = {}

    def share_tied(self, aliases: Mapping[str, str]) -> None:
        """Let a tied parameter that is stored alone be the tensor of the ones it is tied to."""
        for name, first in aliases.items():
            if first not in self.stored and name in self.stored:
                self.stored[first] = self.stored[name]

    def merge(self, name: str) -> Merge:
        """Return how a parameter is put together."""
        return self._way(name).merge or WHOLE

    def tensors(self, name: str) -> list[str]:
        """Return the tensors that a parameter is made of, in the order of its grid.

        Raises DiluError where one is missing, or where there are two that differ.
        """
        if name not in self._tensors:
            merge = self.merge(name)
            count = int(self.shapes[name][0]) if merge.stacked else 1
            parts = range(merge.parts)
            column = self._experts if merge.stacked else self._one
            columns = [column(name, self._way(name), part, count) for part in parts]
            self._tensors[name] = [c[expert] for expert in range(count) for c in columns]
        return self._tensors[name]

    def _way(self, name: str) -> Stored:
        """Return what a parameter is made of; raise DiluError where that is not one thing."""
        ways = self.stored.get(name, [])
        if len(ways) > 1:
            twice = " and ".join(repr(next(way.tensors())) for way in ways)
            raise DiluError(
                f"{name!r} is stored twice: {twice}",
                Loc(str(self.checkpoint.path), tensor=name),
                "remove the file that is not of this checkpoint",
            )
        if not ways:
            raise self._missing(name, f"the checkpoint has no tensor for {name!r}")
        if ways[0].merge is None:
            raise UnsupportedError(
                f"{name} is stored in a form that is not supported: {ways[0].how}",
                Loc(str(self.checkpoint.path), tensor=next(ways[0].tensors())),
            )
        return ways[0]

    def _one(self, name: str, way: Stored, part: int, _: int) -> list[str]:
        """Return the tensor of one part of a parameter."""
        if part not in way.parts:
            raise self._missing(name, f"the checkpoint has no tensor for part {part} of {name!r}")
        first, *others = way.parts[part]
        header = self.checkpoint.header(first)
        for other in others:
            if not self.checkpoint.same(header, self.checkpoint.header(other)):
                raise DiluError(
                    f"{name!r} is stored twice: {first!r} and {other!r} have different values",
                    Loc(str(self.checkpoint.path), tensor=other),
                    "remove the one that is not of this checkpoint",
                )
        return [first]

    def _experts(self, name: str, way: Stored, part: int, count: int) -> list[str]:
        """Return the tensors of one part of all experts."""
        found = way.parts.get(part, [])
        known = numbers(found) if len(found) > 1 else None
        there = known if known is not None else list(range(len(found)))
        for expert in sorted(set(range(count)) - set(there)):
            message = f"the checkpoint has no tensor for expert {expert}, part {part} of {name!r}"
            raise self._missing(name, message)
        if len(there) > count:
            raise DiluError(
                f"{name!r} has {count} experts, and the checkpoint has {len(there)}",
                Loc(str(self.checkpoint.path), tensor=found[-1]),
                "config.json is of another model",
            )
        return found

    def missing_in(self, module: str) -> DiluError | None:
        """Return what is wrong with the tensors of a module's own parameters; None if nothing."""
        own = (f"{module}.{n}" for n, _ in self.model.get_submodule(module).named_parameters())
        for name in own:
            try:
                if name in self.shapes:
                    self.tensors(name)
            except DiluError as error:
                return error
        return None

    def _missing(self, name: str, message: str) -> DiluError:
        """Return the error for a parameter that is not stored, with what is stored in its place."""
        for absent in self.checkpoint.absent:
            if self.names.parameter(absent)[0] == name:
                return self.checkpoint.missing(absent, message)
        error = self.checkpoint.missing(name, message)
        module = name.rpartition(".")[0]
        near = self._beside(name) if module else []
        head = self.model.get_output_embeddings()
        if near:
            form = self.said.stated(name, name)
            said = form.said if isinstance(form, Unread) else _READ_NOT
            error.hint = f"{module} has {', '.join(near)} instead: {said}"
        elif head is not None and self._names_of(getattr(head, "weight", None)) == [name]:
            error.hint = (
                "config.json does not tie the head to the embedding (tie_word_embeddings), so both "
                "must be stored"
            )
        return error

    def _beside(self, name: str) -> list[str]:
        """Return what the files have in place of a weight, such as `weight_packed` or `qweight`."""
        module = name.rpartition(".")[0] + "."
        inside = [t.removeprefix(module) for t in self.checkpoint.tensors if t.startswith(module)]
        claimed = {t for ways in self.stored.values() for way in ways for t in way.tensors()}
        return sorted(n for n in inside if "." not in n and module + n not in claimed)[:4]

    def _names_of(self, parameter: Any) -> Sequence[str]:
        state = self.model.state_dict(keep_vars=True)
        return [n for n, t in state.items() if t is parameter]

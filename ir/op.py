"""How an op is declared: one frozen dataclass with everything about it.

    @register("reduce_sum")
    class ReduceSum(Op):
        axes: tuple[int, ...]
        def infer(self, x): ...
        def reference(self, x): ...

Fields are the op's attributes: `int`, `float`, `bool`, `str`, `None`, `DType`, `Dim`, a
`Function` (for ops with a body), or tuples of those. Lowerings live with their target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar, dataclass_transform

import numpy as np
import sympy

from ..errors import DiluError
from .types import TensorType, evaluate

OPS: dict[str, type[Op]] = {}


def unless(default: Any) -> Any:
    """Declare an attribute that the text form leaves out where it has this value."""
    return field(default=default, metadata={"unless": True})


class Op:
    """Base of all ops. Subclasses are made by `register` and are immutable."""

    name: ClassVar[str] = ""
    #: Index of the input whose buffer the single output takes over (in-place update of a state).
    updates: ClassVar[int | None] = None

    def infer(self, *inputs: TensorType) -> tuple[TensorType, ...]:
        """Return the types of the outputs; raise DiluError when the inputs do not fit."""
        raise NotImplementedError

    def reference(self, *inputs: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        """Compute the outputs from values as the interpreter holds them, sizes all known.

        Float inputs arrive in one precision (f32, or f64 when the interpreter runs wide);
        rounding to the output's type is the interpreter's work.
        """
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def written(self) -> dict[str, Any]:
        """Return the attributes that the text form has."""
        return {
            f.name: value
            for f in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) != f.default or "unless" not in f.metadata
        }

    def changed(self, **attributes: Any) -> Op:
        """Return the op with other values of these attributes."""
        return replace(self, **attributes)  # type: ignore[type-var]

    def sized(self, sizes: Mapping[str, int]) -> Op:
        """Return the op with every symbolic dimension in its attributes evaluated."""

        def known(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(known(v) for v in value)
            return evaluate(value, sizes) if isinstance(value, sympy.Expr) else value

        changed = {k: v for k, old in self.attributes().items() if (v := known(old)) is not old}
        return replace(self, **changed) if changed else self  # type: ignore[type-var]


T = TypeVar("T", bound=Op)


@dataclass_transform(frozen_default=True)
def register(name: str) -> Callable[[type[T]], type[T]]:
    """Declare an op: make the class a frozen dataclass and enter it in `OPS` under `name`."""

    def wrap(cls: type[T]) -> type[T]:
        made = dataclass(frozen=True)(cls)
        made.name = name
        if name in OPS:
            raise AssertionError(f"op {name} declared twice")
        OPS[name] = made
        return made

    return wrap


def expect(condition: bool, message: str) -> None:
    """Raise DiluError with `message` unless `condition` holds (for `infer`)."""
    if not condition:
        raise DiluError(message)

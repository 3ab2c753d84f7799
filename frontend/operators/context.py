"""What a lowering sees: the operator's place in the graph, and the builder it adds nodes to.

A lowering is a function `(context, *arguments, **keywords) -> Value | tuple[Value, ...]` entered in
`TABLE` under the operator's name by `lowers`. Tensor arguments arrive as values, sizes as
dimensions, everything else as it stands in the FX graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sympy
import torch
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils._sympy import functions as torch_sympy

from ...element_types import BY_TORCH
from ...errors import DiluError, Loc, UnsupportedError
from ...ir.dtypes import F8E8M0, F32, F64, DType
from ...ir.graph import Node, Value
from ...ir.op import Op
from ...ir.ops.elementwise import Cast, Ne, Where
from ...ir.ops.index import BroadcastTo, Reshape, Slice, Transpose
from ...ir.ops.reduce import ReduceSum
from ...ir.rewrite import Builder
from ...ir.types import Dim, TensorType, dim, shape_of

Lowered = Value | tuple[Value, ...]
Lowering = Callable[..., Any]

#: The importer's table: an operator's name, as `str(torch.ops.aten.add.Tensor)`, and its lowering.
TABLE: dict[str, Lowering] = {}

TORCH_DTYPES: dict[torch.dtype, DType] = {getattr(torch, name): t for name, t in BY_TORCH.items()}


def lowers(*operators: str) -> Callable[[Lowering], Lowering]:
    """Enter a lowering into the table under the names of operators."""

    def wrap(lowering: Lowering) -> Lowering:
        for operator in operators:
            if operator in TABLE:
                raise AssertionError(f"operator {operator} has two lowerings")
            TABLE[operator] = lowering
        return lowering

    return wrap


def dtype_of(dtype: torch.dtype, loc: Loc | None = None) -> DType:
    """Return dilu's element type of a torch one; raise UnsupportedError when there is none."""
    if dtype not in TORCH_DTYPES:
        raise UnsupportedError(f"the element type {dtype} is not supported", loc)
    return TORCH_DTYPES[dtype]


@cache
def saturates(dtype: DType) -> bool:
    """Return whether a cast to a narrow float saturates in the installed torch, where some
    versions make NaN or infinity of what is too large, and others the largest number."""
    kind = next(theirs for theirs, ours in TORCH_DTYPES.items() if ours == dtype)
    with _disable_current_modes():  # not on fake tensors, which have no numbers
        return bool(torch.full((), float("inf")).to(kind).to(torch.float32).isfinite())


@dataclass
class Symbols:
    """The names of torch's symbolic sizes in the graph."""

    names: dict[str, sympy.Symbol] = field(default_factory=dict)

    def dim(self, size: int | torch.SymInt) -> Dim:
        """Return the dimension that a size of a fake tensor stands for."""
        return size if isinstance(size, int) else self.dim_of(size.node.expr)

    def dim_of(self, expression: sympy.Basic) -> Dim:
        """Return the dimension that an expression of torch's symbols stands for."""
        return dim(self._translate(sympy.sympify(expression)))

    def _translate(self, e: Any) -> Any:
        if e.is_Symbol:
            if str(e) not in self.names:
                message = f"a tensor's size depends on data ({e})"
                raise UnsupportedError(message, hint="sizes may depend on the inputs' sizes only")
            return self.names[str(e)]
        if not e.args:
            return e
        args = [self._translate(a) for a in e.args]
        if isinstance(e, (torch_sympy.FloorDiv, torch_sympy.CleanDiv)):
            return sympy.floor(args[0] / args[1])
        if isinstance(e, torch_sympy.ModularIndexing):
            return sympy.Mod(sympy.floor(args[0] / args[1]), args[2])
        if isinstance(e, (torch_sympy.Mod, torch_sympy.PythonMod)):
            return sympy.Mod(args[0], args[1])
        if isinstance(e, torch_sympy.Max):
            return sympy.Max(*args)
        if isinstance(e, torch_sympy.Min):
            return sympy.Min(*args)
        return e.func(*args)


@dataclass
class Context:
    """The operator being lowered. `types` are the types of its outputs; `promoted` the common
    element type of its tensor and scalar arguments by torch's rules; `roles` the function's inputs
    with a given part in a language model; `layers` emits the call of a run of decoder layers;
    `modules` are the classes of the modules that the operator was called in."""

    builder: Builder
    symbols: Symbols
    operator: str
    types: tuple[TensorType, ...]
    promoted: DType
    roles: dict[str, Value]
    trust_indices: bool = False
    layers: Callable[[int, tuple[Value, ...]], Value] | None = None
    modules: tuple[str, ...] = ()

    @property
    def type(self) -> TensorType:
        return self.types[0]

    @property
    def dtype(self) -> DType:
        return self.types[0].dtype

    def unsupported(self, what: str) -> UnsupportedError:
        """Return the error that says which operator cannot do `what`, and where."""
        return UnsupportedError(f"{self.operator}: {what} is not supported", self.builder.loc)

    def role(self, name: str) -> Value:
        """Return the function input with a given part in a language model, such as `slots`."""
        if name not in self.roles:
            raise DiluError(f"{self.operator} stands outside of a language model", self.builder.loc)
        return self.roles[name]

    def emit(self, op: Op, *inputs: Value) -> Value:
        return self.builder.emit(op, *inputs)

    def cast(self, x: Value, dtype: DType) -> Value:
        """Return `x` in another element type, as torch casts it."""
        old = x.type.dtype
        if old == dtype:
            return x
        if dtype.is_code:
            return self.emit(Cast(dtype, saturates(dtype)), x)
        made = self.emit(Cast(dtype), x)
        if old == F8E8M0 and dtype.is_integer:  # the one type whose NaN is 0 then
            return self.emit(Where(), self.emit(Ne(), x, x), self.builder.literal(0, dtype), made)
        return made

    def wide(self, x: Value) -> Value:
        """Return `x` as f32, or f64 where it is: the precision composites compute in."""
        return x if x.type.dtype == F64 else self.cast(x, F32)

    def result(self, x: Value) -> Value:
        """Return `x` in the element type that the operator returns."""
        return self.cast(x, self.dtype)

    def operand(self, x: Any, dtype: DType) -> Value:
        """Return a tensor, a number or a size as a value of `dtype`."""
        if isinstance(x, Value):
            return self.cast(x, dtype)
        if isinstance(x, sympy.Expr):
            return self.size(x, dtype)
        if dtype.is_code:
            return self.cast(self.builder.literal(x, F32), dtype)
        return self.builder.literal(self.whole(x, dtype) if dtype.is_integer else x, dtype)

    def whole(self, x: float | int | bool, dtype: DType) -> int:
        """Return a number in an integer type: what is too large wraps."""
        if isinstance(x, float) and not math.isfinite(x):
            raise self.unsupported(f"the number {x} in a tensor of {dtype}")
        number = int(x) % 2**dtype.bits
        return number - 2**dtype.bits * (dtype.kind == "int" and number >= 2 ** (dtype.bits - 1))

    def size(self, size: Dim, dtype: DType) -> Value:
        """Return a dimension as a scalar (by counting, where it is symbolic)."""
        if isinstance(size, int):
            return self.builder.literal(size, dtype)
        ones = self.emit(BroadcastTo(shape_of((size,))), self.builder.literal(1, dtype))
        return self.emit(ReduceSum((0,)), ones)

    def apply(self, op: Op, *operands: Any, dtype: DType | None = None) -> Value:
        """Apply an elementwise op to operands of one element type (the first value's)."""
        first = next((x for x in operands if isinstance(x, Value)), None)
        common = dtype or (first.type.dtype if first else F32)
        return self.emit(op, *(self.operand(x, common) for x in operands))

    def producer(self, x: Value) -> Node | None:
        """Return the node that makes `x`, when it is a recent one."""
        for node in reversed(self.builder.nodes):
            if x in node.outputs:
                return node
        return None

    # ------------------------------------------------------------------ shapes

    def axis(self, axis: int, rank: int) -> int:
        return axis % max(rank, 1)

    def axes(self, axes: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
        """Return sorted axes; all of them for None and for an empty list. A scalar has none, and
        takes the axes 0 and -1 for them."""
        if rank == 0:
            return ()
        if axes is None or (not isinstance(axes, int) and not axes):
            return tuple(range(rank))
        listed = (axes,) if isinstance(axes, int) else axes
        return tuple(sorted({self.axis(a, rank) for a in listed}))

    def reshape(self, x: Value, shape: Iterable[Dim]) -> Value:
        want = shape_of(shape)
        return x if want == x.type.shape else self.emit(Reshape(want), x)

    def broadcast(self, x: Value, shape: Iterable[Dim]) -> Value:
        want = shape_of(shape)
        return x if want == x.type.shape else self.emit(BroadcastTo(want), x)

    def transpose(self, x: Value, permutation: Sequence[int]) -> Value:
        """Return `x` with its axes reordered; moving axes of size 1 moves no elements."""
        order = tuple(permutation)
        long = [a for a in order if x.type.shape[a] != 1]
        if long == sorted(long):
            return self.reshape(x, (x.type.shape[a] for a in order))
        return self.emit(Transpose(order), x)

    def row(self, x: Value) -> Value:
        """Return a scalar as a row of one, which has the axis that operators ask for."""
        return x if x.type.rank else self.reshape(x, (1,))

    def swap(self, x: Value, a: int, b: int) -> Value:
        """Return `x` with two axes exchanged."""
        if x.type.rank < 2:
            return x
        order = list(range(x.type.rank))
        a, b = self.axis(a, len(order)), self.axis(b, len(order))
        order[a], order[b] = order[b], order[a]
        return self.transpose(x, order)

    def slice(self, x: Value, axis: int, start: Dim, stop: Dim, step: int = 1) -> Value:
        if step == 1 and start == 0 and stop == x.type.shape[axis]:
            return x
        return self.emit(Slice(axis, dim(start), dim(stop), step), x)

    def fill(self, value: Any, t: TensorType) -> Value:
        """Return a tensor of type `t` that holds one value everywhere."""
        return self.broadcast(self.operand(value, t.dtype), t.shape)

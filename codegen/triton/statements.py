"""Statements → Triton: bindings, stores, element loops, reductions.

Element loops become blocks along axis 1; nested ones become one, and loops that hold more than
loops stay loops. A reduction runs along axis 1 when that is free, else one step after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...ir.dtypes import BF16, BOOL, F16, F32, I64, DType
from ...ir.types import Dim, dim
from ..kernel_ir import Let, Literal, Loop, Reduce, Stmt, Store, compute_type
from .expressions import TYPES, emit_index, store_text, typed_literal
from .scope import BOTH, ROWS, SCALAR, Scope

#: Elements of a row that are worked on at once, at most; longer rows take several turns.
WHOLE_ROW = 8192
TURN = 2048


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def emit_statements(stmts: tuple[Stmt, ...], scope: Scope) -> None:
    """Emit statements in their order."""
    for stmt in stmts:
        if isinstance(stmt, Let):
            text = scope.emit(stmt.value)
            axes = scope.axes_of(stmt.value)
            scope.w.line(f"{scope.bind(stmt.name, axes)} = {text}")
        elif isinstance(stmt, Store):
            emit_store(stmt, scope)
        elif isinstance(stmt, Loop):
            emit_loop(stmt, scope)
        else:
            emit_reduce(stmt, scope)


def emit_store(stmt: Store, scope: Scope) -> None:
    """Emit a store of a tile, rounded to the buffer's type, guarded by its mask."""
    extra = None if stmt.mask is None else scope.emit(stmt.mask)
    value = scope.emit(stmt.value)
    if isinstance(stmt.value, Literal) and stmt.buffer.dtype in (BF16, F16):
        value = typed_literal(stmt.value.value, stmt.value.dtype)
    value = store_text(stmt.buffer.dtype, value)
    place = scope.place(stmt.buffer, stmt.index, scope.here)
    mask = scope.mask(scope.here, extra)
    scope.w.line(f"tl.store({place}, {value}{'' if mask is None else f', mask={mask}'})")


# ------------------------------------------------------------------------------- loops


@dataclass(frozen=True)
class Leaf:
    """A perfect nest of element loops, and the statements for each of their elements."""

    loops: tuple[Loop, ...]
    body: tuple[Stmt, ...]

    @property
    def extent(self) -> Dim:
        size: Dim = 1
        for loop in self.loops:
            size = size * (loop.stop - loop.start)
        return dim(size)


def leaves(stmt: Loop, outer: tuple[Loop, ...] = (), lets: tuple[Stmt, ...] = ()) -> list[Leaf]:
    """Return the nests that a loop consists of; none where it holds more than loops and names."""
    loops = (*outer, stmt)
    if not any(isinstance(s, Loop) for s in stmt.body):
        return [Leaf(loops, (*lets, *stmt.body))]
    found: list[Leaf] = []
    for inside in stmt.body:
        if isinstance(inside, Let):
            lets = (*lets, inside)
            continue
        below = leaves(inside, loops, lets) if isinstance(inside, Loop) else []
        if not below:
            return []
        found += below
    return found


def emit_loop(stmt: Loop, scope: Scope) -> None:
    """Emit a loop over elements of a row."""
    parts = leaves(stmt) if scope.here != BOTH else []
    for leaf in parts:
        with_blocks(leaf, scope)
    if parts:
        return
    var = scope.w.fresh(stmt.var)
    inside = replace(scope, names=dict(scope.names), axes=dict(scope.axes))
    inside.bind(stmt.var, SCALAR, var)
    start, stop = (emit_index(v, scope.names) for v in (stmt.start, stmt.stop))
    with scope.w.block(f"for {var} in range({start}, {stop})"):
        emit_statements(stmt.body, inside)


def with_blocks(leaf: Leaf, scope: Scope) -> None:
    """Emit all elements of a leaf: in one block, or in turns."""
    extent = leaf.extent
    if isinstance(extent, int) and power_of_two(extent) <= WHOLE_ROW:
        emit_statements(leaf.body, opened(leaf.loops, scope, "", power_of_two(extent)))
        return
    first = scope.w.fresh("first")
    with scope.w.block(f"for {first} in range(0, {emit_index(extent, scope.names)}, {TURN})"):
        emit_statements(leaf.body, opened(leaf.loops, scope, first, TURN))


def opened(
    loops: tuple[Loop, ...], scope: Scope, first: str, columns: int, *, beyond: bool = False
) -> Scope:
    """Return the scope of a block of the elements that `loops` run over, its variables bound.

    The block has `columns` elements from `first` on, the blocks together as many as there are
    elements, rounded up; or more, with `beyond`.
    """
    w = scope.w
    extent = Leaf(loops, ()).extent
    at = w.fresh("e")
    start = f"{first} + " if first else ""
    w.line(f"{at} = {start}tl.arange(0, {columns})[None, :]")
    mask = None
    if beyond or not isinstance(extent, int) or extent % columns:
        mask = w.fresh("inside")
        w.line(f"{mask} = {at} < {emit_index(extent, scope.names)}")
    inside = scope.inner(str(columns), mask)
    rest = at
    for i in reversed(range(len(loops))):
        loop = loops[i]
        size = emit_index(dim(loop.stop - loop.start), scope.names, 2)
        offset = "" if loop.start == 0 else f"{emit_index(loop.start, scope.names, 1)} + "
        text = rest if i == 0 else f"{rest} % {size}"
        w.line(f"{inside.bind(loop.var, frozenset({1}))} = {offset}{text}")
        rest = f"({rest} // {size})" if i == 1 else f"{rest} // {size}" if i else rest
    return inside


# -------------------------------------------------------------------------- reductions


def emit_reduce(stmt: Reduce, scope: Scope) -> None:
    """Emit a reduction: of a tile's columns, or one by one where a value is needed for each."""
    loops = tuple(Loop(var, 0, size, ()) for var, size in stmt.loops)
    if scope.here == BOTH:
        _one_by_one(stmt, scope)
    else:
        _along_columns(stmt, loops, scope)


def _along_columns(stmt: Reduce, loops: tuple[Loop, ...], scope: Scope) -> None:
    w = scope.w
    extent = Leaf(loops, ()).extent
    whole = isinstance(extent, int) and power_of_two(extent) <= WHOLE_ROW
    columns = power_of_two(extent) if whole and isinstance(extent, int) else TURN
    state = _State.begun(stmt, scope.inner(str(columns), None))
    if whole:
        inside = opened(loops, scope, "", columns)
        emit_statements(stmt.body, inside)
        state.update(inside)
    else:
        first = w.fresh("first")
        with w.block(f"for {first} in range(0, {emit_index(extent, scope.names)}, {columns})"):
            inside = opened(loops, scope, first, columns)
            emit_statements(stmt.body, inside)
            state.update(inside)
    state.finish(scope)


def _one_by_one(stmt: Reduce, scope: Scope) -> None:
    """Emit a reduction whose every step is a whole block of the loop around it."""
    state = _State.begun(stmt, scope)
    inside = replace(scope, names=dict(scope.names), axes=dict(scope.axes))

    def level(i: int) -> None:
        if i == len(stmt.loops):
            emit_statements(stmt.body, inside)
            state.update(inside)
            return
        var, size = stmt.loops[i]
        text = inside.bind(var, SCALAR)
        with scope.w.block(f"for {text} in range(0, {emit_index(size, scope.names)})"):
            level(i + 1)

    level(0)
    if state.finds_nan:
        name = state.name
        scope.w.line(f'{name} = tl.where({state.beside} != 0, float("nan"), {name})')
    scope.names[stmt.name], scope.axes[stmt.name] = state.name, BOTH


@dataclass(frozen=True)
class _State:
    """What a reduction keeps while it runs, a number for every place of the tile.

    `name` holds the outcome so far; `beside` the position's key for argmax, and whether there was
    a NaN for maxima and minima of floats.
    """

    stmt: Reduce
    name: str
    beside: str
    zeros: str

    @classmethod
    def begun(cls, stmt: Reduce, scope: Scope) -> _State:
        w = scope.w
        state = cls(stmt, w.fresh(stmt.name), w.fresh("beside"), scope.zeros(BOTH))
        if stmt.kind == "argmax":
            kind = _key_type(stmt.value.dtype)
            w.line(f"{state.name} = {scope.zeros(BOTH, 'tl.int64')}")
            lowest = -(2 ** (31 if kind == "tl.int32" else 63))
            w.line(f"{state.beside} = tl.full({_tuple(scope)}, {lowest}, {kind})")
            return state
        kind = _register(stmt.dtype)
        w.line(f"{state.name} = tl.full({_tuple(scope)}, {_identity(stmt)}, {kind})")
        if state.finds_nan:
            w.line(f"{state.beside} = {scope.zeros(BOTH)}")
        return state

    @property
    def finds_nan(self) -> bool:
        return self.stmt.kind in ("max", "min") and self.stmt.dtype.is_float

    def update(self, scope: Scope) -> None:
        """Write what takes in the values of a block."""
        w, stmt, name = scope.w, self.stmt, self.name
        mask = scope.masks.get(1)
        value = scope.emit(stmt.value)
        if stmt.kind == "argmax":
            self._update_argmax(scope, value, mask)
            return
        x = w.fresh("x")
        if stmt.dtype == I64 and stmt.kind in ("max", "min"):  # places are counted in 32 bits
            value = f"tl.cast({value}, tl.int64)"
        w.line(f"{x} = {value}" if stmt.dtype == BOOL else f"{x} = {value} + {self.zeros}")
        if mask is not None:
            w.line(f"{x} = tl.where({mask}, {x}, {_identity(stmt)})")
        w.line(f"{name} = {_combined(stmt, name, x)}")
        if self.finds_nan:
            w.line(f"{self.beside} = {self.beside} | ({x} != {x}).to(tl.int32)")

    def _update_argmax(self, scope: Scope, value: str, mask: str | None) -> None:
        w, name, key = scope.w, self.name, scope.w.fresh("key")
        kind = self.stmt.value.dtype
        text = f"ordered_{kind}({value})" if kind.is_float else f"tl.cast({value}, tl.int64)"
        w.line(f"{key} = {text} + {self.zeros}")
        better = f"({key} > {self.beside})" + (f" & {mask}" if mask is not None else "")
        at = scope.names[self.stmt.loops[0][0]]
        taken = w.fresh("better")
        w.line(f"{taken} = {better}")
        w.line(f"{name} = tl.where({taken}, tl.cast({at}, tl.int64), {name})")
        w.line(f"{self.beside} = tl.where({taken}, {key}, {self.beside})")

    def finish(self, scope: Scope) -> None:
        """Write what brings the places of a row together."""
        w, stmt, name = scope.w, self.stmt, self.name
        out = scope.bind(stmt.name, ROWS)
        if stmt.kind == "argmax":
            best = w.fresh("best")
            w.line(f"{best} = tl.max({self.beside}, axis=1, keep_dims=True)")
            place = f"tl.where({self.beside} == {best}, {name}, {2**62})"
            w.line(f"{out} = tl.min({place}, axis=1, keep_dims=True)")
            return
        kind = "sum" if stmt.kind == "sum" and stmt.dtype != BOOL else stmt.kind
        if stmt.dtype == BOOL:
            kind = "min" if stmt.kind in ("min", "prod") else "max"
            w.line(f"{out} = tl.{kind}({name}.to(tl.int32), axis=1, keep_dims=True) != 0")
            return
        if kind == "prod":
            w.line(f"{out} = tl.reduce({name}, 1, multiplied, keep_dims=True)")
            return
        w.line(f"{out} = tl.{kind}({name}, axis=1, keep_dims=True)")
        if self.finds_nan:
            found = f"tl.max({self.beside}, axis=1, keep_dims=True) != 0"
            w.line(f'{out} = tl.where({found}, float("nan"), {out})')


def _tuple(scope: Scope) -> str:
    return f"({scope.shape[0]}, {scope.shape[1]})"


def _register(t: DType) -> str:
    return TYPES[compute_type(t).name]


def _key_type(t: DType) -> str:
    return "tl.int32" if t == F32 else "tl.int64"


def _identity(stmt: Reduce) -> str:
    t = stmt.dtype
    if t == BOOL:
        return "1" if stmt.kind in ("min", "prod") else "0"
    if stmt.kind in ("sum", "prod"):
        number = int(stmt.kind == "prod")
        return f"{number}.0" if t.is_float else f"{number}"
    if t.is_float:
        return '(-float("inf"))' if stmt.kind == "max" else 'float("inf")'
    half = 2 ** (t.bits - 1)
    low, high = (0, 2 * half - 1) if t.kind == "uint" else (-half, half - 1)
    return f"({low if stmt.kind == 'max' else high})"


def _combined(stmt: Reduce, a: str, b: str) -> str:
    if stmt.dtype == BOOL:
        return f"{a} & {b}" if stmt.kind in ("min", "prod") else f"{a} | {b}"
    if stmt.kind in ("sum", "prod"):
        return f"{a} {'+' if stmt.kind == 'sum' else '*'} {b}"
    return f"tl.{'maximum' if stmt.kind == 'max' else 'minimum'}({a}, {b})"


def blocks(stmts: tuple[Stmt, ...]) -> Iterator[int]:
    """Yield how wide the blocks of the loops and reductions of a row are."""
    for stmt in stmts:
        found: list[Dim] = []
        if isinstance(stmt, Reduce):
            found = [Leaf(tuple(Loop(v, 0, s, ()) for v, s in stmt.loops), ()).extent]
        elif isinstance(stmt, Loop):
            found = [leaf.extent for leaf in leaves(stmt)]
            if not found:
                yield from blocks(stmt.body)
        for extent in found:
            small = isinstance(extent, int) and power_of_two(extent) <= WHOLE_ROW
            yield power_of_two(extent) if small and isinstance(extent, int) else TURN

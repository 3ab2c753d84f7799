"""Building kernel statements: every value lands in the outermost loop that it does not vary in.

A `BlockBuilder` holds the open blocks from the kernel's own (depth 0) inwards. A value is bound
once, in the block of the deepest variable it depends on: loop-invariant code moves out and common
subexpressions are shared by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import sympy

from ..ir.dtypes import BOOL, I64, DType
from ..ir.types import Dim
from .index import Range, index, is_at_least, is_below, variable
from .kernel_ir import (
    Apply,
    Buffer,
    Expr,
    Index,
    Let,
    Literal,
    Load,
    Loop,
    Name,
    Reduce,
    Stmt,
    Store,
)

_MAX_SEGMENTS = 6
_UNKNOWN = Range(0, sympy.oo)


@dataclass
class _Block:
    stmts: list[Stmt] = field(default_factory=list)
    bound: dict[Expr, Name] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)


class _Resplit(Exception):
    """A loop should run over `outer × factor`, since an index divides its variable by `factor`."""

    def __init__(self, var: sympy.Symbol, factor: int) -> None:
        self.var, self.factor = var, factor


class BlockBuilder:
    """Statements in nested loops: each value is bound once, as far outside as its parts are known.

    `ranges` are those of the variables, `mask` what every store is guarded by.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.blocks = [_Block()]
        self.depth: dict[str, int] = {}
        self.ranges: dict[sympy.Symbol, Range] = {}
        self.mask: Expr | None = None
        self._taken = set(taken)
        self._counts: dict[str, int] = {}
        self._breaks: dict[sympy.Symbol, set[int]] = {}
        self._elements: set[sympy.Symbol] = set()

    # -- names

    def fresh(self, base: str) -> str:
        count = self._counts.get(base, 0)
        while f"{base}{count}" in self._taken:
            count += 1
        self._counts[base] = count + 1
        return f"{base}{count}"

    def open_variable(self, base: str, start: Dim, stop: Dim) -> sympy.Symbol:
        """Declare a loop variable of the innermost open block."""
        name = self.fresh(base)
        symbol = variable(name)
        self.depth[name] = len(self.blocks) - 1
        self.ranges[symbol] = Range(start, stop)
        return symbol

    # -- depths

    def depth_of(self, item: Expr | Dim) -> int:
        """Return the depth of the innermost variable that `item` depends on."""
        if isinstance(item, Name):
            return self.depth[item.name]
        if isinstance(item, Literal | int):
            return 0
        if isinstance(item, Index):
            return self.depth_of(item.value)
        if isinstance(item, Apply):
            return max((self.depth_of(a) for a in item.args), default=0)
        if isinstance(item, Load):
            parts = [self.depth_of(i) for i in item.index]
            parts.append(self.depth_of(item.mask) if item.mask is not None else 0)
            if item.buffer.space == "row":
                parts.append(1)
            return max(parts, default=0)
        symbols: set[Any] = item.free_symbols
        return max((self.depth.get(s.name, 0) for s in symbols), default=0)

    # -- values

    def bind(self, value: Expr) -> Expr:
        """Return a name for `value`, bound where its deepest variable is."""
        if isinstance(value, Name | Literal | Index):
            return value
        depth = self.depth_of(value)
        block = self.blocks[depth]
        if value not in block.bound:
            name = Name(self.fresh("v"), value.dtype)
            self.depth[name.name] = depth
            block.stmts.append(Let(name.name, value))
            block.bound[value] = name
        return block.bound[value]

    def apply(self, op: str, *args: Expr, dtype: DType, **options: Any) -> Expr:
        return self.bind(Apply(op, args, dtype, **options))

    def load(self, buffer: Buffer, indices: Iterable[Dim]) -> Expr:
        return self.bind(Load(buffer, tuple(indices), self.mask))

    def store(self, buffer: Buffer, indices: Iterable[Dim], value: Expr) -> None:
        """Append a store to the innermost open block."""
        if isinstance(value, Name):
            value = self._unrounded(value, buffer)
        self.blocks[-1].stmts.append(Store(buffer, tuple(indices), value, self.mask))

    def _unrounded(self, name: Name, buffer: Buffer) -> Expr:
        """A store rounds by itself: pass by a rounding to the buffer's own type."""
        for block in self.blocks:
            for value, bound in block.bound.items():
                if bound == name and isinstance(value, Apply) and value.op == "round":
                    return value.args[0] if value.format == buffer.dtype else name
        return name

    def clamped_index(self, value: Expr, size: Dim) -> Dim:
        """Return a value read from memory as an index within `0 … size - 1`."""
        wide = value
        if isinstance(value, Literal):
            number = max(0, int(value.value))
            return min(number, size - 1) if isinstance(size, int) else number
        if isinstance(value, Index):
            inside = is_at_least(value.value, 0, self.ranges)
            if inside and is_below(value.value, size, self.ranges):
                return value.value
        elif value.dtype != I64:
            wide = self.apply("cast", value, dtype=I64)
        name = self.apply("clamp", wide, Index(size), dtype=I64)
        assert isinstance(name, Name)
        symbol = variable(name.name)
        self.ranges[symbol] = Range(0, size)
        return symbol

    # -- conditions on indices

    def below(self, value: Dim, bound: Dim) -> Expr | bool:
        """Return whether `value < bound`: True or False where it is known, else a condition."""
        if is_below(value, bound, self.ranges):
            return True
        if is_at_least(value, bound, self.ranges):
            return False
        self._note_break(value, bound)
        return self.apply("lt", Index(value), Index(bound), dtype=BOOL)

    def _note_break(self, value: Dim, bound: Dim) -> None:
        free: Any = sympy.sympify(value).free_symbols
        for symbol in free & self._elements:
            point = index(bound - value + symbol)
            if isinstance(point, int):
                self._breaks[symbol].add(point)

    @contextmanager
    def masked(self, condition: Expr | bool) -> Generator[None]:
        """Within, loads and stores happen only where `condition` holds."""
        before = self.mask
        if not isinstance(condition, bool):
            both = before is not None
            self.mask = (
                self.apply("logical_and", before, condition, dtype=BOOL) if both else condition
            )
        try:
            yield
        finally:
            self.mask = before

    def want_split(self, value: Dim, divisor: Dim) -> None:
        """Ask for the loop of `value` to be split when it is an element loop's variable."""
        if not isinstance(value, sympy.Symbol) or not isinstance(divisor, int):
            return
        known = self.ranges.get(value, _UNKNOWN)
        if (
            value in self._elements
            and known.start == 0
            and isinstance(known.stop, int)
            and known.stop % divisor == 0
        ):
            raise _Resplit(value, divisor)

    # -- memos of values already built

    def recall(self, key: Any) -> Any:
        for block in self.blocks:
            if key in block.memo:
                return block.memo[key]
        return None

    def remember(self, key: Any, value: Expr) -> None:
        self.blocks[self.depth_of(value)].memo[key] = value

    # -- blocks

    @contextmanager
    def inner(self, depth: int | None = None) -> Generator[_Block]:
        """Open a block inside that of `depth` (default: the innermost); deeper ones step aside."""
        saved = self.blocks
        self.blocks = saved[: (len(saved) if depth is None else depth + 1)]
        block = _Block()
        self.blocks.append(block)
        try:
            yield block
        finally:
            self.blocks = saved

    @contextmanager
    def back_at(self, depth: int) -> Generator[None]:
        """Within, the block of `depth` is the innermost one, and no mask applies."""
        saved, mask = self.blocks, self.mask
        self.blocks, self.mask = saved[: depth + 1], None
        try:
            yield
        finally:
            self.blocks, self.mask = saved, mask

    def loop(self, size: Dim, body: Callable[[Dim], None], *, base: str = "j") -> None:
        """Append an element loop; `body(index)` builds what it does."""
        if size == 1:
            body(0)
            return
        self._loop(size, body, base)

    def _loop(self, size: Dim, body: Callable[[Dim], None], base: str) -> None:
        try:
            points = self._segment(0, size, body, base, keep=False)
            for start, stop in pairwise(points):
                self._segment(start, stop, body, base, keep=True)
        except _Resplit as ask:
            if self.depth.get(ask.var.name) != len(self.blocks):
                raise
            outer, inner = size // ask.factor, ask.factor
            self.loop(outer, lambda o: self.loop(inner, lambda i: body(o * inner + i)))

    def _segment(
        self, start: Dim, stop: Dim, body: Callable[[Dim], None], base: str, *, keep: bool
    ) -> list[Dim]:
        """Build one loop; return the points at which its conditions change, ends included.

        A loop without such points is kept at once, and an empty list is returned.
        """
        parent = self.blocks[-1]
        with self.inner() as block:
            var = self.open_variable(base, start, stop)
            self._elements.add(var)
            self._breaks[var] = set()
            try:
                body(var)
            finally:
                self._elements.discard(var)
        points = sorted(p for p in self._breaks.pop(var) if self._inside(p, start, stop))
        if keep or not points or len(points) >= _MAX_SEGMENTS:
            parent.stmts.append(Loop(var.name, start, stop, tuple(block.stmts)))
            return []
        return [start, *points, stop]

    def _inside(self, point: int, start: Dim, stop: Dim) -> bool:
        return isinstance(stop, int) and isinstance(start, int) and start < point < stop

    def reduce(
        self,
        kind: Any,
        dtype: DType,
        sizes: tuple[Dim, ...],
        depth: int,
        body: Callable[[tuple[Dim, ...]], Expr],
    ) -> Expr:
        """Append a reduction to the block of `depth` and return its value."""
        with self.inner(depth) as block:
            loops = [(self.open_variable("k", 0, s), s) for s in sizes]
            value = body(tuple(v for v, _ in loops))
        name = Name(self.fresh("r"), dtype)
        self.depth[name.name] = depth
        named = tuple((v.name, s) for v, s in loops)
        stmt = Reduce(name.name, kind, dtype, named, tuple(block.stmts), value)
        self.blocks[depth].stmts.append(stmt)
        return name

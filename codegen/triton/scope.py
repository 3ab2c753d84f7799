"""Where a statement stands: the axes that its values may vary along, and the text of its names.

A program works on tiles `[rows, columns]`. Axis 0 runs over rows of a nest or a product, axis 1
over the elements of a loop or over columns. A value is a scalar or varies along some of the axes;
values of different axes are broadcast against each other. Each axis has a mask where the tile may
reach beyond the end of what it runs over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from ...ir.types import Dim, numel
from ..index import flat_index
from ..kernel_ir import Apply, Buffer, Expr, Index, Literal, Load, Name
from .expressions import emit_apply, emit_index, emit_literal, load_text
from .writer import Writer

Axes = frozenset[int]
SCALAR: Axes = frozenset()
ROWS: Axes = frozenset({0})
COLUMNS: Axes = frozenset({1})
BOTH: Axes = frozenset({0, 1})

_SMALL = 1 << 31
_TOKENS = 1 << 17  # a symbolic size is taken for at most this, when 32 bits have to be enough


@dataclass(frozen=True)
class Scope:
    """`shape`: extents of the tile as text. `masks`: by axis, the name of the mask. `names`: text
    of a name of the kernel IR. `axes`: what a name varies along, when it is not a scalar. `whole`:
    what varies at all is read in the shape of the tile."""

    w: Writer
    shape: tuple[str, str]
    masks: dict[int, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    axes: dict[str, Axes] = field(default_factory=dict)
    here: Axes = ROWS
    whole: bool = False

    def inner(self, columns: str, mask: str | None) -> Scope:
        """Return the scope within a loop over axis 1, of blocks of `columns`."""
        masks = {a: m for a, m in self.masks.items() if a != 1}
        if mask is not None:
            masks[1] = mask
        return replace(
            self, shape=(self.shape[0], columns), masks=masks, names=dict(self.names),
            axes=dict(self.axes), here=BOTH,
        )  # fmt: skip

    def bind(self, name: str, axes: Axes, text: str | None = None) -> str:
        """Give a name of the kernel IR its text, a fresh one unless it is given; return that."""
        self.names[name] = text if text is not None else self.w.fresh(name)
        self.axes[name] = axes
        return self.names[name]

    # -- axes

    def axes_of(self, item: Expr | Dim) -> Axes:
        """Return the axes along which an expression varies."""
        if isinstance(item, Name):
            return self.axes.get(item.name, SCALAR)
        if isinstance(item, Literal | int):
            return SCALAR
        if isinstance(item, Index):
            return self.axes_of(item.value)
        if isinstance(item, Apply):
            return self._union(item.args)
        if isinstance(item, Load):
            mask = SCALAR if item.mask is None else self.axes_of(item.mask)
            return self._union(item.index) | mask
        free: Any = item.free_symbols
        return frozenset(a for s in free for a in self.axes.get(s.name, SCALAR))

    def _union(self, items: Iterable[Expr | Dim]) -> Axes:
        return frozenset(a for i in items for a in self.axes_of(i))

    def zeros(self, axes: Axes, dtype: str = "tl.int32") -> str:
        extents = [self.shape[a] if a in axes else "1" for a in (0, 1)]
        return f"tl.zeros(({extents[0]}, {extents[1]}), {dtype})"

    def mask(self, axes: Axes, extra: str | None = None) -> str | None:
        """Return the condition under which elements along `axes` exist, None where all do."""
        parts = [self.masks[a] for a in sorted(axes) if a in self.masks]
        if extra is not None:
            parts.append(extra)
        return " & ".join(f"({p})" if " " in p else p for p in parts) if parts else None

    # -- text

    def emit(self, e: Expr) -> str:
        """Return Triton for an expression in its compute type."""
        if isinstance(e, Name):
            return self.names.get(e.name) or e.name
        if isinstance(e, Literal):
            return emit_literal(e.value, e.dtype)
        if isinstance(e, Index):
            return emit_index(e.value, self.names, 2)
        if isinstance(e, Load):
            return self._load(e)
        return emit_apply(e, [self.emit(a) for a in e.args])

    def _load(self, e: Load) -> str:
        extra = None if e.mask is None else self.emit(e.mask)
        extra_axes = SCALAR if e.mask is None else self.axes_of(e.mask)
        axes = self._union(e.index)
        wanted = self.here if self.whole and axes else axes | extra_axes
        place = self.place(e.buffer, e.index, wanted)
        mask = self.mask(axes, extra)
        text = f"tl.load({place})" if mask is None else f"tl.load({place}, mask={mask}, other=0)"
        return load_text(e.buffer.dtype, text)

    def place(self, buffer: Buffer, index: tuple[Dim, ...], wanted: Axes) -> str:
        """Return Triton for the address of an element, of the shape that `wanted` has.

        What varies with the columns alone is added in 32 bits; the rest in 64 where the buffer
        may be large.
        """
        flat: Any = sympy.sympify(flat_index(index, buffer.shape))
        groups: dict[Axes, list[Any]] = {}
        terms: tuple[Any, ...] = sympy.Add.make_args(flat)
        for term in terms:
            groups.setdefault(self.axes_of(term), []).append(term)
        text, covered = buffer.name, SCALAR
        for axes in sorted(groups, key=sorted):
            value: Any = sympy.Add(*groups[axes])
            if value == 0:
                continue
            names = self.names
            of_sizes = any(s.name not in self.names for s in value.free_symbols)
            if _may_be_large(buffer) and (axes != COLUMNS or of_sizes):
                names = names | self._wide(value)
            text += f" + {emit_index(value, names, 2)}"
            covered |= axes
        if not wanted <= covered:
            text += f" + {self.zeros(wanted)}"
        return text

    def _wide(self, value: Any) -> dict[str, str]:
        return {
            s.name: f"tl.cast({self.names.get(s.name) or s.name}, tl.int64)"
            for s in value.free_symbols
        }


def _may_be_large(buffer: Buffer) -> bool:
    """Whether the number of elements may exceed what 32 bits can count."""
    size: Any = sympy.sympify(numel(buffer.shape))
    return bool(size.subs(dict.fromkeys(size.free_symbols, _TOKENS)) >= _SMALL)

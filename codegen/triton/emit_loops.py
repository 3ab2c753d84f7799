"""Loop nests → Triton: a program for a tile of rows, or for a block of elements of a few rows."""

from __future__ import annotations

from ...ir.types import Dim, dim, numel, print_dim
from ..kernel_ir import Let, Loop, LoopNest
from .expressions import emit_index
from .frame import Frame, Variant
from .scope import ROWS, SCALAR, Scope
from .statements import Leaf, blocks, emit_statements, leaves, opened, power_of_two
from .writer import Writer

_ELEMENTS = 1024  # of a program, about
_PIECE = 1024  # elements of a row that one program does, at most, where others can do the rest


def emit_nest(nest: LoopNest, frame: Frame, what: str = "") -> None:
    """Add the launch of a nest."""
    assert not nest.row_buffers, "rows are computed again, not kept"
    rows = numel(tuple(size for _, size in nest.rows))
    parts = _independent(nest)
    widest = max(blocks(nest.body), default=1)
    columns = min(widest, _PIECE) if parts else widest
    tile = max(1, _ELEMENTS // columns)
    if isinstance(rows, int):
        tile = min(tile, power_of_two(rows))
    w = Writer()
    scope = _row_scope(w, nest, rows, tile)
    pieces: Dim | str = 1
    if parts:
        pieces = _emit_pieces(nest, parts, columns, scope)
    else:
        emit_statements(nest.body, scope)
    grid = (_ceil(rows, tile), pieces, 1)
    warps = min(16, max(1, tile * columns // 512)) if not parts else 4
    frame.launch(what, w, grid, (Variant(warps=max(4, warps)),))


def _row_scope(w: Writer, nest: LoopNest, rows: Dim, tile: int) -> Scope:
    """Write the number of every row of the tile, and what it says of the rows' variables."""
    outside = Scope(w, (str(tile), "1"), here=SCALAR)
    emit_statements(nest.invariant, outside)
    masks: dict[int, str] = {}
    row = w.fresh("row")
    w.line(f"{row} = tl.program_id(0) * {tile} + tl.arange(0, {tile})[:, None]")
    if not (isinstance(rows, int) and rows % tile == 0) and tile > 1:
        masks[0] = w.fresh("valid")
        w.line(f"{masks[0]} = {row} < {emit_index(rows, {})}")
    scope = Scope(w, (str(tile), "1"), masks, dict(outside.names), dict(outside.axes))
    rest = row
    for i in reversed(range(len(nest.rows))):
        var, size = nest.rows[i]
        text = emit_index(size, {}, 2)
        w.line(f"{scope.bind(var, ROWS)} = {rest if i == 0 else f'{rest} % {text}'}")
        rest = f"({rest} // {text})" if i else rest
    return scope


def _ceil(size: Dim, tile: int) -> str | Dim:
    if isinstance(size, int):
        return -(-size // tile)
    return f"({print_dim(size)} + {tile - 1}) // {tile}" if tile > 1 else size


# ------------------------------------------------------------------------------ pieces


def _independent(nest: LoopNest) -> list[Leaf]:
    """Return the element loops of rows that consist of nothing else; none for other rows."""
    loops = [s for s in nest.body if isinstance(s, Loop)]
    if any(not isinstance(s, Let | Loop) for s in nest.body):
        return []
    found = [leaves(loop) for loop in loops]
    return [leaf for each in found for leaf in each] if all(found) else []


def _emit_pieces(nest: LoopNest, parts: list[Leaf], columns: int, scope: Scope) -> Dim | str:
    """Write one block of each loop, the program's own, and return how many blocks there are."""
    emit_statements(tuple(s for s in nest.body if isinstance(s, Let)), scope)
    counts = list(dict.fromkeys(_ceil(leaf.extent, columns) for leaf in parts))
    first = ""
    if counts != [1]:
        first = scope.w.fresh("piece")
        scope.w.line(f"{first} = tl.program_id(1) * {columns}")
    same = len(counts) == 1
    for leaf in parts:
        block = opened(leaf.loops, scope, first, columns, beyond=not same)
        emit_statements(leaf.body, block)
    if same:
        return counts[0]
    if all(isinstance(c, int) for c in counts):
        return max(c for c in counts if isinstance(c, int))
    return f"max({', '.join(c if isinstance(c, str) else print_dim(dim(c)) for c in counts)})"

"""Loop nests → C: rows shared among the threads, or pieces of rows where rows are few."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.types import Dim, dim, numel
from ..kernel_ir import Let, Loop, LoopNest
from .expressions import Expressions, emit_index
from .statements import cost, emit_loop, emit_statements
from .writer import Writer

_PIECE = 2048  # operations' worth of elements in a piece of a row, about
_SHORTEST = 64  # iterations of an innermost loop in a piece


@dataclass(frozen=True)
class Pieces:
    """How a row is cut: `count` pieces of `length` iterations of its element loops."""

    length: int
    count: Dim | str


def emit_nest(w: Writer, nest: LoopNest, ex: Expressions, tail: tuple[str, ...] = ()) -> None:
    """Emit a nest, run by every thread; `tail` are lines at the end of every row, in which `row`
    is the row's number."""
    with w.block():
        emit_statements(w, nest.invariant, ex)
        rows = emit_index(numel(tuple(size for _, size in nest.rows)), 2)
        pieces = None if tail else _pieces(nest)
        per_row = cost(nest.body)
        if pieces is not None:
            rows = f"{rows}*{pieces.count}" if rows != "1" else str(pieces.count)
            per_row = _PIECE
        w.line("int64_t begin, end;")
        price = emit_index(per_row)
        w.line(f"dilu_share({rows}, {price}, thread, threads, &begin, &end);")
        with w.block("for (int64_t row = begin; row < end; row++)"):
            if pieces is None:
                _emit_row_variables(w, nest, "row")
                emit_statements(w, nest.body, ex)
                for line in tail:
                    w.line(line)
            else:
                _emit_piece(w, nest, ex, pieces)


def _emit_row_variables(w: Writer, nest: LoopNest, row: str) -> None:
    """Take the row's number apart."""
    used: list[str] = []
    rest = row
    for i in reversed(range(len(nest.rows))):
        var, size = nest.rows[i][0], nest.rows[i][1]
        if i == 0:
            used.append(f"const int64_t {var} = {rest};")
        else:
            text = emit_index(size, 2)
            used.append(f"const int64_t {var} = {rest} % {text};")
            rest = f"{rest} / {text}"
    for line in reversed(used):
        w.line(line)
    for var, _ in nest.rows:
        w.line(f"(void){var};")


# ------------------------------------------------------------------------------ pieces


def _pieces(nest: LoopNest) -> Pieces | None:
    """Return how to cut rows: where they consist of loops over one range of elements."""
    loops = [s for s in nest.body if isinstance(s, Loop)]
    if not loops or any(not isinstance(s, Loop | Let) for s in nest.body) or nest.row_buffers:
        return None
    stop: Dim = 0
    for loop in loops:  # segments of one range, one after another
        if dim(loop.start - stop) != 0:
            return None
        stop = loop.stop
    per_element = max((_known(cost(s.body)) for s in loops), default=1)
    length = max(_SHORTEST, _PIECE // max(per_element, 1) // 16 * 16)
    if isinstance(loops[0].stop, int) and any(isinstance(s, Loop) for s in loops[0].body):
        length = max(1, _PIECE // max(per_element, 1))
    if isinstance(stop, int):
        count = -(-stop // length)
        if count <= 1:
            return None
        return Pieces(-(-stop // count), count)
    return Pieces(length, f"(({emit_index(stop)} + {length - 1}) / {length})")


def _known(value: Dim) -> int:
    return value if isinstance(value, int) else _PIECE


def _emit_piece(w: Writer, nest: LoopNest, ex: Expressions, pieces: Pieces) -> None:
    count = emit_index(pieces.count) if not isinstance(pieces.count, str) else pieces.count
    loops = [s for s in nest.body if isinstance(s, Loop)]
    total = emit_index(loops[-1].stop)
    if nest.rows:
        _emit_row_variables(
            w, nest, f"row / {count}" if len(nest.rows) == 1 else f"(row / {count})"
        )
    w.line(f"const int64_t from = row % {count} * {pieces.length};")
    w.line(f"const int64_t to = dilu_smaller(from + {pieces.length}, {total});")
    single = len(loops) == 1
    for stmt in nest.body:
        if isinstance(stmt, Loop):
            first = "from" if single else f"dilu_larger(from, {emit_index(stmt.start)})"
            last = "to" if single else f"dilu_smaller(to, {emit_index(stmt.stop)})"
            emit_loop(w, stmt, ex, first, last)
        else:
            emit_statements(w, (stmt,), ex)

"""Statements → C: bindings, stores, element loops, reductions."""

from __future__ import annotations

from ...ir.dtypes import BOOL, F32, F64, DType
from ...ir.types import Dim, dim
from ..kernel_ir import Apply, Expr, Index, Let, Load, Loop, Reduce, Stmt, Store
from .expressions import (
    Expressions,
    c_type,
    emit_index,
    emit_literal,
    register_type,
    store_text,
)
from .writer import Writer

_DEAR = frozenset({"exp", "log", "sin", "cos", "tanh", "erf", "sigmoid", "pow", "atan"})
_IDENTITY = {"max": float("-inf"), "min": float("inf")}


def emit_statements(w: Writer, stmts: tuple[Stmt, ...], ex: Expressions) -> None:
    """Emit statements in their order."""
    for stmt in stmts:
        if isinstance(stmt, Let):
            kind = register_type(stmt.value.dtype)
            w.line(f"const {kind} {stmt.name} = {ex.top(stmt.value)};")
        elif isinstance(stmt, Store):
            emit_store(w, stmt, ex)
        elif isinstance(stmt, Loop):
            emit_loop(w, stmt, ex)
        else:
            emit_reduce(w, stmt, ex)


def emit_store(w: Writer, stmt: Store, ex: Expressions) -> None:
    """Emit a store, rounded to the buffer's type, guarded by its mask."""
    value = store_text(stmt.buffer.dtype, ex.top(stmt.value))
    text = f"{ex.access(stmt.buffer, stmt.index)} = {value};"
    w.line(text if stmt.mask is None else f"if ({ex.top(stmt.mask)}) {text}")


def is_innermost(body: tuple[Stmt, ...]) -> bool:
    """Return whether no loop is in a body."""
    return not any(isinstance(s, Loop | Reduce) for s in body)


def emit_loop(
    w: Writer, stmt: Loop, ex: Expressions, start: str | None = None, stop: str | None = None
) -> None:
    """Emit a loop, over a part of its range where `start` and `stop` are given."""
    var = stmt.var
    first, last = start or emit_index(stmt.start), stop or emit_index(stmt.stop)
    if is_innermost(stmt.body):
        w.pragma("omp simd")
    with w.block(f"for (int64_t {var} = {first}; {var} < {last}; {var}++)"):
        emit_statements(w, stmt.body, ex)


# -------------------------------------------------------------------------- reductions


def emit_reduce(w: Writer, stmt: Reduce, ex: Expressions) -> None:
    """Emit a reduction: its accumulators, its loops, and what it yields."""
    if stmt.kind == "argmax":
        _emit_argmax(w, stmt, ex)
    elif stmt.kind in ("sum", "prod") or stmt.dtype == BOOL:
        _emit_sum(w, stmt, ex)
    else:
        _emit_extreme(w, stmt, ex)


def _emit_nest(w: Writer, stmt: Reduce, ex: Expressions, clauses: str, update: list[str]) -> None:
    """Emit the loops of a reduction around its body and `update`."""

    def level(i: int) -> None:
        var, size = stmt.loops[i][0], stmt.loops[i][1]
        last = i == len(stmt.loops) - 1
        if last and clauses and is_innermost(stmt.body):
            w.pragma(f"omp simd {clauses}")
        with w.block(f"for (int64_t {var} = 0; {var} < {emit_index(size)}; {var}++)"):
            if not last:
                level(i + 1)
                return
            emit_statements(w, stmt.body, ex)
            for line in update:
                w.line(line)

    level(0)


def _emit_sum(w: Writer, stmt: Reduce, ex: Expressions) -> None:
    kind, name = register_type(stmt.dtype), stmt.name
    operator = "*" if stmt.kind == "prod" else "+"
    if stmt.dtype == BOOL:
        operator = "&" if stmt.kind in ("min", "prod") else "|"
    w.line(f"{kind} {name} = {0 if operator in '+|' else 1};")
    update = [f"{name} {operator}= {ex.top(stmt.value)};"]
    _emit_nest(w, stmt, ex, f"reduction({operator}:{name})", update)


def _emit_extreme(w: Writer, stmt: Reduce, ex: Expressions) -> None:
    """Emit a maximum or minimum; of floats, with a flag beside it that says NaN was there."""
    kind, name, t = register_type(stmt.dtype), stmt.name, stmt.dtype
    compare = ">" if stmt.kind == "max" else "<"
    operator = f"dilu_{stmt.kind}" if t.is_float else stmt.kind
    clauses = f"reduction({operator}:{name})"
    update = [
        f"const {kind} {name}_x = {ex.top(stmt.value)};",
        f"{name} = {name}_x {compare} {name} ? {name}_x : {name};",
    ]
    w.line(f"{kind} {name} = {_first(stmt.kind, t)};")
    if t.is_float:
        w.line(f"int {name}_nan = 0;")
        clauses += f" reduction(|:{name}_nan)"
        update.append(f"{name}_nan |= {name}_x != {name}_x;")
    _emit_nest(w, stmt, ex, clauses, update)
    if t.is_float:
        w.line(f"if ({name}_nan) {name} = NAN;")


def _first(kind: str, t: DType) -> str:
    if t.is_float:
        return emit_literal(_IDENTITY[kind], t)
    bits = t.bits
    low, high = (0, 2**bits - 1) if t.kind != "int" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return f"({c_type(t)}){emit_literal(low if kind == 'max' else high, t)}"


def _emit_argmax(w: Writer, stmt: Reduce, ex: Expressions) -> None:
    kind, name = register_type(stmt.value.dtype), stmt.name
    ((var, _),) = stmt.loops
    w.line(f"int64_t {name} = 0;")
    w.line(f"{kind} {name}_best = {_first('max', stmt.value.dtype)};")
    x, best = f"{name}_x", f"{name}_best"
    nan = f" || ({x} != {x} && {best} == {best})" if stmt.value.dtype.is_float else ""
    update = [
        f"const {kind} {x} = {ex.top(stmt.value)};",
        f"if ({x} > {best}{nan}) {best} = {x}, {name} = {var};",
    ]
    _emit_nest(w, stmt, ex, "", update)


# ------------------------------------------------------------------------------- costs


def cost(stmts: tuple[Stmt, ...]) -> Dim:
    """Return about how many operations statements take."""
    total: Dim = 0
    for stmt in stmts:
        if isinstance(stmt, Let):
            total = total + _expression_cost(stmt.value)
        elif isinstance(stmt, Store):
            total = total + 1 + _expression_cost(stmt.value)
        elif isinstance(stmt, Loop):
            total = total + (stmt.stop - stmt.start) * cost(stmt.body)
        else:
            inner = cost(stmt.body) + _expression_cost(stmt.value) + 1
            for _, size in stmt.loops:
                inner = inner * size
            total = total + inner
    return dim(total)


def _expression_cost(e: Expr) -> int:
    if isinstance(e, Apply):
        own = 12 if e.op in _DEAR else 1
        if e.op in _DEAR and e.dtype in (F32, F64) and e.op in ("sin", "cos", "pow", "log"):
            own = 40
        return own + sum(_expression_cost(a) for a in e.args)
    return 1 if isinstance(e, Load | Index) else 0

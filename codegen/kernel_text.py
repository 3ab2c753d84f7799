"""The text form of kernel IR, for people and goldens; nothing parses it.

kernel norm: loops (x: f32[T,64], w: bf16[64]) -> (y: f32[T,64])
  for i0 < T:
    r0 = sum over k0 < 64:
      v0 = x[i0, k0]
      yield (v0 * v0)
    y[i0, j0] = …
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from ..ir.types import Dim, print_dim
from .index import FloorDiv, Remainder
from .kernel_ir import (
    Apply,
    Attention,
    Buffer,
    Epilogue,
    Experts,
    Expr,
    Index,
    Kernel,
    Let,
    Literal,
    Load,
    Loop,
    LoopNest,
    Matmul,
    Name,
    Step,
    Stmt,
    Store,
    TopK,
    Weight,
)  # fmt: skip

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "mod": "%", "eq": "==", "ne": "!=", "lt": "<",
    "le": "<=", "gt": ">", "ge": ">=", "logical_and": "and", "logical_or": "or",
}  # fmt: skip


def print_kernel(kernel: Kernel) -> str:
    """Return the text of a kernel."""
    inputs = ", ".join(map(_buffer, kernel.inputs))
    outputs = ", ".join(map(_buffer, kernel.outputs))
    lines = [f"kernel {kernel.name}: {kernel.kind} ({inputs}) -> ({outputs})"]
    lines += [f"  scratch {_buffer(b)}" for b in kernel.scratch]
    for step in kernel.steps:
        lines += ["  " + line for line in _step(step)]
    return "\n".join(lines) + "\n"


def _buffer(b: Buffer) -> str:
    marks = " constant" if b.constant else ""
    marks += f" pieces={b.pieces}" if b.pieces else ""
    return f"{b.name}: {b.dtype}[{','.join(map(_dim, b.shape))}]{marks}"


def _dim(value: Dim) -> str:
    if not isinstance(value, int) and value.has(FloorDiv, Remainder):
        return str(value)
    return print_dim(value)


# ------------------------------------------------------------------------------- steps


def _step(step: Step) -> Iterator[str]:
    if isinstance(step, LoopNest):
        yield from _nest(step)
    elif isinstance(step, Matmul):
        turned = "ᵀ" if step.transpose_b else ""
        sizes = f"M={_dim(step.M)}, N={_dim(step.N)}, K={_dim(step.K)}, batch={_dim(step.batch)}"
        weights = " and ".join(f"{_weight(w)}{turned}" for w in step.weights)
        yield f"matmul {step.a.name} · {weights} ({sizes}):"
        yield from _around(step.prologue, step.epilogue)
    elif isinstance(step, Experts):
        yield (
            f"experts {step.activation} of {step.a.name} by {step.indices.name},"
            f" {step.routing.name}: {_weight(step.gate_up)}, {_weight(step.down)}:"
        )
        yield from _around(step.prologue, step.epilogue)
    else:
        yield f"{_named(step)}"


def _named(step: Attention | TopK) -> str:
    parts = []
    for f in fields(step):
        value = getattr(step, f.name)
        parts.append(f"{f.name}={value.name if isinstance(value, Buffer) else value}")
    return f"{type(step).__name__.lower()} {', '.join(parts)}"


def _weight(w: Weight) -> str:
    scales = f" × {w.scales.name}: {w.format.scale} per {list(w.format.block)}" if w.scales else ""
    rows = f" from row {_dim(w.row)} + b·{_dim(w.batch_rows)}" if w.row or w.batch_rows else ""
    return f"({w.codes.name}: {w.format.element}{scales}{rows})"


def _around(prologue: LoopNest | None, epilogue: Epilogue) -> Iterator[str]:
    if prologue is not None:
        yield "  prologue:"
        for line in _nest(prologue):
            yield "    " + line
    e = epilogue
    yield f"  epilogue for row {e.row}, column {e.column}, batch {e.batch}:"
    for part in (e.invariant, e.row_body, e.body):
        for line in _statements(part):
            yield "    " + line


def _nest(nest: LoopNest) -> Iterator[str]:
    yield from _statements(nest.invariant)
    rows = ", ".join(f"{var} < {_dim(size)}" for var, size in nest.rows)
    yield f"for {rows or 'one row'}:"
    for b in nest.row_buffers:
        yield f"  row buffer {_buffer(b)}"
    for line in _statements(nest.body):
        yield "  " + line


# -------------------------------------------------------------------------- statements


def _statements(stmts: tuple[Stmt, ...]) -> Iterator[str]:
    for stmt in stmts:
        if isinstance(stmt, Let):
            yield f"{stmt.name} = {_expr(stmt.value)}"
        elif isinstance(stmt, Store):
            mask = f" where {_expr(stmt.mask)}" if stmt.mask is not None else ""
            yield f"{_place(stmt.buffer, stmt.index)} = {_expr(stmt.value)}{mask}"
        elif isinstance(stmt, Loop):
            yield f"for {_dim(stmt.start)} <= {stmt.var} < {_dim(stmt.stop)}:"
            yield from ("  " + line for line in _statements(stmt.body))
        else:
            loops = ", ".join(f"{var} < {_dim(size)}" for var, size in stmt.loops)
            yield f"{stmt.name}: {stmt.dtype} = {stmt.kind} over {loops}:"
            yield from ("  " + line for line in _statements(stmt.body))
            yield f"  yield {_expr(stmt.value)}"


def _place(buffer: Buffer, index: tuple[Dim, ...]) -> str:
    return f"{buffer.name}[{', '.join(map(_dim, index))}]"


def _expr(e: Expr) -> str:
    if isinstance(e, Name):
        return e.name
    if isinstance(e, Literal):
        return f"{e.value}:{e.dtype}"
    if isinstance(e, Index):
        return f"index({_dim(e.value)})"
    if isinstance(e, Load):
        mask = f" where {_expr(e.mask)}" if e.mask is not None else ""
        text = _place(e.buffer, e.index) + mask
        return f"({text})" if mask else text
    return _apply(e)


def _apply(e: Apply) -> str:
    args = [_expr(a) for a in e.args]
    if e.op in _INFIX:
        return f"({args[0]} {_INFIX[e.op]} {args[1]})"
    typed = e.op in ("cast", "round", "decode", "encode")
    name = f"{e.op}.{e.format or e.dtype}" if typed else e.op
    return f"{name}({', '.join(args)})"

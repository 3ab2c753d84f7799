"""Cleaning statements: names nobody uses go, names used once in their own block are written out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ..ir.types import Dim
from .kernel_ir import Apply, Expr, Index, Let, Load, Loop, Name, Reduce, Stmt, Store

_LONGEST = 8  # ops in one expression


def tidy(*parts: tuple[Stmt, ...], keep: Iterable[str] = ()) -> list[tuple[Stmt, ...]]:
    """Return nested statement lists (each sees the names of those before it), cleaned."""
    cleaned = [_live(part, set()) for part in parts]
    used: set[str] = set(keep)
    for i in reversed(range(len(parts))):
        cleaned[i] = _live(parts[i], used)
    counts = Counter(n for part in cleaned for stmt in part for n in _names_in(stmt))
    fixed = {n for part in cleaned for stmt in part for n in _index_names(stmt)} | set(keep)
    single = {n for n, c in counts.items() if c == 1 and n not in fixed}
    return [_written_out(part, single) for part in cleaned]


# ------------------------------------------------------------------------- dead code


def _live(stmts: tuple[Stmt, ...], used: set[str]) -> tuple[Stmt, ...]:
    """Return the statements that matter, given and adding to the names `used` after them."""
    kept: list[Stmt] = []
    for stmt in reversed(stmts):
        if isinstance(stmt, Let | Reduce) and stmt.name not in used:
            continue
        if isinstance(stmt, Reduce):
            used.update(_expr_names(stmt.value))
            for _, size in stmt.loops:
                used.update(_dim_names(size))
        if isinstance(stmt, Loop | Reduce):
            body = _live(stmt.body, used)
            if isinstance(stmt, Loop) and not body:
                continue
            stmt = replace(stmt, body=body)
        used.update(_names_in(stmt))
        kept.append(stmt)
    return tuple(reversed(kept))


# ------------------------------------------------------------------------- names


def _dim_names(value: Dim) -> Iterator[str]:
    if not isinstance(value, int):
        symbols: set[Any] = value.free_symbols
        yield from (s.name for s in symbols)


def _expr_index_names(e: Expr) -> Iterator[str]:
    if isinstance(e, Index):
        yield from _dim_names(e.value)
    elif isinstance(e, Apply):
        for a in e.args:
            yield from _expr_index_names(a)
    elif isinstance(e, Load):
        for i in e.index:
            yield from _dim_names(i)
        if e.mask is not None:
            yield from _expr_index_names(e.mask)


def _plain_names(e: Expr) -> Iterator[str]:
    if isinstance(e, Name):
        yield e.name
    elif isinstance(e, Apply):
        for a in e.args:
            yield from _plain_names(a)
    elif isinstance(e, Load) and e.mask is not None:
        yield from _plain_names(e.mask)


def _expr_names(e: Expr) -> Iterator[str]:
    yield from _plain_names(e)
    yield from _expr_index_names(e)


def _expressions(stmt: Stmt) -> Iterator[Expr]:
    """The expressions of a statement itself, not of the statements inside it."""
    if isinstance(stmt, Let | Reduce):
        yield stmt.value
    elif isinstance(stmt, Store):
        yield stmt.value
        if stmt.mask is not None:
            yield stmt.mask


def _names_in(stmt: Stmt) -> Iterator[str]:
    for e in _expressions(stmt):
        yield from _expr_names(e)
    if isinstance(stmt, Store):
        for i in stmt.index:
            yield from _dim_names(i)
    if isinstance(stmt, Loop):
        yield from _dim_names(stmt.start)
        yield from _dim_names(stmt.stop)
    if isinstance(stmt, Loop | Reduce):
        for inside in stmt.body:
            yield from _names_in(inside)


def _index_names(stmt: Stmt) -> Iterator[str]:
    for e in _expressions(stmt):
        yield from _expr_index_names(e)
    if isinstance(stmt, Store):
        for i in stmt.index:
            yield from _dim_names(i)
    if isinstance(stmt, Loop):
        yield from _dim_names(stmt.stop)
    if isinstance(stmt, Loop | Reduce):
        for inside in stmt.body:
            yield from _index_names(inside)


# ------------------------------------------------------------------- writing out


def _written_out(stmts: tuple[Stmt, ...], single: set[str]) -> tuple[Stmt, ...]:
    here = {s.name for s in stmts if isinstance(s, Let)} & single
    reachable = _named_here(stmts)
    here &= reachable  # used here and not inside a loop, where it would be computed again
    return tuple(_substitute(stmts, here, single)[0])


def _named_here(stmts: tuple[Stmt, ...]) -> set[str]:
    """Return the names that the statements of a block use themselves; a reduction's value is
    computed in its own loop."""
    own = (s for s in stmts if not isinstance(s, Reduce))
    return {n for s in own for e in _expressions(s) for n in _plain_names(e)}


def _substitute(
    stmts: tuple[Stmt, ...], here: set[str], single: set[str]
) -> tuple[list[Stmt], dict[str, Expr]]:
    held: dict[str, Expr] = {}
    out: list[Stmt] = []
    for stmt in stmts:
        if isinstance(stmt, Let):
            value = _put(stmt.value, held)
            if stmt.name in here and _size(value) < _LONGEST:
                held[stmt.name] = value
            else:
                out.append(Let(stmt.name, value))
        elif isinstance(stmt, Store):
            mask = None if stmt.mask is None else _put(stmt.mask, held)
            out.append(replace(stmt, value=_put(stmt.value, held), mask=mask))
        elif isinstance(stmt, Reduce):
            out.append(_reduce_written_out(stmt, single))
        else:
            out.append(replace(stmt, body=_written_out(stmt.body, single)))
    return out, held


def _reduce_written_out(stmt: Reduce, single: set[str]) -> Reduce:
    reachable = _named_here(stmt.body) | set(_plain_names(stmt.value))
    here = {s.name for s in stmt.body if isinstance(s, Let)} & single & reachable
    body, held = _substitute(stmt.body, here, single)
    return replace(stmt, body=tuple(body), value=_put(stmt.value, held))


def _put(e: Expr, held: dict[str, Expr]) -> Expr:
    if not held:
        return e
    if isinstance(e, Name):
        return held.get(e.name, e)
    if isinstance(e, Apply):
        return replace(e, args=tuple(_put(a, held) for a in e.args))
    if isinstance(e, Load) and e.mask is not None:
        return replace(e, mask=_put(e.mask, held))
    return e


def _size(e: Expr) -> int:
    if isinstance(e, Apply):
        return 1 + sum(_size(a) for a in e.args)
    return 1 + (_size(e.mask) if isinstance(e, Load) and e.mask is not None else 0)

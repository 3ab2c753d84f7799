"""Regions of elementwise ops, data movement and reductions → loop nests.

Rows are the parallel part: with reductions, the axes that none of them reduces; without, all axes
but the last. What depends on the row alone is computed once a row, reductions included. Costly
values that several inner loops need are kept in a row buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ir.graph import Function, Node, Value
from ..ir.types import Dim, Shape, dim
from .block import BlockBuilder
from .kernel_ir import Buffer, Expr, LoopNest
from .lower_values import BodyValues, Indices
from .tidy import tidy

_COSTLY = frozenset({"exp", "log", "sin", "cos", "tanh", "erf", "sigmoid", "pow", "atan"})


@dataclass(frozen=True)
class Output:
    """A value and where its elements go: `place` maps the value's index to the buffer's."""

    value: Value
    buffer: Buffer
    place: Callable[[Indices], Indices] = lambda indices: indices


def lower_loops(
    body: Function,
    inputs: dict[str, Buffer],
    outputs: Sequence[Output],
    taken: set[str],
    *,
    keeps_rows: bool,
) -> list[LoopNest]:
    """Return the nests that compute `outputs`; one, unless they differ in shape without need.

    With `keeps_rows`, costly values that several loops of a row read are computed once.
    """
    leads = [_reduced_lead(n) for n in _reductions(body, outputs)]
    if leads and all(lead is not None for lead in leads):
        shape = next(n.inputs[0].type.shape for n in _reductions(body, outputs))
        rows = _common_lead(shape, min(lead for lead in leads if lead is not None), outputs)
        return [lower_nest(body, inputs, outputs, shape[:rows], taken, keeps_rows)]
    shapes = dict.fromkeys(o.value.type.shape for o in outputs)
    return [
        lower_nest(body, inputs, same, s[:-1], taken, keeps_rows)
        for s in shapes
        for same in [[o for o in outputs if o.value.type.shape == s]]
    ]


def lower_nest(
    body: Function,
    inputs: dict[str, Buffer],
    outputs: Sequence[Output],
    rows: Shape,
    taken: set[str],
    keeps_rows: bool,
) -> LoopNest:
    """Return the nest over `rows`, the leading axes of every output."""
    builder = BlockBuilder(taken)
    values = BodyValues(body, builder, inputs)
    with builder.inner() as row_block:
        variables: list[Dim] = []
        named: list[tuple[str, Dim]] = []
        for size in rows:
            if size == 1:
                variables.append(0)
                continue
            variable = builder.open_variable("i", 0, size)
            variables.append(variable)
            named.append((variable.name, size))
        kept = outputs if keeps_rows else ()
        buffers = RowBuffers(values, tuple(variables), rows, kept)
        for tail in dict.fromkeys(o.value.type.shape[len(rows) :] for o in outputs):
            group = [o for o in outputs if o.value.type.shape[len(rows) :] == tail]
            _element_loops(values, group, tuple(variables), tail)
    invariant, content = tidy(tuple(builder.blocks[0].stmts), tuple(row_block.stmts))
    return LoopNest(tuple(named), content, invariant, tuple(buffers.made))


def _element_loops(
    values: BodyValues, outputs: Sequence[Output], indices: Indices, tail: Shape
) -> None:
    if tail:
        values.builder.loop(
            tail[0], lambda j: _element_loops(values, outputs, (*indices, j), tail[1:])
        )
        return
    elements = [(o, values.element(o.value, indices)) for o in outputs]
    for output, element in elements:
        values.builder.store(output.buffer, output.place(indices), element)


# -------------------------------------------------------------------------------- rows


def _is_reduction(node: Node) -> bool:
    return node.op.name.startswith("reduce_") or node.op.name == "argmax"


def _reductions(body: Function, outputs: Sequence[Output]) -> list[Node]:
    needed = {o.value.name for o in outputs}
    found: list[Node] = []
    for node in reversed(body.nodes):
        if any(v.name in needed for v in node.outputs):
            needed.update(v.name for v in node.inputs)
            if _is_reduction(node):
                found.append(node)
    return found


def _reduced_lead(node: Node) -> int | None:
    """Return how many leading axes a reduction leaves, or None when it reduces other axes."""
    rank = node.inputs[0].type.rank
    axes: tuple[int, ...] = getattr(node.op, "axes", (rank - 1,))
    lead = rank - len(axes)
    return lead if axes == tuple(range(lead, rank)) else None


def _common_lead(shape: Shape, lead: int, outputs: Sequence[Output]) -> int:
    """Return how many of the first `lead` axes every output begins with."""
    for output in outputs:
        own = output.value.type.shape
        same = 0
        while same < min(lead, len(own)) and dim(own[same] - shape[same]) == 0:
            same += 1
        lead = min(lead, same)
    return lead


# ------------------------------------------------------------------------- row buffers


class RowBuffers:
    """Costly values that more than one inner loop of a row reads, computed once into a buffer."""

    def __init__(
        self, values: BodyValues, row: Indices, rows: Shape, outputs: Sequence[Output]
    ) -> None:
        self.values = values
        self.row = row
        self.made: list[Buffer] = []
        self.filled: set[str] = set()
        for value in self._worth_keeping(rows, outputs):
            values.special[value.name] = self._reader(value)

    def _worth_keeping(self, rows: Shape, outputs: Sequence[Output]) -> list[Value]:
        """Return costly values of whole rows that several loops reach."""
        loops: dict[str, set[str]] = {}
        for o in outputs:
            loops.setdefault(o.value.name, set()).add(f"tail {o.value.type.shape[len(rows) :]}")
        kept: list[Value] = []
        for node in reversed(self.values.body.nodes):
            readers = set[str]().union(*(loops.get(v.name, set()) for v in node.outputs))
            if not readers:
                continue
            if _is_reduction(node):
                readers = {f"reduce {node.output.name}"}
            elif node.op.name in _COSTLY and len(readers) > 1 and self._spans(node.output, rows):
                kept.append(node.output)
                readers = {f"fill {node.output.name}"}
            for value in node.inputs:
                loops.setdefault(value.name, set()).update(readers)
        return kept

    def _spans(self, value: Value, rows: Shape) -> bool:
        shape = value.type.shape
        same = shape[: len(rows)] == tuple(rows)
        return same and any(size != 1 for size in shape[len(rows) :])

    def _reader(self, value: Value) -> Callable[[Indices], Expr | None]:
        values, count = self.values, len(self.row)
        buffer = Buffer(
            values.builder.fresh("row"), value.type.dtype, value.type.shape[count:], "row"
        )

        def read(indices: Indices) -> Expr | None:
            if indices[:count] != self.row or value.name in values.computing:
                return None
            if value.name not in self.filled:
                self.filled.add(value.name)
                self.made.append(buffer)
                values.computing.add(value.name)
                with values.builder.back_at(1):
                    _element_loops(
                        values, [Output(value, buffer, lambda i: i[count:])], self.row, buffer.shape
                    )
                values.computing.discard(value.name)
            return values.builder.load(buffer, indices[count:])

        return read

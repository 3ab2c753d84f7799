"""What a rank's program does at given sizes, kernel by kernel, counted from the kernel IR.

Shapes: T tokens of a rank, S sequences, R rows of logits, A assignments of tokens to the experts
of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import sympy

from ..codegen.kernel_ir import (
    Attention,
    Buffer,
    CallPlan,
    CollectivePlan,
    Experts,
    Kernel,
    Launch,
    Matmul,
    Plan,
    Program,
    RoutedPlan,
)
from ..ir.types import Dim, symbol
from ..runtime.mesh.wire import FORMATS, row_bytes


@dataclass(frozen=True)
class Sizes:
    """How much a rank works on in one step; `context` tokens are attended to by each token, on
    average; `slots` are the experts that each of `ranks` holds, 0 for as many as were compiled for;
    `wire` is how rows travel to experts.
    """

    tokens: float
    rows: float
    sequences: float
    context: float
    assignments: float = 0
    slots: int = 0
    ranks: int = 0
    wire: str = "exact"

    def symbols(self) -> dict[str, float]:
        pages = self.sequences * max(1.0, self.context / 64)
        return {"T": self.tokens, "R": self.rows, "S": self.sequences, "P": 1, "B": pages}


@dataclass(frozen=True)
class Work:
    """What a kernel or a collective does, once; `part` says which kind of work it is, for reports.

    `weights` numbers, of `weight_bytes`, are each used for `rows` rows; `flops` and `nbytes` are
    what is done beside that. A collective has its `axis`, and `nbytes` are what a rank puts in.
    """

    name: str
    part: str
    weights: float = 0
    weight_bytes: float = 0
    rows: float = 0
    flops: float = 0
    nbytes: float = 0
    axis: str = ""
    collective: str = ""


@dataclass(frozen=True)
class LayerWork:
    """The work of one of `times` equal layers, or of what is outside of layers."""

    name: str
    times: int
    works: tuple[Work, ...]


def count_work(program: Program, sizes: Sizes) -> list[LayerWork]:
    """Return the work of the first function of a program, layer by layer."""
    return list(_layers(program.entries[0].plan, 1, sizes))


def _layers(plan: Plan, times: int, sizes: Sizes) -> Iterator[LayerWork]:
    yield LayerWork(plan.name, times, tuple(_works(plan, sizes, sizes.symbols())))
    for step in plan.steps:
        if isinstance(step, CallPlan):
            yield from _layers(step.plan, times * step.times, sizes)


def _works(plan: Plan, sizes: Sizes, symbols: Mapping[str, float]) -> Iterator[Work]:
    for step in plan.steps:
        if isinstance(step, Launch):
            yield _kernel(step.kernel, sizes, symbols)
        elif isinstance(step, CollectivePlan):
            nbytes = number(step.rows, symbols) * number(step.width, symbols) * step.dtype.itemsize
            yield Work(step.kind, "network", nbytes=nbytes, axis=step.axis, collective=step.kind)
        elif isinstance(step, RoutedPlan):
            out, home = FORMATS[sizes.wire]
            row = row_bytes(out, step.width, step.dtype.itemsize)
            back = row_bytes(home, step.width, step.made.itemsize)
            sent = max(sizes.tokens * step.choices, sizes.assignments)
            way = Work("combine", "network", nbytes=sent * back, axis="ep", collective="all_to_all")
            ranks = sizes.ranks or step.ranks
            if ranks <= step.choices:  # every rank gets all rows (runtime/mesh/rounds.py)
                rows = sizes.tokens * (row + 4 * step.choices)
                yield Work("dispatch", "network", nbytes=rows, axis="ep", collective="all_gather")
            else:
                counts = ranks * (sizes.slots or step.slots) * 8
                yield Work("routing", "network", nbytes=counts, axis="ep", collective="all_gather")
                yield replace(way, name="dispatch", nbytes=sent * row)
            inner = {**symbols, step.symbol: sizes.assignments}
            yield from _works(step.plan, replace(sizes, tokens=sizes.assignments), inner)
            yield way


def _kernel(kernel: Kernel, sizes: Sizes, symbols: Mapping[str, float]) -> Work:
    work = Work(kernel.name, "other", nbytes=_activations(kernel, symbols))
    for step in kernel.steps:
        if isinstance(step, Matmul):
            M, N, K, batch = (number(d, symbols) for d in (step.M, step.N, step.K, step.batch))
            each = N * K * batch
            nbytes = sum(each * w.format.bytes_per_number for w in step.weights)
            work = replace(
                work, part="products", weights=work.weights + each * len(step.weights),
                weight_bytes=work.weight_bytes + nbytes, rows=M,
            )  # fmt: skip
        elif isinstance(step, Experts):
            work = replace(work, part="experts", **_experts(step, sizes, symbols))
        elif isinstance(step, Attention):
            work = replace(work, part="attention", **_attention(step, sizes))
    return work


def _experts(step: Experts, sizes: Sizes, symbols: Mapping[str, float]) -> dict[str, float]:
    """Assignments fall on experts alike: of E, E·(1 - (1 - 1/E)^A) have some."""
    H, I = (number(d, symbols) for d in (step.H, step.I))
    E = sizes.slots or number(step.E, symbols)
    assignments = number(step.T, symbols) * number(step.k, symbols)
    busy = E * (1 - (1 - 1 / E) ** assignments) if E > 1 else min(1.0, assignments)
    each = (
        2 * H * I * step.gate_up.format.bytes_per_number,
        H * I * step.down.format.bytes_per_number,
    )
    return {
        "weights": busy * 3 * H * I,
        "weight_bytes": busy * sum(each),
        "rows": assignments / busy if busy else 0,
    }


def _attention(step: Attention, sizes: Sizes) -> dict[str, float]:
    context = sizes.context if step.window is None else min(sizes.context, step.window)
    heads, width = (int(d) for d in step.q.shape[1:])
    caches = {b.name: b for b in (step.keys, step.values)}  # one, where values are a part of keys
    entry = sum(int(b.shape[1]) * int(b.shape[3]) * b.dtype.itemsize for b in caches.values())
    return {
        "flops": 2 * sizes.tokens * heads * context * (width + step.value_dim),
        "nbytes": sizes.sequences * context * entry,
    }


def _activations(kernel: Kernel, symbols: Mapping[str, float]) -> float:
    """Return the bytes of what a kernel reads and writes beside stored weights and caches."""
    skipped = {
        b.name
        for step in kernel.steps
        for b in (
            [w.codes for w in step.weights] if isinstance(step, Matmul)
            else [step.gate_up.codes, step.down.codes] if isinstance(step, Experts)
            else [step.keys, step.values] if isinstance(step, Attention)
            else []
        )
    }  # fmt: skip
    written = sum(_buffer(b, symbols) for b in kernel.outputs)
    read = 0.0
    for buffer in kernel.inputs:
        if buffer.name in skipped or "B" in map(str, _symbols(buffer)):
            continue
        size = _buffer(buffer, symbols)
        read += min(size, written) if buffer.constant else size  # of a table, the rows looked up
    return read + written


def _symbols(buffer: Buffer) -> set[object]:
    return {s for d in buffer.shape if not isinstance(d, int) for s in d.free_symbols}


def _buffer(buffer: Buffer, symbols: Mapping[str, float]) -> float:
    size = float(buffer.dtype.itemsize)
    for d in buffer.shape:
        size *= number(d, symbols)
    return size


def number(value: Dim, symbols: Mapping[str, float]) -> float:
    """Return the number that a dimension stands for, sizes being fractions where they are means."""
    if isinstance(value, int):
        return value
    names, function = _compiled(value)
    return float(function(*(symbols[name] for name in names)))


@cache
def _compiled(value: sympy.Expr) -> tuple[tuple[str, ...], Callable[..., float]]:
    names = tuple(sorted(str(s) for s in value.free_symbols))
    return names, sympy.lambdify([symbol(name) for name in names], value, "math")

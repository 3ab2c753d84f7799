"""Routed experts → Triton: sort the assignments, two grouped products, add every token's.

Launches: the rows of activations where they are computed; how many assignments every expert has;
their places in blocks; gate and up with the activation; down, weighted; the sum and the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...ir.dtypes import F32, I32
from ...ir.types import Dim, dim, numel, print_dim
from ..kernel_ir import Buffer, Experts, Weight
from .emit_loops import emit_nest
from .emit_products import addresses, emit_epilogue, product_call, stored, tile_scope, with_nan
from .expressions import emit_index, store_text
from .frame import Frame, Rows, Variant
from .statements import power_of_two
from .variants import FEW, Product, Range, grouped
from .writer import Writer

_ASSIGNMENTS = 1024  # that a program looks at in one turn
_COLUMNS = 512  # of a program that adds a token's outcomes


@dataclass(frozen=True)
class _Sorted:
    """The assignments in blocks of one expert each."""

    order: Buffer
    expert_of: Buffer
    blocks: Dim
    rows: Rows


def emit_experts(step: Experts, frame: Frame, what: str) -> None:
    """Add the launches of an experts step."""
    if step.prologue is not None:
        emit_nest(step.prologue, frame, f"{what}rows")
    total = dim(step.T * step.k)
    hidden = frame.scratch_buffer("hidden", step.a.dtype, (total, step.I))
    outcome = frame.scratch_buffer("outcome", F32, (total, step.H))
    counts = frame.scratch_buffer("counts", I32, (step.E,))
    _emit_count(step, frame, f"{what}count", counts, total)
    up = _product(step, step.gate_up, frame, two=True)
    down = _product(step, step.down, frame, two=False)
    pairs = zip(grouped(up, frame.gpu), grouped(down, frame.gpu), strict=True)
    for span, second in pairs:
        places = _emit_places(step, frame, f"{what}{span.name}_places", span, counts, total)
        _emit_up(step, frame, f"{what}{span.name}_up", span, places, hidden, total)
        _emit_down(step, frame, f"{what}{span.name}_down", second, places, hidden, outcome, total)
    _emit_sum(step, frame, f"{what}sum", outcome)


def _product(step: Experts, weight: Weight, frame: Frame, *, two: bool) -> Product:
    N, K = (step.I, step.H) if two else (step.H, step.I)
    assert isinstance(N, int) and isinstance(K, int)
    reach = stored(weight, True, K, frame.gpu).step
    return Product(N, K, reach, step.a.dtype.itemsize, weight.codes.dtype.itemsize, two)


def _rows(step: Experts, span: Range, total: Dim) -> Rows:
    """Return for which numbers of assignments a range serves: by how many an expert has."""
    assert isinstance(step.E, int)
    border = FEW * step.E
    return Rows(total, 1, border) if span.name == "few" else Rows(total, border + 1, None)


def _block_rows(span: Range) -> int:
    (rows,) = {dict(v.constants)["BM"] for v in span.variants}
    return rows


# ------------------------------------------------------------------------------ sorting


def _emit_count(step: Experts, frame: Frame, what: str, counts: Buffer, total: Dim) -> None:
    w = Writer()
    w.line(
        f"count_assignments({step.indices.name}, {counts.name},"
        f" {emit_index(total, {})}, {emit_index(step.E, {})}, {_ASSIGNMENTS})"
    )
    frame.launch(what, w, (step.E, 1, 1), (Variant(),))


def _emit_places(
    step: Experts, frame: Frame, what: str, span: Range, counts: Buffer, total: Dim
) -> _Sorted:
    rows = _block_rows(span)
    limit = sympy.Min(total, step.E) if not isinstance(total, int) else min(total, int(step.E))
    blocks = dim(limit + sympy.floor(sympy.sympify(total) / rows))
    order = frame.scratch_buffer(f"order_{span.name}", I32, (blocks, rows))
    expert_of = frame.scratch_buffer(f"expert_of_{span.name}", I32, (blocks,))
    assert isinstance(step.E, int)
    w = Writer()
    names = ", ".join(b.name for b in (step.indices, counts, order, expert_of))
    w.line(
        f"place_assignments({names}, {emit_index(total, {})}, {emit_index(blocks, {})}, {step.E},"
        f" {power_of_two(step.E)}, {_ASSIGNMENTS}, {rows})"
    )
    condition = _rows(step, span, total)
    frame.launch(what, w, (step.E, 1, 1), (Variant(),), rows=condition)
    return _Sorted(order, expert_of, blocks, condition)


# ----------------------------------------------------------------------------- products


def _begin(w: Writer, places: _Sorted, total: Dim) -> None:
    """Write which expert the program's block is of, and its assignments."""
    w.line("block_ = tl.program_id(1)")
    w.line(f"expert_ = tl.load({places.expert_of.name} + block_)")
    with w.block("if expert_ < 0"):
        w.line("return")
    order = places.order.name
    w.line(f"rows_ = tl.load({order} + block_ * BM + tl.arange(0, BM)[:, None])")
    w.line(f"valid_ = rows_ < {emit_index(total, {})}")
    w.line("n_ = tl.program_id(0)")


def _matrices(weight: Weight, two: bool) -> list[str]:
    """Return the addresses of the expert's matrices and scales."""
    buffers = [weight.codes, weight.scales or weight.codes]
    texts = addresses(weight)
    sizes = [numel(b.shape[2 if two else 1 :]) for b in buffers]
    base = [
        f"{text} + tl.cast(expert_, tl.int64) * {emit_index(dim(size * (2 if two else 1)), {}, 2)}"
        for text, size in zip(texts, sizes, strict=True)
    ]
    more = [f"{b} + {emit_index(s, {}, 2)}" for b, s in zip(base, sizes, strict=True)]
    return [*base, *more] if two else base


def _call(step: Experts, weight: Weight, two: bool, N: Dim, K: Dim, a: Buffer, frame: Frame) -> str:
    return product_call(
        "x_", "valid_", _matrices(weight, two), "0", "0", emit_index(K, {}), "n_ * BN",
        N, K, weight, True, a, frame.gpu,
    )  # fmt: skip


def _emit_up(
    step: Experts, frame: Frame, what: str, span: Range, places: _Sorted, hidden: Buffer, total: Dim
) -> None:
    w = Writer()
    _begin(w, places, total)
    token = f"tl.cast(tl.where(valid_, rows_, 0) // {emit_index(step.k, {}, 2)}, tl.int64)"
    w.line(f"x_ = {step.a.name} + {token} * {emit_index(step.H, {}, 2)}")
    w.line(f"sums_, more_ = {_call(step, step.gate_up, True, step.I, step.H, step.a, frame)}")
    w.line("columns_ = n_ * BN + tl.arange(0, BN)[None, :]")
    value = store_text(hidden.dtype, f"{step.activation}(sums_) * more_")
    place = f"{hidden.name} + tl.cast(rows_, tl.int64) * {emit_index(step.I, {}, 2)}"
    mask = f"valid_ & (columns_ < {emit_index(step.I, {})})"
    w.line(f"tl.store({place} + columns_, {value}, mask={mask})")
    variants = with_nan(span.variants, step.gate_up, {})
    frame.launch(what, w, _grid(step.I, places), variants, rows=places.rows, matrix=True)


def _emit_down(
    step: Experts, frame: Frame, what: str, span: Range, places: _Sorted, hidden: Buffer,
    outcome: Buffer, total: Dim,
) -> None:  # fmt: skip
    w = Writer()
    _begin(w, places, total)
    row = "tl.cast(tl.where(valid_, rows_, 0), tl.int64)"
    w.line(f"x_ = {hidden.name} + {row} * {emit_index(step.I, {}, 2)}")
    w.line(f"sums_, more_ = {_call(step, step.down, False, step.H, step.I, hidden, frame)}")
    w.line("columns_ = n_ * BN + tl.arange(0, BN)[None, :]")
    own = "rows_ + columns_ * 0" if frame.gpu.whole_reads else "rows_"
    w.line(f"share_ = tl.load({step.routing.name} + {own}, mask=valid_, other=0.0)")
    place = f"{outcome.name} + tl.cast(rows_, tl.int64) * {emit_index(step.H, {}, 2)}"
    mask = f"valid_ & (columns_ < {emit_index(step.H, {})})"
    w.line(f"tl.store({place} + columns_, sums_ * share_, mask={mask})")
    variants = with_nan(span.variants, step.down, {})
    frame.launch(what, w, _grid(step.H, places), variants, rows=places.rows, matrix=True)


def _grid(N: Dim, places: _Sorted) -> tuple[str, Dim, Dim]:
    return f"({print_dim(N)} + BN - 1) // BN", places.blocks, 1


def _emit_sum(step: Experts, frame: Frame, what: str, outcome: Buffer) -> None:
    """Add the launch that adds the outcomes of a token, in order, and runs the epilogue."""
    w = Writer()
    w.line("rows_ = tl.program_id(0) + tl.zeros((1, 1), tl.int32)")
    w.line(f"valid_ = rows_ < {emit_index(step.T, {})}")
    w.line(f"columns_ = tl.program_id(1) * {_COLUMNS} + tl.arange(0, {_COLUMNS})[None, :]")
    scope = tile_scope(w, step.H, ("1", str(_COLUMNS)), ragged=True)
    w.line(f"sums_ = tl.zeros((1, {_COLUMNS}), tl.float32)")
    k, H = emit_index(step.k, {}, 2), emit_index(step.H, {}, 2)
    with w.block(f"for choice_ in range({k})"):
        place = f"tl.cast(rows_ * {k} + choice_, tl.int64) * {H} + columns_"
        w.line(f"sums_ += tl.load({outcome.name} + {place}, mask=exists_, other=0.0)")
    emit_epilogue(step.epilogue, scope, ["sums_"], batch="0")
    columns = -(-int(step.H) // _COLUMNS)
    frame.launch(what, w, (step.T, columns, 1), (Variant(),))

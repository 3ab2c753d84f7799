"""Matrix products → Triton: the product's call, parts of K, epilogues.

A product of few rows is cut along K where its columns alone would not keep the GPU busy; the parts
are added by a launch of its own, in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import sympy

from ...ir.dtypes import BF16, F8E4M3, F16, F32, DType
from ...ir.types import Dim, dim, print_dim
from ..kernel_ir import Buffer, Epilogue, Matmul, Weight
from ..target import Gpu
from .emit_loops import emit_nest
from .expressions import TYPES, emit_index
from .frame import Frame, Variant
from .scope import BOTH, ROWS, SCALAR, Scope
from .statements import emit_statements
from .variants import FEW, Product, Range, ranges, splits
from .writer import Writer

_FINISHED = 256  # columns of a program that adds parts


@dataclass(frozen=True)
class Stored:
    """How a product reads its weights: see `product_tile` of the kernel library."""

    mode: str
    step: int
    one_scale: int  # columns that are a multiple of it have one scale; 0: all have
    scale_stride: Dim
    parts: int


def emit_matmul(step: Matmul, frame: Frame, what: str) -> None:
    """Add the launches of the prologue and of the product for every range of rows."""
    if step.prologue is not None:
        emit_nest(step.prologue, frame, f"{what}rows")
    product = product_of(step, frame.gpu)
    for span in ranges(product, frame.gpu, step.M):
        parts: list[Buffer] = []
        cut = splits(product, frame.gpu) if span.name == "few" else 1
        if cut > 1:
            parts = _parts_buffers(step, frame, cut)
        _emit_product(step, frame, f"{what}{span.name}", span, parts)
        if parts:
            _emit_finish(step, frame, f"{what}{span.name}_sum", span, parts)


def product_of(step: Matmul, gpu: Gpu) -> Product:
    """Return what the choice of variants of a product depends on."""
    weight = step.weights[0]
    reading = stored(weight, step.transpose_b, step.K, gpu)
    return Product(
        _static(step.N), _static(step.K), reading.step, step.a.dtype.itemsize,
        weight.codes.dtype.itemsize, len(step.weights) > 1,
        step.batch if isinstance(step.batch, int) else 1,
    )  # fmt: skip


def _static(size: Dim) -> int:
    """Return a size, for choosing tiles, of a dimension that may be symbolic."""
    return size if isinstance(size, int) else 1024


# ----------------------------------------------------------------------------- weights


def stored(weight: Weight, transposed: bool, K: Dim, gpu: Gpu) -> Stored:
    """Return how the scales of a weight meet a product that is made in steps along K."""
    parts = weight_parts(weight.format.element, gpu)
    rows, columns = weight.format.block
    stride: Dim = 0
    if weight.scales is not None:
        blocks = sympy.ceiling(sympy.sympify(weight.columns) / columns) if columns else 1
        stride = dim(blocks)
    along, across = (columns, rows) if transposed else (rows, columns)
    shift = [s for s in (weight.row, weight.batch_rows) if s != 0]
    numbers = [s for s in shift if isinstance(s, int)]
    known = len(numbers) == len(shift)
    if weight.scales is None:
        return Stored("none", 128, 0, 0, parts)
    one = across if not transposed else (math.gcd(across, *numbers) if known else 1)
    whole = along == 0 or (isinstance(K, int) and along >= K)
    if whole and (transposed or along == 0 or not shift):
        return Stored("end", 128, one if across else 0, stride, parts)
    reach = along if transposed else (math.gcd(along, *numbers) if known else 1)
    step = reach & -reach
    if step >= 16:
        return Stored("step", min(step, 128), one if across else 0, stride, parts)
    return Stored("each", 128, 1, stride, weight_parts(F32, gpu))


def weight_parts(t: DType, gpu: Gpu) -> int:
    """Return how many operands add up to a weight of type `t`."""
    if gpu.dot == F32 or t.is_code or t == gpu.dot:
        return 1
    if t == BF16:  # in f16: what is lost lies below f16's smallest number
        return 1
    return 2 if t == F16 or gpu.dot == F16 else 3


def activation_parts(t: DType, gpu: Gpu) -> int:
    """Return how many operands add up to an activation: two hold 16 bits or more of f32's 24."""
    if gpu.dot == F32 or t == gpu.dot or t == BF16:
        return 1
    return 2


def product_call(
    x: str, valid: str, matrices: list[str], row: str, begin: str, end: str, first: str,
    N: Dim, K: Dim, weight: Weight, transposed: bool, a: Buffer, gpu: Gpu,
) -> str:  # fmt: skip
    """Return the call of `product_tile`; `matrices` are addresses of weights and scales."""
    reading = stored(weight, transposed, K, gpu)
    two = len(matrices) > 2
    form = weight.format
    constants = {
        "N": emit_index(N, {}), "K": emit_index(K, {}), "STRIDE": emit_index(weight.columns, {}),
        "SCALE_STRIDE": emit_index(reading.scale_stride, {}), "N_WHOLE": _divides("BN", N),
        "K_WHOLE": _divides("BK", K), "TRANSPOSED": transposed,
        "FORMAT": f'"{form.element.name}"',
        "SCALE": f'"{form.scale.name if form.scale else "none"}"', "MODE": f'"{reading.mode}"',
        "BLOCK_ROWS": form.block[0], "BLOCK_COLUMNS": form.block[1],
        "ONE_SCALE": f"{reading.one_scale} % BN == 0", "TWO": two,
        "X": activation_parts(a.dtype, gpu), "W": reading.parts, "DOT": TYPES[gpu.dot.name],
        "DECODE": _decoding(gpu), "BN": "BN", "BK": "BK",
    }  # fmt: skip
    pairs = matrices if two else matrices * 2
    positional = [x, valid, *pairs, first, row, begin, end]
    return f"product_tile({', '.join([*positional, *(f'{n}={v}' for n, v in constants.items())])})"


def _decoding(gpu: Gpu) -> str:
    """Return how codes become numbers. Conversion instructions are fewer, which helps tiles of many
    rows, and slower, which costs the few rows whose time is that of reading weights a third."""
    fast = f'"{gpu.decode}"'
    if gpu.decode == "native":
        fast = f'("packed" if BM <= {FEW} else "native")'
    return f'"exact" if NAN else {fast}'


def _divides(block: str, size: Dim) -> str:
    return f"{size} % {block} == 0" if isinstance(size, int) else "False"


def with_nan(
    variants: tuple[Variant, ...], weight: Weight, constants: dict[str, int]
) -> tuple[Variant, ...]:
    """Return the variants with more constants, and the first again for weights with NaN codes."""
    more = tuple(constants.items())
    found = [replace(v, constants=(*v.constants, *more, ("NAN", 0))) for v in variants]
    if weight.format.element == F8E4M3:
        first = variants[0]
        found.append(replace(first, constants=(*first.constants, *more, ("NAN", 1)), nan=True))
    return tuple(found)


# ----------------------------------------------------------------------------- product


def _emit_product(step: Matmul, frame: Frame, what: str, span: Range, parts: list[Buffer]) -> None:
    w = Writer()
    M, N, K = (emit_index(d, {}) for d in (step.M, step.N, step.K))
    w.line(f"rows_of, columns_of = (({M}) + BM - 1) // BM, (({N}) + BN - 1) // BN")
    w.line("m_, n_ = tile_of(tl.program_id(0), rows_of, columns_of)")
    w.line("batch_ = tl.program_id(1)")
    w.line("rows_ = m_ * BM + tl.arange(0, BM)[:, None]")
    w.line(f"valid_ = rows_ < {M}")
    begin, end = "0", K
    cut = parts[0].shape[0] if parts else 1
    if parts:
        w.line("part_ = batch_ % SPLIT")
        w.line("batch_ = batch_ // SPLIT")
        w.line(f"each_ = (({K} + BK - 1) // BK + SPLIT - 1) // SPLIT * BK")
        w.line("begin_ = part_ * each_")
        w.line(f"end_ = tl.minimum({K}, begin_ + each_)")
        begin, end = "begin_", "end_"
    w.line(f"x_ = {step.a.name} + tl.cast(batch_ * ({M}) + rows_, tl.int64) * {K}")
    weight = step.weights[0]
    row = f"{emit_index(weight.row, {}, 1)} + batch_ * {emit_index(weight.batch_rows, {}, 2)}"
    call = product_call(
        "x_", "valid_", [a for v in step.weights for a in addresses(v)],
        row if weight.batch_rows != 0 else emit_index(weight.row, {}), begin, end, "n_ * BN",
        step.N, step.K, weight, step.transpose_b, step.a, frame.gpu,
    )  # fmt: skip
    w.line(f"sums_, more_ = {call}")
    w.line("columns_ = n_ * BN + tl.arange(0, BN)[None, :]")
    constants = {"SPLIT": int(cut)} if parts else {}
    variants = with_nan(span.variants, weight, constants)
    if parts:
        _store_parts(step, w, parts)
    else:
        scope = tile_scope(w, step.N, ("BM", "BN"), ragged=True)
        scope = replace(scope, whole=frame.gpu.whole_reads)
        emit_epilogue(step.epilogue, scope, ["sums_", "more_"], batch="batch_")
    tiles = f"(({_printed(step.M)} + BM - 1) // BM) * (({_printed(step.N)} + BN - 1) // BN)"
    programs = dim(step.batch * cut)
    rows = span.rows(step.M)
    frame.launch(what, w, (tiles, programs, 1), variants, rows=rows, matrix=True)


def addresses(weight: Weight) -> list[str]:
    """Return the addresses of a weight and of its scales (anything, where it has none)."""
    codes = weight.codes.name
    return [codes, weight.scales.name if weight.scales is not None else codes]


def tile_scope(w: Writer, N: Dim, shape: tuple[str, str], *, ragged: bool) -> Scope:
    """Return the scope of a tile of results, of rows `rows_` (`valid_`) and columns `columns_`."""
    masks = {0: "valid_"}
    if ragged:
        w.line(f"exists_ = columns_ < {emit_index(N, {})}")
        masks[1] = "exists_"
    return Scope(w, shape, masks, here=BOTH)


def emit_epilogue(e: Epilogue, scope: Scope, sums: list[str], batch: str) -> None:
    """Write what becomes of a tile of sums."""
    outside = replace(scope, here=SCALAR)
    scope.bind(e.batch, SCALAR, batch)
    emit_statements(e.invariant, outside)
    scope.bind(e.row, ROWS, "rows_")
    emit_statements(e.row_body, replace(scope, here=ROWS))
    scope.bind(e.column, frozenset({1}), "columns_")
    for name, text in zip(e.accumulators, sums, strict=False):
        scope.bind(name, BOTH, text)
    emit_statements(e.body, scope)


def _printed(size: Dim) -> str:
    return print_dim(size) if isinstance(size, int) else f"({print_dim(size)})"


# ------------------------------------------------------------------------- parts of K


def _parts_buffers(step: Matmul, frame: Frame, cut: int) -> list[Buffer]:
    """Return the buffers of the parts of the sums, `[parts, batch, rows, N]` each."""
    few = sympy.Min(step.M, FEW) if not isinstance(step.M, int) else step.M
    shape = (cut, step.batch, dim(few), step.N)
    return [frame.scratch_buffer(f"parts{i}", F32, shape) for i in range(len(step.weights))]


def _part_place(step: Matmul) -> str:
    batch, M, N = (emit_index(d, {}, 2) for d in (step.batch, step.M, step.N))
    return f"at_ = ((part_ * {batch} + batch_) * {M} + rows_) * {N} + columns_"


def _store_parts(step: Matmul, w: Writer, parts: list[Buffer]) -> None:
    w.line(f"exists_ = columns_ < {emit_index(step.N, {})}")
    w.line(_part_place(step))
    for buffer, sums in zip(parts, ("sums_", "more_"), strict=False):
        w.line(f"tl.store({buffer.name} + at_, {sums}, mask=valid_ & exists_)")


def _emit_finish(step: Matmul, frame: Frame, what: str, span: Range, parts: list[Buffer]) -> None:
    """Add the launch that adds the parts, in order, and runs the epilogue."""
    w = Writer()
    w.line("rows_ = tl.program_id(1) + tl.zeros((1, 1), tl.int32)")
    w.line(f"valid_ = rows_ < {emit_index(step.M, {})}")
    w.line("batch_ = tl.program_id(2)")
    w.line(f"columns_ = tl.program_id(0) * {_FINISHED} + tl.arange(0, {_FINISHED})[None, :]")
    scope = tile_scope(w, step.N, ("1", str(_FINISHED)), ragged=True)
    names: list[str] = []
    for buffer in parts:
        total = w.fresh("sums")
        names.append(total)
        w.line(f"{total} = tl.zeros((1, {_FINISHED}), tl.float32)")
        with w.block(f"for part_ in range({buffer.shape[0]})"):
            w.line(_part_place(step))
            element = f"{buffer.name} + at_"
            w.line(f"{total} += tl.load({element}, mask=valid_ & exists_, other=0.0)")
    emit_epilogue(step.epilogue, scope, names, batch="batch_")
    columns = dim(sympy.floor((sympy.sympify(step.N) + _FINISHED - 1) / _FINISHED))
    grid = (columns, step.M, step.batch)
    frame.launch(what, w, grid, (Variant(warps=4),), rows=span.rows(step.M))

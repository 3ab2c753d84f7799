"""Matrix products and experts → C: arguments of the micro-kernels, packing, epilogues."""

from __future__ import annotations

from ...ir.types import Dim, dim, numel
from ..index import floor_div
from ..kernel_ir import Buffer, Epilogue, Experts, LoopNest, Matmul, Weight
from .emit_loops import emit_nest
from .expressions import FORMATS, Expressions, element, emit_index
from .frame import Frame
from .statements import emit_statements
from .writer import Writer


def ceil_div(a: Dim, b: Dim) -> Dim:
    """Return `a / b`, rounded up."""
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b)
    return floor_div(a + b - 1, b)


def emit_matmul(w: Writer, step: Matmul, frame: Frame) -> None:
    """Emit the prologue, a barrier, and the product with its epilogue."""
    weight = step.weights[0]
    packed = step.transpose_b
    assert packed or len(step.weights) == 1
    rows = dim(step.M * step.batch)
    x, stride = emit_activations(w, step.a, step.prologue, rows, step.K, weight, packed, frame)
    epilogue, ctx = emit_epilogue(step.epilogue, step.batch, step.N, frame)
    scratch = frame.space("dilu_matmul_scratch(threads)")
    fields = {
        "M": emit_index(step.M), "N": emit_index(step.N), "K": emit_index(step.K),
        "batch": emit_index(step.batch), "batch_rows": emit_index(weight.batch_rows),
        "row0": emit_index(weight.row), "x": x, "x_stride": stride,
        "x_batch_stride": f"{emit_index(step.M, 2)} * {stride}",
        "codes": _pair([v.codes.name for v in step.weights]),
        "scales": _pair([v.scales.name if v.scales else "0" for v in step.weights]),
        "weight_stride": emit_index(weight.columns),
        "scale_stride": emit_index(_scale_stride(weight)), "scratch": scratch,
    }  # fmt: skip
    with w.block():
        emit_struct(w, "dilu_matmul_args", "args", fields)
        if packed:
            product = f"dilu_matmul(&{weight_kernels(weight, frame)}, {len(step.weights)}, "
        else:
            product = f"{_transposed_product(weight, frame)}("
        w.line(f"{product}&args, {epilogue}, {ctx}, pool, thread);")


def weight_kernels(weight: Weight, frame: Frame) -> str:
    """Return the name of what the module compiles for this weight's format."""
    name = f"weights_{weight.format.name}"
    return frame.instance(name, f"DILU_WEIGHT_KERNELS({name}, {_format(weight)})\n")


def _transposed_product(weight: Weight, frame: Frame) -> str:
    """Return the name of the product with weights of this format that lie transposed."""
    name = f"matmul_kn_{weight.format.name}"
    return frame.instance(
        name,
        f"DILU_NOINLINE void {name}(const dilu_matmul_args* args, dilu_epilogue epilogue,\n"
        "  const void* ctx, dilu_pool* pool, int thread) {\n"
        f"  const dilu_weight_type type = {_format(weight)};\n"
        "  dilu_matmul_kn(type, args, epilogue, ctx, pool, thread);\n}\n",
    )


def _pair(items: list[str]) -> str:
    return "{" + ", ".join(items) + "}"


def _scale_stride(weight: Weight) -> Dim:
    if weight.scales is None:
        return 0
    columns = weight.format.block[1]
    return ceil_div(weight.columns, columns) if columns else 1


def _format(weight: Weight) -> str:
    """Return a `dilu_weight_type` in braces."""
    form = weight.format
    scale = FORMATS[form.scale.name] if form.scale is not None else "DILU_NONE"
    rows, columns = form.block
    return f"{{{FORMATS[form.element.name]}, {scale}, {rows}, {columns}}}"


def emit_struct(w: Writer, kind: str, name: str, fields: dict[str, str]) -> None:
    """Emit the constant `name` of a struct type `kind`, its fields by their names."""
    with w.block(f"const {kind} {name} =", "};"):
        for field, text in fields.items():
            w.line(f".{field} = {text},")


# ------------------------------------------------------------------------- activations


def emit_activations(
    w: Writer,
    a: Buffer,
    prologue: LoopNest | None,
    rows: Dim,
    K: Dim,
    weight: Weight,
    packed: bool,
    frame: Frame,
) -> tuple[str, str]:
    """Emit what brings rows into the form the product wants; return their address and stride."""
    if not packed:
        if prologue is not None:
            frame.row_buffers(w, prologue)
            emit_nest(w, prologue, Expressions())
            frame.barrier(w)
        return a.name, emit_index(K, 2)
    name = frame.fresh("packed")
    stride = f"dilu_packed_length({emit_index(K)})"
    place = frame.space(f"{emit_index(rows, 2)} * {stride} * 4")
    w.line(f"float* const {name} = (float*){place};")
    if prologue is None:
        form = FORMATS[weight.format.element.name]
        w.line(
            f"dilu_pack_rows({form}, {a.name}, {emit_index(K)}, {emit_index(rows)},"
            f" {emit_index(K)}, {name}, {stride}, pool, thread);"
        )
    else:
        _emit_packed_prologue(w, a, prologue, K, weight, name, stride, frame)
    frame.barrier(w)
    return name, stride


def _emit_packed_prologue(
    w: Writer,
    a: Buffer,
    prologue: LoopNest,
    K: Dim,
    weight: Weight,
    packed: str,
    stride: str,
    frame: Frame,
) -> None:
    """Emit rows that are computed into a buffer of the thread's own and packed from there."""
    own = frame.per_thread(f"{emit_index(K, 2)} * 4")
    own_name = a.name
    w.line(f"float* const {own_name} = (float*)({own});")

    def access(buffer: Buffer, indices: tuple[Dim, ...]) -> str:
        if buffer == a:
            return f"{own_name}[{emit_index(indices[-1])}]"
        return element(buffer, indices)

    frame.row_buffers(w, prologue)
    form = FORMATS[weight.format.element.name]
    tail = f"dilu_pack_row({form}, {a.name}, {emit_index(K)}, {packed} + row * {stride});"
    emit_nest(w, prologue, Expressions(access), (tail,))


# --------------------------------------------------------------------------- epilogues


def emit_epilogue(e: Epilogue, batch: Dim, N: Dim, frame: Frame) -> tuple[str, str]:
    """Write the epilogue as a function before the kernel; return its name and its context."""
    name = frame.function("epilogue")
    context = frame.context()
    sums = ", ".join(f"const float* sums{i}" for i in range(2))
    row, column, b = e.row, e.column, e.batch
    body = Writer()
    if batch == 1:
        body.line("const int64_t first = column;")
    else:
        body.line(f"const int64_t {b} = column / {emit_index(N, 2)};")
        body.line(f"const int64_t first = column - {b} * {emit_index(N, 2)};")
    ex = Expressions()
    emit_statements(body, e.invariant, ex)
    emit_statements(body, e.row_body, ex)
    body.pragma("omp simd")
    with body.block("for (int64_t i = 0; i < count; i++)"):
        body.line(f"const int64_t {column} = first + i;")
        for i, acc in enumerate(e.accumulators):
            body.line(f"const float {acc} = sums{i}[i];")
        emit_statements(body, e.body, ex)
    w = frame.before
    head = f"const void* ctx, int64_t {row}, int64_t column, int64_t count, {sums}"
    with w.block(f"DILU_NOINLINE void {name}({head})"):
        frame.unpack_context(w, body)
        w.append(body)
    w.line()
    return name, context


# ----------------------------------------------------------------------------- experts

ACTIVATIONS = {
    "silu": "dilu_silu(gate[i])",
    "gelu_tanh": (
        "0.5f * gate[i] * (1.0f + dilu_tanh(0.79788456f * (gate[i] + 0.044715f * gate[i] * gate[i]"
        " * gate[i])))"
    ),
}


def emit_experts(w: Writer, step: Experts, frame: Frame) -> None:
    """Emit the prologue, the pointer tables and the grouped product."""
    x, stride = emit_activations(
        w, step.a, step.prologue, step.T, step.H, step.gate_up, True, frame
    )
    epilogue, ctx = emit_epilogue(step.epilogue, 1, step.H, frame)
    sizes = {
        n: emit_index(v)
        for n, v in zip("THIEk", (step.T, step.H, step.I, step.E, step.k), strict=True)
    }
    listed = ", ".join(f".{n} = {v}" for n, v in sizes.items())
    scratch = frame.space(f"dilu_experts_scratch(&(dilu_experts_args){{{listed}}}, threads)")
    fields = {
        **sizes, "x": x, "x_stride": stride,
        "indices": step.indices.name, "index_bytes": "8",
        "routing": step.routing.name,
        "gate_up_codes": _table(step.gate_up.codes, 2, frame),
        "gate_up_scales": _table(step.gate_up.scales, 2, frame),
        "down_codes": _table(step.down.codes, 1, frame),
        "down_scales": _table(step.down.scales, 1, frame),
        "gate_up_scale_stride": emit_index(_scale_stride(step.gate_up)),
        "down_scale_stride": emit_index(_scale_stride(step.down)), "scratch": scratch,
    }  # fmt: skip
    with w.block():
        emit_struct(w, "dilu_experts_args", "args", fields)
        kernels = ", ".join(f"&{weight_kernels(x, frame)}" for x in (step.gate_up, step.down))
        activation = _activation(step.activation, frame)
        w.line(f"dilu_experts({kernels}, &args, {activation}, {epilogue}, {ctx}, pool, thread);")


def _activation(kind: str, frame: Frame) -> str:
    """Return the name of the function between the experts' two products."""
    name = f"experts_{kind}"
    return frame.instance(
        name,
        f"DILU_NOINLINE void {name}(const void* ctx, int64_t count, const float* gate,\n"
        "  const float* up, float* hidden) {\n"
        "  (void)ctx;\n"
        "#pragma omp simd\n"
        "  for (int64_t i = 0; i < count; i++)\n"
        f"    hidden[i] = {ACTIVATIONS[kind]} * up[i];\n}}\n",
    )


def _table(buffer: Buffer | None, parts: int, frame: Frame) -> str:
    """Return C for the addresses of the matrices of a stacked weight: `parts` leading axes."""
    if buffer is None:
        return "0"
    count = numel(buffer.shape[:parts])
    per_piece = numel(buffer.shape[buffer.pieces : parts])
    size = dim(numel(buffer.shape[parts:]) * buffer.dtype.itemsize)
    own = frame.per_thread(f"{emit_index(count, 2)} * 8") if per_piece != 1 else "0"
    constant = frame.constant(buffer)
    return (
        f"dilu_constant_parts({constant}, {emit_index(count)}, {emit_index(per_piece)},"
        f" {emit_index(size)}, (const void**)({own}))"
    )

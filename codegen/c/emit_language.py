"""Attention and top-k → C."""

from __future__ import annotations

from ...ir.types import numel
from ..kernel_ir import Attention, Buffer, TopK
from .emit_products import emit_struct
from .expressions import FORMATS, c_type, emit_index, load_text, register_type
from .frame import Frame
from .writer import Writer


def emit_attention(w: Writer, step: Attention, frame: Frame) -> None:
    """Emit the call of the attention kernel."""
    tokens, heads, key_dim = step.q.shape
    kv_heads, page_size = step.keys.shape[1:3]
    keys, values = step.keys.name, step.values.name
    sizes = f"{emit_index(key_dim)}, {step.value_dim}, threads"
    same = step.keys.shape == step.values.shape
    fields = {
        "T": emit_index(tokens), "Hq": emit_index(heads), "Hkv": emit_index(kv_heads),
        "Dk": emit_index(key_dim), "Dv": str(step.value_dim), "q": step.q.name,
        "q_stride": emit_index(numel(step.q.shape[1:])), "k": keys,
        "v": f"(const void*){values} == (const void*){keys} ? 0 : {values}" if same else values,
        **_strides("k", step.keys), **_strides("v", step.values),
        "page_size": emit_index(page_size), "positions": step.positions.name,
        "sequence": step.sequence.name, "sequence_bytes": "8",
        "block_tables": step.pages.name, "block_bytes": "8",
        "block_stride": emit_index(step.pages.shape[1]),
        "scale": f"{step.scale!r}f", "window": str(step.window or 0),
        "out": step.out.name, "out_stride": emit_index(numel(step.out.shape[1:])),
        "scratch": frame.space(f"dilu_attention_scratch({sizes})"),
    }  # fmt: skip
    with w.block():
        emit_struct(w, "dilu_attention_args", "args", fields)
        w.line(f"{_paged(step.keys, frame)}(&args, pool, thread);")


def _paged(cache: Buffer, frame: Frame) -> str:
    """Return the name of the attention kernel for a cache's format."""
    name = f"attention_{cache.dtype.name}"
    return frame.instance(
        name,
        f"DILU_NOINLINE void {name}(const dilu_attention_args* args, dilu_pool* pool, int thread)"
        f" {{\n  dilu_attention({FORMATS[cache.dtype.name]}, args, pool, thread);\n}}\n",
    )


def _strides(prefix: str, cache: Buffer) -> dict[str, str]:
    axes = {"page": 1, "head": 2, "slot": 3}
    return {
        f"{prefix}_{name}_stride": emit_index(numel(cache.shape[axis:]))
        for name, axis in axes.items()
    }


def emit_topk(w: Writer, step: TopK, frame: Frame) -> None:
    """Emit a selection by insertion: k is small. NaN counts as the largest."""
    *lead, size = step.x.shape
    x, values, indices = (b.name for b in (step.x, step.values, step.indices))
    kind, stored = register_type(step.x.dtype), c_type(step.x.dtype)
    k = step.k
    w.line("int64_t begin, end;")
    rows, length = emit_index(numel(tuple(lead)), 2), emit_index(size, 2)
    w.line(f"dilu_share({rows}, {length} * 4, thread, threads, &begin, &end);")
    with w.block("for (int64_t row = begin; row < end; row++)"):
        w.line(f"const {stored}* const from = {x} + row * {length};")
        w.line(f"{stored}* const top = {values} + row * {k};")
        w.line(f"int64_t* const which = {indices} + row * {k};")
        with w.block(f"for (int64_t i = 0; i < {length}; i++)"):
            w.line(f"const {kind} value = {load_text(step.x.dtype, 'from[i]')};")
            w.line(f"int64_t place = i < {k} ? i : {k};")
            last = load_text(step.x.dtype, "top[place - 1]")
            condition = f"value {'>' if step.largest else '<'} {last}"
            if step.x.dtype.is_float:
                nan, other = ("value", last) if step.largest else (last, "value")
                condition = f"({condition} || ({nan} != {nan} && {other} == {other}))"
            with w.block(f"while (place > 0 && {condition})"):
                w.line("place--;")
                with w.block(f"if (place + 1 < {k})"):
                    w.line("top[place + 1] = top[place];")
                    w.line("which[place + 1] = which[place];")
            w.line(f"if (place < {k}) top[place] = from[i], which[place] = i;")

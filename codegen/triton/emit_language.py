"""Attention and top-k → Triton."""

from __future__ import annotations

from typing import NamedTuple

import sympy

from ...errors import UnsupportedError
from ...ir.dtypes import BF16, F32, DType
from ...ir.types import Dim, dim, numel, print_dim
from ..kernel_ir import Attention, Buffer, TopK
from ..target import Gpu
from .expressions import TYPES, emit_index
from .frame import Frame, Rows, Variant
from .statements import power_of_two
from .writer import Writer

_LONGEST_ROW = 16384  # of a top-k


def emit_topk(step: TopK, frame: Frame, what: str) -> None:
    """Add the launch of a selection; a program does a few rows."""
    *lead, size = step.x.shape
    if not isinstance(size, int) or size > _LONGEST_ROW:
        raise UnsupportedError(f"top-k of rows of {size} is not supported on GPUs")
    columns = power_of_two(size)
    tile = max(1, 512 // columns)
    rows = numel(tuple(lead))
    w = Writer()
    names = ", ".join(b.name for b in (step.x, step.values, step.indices))
    w.line(
        f"topk_rows({names}, {emit_index(rows, {})}, {size}, {step.k}, {columns}, {tile},"
        f" {step.largest})"
    )
    frame.launch(
        what.strip("_"), w, (f"({print_dim(rows)} + {tile - 1}) // {tile}", 1, 1), (Variant(),)
    )


# --------------------------------------------------------------------------- attention

#: Up to so many tokens, what each sees is cut into parts that several programs walk.
FEW_TOKENS = 16
_MOST_PARTS = 16
_ROWS = 16  # the least of a tile


def emit_attention(step: Attention, frame: Frame, what: str) -> None:
    """Add the launches of attention: for few tokens in parts, for many in tiles of tokens."""
    tokens, heads, _ = step.q.shape
    parts = [
        frame.scratch_buffer(name, F32, (dim(few(tokens)), heads, _parts(step, frame.gpu), *more))
        for name, more in (("maxima", ()), ("totals", ()), ("sums", (step.value_dim,)))
    ]
    rows = None if isinstance(tokens, int) else Rows(tokens, 1, FEW_TOKENS)
    if not isinstance(tokens, int) or tokens <= FEW_TOKENS:
        _emit_parts(step, frame, f"{what}few", parts, rows)
    rows = None if isinstance(tokens, int) else Rows(tokens, FEW_TOKENS + 1, None)
    if not isinstance(tokens, int) or tokens > FEW_TOKENS:
        _emit_tiles(step, frame, f"{what}many", rows)


def _parts(step: Attention, gpu: Gpu) -> int:
    """Return into how many parts what a token sees is cut, a power of two."""
    heads, kv_heads = int(step.q.shape[1]), int(step.keys.shape[1])
    programs = kv_heads * -(-heads // kv_heads // _ROWS)
    return 1 << min(max(gpu.programs // programs, 2), _MOST_PARTS).bit_length() - 1


def few(tokens: Dim) -> Dim:
    """Return how many of the tokens go through the kernels for few of them."""
    return min(tokens, FEW_TOKENS) if isinstance(tokens, int) else sympy.Min(tokens, FEW_TOKENS)


def _emit_parts(
    step: Attention, frame: Frame, what: str, parts: list[Buffer], rows: Rows | None
) -> None:
    tokens, heads, _ = step.q.shape
    kv_heads = step.keys.shape[1]
    w = Writer()
    names = [b.name for b in (*_operands(step), *parts)]
    names.append(emit_index(step.pages.shape[1], {}))
    constants = _constants(step, frame.gpu) | {
        "BH": "BH",
        "BN": "BN",
        "BC": "BC",
        "SPLITS": _parts(step, frame.gpu),
    }
    w.line(f"attention_split({', '.join(names)}, {_listed(constants)})")
    group = dim(sympy.sympify(heads) / kv_heads)
    block = max(1, min(_ROWS, int(group)))
    variants = tuple(
        Variant((("BH", block), ("BN", keys), ("BC", chunk)), warps, 2)
        for _, keys, chunk, warps in _tiles(step, frame.gpu).few
    )
    blocks = f"{print_dim(kv_heads)} * (({print_dim(group)} + BH - 1) // BH)"
    frame.launch(what, w, (tokens, blocks, _parts(step, frame.gpu)), variants, rows=rows)
    w = Writer()
    names = [b.name for b in (*parts, step.out)]
    width = power_of_two(step.value_dim)
    w.line(
        f"attention_combine({', '.join(names)}, {step.value_dim}, {width},"
        f" {_parts(step, frame.gpu)})"
    )
    frame.launch(f"{what}_sum", w, (dim(tokens * heads), 1, 1), (Variant(),), rows=rows)


def _emit_tiles(step: Attention, frame: Frame, what: str, rows: Rows | None) -> None:
    tokens, heads, _ = step.q.shape
    kv_heads = step.keys.shape[1]
    w = Writer()
    names = [b.name for b in (*_operands(step), step.out)]
    names += [emit_index(tokens, {}), emit_index(step.pages.shape[1], {})]
    constants = _constants(step, frame.gpu) | {"BT": "BT", "BH": "BH", "BN": "BN", "BC": "BC"}
    w.line(f"attention_prefill({', '.join(names)}, {_listed(constants)})")
    group = int(dim(sympy.sympify(heads) / kv_heads))
    block = 1 << min(group, _ROWS).bit_length() - 1
    variants = tuple(
        Variant((("BT", rows // block), ("BH", block), ("BN", keys), ("BC", chunk)), warps, 2)
        for rows, keys, chunk, warps in _tiles(step, frame.gpu).many
    )
    grid = (
        f"({print_dim(tokens)} + BT - 1) // BT",
        f"{print_dim(kv_heads)} * (({group} + BH - 1) // BH)",
        1,
    )
    frame.launch(what, w, grid, variants, rows=rows)


def _operands(step: Attention) -> list[Buffer]:
    return [step.q, step.keys, step.values, step.positions, step.sequence, step.pages]


class _Tiles(NamedTuple):
    """Tiles of the two forms, each as rows, keys, numbers of a chunk (0: all) and warps, the
    likeliest first. The last of each takes little of everything, for targets that have less."""

    few: tuple[tuple[int, int, int, int], ...]
    many: tuple[tuple[int, int, int, int], ...]


#: By whether operands are f32 and whether heads are wider than _WIDE, as what compiles for
#: cuda:80 without spills: in f32 a tile takes three times the registers.
_TILES = {
    (False, False): _Tiles(((16, 64, 0, 4), (16, 32, 0, 4)), ((64, 64, 0, 8), (32, 32, 0, 4))),
    (False, True): _Tiles(((16, 32, 64, 8), (16, 16, 64, 4)), ((64, 32, 64, 8), (16, 16, 64, 8))),
    (True, False): _Tiles(((16, 32, 64, 8), (16, 16, 32, 4)), ((32, 32, 64, 8), (16, 16, 32, 8))),
    (True, True): _Tiles(((16, 16, 64, 8), (16, 16, 32, 8)), ((32, 16, 64, 8), (16, 16, 32, 8))),
}
_WIDE = 256


def _tiles(step: Attention, gpu: Gpu) -> _Tiles:
    size = int(step.q.shape[2])
    few, many = _TILES[_operand(step, gpu) == F32, size > _WIDE]
    whole = [
        tuple((rows, keys, chunk if chunk < size else 0, warps) for rows, keys, chunk, warps in t)
        for t in (few, many)
    ]
    return _Tiles(*whole)


def _operand(step: Attention, gpu: Gpu) -> DType:
    """Return the type that is multiplied: the target's own where nothing is lost by it."""
    own = gpu.dot == step.keys.dtype == step.q.dtype
    return gpu.dot if own else F32


def _constants(step: Attention, gpu: Gpu) -> dict[str, object]:
    """Return what is the same for all programs of a step."""
    _, heads, key_dim = step.q.shape
    same = step.values.name == step.keys.name
    first, rest = _halves(int(key_dim))
    value_first, value_rest = _halves(step.value_dim)
    return {
        "HQ": heads, "HKV": step.keys.shape[1], "DK": key_dim, "DV": step.value_dim,
        "DVX": step.values.shape[3], "G": step.keys.shape[2],
        "SCALE": repr(step.scale), "WINDOW": step.window or 0, "SAME": same, "D1": first,
        "D2": rest, "V1": value_first, "V2": value_rest,
        "DOT": TYPES[_operand(step, gpu).name],
        "PRECISION": f'"{_precision(gpu)}"',
    }  # fmt: skip


def _precision(gpu: Gpu) -> str:
    """Return how f32 operands are multiplied: exactly, or nearly so by matrix instructions."""
    return "tf32x3" if gpu.backend == "cuda" and gpu.dot == BF16 else "ieee"


def _halves(size: int) -> tuple[int, int]:
    """Return the largest power of two in a size, 16 at least, and the rest filled up to one."""
    first = max(16, 1 << size.bit_length() - 1)
    return first, max(16, power_of_two(size - first)) if size > first else 0


def _listed(constants: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in constants.items())

"""Scalar expressions and index expressions → C: types, literals, one table op → text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import sympy

from ...errors import UnsupportedError
from ...ir.dtypes import BF16, BOOL, F16, F32, F64, I64, DType, conversion_bits
from ...ir.types import Dim
from ..index import FloorDiv, Remainder, flat_index
from ..kernel_ir import (
    DECODED,
    ENCODED,
    Apply,
    Buffer,
    Expr,
    Index,
    Literal,
    Load,
    Name,
    compute_type,
)

UNALIGNED = {
    "double": "dilu_unaligned_f64", "float": "dilu_unaligned_f32", "uint16_t": "dilu_unaligned_u16",
    "uint32_t": "dilu_unaligned_u32", "int64_t": "dilu_unaligned_i64",
    "int32_t": "dilu_unaligned_i32", "int16_t": "dilu_unaligned_i16",
}  # fmt: skip
#: The library's name of a storage format.
FORMATS = {t.name: f"DILU_{t.name.upper()}" for t in (F32, *DECODED)}


def c_type(t: DType) -> str:
    """Return the C type in which values of `t` lie in memory."""
    if t in (F64, F32):
        return "double" if t == F64 else "float"
    return f"{'int' if t.kind == 'int' else 'uint'}{8 * t.itemsize}_t"


def register_type(t: DType) -> str:
    """Return the C type that numbers of an element type are computed in."""
    return c_type(compute_type(t))


def pointer_type(buffer: Buffer) -> str:
    """Return the C type of a buffer's elements; constants lie where a file has them, unaligned."""
    kind = c_type(buffer.dtype)
    return UNALIGNED.get(kind, kind) if buffer.constant else kind


# ----------------------------------------------------------------------------- indices


def emit_index(value: Dim, level: int = 0) -> str:
    """Return C for an index expression; parenthesized where it binds weaker than `level`."""
    e: Any = sympy.sympify(value)
    args: Any = e.args
    own, text = 2, ""
    if e.is_Symbol or e.is_Integer:
        text, own = str(e), 2 if e.is_Symbol or int(e) >= 0 else 0
    elif e.is_Add:
        text, own = _sum(e), 0
    elif e.is_Mul:
        text, own = "*".join(emit_index(a, 2) for a in _factors(e)), 1
    elif e.is_Pow and e.exp.is_Integer and int(e.exp) > 0:
        text, own = "*".join([emit_index(e.base, 2)] * int(e.exp)), 1
    elif isinstance(e, FloorDiv):
        text, own = f"{emit_index(args[0], 2)} / {emit_index(args[1], 2)}", 1
    elif isinstance(e, Remainder | sympy.Mod):
        text, own = f"{emit_index(args[0], 2)} % {emit_index(args[1], 2)}", 1
    elif isinstance(e, sympy.floor):
        top, bottom = args[0].as_numer_denom()
        text = f"dilu_div_i64({emit_index(top)}, {emit_index(bottom)})"
    elif isinstance(e, sympy.Max | sympy.Min):
        name = "dilu_larger" if isinstance(e, sympy.Max) else "dilu_smaller"
        parts = [emit_index(a) for a in sorted(args, key=str)]
        text = parts[0]
        for part in parts[1:]:
            text = f"{name}({text}, {part})"
    else:
        raise UnsupportedError(f"the index {e} has no form in C")
    return f"({text})" if own < level else text


def _sum(e: Any) -> str:
    terms = sorted(e.args, key=lambda a: (bool(a.is_Number), -len(a.free_symbols), str(a)))
    text = emit_index(terms[0], 1)
    for term in terms[1:]:
        number, rest = term.as_coeff_Mul()
        minus = bool(number < 0)
        text += f" {'-' if minus else '+'} {emit_index(-number * rest if minus else term, 1)}"
    return text


def _factors(e: Any) -> list[Any]:
    return sorted(e.args, key=lambda a: (bool(a.is_Number), str(a)))


# ---------------------------------------------------------------------------- literals


def emit_literal(value: float | int | bool, t: DType) -> str:
    """Return the C literal of a value in its compute type."""
    if not t.is_float:
        number = int(value)
        if number == -(2**63):
            return "INT64_MIN"
        return f"INT64_C({number})" if t == I64 and abs(number) >= 2**31 else str(number)
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = str(np.float32(value)) + "f" if compute_type(t) == F32 else repr(float(value))
    return f"({text})" if text.startswith("-") else text


# ---------------------------------------------------------------------------------- ops

#: Functions of floats: f32 name, f64 name.
_FUNCTIONS = {
    "abs": ("fabsf", "fabs"), "exp": ("dilu_expf", "exp"), "log": ("logf", "log"),
    "sqrt": ("sqrtf", "sqrt"), "sin": ("sinf", "sin"), "cos": ("cosf", "cos"),
    "tanh": ("dilu_tanh", "tanh"), "atan": ("dilu_atan", "atan"),
    "erf": ("dilu_erf", "erf"), "floor": ("floorf", "floor"),
    "sigmoid": ("dilu_sigmoid", "1.0 / (1.0 + exp(-({0})))"),
    "rsqrt": ("1.0f / sqrtf({0})", "1.0 / sqrt({0})"), "pow": ("powf", "pow"),
    "mod": ("dilu_mod_f32", "dilu_mod_f64"), "round_even": ("rintf", "rint"),
    "copysign": ("copysignf", "copysign"),
    "maximum": ("dilu_max_f32", "dilu_max_f64"), "minimum": ("dilu_min_f32", "dilu_min_f64"),
}  # fmt: skip
_OPERATORS = {
    "neg": "-{0}", "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}",
    "div": "{0} / {1}",
}  # fmt: skip
_INTEGERS = {
    **_OPERATORS, "abs": "dilu_abs_i64({0})", "div": "dilu_div_i64({0}, {1})",
    "mod": "dilu_mod_i64({0}, {1})", "pow": "dilu_pow_i64({0}, {1})",
    "maximum": "dilu_max_i64({0}, {1})", "minimum": "dilu_min_i64({0}, {1})",
    "bit_not": "~{0}", "bit_and": "{0} & {1}", "bit_or": "{0} | {1}", "bit_xor": "{0} ^ {1}",
    "shift_left": "dilu_shift_left_i64({0}, {1})", "shift_right": "dilu_shift_right_i64({0}, {1})",
}  # fmt: skip
_BOOLS = {
    "add": "{0} | {1}", "mul": "{0} & {1}", "maximum": "{0} | {1}", "minimum": "{0} & {1}",
    "logical_not": "!{0}", "logical_and": "{0} & {1}", "logical_or": "{0} | {1}",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}",
}  # fmt: skip

Access = Callable[[Buffer, tuple[Dim, ...]], str]


def element(buffer: Buffer, indices: tuple[Dim, ...]) -> str:
    """Return C for an element of a row-major buffer."""
    if buffer.pieces:
        count = buffer.pieces
        piece = emit_index(flat_index(indices[:count], buffer.shape[:count]))
        place = emit_index(flat_index(indices[count:], buffer.shape[count:]))
        return f"((const {pointer_type(buffer)}*){buffer.name}.pieces[{piece}])[{place}]"
    return f"{buffer.name}[{emit_index(flat_index(indices, buffer.shape))}]"


class Expressions:
    """Emits expressions; `access` says how a buffer's element is written."""

    def __init__(self, access: Access = element) -> None:
        self.access = access

    def emit(self, e: Expr) -> str:
        """Return C for an expression in its compute type, parenthesized where it has to be."""
        if isinstance(e, Name):
            return e.name
        if isinstance(e, Literal):
            return emit_literal(e.value, e.dtype)
        if isinstance(e, Index):
            text = emit_index(e.value, 2)
            return f"(int64_t){text}" if isinstance(e.value, int) else text
        if isinstance(e, Load):
            return self._load(e)
        return self._apply(e)

    def top(self, e: Expr) -> str:
        """Return C for an expression that stands alone."""
        text = self.emit(e)
        return text[1:-1] if _wrapped(text) else text

    def _load(self, e: Load) -> str:
        text = load_text(e.buffer.dtype, self.access(e.buffer, e.index))
        if e.mask is None:
            return text
        return f"({self.emit(e.mask)} ? {text} : 0)"

    def _apply(self, e: Apply) -> str:
        args = [self.emit(a) for a in e.args]
        if e.op == "where":
            return f"({args[0]} ? {args[1]} : {args[2]})"
        if e.op == "clamp":
            return f"dilu_clamp({args[0]}, {args[1]})"
        if e.op == "cast":
            return cast_text(args[0], e.args[0].dtype, e.dtype)
        if e.op in ("round", "decode", "encode"):
            return self._codec(e, args[0])
        operand = e.args[0].dtype
        if e.dtype == BOOL:
            return f"({_BOOLS[e.op].format(*args)})"
        if operand.is_float and e.op in _FUNCTIONS:
            return _call(_FUNCTIONS[e.op][operand == F64], args)
        table = _OPERATORS if operand.is_float else _INTEGERS
        if e.op not in table:
            raise UnsupportedError(f"no C for the op {e.op} of {operand}")
        text = f"({table[e.op].format(*args)})"
        return text if operand.is_float or e.dtype == I64 else f"(({c_type(e.dtype)}){text})"

    def _codec(self, e: Apply, arg: str) -> str:
        assert e.format is not None
        name = e.format.name
        if e.op == "round" and e.format in (BF16, F16):
            return load_text(e.format, store_text(e.format, arg))
        if e.op == "decode" and e.format in DECODED:
            text = f"dilu_decode_{name}({arg})"
            return text if e.dtype == F32 else f"((double){text})"
        if e.op == "encode" and e.format in ENCODED:
            return f"dilu_encode_{name}({arg}, {int(e.saturate)})"
        raise UnsupportedError(f"no C for {e.op} of {name}")


def _call(function: str, args: list[str]) -> str:
    if "{" in function:
        return f"({function.format(*args)})"
    return f"{function}({', '.join(a[1:-1] if _wrapped(a) else a for a in args)})"


def _wrapped(text: str) -> bool:
    """Whether the first parenthesis of `text` closes at its end."""
    if not text.startswith("("):
        return False
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i == len(text) - 1
    return False


def cast_text(x: str, old: DType, new: DType) -> str:
    """Return a C expression of type `old` as one of type `new`, converted as torch converts."""
    if new == BOOL:
        return f"({x} != 0)"
    if old.is_float and not new.is_float:
        return f"(({c_type(new)})dilu_to_i{conversion_bits(new)}({x}))"
    return f"(({c_type(new)}){x})"


def load_text(t: DType, element: str) -> str:
    """Return C for the value, in its compute type, of an element in memory."""
    return f"dilu_decode_{t.name}({element})" if t in (BF16, F16) else element


def store_text(t: DType, value: str) -> str:
    """Return C for what is put in memory for a value in its compute type."""
    if t == BF16:
        return f"dilu_encode_bf16({value})"
    if t == F16:
        return f"dilu_encode_f16({value}, 0)"
    return value

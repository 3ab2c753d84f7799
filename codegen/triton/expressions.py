"""Scalar expressions and index expressions → Triton: types, literals, one table op → text."""

from __future__ import annotations

import math
from typing import Any

import sympy

from ...errors import UnsupportedError
from ...ir.dtypes import BF16, BOOL, DTYPES, F16, F32, F64, DType, conversion_bits
from ...ir.types import Dim
from ..index import FloorDiv, Remainder
from ..kernel_ir import DECODED, ENCODED, Apply, Buffer, Literal, compute_type

#: What values of a type are called, as far as a kernel holds them.
TYPES = {t.name: f"tl.{t.torch}" for t in DTYPES.values() if not t.is_code} | {"bool": "tl.int1"}


def pointer_type(buffer: Buffer) -> str:
    """Return Triton's type of a pointer to a buffer's elements. A truth value is a byte."""
    t = buffer.dtype
    if t.is_code or t == BOOL:
        return "*u8"
    return f"*fp{t.bits}" if t.is_float and t.is_numpys else f"*{t.name}"


# ----------------------------------------------------------------------------- indices


def emit_index(value: Dim, names: dict[str, str], level: int = 0) -> str:
    """Return Triton for an index expression; parenthesized where it binds weaker than `level`.

    `names` says what its symbols are called; index expressions are never negative, so that
    Triton's division, which cuts off, is floor division.
    """
    e: Any = sympy.sympify(value)
    args: Any = e.args
    own, text = 2, ""
    if e.is_Symbol:
        text = names.get(str(e)) or str(e)
    elif e.is_Integer:
        text, own = str(e), 2 if int(e) >= 0 else 0
    elif e.is_Add:
        text, own = _sum(e, names), 0
    elif e.is_Mul:
        text, own = " * ".join(emit_index(a, names, 2) for a in _factors(e)), 1
    elif e.is_Pow and e.exp.is_Integer and int(e.exp) > 0:
        text, own = " * ".join([emit_index(e.base, names, 2)] * int(e.exp)), 1
    elif isinstance(e, FloorDiv | Remainder | sympy.Mod):
        sign = "//" if isinstance(e, FloorDiv) else "%"
        text, own = f"{emit_index(args[0], names, 2)} {sign} {emit_index(args[1], names, 2)}", 1
    elif isinstance(e, sympy.floor):
        top, bottom = args[0].as_numer_denom()
        text, own = f"{emit_index(top, names, 2)} // {emit_index(bottom, names, 2)}", 1
    elif isinstance(e, sympy.Max | sympy.Min):
        name = "tl.maximum" if isinstance(e, sympy.Max) else "tl.minimum"
        text, *rest = [emit_index(a, names) for a in sorted(args, key=str)]
        for part in rest:
            text = f"{name}({text}, {part})"
    else:
        raise UnsupportedError(f"the index {e} has no form in Triton")
    return f"({text})" if own < level else text


def _sum(e: Any, names: dict[str, str]) -> str:
    terms = sorted(e.args, key=lambda a: (bool(a.is_Number), -len(a.free_symbols), str(a)))
    text = emit_index(terms[0], names, 1)
    for term in terms[1:]:
        number, rest = term.as_coeff_Mul()
        minus = bool(number < 0)
        text += (
            f" {'-' if minus else '+'} {emit_index(-number * rest if minus else term, names, 1)}"
        )
    return text


def _factors(e: Any) -> list[Any]:
    return sorted(e.args, key=lambda a: (bool(a.is_Number), str(a)))


# ---------------------------------------------------------------------------- literals


def emit_literal(value: float | int | bool, t: DType) -> str:
    """Return a number of type `t` as Triton reads it."""
    # Alone, Triton takes a float for f32, which holds these few of f64's numbers surely.
    short = abs(value) < 1000 and float(value * 1024).is_integer()
    if t == F64 and math.isfinite(value) and not short:
        return typed_literal(value, t)
    return _number(value, t)


def typed_literal(value: float | int | bool, t: DType) -> str:
    """Return Triton for a literal as a tensor, which functions of the library take it for."""
    return f"tl.full((), {_number(value, t)}, {_type(t)})"


def _number(value: float | int | bool, t: DType) -> str:
    if not t.is_float:
        return str(int(value))
    if math.isnan(value):
        return 'float("nan")'
    if math.isinf(value):
        return 'float("inf")' if value > 0 else '(-float("inf"))'
    text = repr(float(value))
    return f"({text})" if text.startswith("-") else text


# ---------------------------------------------------------------------------------- ops

_ANY = {
    "neg": "(-{0})", "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})",
    "abs": "tl.abs({0})",
}  # fmt: skip
_FLOATS = {
    **_ANY, "div": "({0} / {1})", "mod": "float_mod({0}, {1})", "pow": "power({0}, {1})",
    "exp": "tl.exp({0})", "log": "tl.log({0})", "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})",
    "sin": "sin({0})", "cos": "cos({0})", "tanh": "tanh({0})", "erf": "erf({0})",
    "atan": "atan({0})", "round_even": "round_even({0})", "copysign": "copy_sign({0}, {1})",
    "floor": "tl.floor({0})", "sigmoid": "sigmoid({0})", "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
}  # fmt: skip
#: Where f64 has a better form than what serves f32.
_DOUBLES = _FLOATS | {
    "rsqrt": "(1.0 / tl.sqrt({0}))", "erf": "tl.erf({0})", "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "tanh": "(1.0 - 2.0 / (tl.exp(2.0 * {0}) + 1.0))", "atan": "atan_f64({0})",
}  # fmt: skip
_INTEGERS = {
    **_ANY, "div": "int_div({0}, {1})", "mod": "int_mod({0}, {1})", "pow": "int_power({0}, {1})",
    "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})",
    "bit_not": "(~{0})", "bit_and": "({0} & {1})", "bit_or": "({0} | {1})",
    "bit_xor": "({0} ^ {1})", "shift_left": "shift_left({0}, {1})",
    "shift_right": "shift_right({0}, {1})",
}  # fmt: skip
_BOOLS = {
    "add": "({0} | {1})", "mul": "({0} & {1})", "maximum": "({0} | {1})",
    "minimum": "({0} & {1})", "logical_not": "({0} == 0)", "logical_and": "({0} & {1})",
    "logical_or": "({0} | {1})", "eq": "({0} == {1})", "ne": "({0} != {1})",
    "lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})",
}  # fmt: skip
#: Ops whose functions in the library ask for the types of their arguments.
_TYPED = frozenset({"pow", "copysign", "shift_left", "shift_right"})


def emit_apply(e: Apply, args: list[str]) -> str:
    """Return Triton for an op of arguments whose text is known."""
    typed = e.op in _TYPED or (e.op == "mod" and e.dtype.is_float)
    if typed or all(isinstance(a, Literal) for a in e.args):
        args = [
            typed_literal(a.value, a.dtype) if isinstance(a, Literal) else text
            for a, text in zip(e.args, args, strict=True)
        ]
    if e.op == "where":
        return f"tl.where({', '.join(args)})"
    if e.op == "clamp":
        return f"clamp_index({args[0]}, {args[1]})"
    if e.op == "cast":
        return _cast(args[0], e.args[0].dtype, e.dtype)
    if e.op in ("round", "decode", "encode"):
        return _codec(e, args[0])
    if e.dtype == BOOL:
        return _BOOLS[e.op].format(*args)
    operand = e.args[0].dtype
    table = _INTEGERS
    if operand.is_float:
        table = _DOUBLES if operand == F64 else _FLOATS
    if e.op not in table:
        raise UnsupportedError(f"no Triton for the op {e.op} of {operand}")
    text = table[e.op].format(*args)
    return text if operand.is_float else f"tl.cast({text}, {_type(e.dtype)})"


def _cast(x: str, old: DType, new: DType) -> str:
    if new == BOOL:
        return f"({x} != 0)"
    if old.is_float and not new.is_float:
        x = f"to_i{conversion_bits(new)}({x})"
    return f"tl.cast({x}, {_type(new)})"


def _type(t: DType) -> str:
    return TYPES[compute_type(t).name]


def _codec(e: Apply, arg: str) -> str:
    assert e.format is not None
    name = e.format.name
    if e.op == "round" and e.format in (BF16, F16):
        return f"round_{name}({arg})"
    if e.op == "decode" and e.format in DECODED:
        text = f"as_f32({arg})" if e.format in (BF16, F16) else f"decode_{name}({arg})"
        return text if e.dtype == F32 else f"{text}.to(tl.float64)"
    if e.op == "encode" and e.format in ENCODED:
        return f"encode_{name}({arg}, {e.saturate})"
    raise UnsupportedError(f"no Triton for {e.op} of {name}")


def load_text(t: DType, element: str) -> str:
    """Return Triton for values, in their compute type, of elements in memory."""
    if t in (BF16, F16):
        return f"as_f32({element})"
    return f"({element} != 0)" if t == BOOL else element


def store_text(t: DType, value: str) -> str:
    """Return Triton for what is put in memory for values in their compute type."""
    if t in (BF16, F16):
        return f"stored_as({value}, {TYPES[t.name]})"
    return f"tl.cast({value}, {'tl.uint8' if t == BOOL else TYPES[t.name]})"

"""Arithmetic on the bits of integers, and on truth values, which have one."""

from __future__ import annotations

from typing import Any

from ...ir.dtypes import BOOL
from ...ir.graph import Value
from ...ir.op import Op
from ...ir.ops import bits
from ...ir.ops import elementwise as ew
from .context import Context, lowers
from .elementwise import LOGICAL, truth

_BITS: dict[str, type[Op]] = {"and": bits.BitAnd, "or": bits.BitOr, "xor": bits.BitXor}
_SHIFTS: dict[str, type[Op]] = {"left": bits.ShiftLeft, "right": bits.ShiftRight}


@lowers(
    *(f"aten.bitwise_{n}.{o}" for n in _BITS for o in ("Tensor", "Scalar", "Scalar_Tensor")),
    *(f"aten.__{n}__.{o}" for n in _BITS for o in ("Tensor", "Scalar")),
)
def bitwise(c: Context, a: Any, b: Any) -> Value:
    name = c.operator.split(".")[1].removeprefix("bitwise_").strip("_")
    if c.dtype == BOOL:
        return c.emit(LOGICAL[name](), truth(c, a), truth(c, b))
    return c.apply(_BITS[name](), a, b, dtype=c.dtype)


@lowers("aten.bitwise_not.default")
def bitwise_not(c: Context, x: Value) -> Value:
    return c.emit(ew.LogicalNot() if c.dtype == BOOL else bits.BitNot(), x)


@lowers(
    *(f"aten.bitwise_{n}_shift.{o}" for n in _SHIFTS
      for o in ("Tensor", "Tensor_Scalar", "Scalar_Tensor")),
    *(f"aten.__{n}shift__.{o}" for n in ("l", "r") for o in ("Tensor", "Scalar")),
)  # fmt: skip
def shift(c: Context, a: Any, b: Any) -> Value:
    left = "left" in c.operator or "lshift" in c.operator
    if not c.dtype.is_integer:
        raise c.unsupported(f"shifting the bits of {c.dtype}")
    return c.apply(_SHIFTS["left" if left else "right"](), a, b, dtype=c.dtype)

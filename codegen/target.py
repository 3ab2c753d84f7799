"""What a target is: what passes may ask of it, and what its compiler is told.

Passes see `native` and nothing else; the rest is read by the emitter and the driver of the
target's `language`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.dtypes import BF16, BOOL, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, DType

#: The types every machine can hold and compute with (16-bit floats are computed in f32).
ORDINARY: frozenset[DType] = frozenset({F64, F32, F16, BF16, I64, I32, I16, I8, U8, U16, U32, BOOL})


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    `native`: element types that may stand in kernels. `language`: which emitter serves it.
    `flags`: what the compiler is told about the instruction set. `requires`: features a machine
    must have, by their names in /proc/cpuinfo. `header`: the instruction table of the kernels.
    `executable`: whether machine code is made at all.
    """

    name: str
    native: frozenset[DType] = ORDINARY
    language: str = "c"
    flags: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    header: str = ""
    executable: bool = True

    def __str__(self) -> str:
        return self.name

"""What a target is: what passes may ask of it, and what its compiler is told.

Passes see `native` and nothing else; the rest is read by the emitter and the driver of the
target's `language`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal as OneOf

from ..ir.dtypes import DTYPES, F32, DType

#: The types every machine can hold and compute with (16-bit floats are computed in f32).
ORDINARY = frozenset(t for t in DTYPES.values() if not t.is_code)

_CODE = {"cuda": ("cubin", "ptx"), "hip": ("hsaco",)}


@dataclass(frozen=True)
class Gpu:
    """What the Triton emitter asks of a GPU.

    `backend` and `arch` are Triton's own names (`cuda` and 80, `hip` and `gfx90a`). `warp`:
    threads of a warp. `shared`: bytes of shared memory that one program may use. `dot`: the type
    of the operands of matrix instructions. `decode`: how FP8 codes become numbers: `packed`
    (inline assembly, four at a time), `portable` (integer arithmetic) or `native` (conversion
    instructions). `matrix`: the opcodes of matrix instructions, one of which must stand in every
    matrix product. `programs`: how many at once keep it busy. `triton`: which installation of
    Triton compiles for it: "" is the one that is imported, a version one that is apart, an absolute
    path a folder with a fork of it, and `packages` what pip installs there. `code`: which stages of
    its Triton are kept, first what a device loads, then text that its driver compiles; no stage
    after the last of them is run. `toolkit`: the version of whatever else makes the code.
    `whole_reads`: what meets a product's sums has to be read in their shape, since its compiler
    cannot spread a row or a column over them.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    dot: DType
    decode: OneOf["packed", "portable", "native"]
    matrix: tuple[str, ...]
    programs: int = 256
    triton: str = ""
    packages: str = "triton"
    code: tuple[str, ...] = ()
    toolkit: str = ""
    whole_reads: bool = False

    @property
    def kept(self) -> tuple[str, ...]:
        """The stages that are kept, those of the devices that Triton itself knows by default."""
        return self.code or _CODE.get(self.backend, ("binary",))


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    `native`: element types that may stand in kernels. `language`: which emitter serves it.
    `flags`: what the compiler is told about the instruction set. `requires`: features a machine
    must have, by their names in /proc/cpuinfo. `header`: the instruction table of the kernels.
    `executable`: whether machine code is made at all. `activations`: float types that products
    and attention read as they are; others are converted first. `keeps_rows`: whether costly
    values of a row are kept for its next loop rather than computed again. `copies_weights`: weights
    lie in memory of the device's own, each constant in one piece. `gpu`: what a GPU is like.
    """

    name: str
    native: frozenset[DType] = ORDINARY
    language: OneOf["c", "triton"] = "c"
    flags: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    header: str = ""
    executable: bool = True
    activations: tuple[DType, ...] = (F32,)
    keeps_rows: bool = True
    copies_weights: bool = False
    gpu: Gpu | None = None

    def __str__(self) -> str:
        return self.name

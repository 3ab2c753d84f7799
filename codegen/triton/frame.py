"""What one kernel of the IR becomes: functions in Triton, launches of them, working memory.

A step that needs the whole of what another made is a launch of its own: launches run in order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...ir.dtypes import DType
from ...ir.types import Dim, Shape, dim, numel, print_dim, symbol, symbols
from ..kernel_ir import Buffer, Kernel
from ..names import buffer_name
from ..target import Gpu
from .expressions import pointer_type
from .writer import Writer

Grid = tuple[str, str, str]


@dataclass(frozen=True)
class Argument:
    """A run-time argument of a function: a buffer's address, or a size."""

    name: str
    type: str
    buffer: Buffer | None = None
    size: Dim | None = None


@dataclass(frozen=True)
class Variant:
    """One choice of a function's constants, and how it is compiled.

    `nan`: NaN codes of e4m3 are decoded as such, which the others leave out.
    """

    constants: tuple[tuple[str, int], ...] = ()
    warps: int = 4
    stages: int = 1
    nan: bool = False

    @property
    def label(self) -> str:
        parts = [f"{name}{value}" for name, value in self.constants if name != "NAN"]
        parts += [f"w{self.warps}", f"s{self.stages}", *(["nan"] if self.nan else [])]
        return "-".join(parts).lower()


@dataclass(frozen=True)
class Rows:
    """A launch that serves only some sizes: `low <= size`, and `size <= high` where it is given."""

    size: Dim
    low: int
    high: int | None


@dataclass(frozen=True)
class Launch:
    """A function and how it is launched. The grid is text of sizes and of variants' constants."""

    name: str
    text: str
    arguments: tuple[Argument, ...]
    variants: tuple[Variant, ...]
    grid: Grid
    rows: Rows | None = None
    matrix: bool = False


@dataclass
class Frame:
    """A kernel while it is emitted."""

    kernel: Kernel
    name: str
    gpu: Gpu
    launches: list[Launch] = field(default_factory=list)
    scratch: list[Buffer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scratch += self.kernel.scratch

    def scratch_buffer(self, name: str, dtype: DType, shape: Shape) -> Buffer:
        """Return working memory of the kernel's own, under a name that nothing else has."""
        taken = {b.name for b in (*self.kernel.inputs, *self.kernel.outputs, *self.scratch)}
        self.scratch.append(Buffer(buffer_name(name, taken), dtype, shape, "scratch"))
        return self.scratch[-1]

    def launch(
        self,
        what: str,
        w: Writer,
        grid: tuple[Dim | str, Dim | str, Dim | str],
        variants: tuple[Variant, ...],
        *,
        rows: Rows | None = None,
        matrix: bool = False,
    ) -> None:
        """Add a launch of a function with the body that `w` holds."""
        body = w.text()
        words = set(re.findall(r"[A-Za-z_]\w*", body))
        buffers = (*self.kernel.inputs, *self.kernel.outputs, *self.scratch)
        arguments = [
            Argument(b.name, pointer_type(b), buffer=b) for b in buffers if b.name in words
        ]
        arguments += [Argument(s, "i32", size=symbol(s)) for s in self._symbols() if s in words]
        name = f"{self.name}_{what}" if what else self.name
        constants = [f"{c}: tl.constexpr" for c, _ in variants[0].constants]
        head = ", ".join([*(a.name for a in arguments), *constants])
        indented = "".join(f"    {line}\n" if line else "\n" for line in body.splitlines())
        text = f"@triton.jit\ndef {name}({head}):\n{indented}"
        shown = tuple(g if isinstance(g, str) else print_dim(dim(g)) for g in grid)
        assert len(shown) == 3
        self.launches.append(Launch(name, text, tuple(arguments), variants, shown, rows, matrix))

    def _symbols(self) -> list[str]:
        """Return the sizes that the kernel knows, those of its working memory too."""
        found = dict.fromkeys(self.kernel.symbols)
        found.update(dict.fromkeys(symbols(d for b in self.scratch for d in b.shape)))
        return list(found)


def buffer_bytes(buffer: Buffer) -> Dim:
    """Return the bytes of a buffer."""
    return dim(numel(buffer.shape) * buffer.dtype.itemsize)

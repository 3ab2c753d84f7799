"""Which tiles a product is compiled with: a few for every range of rows, the likeliest first.

They follow from the shape, the formats and the shared memory of the target alone. Which is used is
decided after compiling, from what each takes of registers and shared memory, or on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...ir.types import Dim
from ..target import Gpu
from .frame import Rows, Variant

#: Rows of the smallest product of matrix instructions; up to so many are one tile.
FEW = 16
_SOME = 64
_LEAST_STEPS = 4  # along K, of a program that does a part of K


@dataclass(frozen=True)
class Product:
    """What matters of a product for its tiles: `step` is how far one scale reaches along K (a
    power of two), `x_bytes` and `w_bytes` the sizes of a number as it is loaded, `batch` how many
    products there are at once."""

    N: int
    K: int
    step: int
    x_bytes: int
    w_bytes: int
    two: bool = False
    batch: int = 1


@dataclass(frozen=True)
class Range:
    """A range of rows and the tiles for it."""

    name: str
    low: int
    high: int | None
    variants: tuple[Variant, ...]

    def rows(self, size: Dim) -> Rows | None:
        """Return the condition of a launch, None where it always holds."""
        return None if isinstance(size, int) else Rows(size, self.low, self.high)


def ranges(product: Product, gpu: Gpu, rows: Dim) -> list[Range]:
    """Return the ranges that `rows` may fall in, each with its variants."""
    found = [
        Range("few", 1, FEW, _few(product, gpu)),
        Range("some", FEW + 1, _SOME, _some(product, gpu)),
        Range("many", _SOME + 1, None, _many(product, gpu)),
    ]
    if isinstance(rows, int):
        found = [r for r in found if r.low <= rows and (r.high is None or rows <= r.high)]
    return found


def grouped(product: Product, gpu: Gpu) -> list[Range]:
    """Return the ranges of blocks of experts: by the assignments that an expert has on average."""
    return [
        Range("few", 1, FEW, _few(product, gpu)),
        Range("many", FEW + 1, None, _some(product, gpu)),
    ]


def splits(product: Product, gpu: Gpu) -> int:
    """Return into how many parts K is cut for few rows, so that there are programs enough."""
    tiles = -(-product.N // 64) * product.batch
    steps = -(-product.K // min(128, product.step))
    wanted = min(gpu.programs // max(tiles, 1), steps // _LEAST_STEPS, 16)
    return 1 << max(wanted, 1).bit_length() - 1


def _few(p: Product, gpu: Gpu) -> tuple[Variant, ...]:
    # Decoding in plain arithmetic takes registers, of which a thread of 32 has half a warp's of 64.
    step = 64 if gpu.decode == "portable" and gpu.warp == 32 else 128
    tiles = [(FEW, 64, step, 4, 5), (FEW, 32, step, 4, 6), (FEW, 128, step, 8, 4)]
    return _fitting(p, gpu, tiles)


def _some(p: Product, gpu: Gpu) -> tuple[Variant, ...]:
    return _fitting(p, gpu, [(_SOME, 64, 64, 4, 4), (_SOME, 128, 64, 8, 3)])


def _many(p: Product, gpu: Gpu) -> tuple[Variant, ...]:
    wide = 64 if p.two else 128
    tiles = [(128, wide, 64, 8, 3), (64, wide, 64, 4, 4), (128, 2 * wide, 64, 8, 3)]
    return _fitting(p, gpu, tiles)


def _fitting(
    p: Product, gpu: Gpu, tiles: list[tuple[int, int, int, int, int]]
) -> tuple[Variant, ...]:
    """Return the tiles cut to the product's size and to the shared memory that there is."""
    found: dict[Variant, None] = {}
    for rows, columns, step, warps, stages in tiles:
        columns = min(columns, max(16, 1 << (p.N - 1).bit_length()))
        step = min(step, p.step, max(16, 1 << (p.K - 1).bit_length()))
        warps = max(1, min(warps, rows * columns // 256))
        stages = min(stages, max(1, math.ceil(p.K / step)))
        one = rows * step * p.x_bytes + columns * step * p.w_bytes * (2 if p.two else 1)
        while stages > 2 and one * (stages - 1) > gpu.shared:
            stages -= 1
        constants = (("BM", rows), ("BN", columns), ("BK", step))
        found[Variant(constants, warps, stages)] = None
    return tuple(found)

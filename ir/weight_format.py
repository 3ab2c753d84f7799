"""The one declaration of how the numbers of a weight are stored.

The checkpoint's reader fills it, the importer makes ops of it, kernels are specialized by it. What
a new format needs said (a packing, a second scale, a zero point) is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .dtypes import DType
from .types import Dim, TensorType


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Elements of a type; with a `scale` type, every `block` of rows and columns of the last two
    axes has a scale that multiplies its elements. Blocks at the edges may be ragged."""

    element: DType
    scale: DType | None = None
    block: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """A name that says all of it, such as `f8e4m3_f32_128_128`."""
        rows, columns = self.block
        return f"{self.element.name}_{self.scale.name if self.scale else 'none'}_{rows}_{columns}"

    @property
    def bytes_per_number(self) -> float:
        """What a number takes, with its share of a scale."""
        rows, columns = self.block
        share = self.scale.itemsize / (rows * columns) if self.scale is not None else 0.0
        return self.element.bits / 8 + share


def scale_shape(shape: Sequence[Dim], block: tuple[int, int]) -> tuple[Dim, ...]:
    """Return how many scales numbers of this shape have along each axis."""
    *lead, n, k = shape
    return (*lead, -(-n // block[0]), -(-k // block[1]))


@dataclass(frozen=True, slots=True)
class Storage:
    """How a parameter is stored: the type of its elements' constant, and their format.

    The constant's shape may split the parameter's (a grid of experts and projections), never
    reorder it.
    """

    type: TensorType
    format: WeightFormat

    @property
    def scales(self) -> TensorType | None:
        """The type of the scales' constant."""
        if self.format.scale is None:
            return None
        return TensorType(self.format.scale, scale_shape(self.type.shape, self.format.block))


def plain(t: TensorType) -> Storage:
    """Return the storage of numbers as they are."""
    return Storage(t, WeightFormat(t.dtype))

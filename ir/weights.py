"""Where a constant's bytes are: in the files of a checkpoint, or in the compiler's hands.

A constant is a grid of equal pieces, row-major over its leading dimensions: a stacked expert
weight `f8e4m3[58,256,2048,7168]` is a grid `[58,256]` of pieces `[2048,7168]`, each its own
tensor in the checkpoint. An ordinary weight is a grid with one piece and no leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dtypes import DType
from .types import TensorType


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of bytes in a file: `file` as the checkpoint names it, `offset` in bytes.

    `tensor` is the name in the file's header, for messages.
    """

    file: str
    tensor: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A part of a constant: along `axis` of the mesh, a rank holds of dimension `dim` of the whole
    the indices that the constant `placement`, `[…, ranks, slots]`, names."""

    axis: str
    dim: int
    placement: str

    def stacked(self, leading: int) -> Placed:
        """Return the same split of a constant with more leading dimensions."""
        return Placed(self.axis, self.dim + leading, self.placement)


@dataclass(frozen=True, slots=True)
class Even:
    """An equal part of a constant: along `axis` of the mesh, index i of the n-th rank's dimension
    `dim`, of `size`, is index `(n·size + i)·step // block` of the whole's.

    So rows are divided, and scales of `block` rows, of which a part begins at any multiple of
    `step`: then a scale stands for `step` rows.
    """

    axis: str
    dim: int
    size: int
    step: int = 1
    block: int = 1

    def stacked(self, leading: int) -> Even:
        """Return the same split of a constant with more leading dimensions."""
        return Even(self.axis, self.dim + leading, self.size, self.step, self.block)


Split = Placed | Even


@dataclass(frozen=True)
class Weight:
    """The binding of a constant.

    `grid` counts the leading dimensions that are spread over `pieces`. Exactly one of `pieces`
    and `data` is set; neither, when only the model's configuration was given. `data` holds raw
    storage (`dtype.storage`) of the whole constant. With `splits`, `type` is what one rank has,
    and `whole` what all have together, which pieces or data are of.
    """

    type: TensorType
    grid: int = 0
    pieces: tuple[Piece, ...] = ()
    data: np.ndarray | None = None
    splits: tuple[Split, ...] = ()
    whole_type: TensorType | None = None

    @property
    def whole(self) -> TensorType:
        return self.whole_type or self.type

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def grid_shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.whole.shape[: self.grid])

    @property
    def piece_shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.whole.shape[self.grid :])

    @property
    def nbytes(self) -> int:
        return int(self.whole.nbytes)

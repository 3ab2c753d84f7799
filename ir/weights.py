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
class Split:
    """How a rank's part of a constant is chosen: along `axis` of the mesh it holds, of dimension
    `dim` of the whole, the indices that the constant `placement`, `[…, ranks, slots]`, names."""

    axis: str
    dim: int
    placement: str


@dataclass(frozen=True)
class Weight:
    """The binding of a constant.

    `grid` counts the leading dimensions that are spread over `pieces`. Exactly one of `pieces`
    and `data` is set; neither, when only the model's configuration was given. `data` holds raw
    storage (`dtype.storage`) of the whole constant. With a `split`, `type` is what one rank has,
    and `whole` what all have together, which pieces or data are of.
    """

    type: TensorType
    grid: int = 0
    pieces: tuple[Piece, ...] = ()
    data: np.ndarray | None = None
    split: Split | None = None
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

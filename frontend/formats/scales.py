"""The scales of a weight: which tensors may be them, and what shares one, by their shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...ir.types import Dim
from ...ir.weight_format import scale_shape
from .form import Block, Form


@dataclass(frozen=True)
class Shared:
    """What shares a scale: `block` rows and columns. `everything`: one scale also serves all the
    matrices of a stack."""

    block: tuple[int, int]
    everything: bool = False


def scale_names(tensor: str, suffixes: Sequence[str]) -> Iterator[str]:
    """Yield the names that the scales of the weight `tensor` may have."""
    stem = tensor.removesuffix("weight")
    if stem != tensor and (not stem or stem.endswith(".")):
        yield from (stem + suffix for suffix in suffixes)
        return
    for suffix in suffixes:
        yield f"{tensor}_{suffix}"
        yield f"{tensor}.{suffix}"


def shared(
    form: Form, shape: Sequence[int], scales: Sequence[int], *, halves: bool = False
) -> Shared | None:
    """Return what shares one of `scales`, the shape of a tensor of them, for a weight of `shape`;
    None where that is not what the form says.

    With `halves`, the weight is two of equal size, one above the other, which may have a scale
    each where the form has one for a whole weight.
    """
    n, k = shape[-2:]
    for rows, columns in form.blocks:
        block = (rows or n, columns or k)
        if _fits(scales, scale_shape(shape, block)):
            return Shared(block)
        if rows is None and columns is None:
            half = (n // 2, k)
            if halves and n % 2 == 0 and _fits(scales, scale_shape(shape, half)):
                return Shared(half)
            if math.prod(scales) == 1:
                return Shared(block, everything=len(shape) > 2)
    return None


def described(block: Block) -> str:
    """Return in words what shares a scale."""
    rows, columns = block
    if rows is None and columns is None:
        return "one for the whole weight"
    if columns is None:
        return "one per row" if rows == 1 else f"one per {rows} rows"
    return f"one per {rows or 'all'}x{columns} block"


def _fits(scales: Sequence[int], want: Sequence[Dim]) -> bool:
    """Return whether a tensor of shape `scales` has `want`, in the same order.

    Files leave out ends of 1 (`[N]` for `[N,1]`), or put a 1 behind each axis (`[n,1,k,1]`).
    """
    have, want = list(scales), list(want)
    if have[1::2] == [1, 1] and len(have) == 4:
        have = have[::2]
    if len(have) > len(want):
        return False
    return want == have + [1] * (len(want) - len(have))

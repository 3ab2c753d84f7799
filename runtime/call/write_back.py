"""Arguments that a model writes to: the caller's own arrays get the new values after the call.

Invariant: an array that cannot be written to, or that other arguments share, is refused before
anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import DiluError
from .arrays import is_torch, to_numpy


def require_writable(
    function: str,
    parameters: Sequence[Mapping[str, Any]],
    values: Sequence[Any],
    writes: Mapping[int, int],
) -> None:
    """Raise DiluError where an argument that the model writes to cannot take what it writes."""
    for index in writes:
        name, value = parameters[index]["name"], values[index]
        reason = _obstacle(value)
        others = (v for i, v in enumerate(values) if i != index)
        if reason is None and any(_share(value, other) for other in others):
            reason = "shares memory with another argument"
        if reason is not None:
            raise DiluError(
                f"{function}: the model writes to its argument {name}, which {reason}",
                hint="pass an array of its own that can be written to",
            )


def write_back(value: Any, result: Any) -> None:
    """Put a result into the caller's array."""
    if is_torch(value):
        value.copy_(result)
    else:
        bits, _ = to_numpy(result, "f32")
        # Types that numpy lacks are bits here, and what another library made of them there.
        value[...] = bits if value.dtype.kind == bits.dtype.kind else bits.view(value.dtype)


def _obstacle(value: Any) -> str | None:
    """Return why nothing can be written to an argument."""
    if is_torch(value):
        strides = value.stride()
        if value.requires_grad:
            return "requires a gradient"
    elif isinstance(value, np.ndarray):
        strides = value.strides
        if not value.flags.writeable:
            return "is read-only"
    else:
        return f"is a {type(value).__name__}"
    repeated = any(n > 1 and s == 0 for n, s in zip(value.shape, strides, strict=True))
    return "has several elements in one place" if repeated else None


def _share(a: Any, b: Any) -> bool:
    """Whether two arguments may lie in the same memory."""
    one, two = _span(a), _span(b)
    if one is None or two is None:
        return False
    return one[0] == two[0] and one[1] < two[2] and two[1] < one[2]


def _span(value: Any) -> tuple[str, int, int] | None:
    """Return where an argument's elements lie: the device, the first address and the end."""
    if is_torch(value):
        if not value.numel():
            return None
        reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        start = value.data_ptr()
        return str(value.device), start, start + (reach + 1) * value.element_size()
    if isinstance(value, np.ndarray) and value.size:
        steps = [(n - 1) * s for n, s in zip(value.shape, value.strides, strict=True)]
        start = value.__array_interface__["data"][0]
        low = start + sum(s for s in steps if s < 0)
        return "cpu", low, start + sum(s for s in steps if s > 0) + value.itemsize
    return None

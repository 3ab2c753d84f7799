"""`runtime/mesh/wire.py` on a device, by torch: the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..mesh.wire import LARGEST, SCALE, is_plain

if TYPE_CHECKING:
    import torch


def encode(form: str, rows: torch.Tensor) -> torch.Tensor:
    """Return rows, f32 or bf16, as bytes u8[n, size]."""
    import torch

    if is_plain(form, rows.element_size()):
        return rows.view(torch.uint8)
    if form == "bf16":
        return rows.bfloat16().view(torch.uint8)
    rows = rows.float()
    largest = rows.abs().amax(1, keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest / LARGEST)
    scales = torch.where(scales == 0, _SMALLEST, scales)
    codes = (rows / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], 1)


def decode(form: str, data: torch.Tensor, like: torch.dtype) -> torch.Tensor:
    """Return rows of a type, which came as bytes."""
    import torch

    if is_plain(form, like.itemsize):
        return data.view(like)
    if form == "bf16":
        return data.view(torch.bfloat16).to(like)
    codes: Any = data[:, :-SCALE].contiguous().view(torch.float8_e4m3fn)
    return (codes.float() * data[:, -SCALE:].contiguous().view(torch.float32)).to(like)


_SMALLEST = 2.0**-149

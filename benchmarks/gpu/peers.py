"""What dilu is compared with on the device: bf16 and FP8 products of torch, a naive Triton decode.

Weights are codes u8[N, K] of e4m3 with f32 scales for blocks of 128 x 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from kernels import BLOCK, blocks


def random_codes(*shape: int, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    """Return random e4m3 codes of all magnitudes, none of them NaN."""
    rng = torch.Generator(device=device).manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=rng)
    return torch.where((codes & 0x7F) == 0x7F, codes & 0x80, codes)


def random_scales(*shape: int, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    """Return scales for the last two axes' blocks, so that weights are of ordinary size."""
    rng = torch.Generator(device=device).manual_seed(seed + 1)
    grid = (*shape[:-2], blocks(shape[-2]), blocks(shape[-1]))
    return (0.5 + torch.rand(grid, device=device, generator=rng)) * 2e-4


def decoded(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return codes times scales, computed in f32 (f64 where asked for)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = codes.view(torch.float8_e4m3fn).to(wide)
    rows, columns = codes.shape[-2:]
    spread = scales.to(wide).repeat_interleave(BLOCK, -2)[..., :rows, :]
    return (values * spread.repeat_interleave(BLOCK, -1)[..., :columns]).to(dtype)


class Fp8Mm:
    """The device's own FP8: activations and weights e4m3, one scale of each, as `_scaled_mm`."""

    def __init__(self, codes: list[torch.Tensor], x: torch.Tensor) -> None:
        self.weights = [c.view(torch.float8_e4m3fn).t() for c in codes]
        self.x = x.clamp(-448, 448).to(torch.float8_e4m3fn)
        self.one = torch.ones((), device=x.device)

    def __call__(self, copy: int) -> Any:
        return torch._scaled_mm(
            self.x, self.weights[copy], self.one, self.one, out_dtype=torch.bfloat16
        )


@triton.jit
def naive_kernel(
    x, w, s, y, M, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Codes to f16 in the first form one thinks of, scales in every step."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        a = tl.load(x + rm[:, None] * K + k0 + k[None, :], mask=rm[:, None] < M, other=0.0)
        code = tl.load(w + rn[None, :] * K + k0 + k[:, None], mask=rn[None, :] < N, other=0)
        code = code.to(tl.uint16)
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True)
        scale = tl.load(s + (tl.program_id(1) * BN // 128) * (K // 128) + k0 // 128)
        sums += tl.dot(a.to(tl.float16), value) * (scale * 256.0)
    out = y + rm[:, None] * N + rn[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


class Naive:
    """The naive decode, launched as Triton itself launches."""

    def __init__(self, codes: list[torch.Tensor], scales: torch.Tensor, x: torch.Tensor) -> None:
        self.codes, self.scales, self.x = codes, scales, x
        self.y = torch.empty(x.shape[0], codes[0].shape[0], dtype=x.dtype, device=x.device)

    def __call__(self, copy: int) -> Any:
        (rows, k), n = self.x.shape, self.codes[0].shape[0]
        bm, bn = (16, 64) if rows <= 16 else (64, 128)
        naive_kernel[triton.cdiv(rows, bm), triton.cdiv(n, bn)](
            self.x, self.codes[copy], self.scales, self.y, rows, n, k, bm, bn, 64, num_warps=4
        )
        return self.y


class ExpertsBf16:
    """Experts in bf16, a cuBLAS product for each expert that has rows, as frameworks do without a
    kernel of their own. The routing is fixed, so that it can be captured."""

    def __init__(
        self, gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor, indices: torch.Tensor
    ) -> None:
        self.gate_up, self.down, self.x = gate_up, down, x
        self.rows = {int(e): (indices == e).nonzero()[:, 0] for e in indices.unique().tolist()}

    def __call__(self, copy: int) -> Any:
        out = torch.zeros_like(self.x)
        for e, rows in self.rows.items():
            x = self.x[rows]
            both = x @ self.gate_up[e].flatten(0, 1).t()
            gate, up = both.chunk(2, -1)
            out.index_add_(0, rows, (torch.nn.functional.silu(gate) * up) @ self.down[e].t())
        return out

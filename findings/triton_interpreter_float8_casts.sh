#!/usr/bin/env bash
# Triton's interpreter casts to and from float8e4nv as no device does.
#
# Versions: triton 3.9.0 with TRITON_INTERPRET=1, torch 2.13.0 (CPU), numpy 2.4.6.
# Kernels: float32 → tl.float8e4nv, and the codes of NaN → float32.
# Seen:
#     number      1.0625  1.1875  448  464  1000  inf  NaN
#     interpreter 1.125   1.25    448  NaN  256   256  384
#     torch       1       1.25    448  448  448   448  NaN
#     codes 7F, FF:  interpreter 480, -480   torch NaN, NaN
# So a tie goes away from zero and not to even, what overflows wraps into smaller numbers, and NaN becomes
# a number in both directions: tests of such kernels under the interpreter say nothing about a GPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps triton==3.9.0
cd "$work"
cat >kernels.py <<'EOF'
import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def encode(x, codes, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(codes + i, tl.load(x + i).to(tl.float8e4nv).to(tl.uint8, bitcast=True))


@triton.jit
def decode(codes, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(codes + i).to(tl.float8e4nv, bitcast=True).to(tl.float32))


nan, inf = float("nan"), float("inf")
x = torch.tensor([1.0625, 1.1875, 448, 464, 1000, inf, nan, -1000])
codes = torch.zeros(8, dtype=torch.uint8)
encode[(1,)](x, codes, 8)
interpreted = codes.view(torch.float8_e4m3fn).float().numpy()
native = x.to(torch.float8_e4m3fn).float().numpy()
print("interpreter", interpreted, "torch", native)
np.testing.assert_array_equal(interpreted, [1.125, 1.25, 448, nan, 256, 256, 384, -256])
np.testing.assert_array_equal(native, [1, 1.25, 448, 448, 448, 448, nan, -448])

codes, y = torch.tensor([0x7F, 0xFF], dtype=torch.uint8), torch.zeros(2)
decode[(1,)](codes, y, 2)
native = codes.view(torch.float8_e4m3fn).float()
print("codes of NaN: interpreter", y.tolist(), "torch", native.tolist())
assert y.tolist() == [480, -480] and native.isnan().all(), (y, native)
EOF
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore kernels.py

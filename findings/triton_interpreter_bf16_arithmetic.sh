#!/usr/bin/env bash
# Triton's interpreter does arithmetic on the bits of bf16 numbers, as if they were integers.
#
# Versions: triton 3.9.0 with TRITON_INTERPRET=1, torch 2.13.0 (CPU), numpy 2.4.6.
# Kernel: y = x + x for 1, 1.5, 2, 100.
# Seen:
#     fp16                     2  3  4  200
#     bf16                     1.7014e+38  inf  -0  -1.3542e-35, without a warning
#     bf16 through float32     2  3  4  200
# So one is 0x3F80, twice that is 0x7F00, and that is 2^127. Under the interpreter a kernel has to go
# through float32 before every operation on bf16; what it only loads, casts and stores is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps triton==3.9.0
cd "$work"
cat >kernels.py <<'EOF'
import torch
import triton
import triton.language as tl


@triton.jit
def double(x, y, n: tl.constexpr, wide: tl.constexpr):
    i = tl.arange(0, n)
    v = tl.load(x + i)
    if wide:
        v = v.to(tl.float32)
    tl.store(y + i, (v + v).to(x.dtype.element_ty))


def run(dtype, wide):
    x = torch.tensor([1, 1.5, 2, 100], dtype=dtype)
    y = torch.zeros_like(x)
    double[(1,)](x, y, 4, wide)
    return y


right = [2, 3, 4, 200]
half, brain, through = run(torch.float16, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
print("fp16", half.tolist(), "bf16", brain.tolist(), "through float32", through.tolist())
assert half.tolist() == right and through.tolist() == right
ones = torch.tensor([1, 1.5, 2, 100], dtype=torch.bfloat16).view(torch.int16).int()
bits = (2 * ones & 0xFFFF).tolist()
assert (brain.view(torch.int16).int() & 0xFFFF).tolist() == bits, brain
assert brain[0].item() == 2.0**127 and brain[1].item() == float("inf"), brain
EOF
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore kernels.py

#!/usr/bin/env bash
# For sm_70 and sm_75 triton compiles tl.dot of fp16 into scalar arithmetic and says nothing.
#
# Versions: triton 3.2.0 and 3.9.0. Nothing runs, so no GPU is needed.
# Kernel: one 64 by 64 by 64 product of fp16, float32 sums.
# Seen, as mma and fma instructions in the PTX (sm_70, sm_75, sm_80):
#     3.2.0   mma yes, yes, yes
#     3.9.0   mma no, no, yes; the first two have 2048 fma in their place
# So on a V100 or a T4 the newer version runs the same kernel without the tensor cores.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cd "$work"
cat >kernels.py <<'EOF'
import json
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c):
    tile = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


keyword = "constexprs" if triton.__version__ >= "3.3" else "constants"
seen = {}
for arch in (70, 75, 80):
    types = {"a": "*fp16", "b": "*fp16", "c": "*fp32"}
    source = ASTSource(fn=product, signature=types, **{keyword: {}})
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    seen[arch] = len(re.findall(r"\bmma\.sync", ptx)), len(re.findall(r"\bfma\.rn", ptx))
print(triton.__version__, "mma, fma", seen)
assert [arch for arch, (mma, _) in seen.items() if mma] == json.loads(sys.argv[1]), seen
assert all(fma == (0 if mma else 2048) for mma, fma in seen.values()), seen
EOF
for pair in "3.2.0=[70, 75, 80]" "3.9.0=[80]"; do
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check setuptools "triton==${pair%=*}"
    TRITON_CACHE_DIR="$work/${pair%=*}" "$work/venv/bin/python" -W ignore kernels.py "${pair#*=}"
done

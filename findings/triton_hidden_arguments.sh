#!/usr/bin/env bash
# Compiled triton kernels take more arguments than they were written with, and how many depends on the version.
#
# Versions: triton 3.2.0, 3.4.0 and 3.9.0. Nothing runs, so no GPU is needed.
# Kernel: two pointers, y = x + 1, compiled for sm_80.
# Seen, as the PTX's parameters:
#     3.2.0   2
#     3.4.0   3    one more pointer behind the kernel's own: global scratch
#     3.9.0   4    two more: global and profile scratch
# though the metadata of 3.9.0 says that the kernel needs 0 bytes of both. A launcher of one's own that
# passes the two pointers alone lets the others be whatever lies there: count the PTX's parameters.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cd "$work"
cat >kernels.py <<'EOF'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def increment(x, y):
    i = tl.arange(0, 64)
    tl.store(y + i, tl.load(x + i) + 1)


target = GPUTarget("cuda", 80, 32)
keyword = "constexprs" if triton.__version__ >= "3.3" else "constants"
source = ASTSource(fn=increment, signature={"x": "*fp32", "y": "*fp32"}, **{keyword: {}})
kernel = triton.compile(source, target=target)
count = len(re.findall(r"\.param [^\n]*increment_param_\d", kernel.asm["ptx"].split("{")[0]))
sizes = [getattr(kernel.metadata, f"{n}_scratch_size", None) for n in ("global", "profile")]
print(triton.__version__, "parameters", count, "scratch sizes", sizes)
assert count == int(sys.argv[1]), count
if triton.__version__.startswith("3.9"):
    assert sizes == [0, 0], sizes
EOF
for pair in 3.2.0=2 3.4.0=3 3.9.0=4; do
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check setuptools "triton==${pair%=*}"
    TRITON_CACHE_DIR="$work/${pair%=*}" "$work/venv/bin/python" -W ignore kernels.py "${pair#*=}"
done

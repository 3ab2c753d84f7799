#!/usr/bin/env bash
# For AMD, triton drops inline assembly on 8-bit elements and still returns a kernel.
#
# Versions: triton 3.9.0. Nothing runs, so no GPU is needed.
# Kernel: y = not x on int8, by inline_asm_elementwise with pack=4: four elements in a 32-bit register.
# Seen:
#     sm_80             not.b32 is in the PTX
#     gfx942, gfx1100   "error: could not allocate output register for constraint 'v'" on stderr; compile
#                       returns all the same, with a hsaco that has no v_not_b32 and stores what it did
#                       not compute
#     gfx942, int32     v_not_b32 is there
# So a compile that raises nothing is no sign on AMD: look for the instruction in the text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0
cd "$work"
cat >kernels.py <<'EOF'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def invert(x, y, asm: tl.constexpr, constraints: tl.constexpr, pack: tl.constexpr):
    i = tl.arange(0, 256)
    v = tl.load(x + i)
    v = tl.inline_asm_elementwise(asm, constraints, [v], dtype=v.dtype, is_pure=True, pack=pack)
    tl.store(y + i, v)


def has(target, stage, asm, constraints, element, pack):
    names = ["asm", "constraints", "pack"]
    types = {"x": f"*{element}", "y": f"*{element}"} | dict.fromkeys(names, "constexpr")
    constants = dict(zip(names, [asm, constraints, pack]))
    text = triton.compile(ASTSource(invert, types, constants), target=target).asm
    assert text["hsaco" if target.backend == "hip" else "cubin"]
    return asm.split()[0] in text[stage]


v_not = ("amdgcn", "v_not_b32 $0, $1", "=v,v")
seen = {
    "sm_80": has(GPUTarget("cuda", 80, 32), "ptx", "not.b32 $0, $1;", "=r,r", "i8", 4),
    "gfx942": has(GPUTarget("hip", "gfx942", 64), *v_not, "i8", 4),
    "gfx1100": has(GPUTarget("hip", "gfx1100", 32), *v_not, "i8", 4),
    "gfx942, int32": has(GPUTarget("hip", "gfx942", 64), *v_not, "i32", 1),
}
print(seen)
assert seen == {"sm_80": True, "gfx942": False, "gfx1100": False, "gfx942, int32": True}, seen
EOF
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore kernels.py

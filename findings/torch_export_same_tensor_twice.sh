#!/usr/bin/env bash
# torch.export of a call that passes one tensor twice makes a program that ignores one of its inputs.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6.
# Module: a - 2 b, exported with (x, x), called with a = 1 and b = 5; the right answer is -9.
# Seen:
#     export(m, (x, x))           -5: both operands read b, a is unused; no warning, strict or not
#     export(m, (x, x.clone()))   -9
#     torch.jit.trace(m, (x, x))  -9
# So examples for an export have to be different tensors, masks and caches that start out equal too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch


class Module(torch.nn.Module):
    def forward(self, a, b):
        return a - 2 * b


module, x = Module(), torch.ones(2)
inputs = torch.full((2,), 1.0), torch.full((2,), 5.0)
programs = {
    "same": torch.export.export(module, (x, x)).module(),
    "same, strict": torch.export.export(module, (x, x), strict=True).module(),
    "clone": torch.export.export(module, (x, x.clone())).module(),
    "trace": torch.jit.trace(module, (x, x)),
}
seen = {name: program(*inputs)[0].item() for name, program in programs.items()}
print(seen)
assert module(*inputs).tolist() == [-9, -9]
assert seen == {"same": -5, "same, strict": -5, "clone": -9, "trace": -9}, seen
EOF

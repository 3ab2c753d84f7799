#!/usr/bin/env bash
# safetensors counts the numbers of a packed F4 tensor in its shape, and cannot slice it.
#
# Versions: safetensors 0.8.0, torch 2.13.0, numpy 2.4.6.
# File: one tensor of type F4 and shape [2, 8], so eight bytes, two numbers in each.
# Seen:
#     get_slice(...).get_shape()   [2, 8]
#     get_tensor(...)              shape [2, 4], torch.float4_e2m1fn_x2: bytes, not numbers
#     get_slice(...)[0:1]          RuntimeError: shape '[2, 8]' is invalid for input of size 8
# A reader that checks a model's shapes against headers has to know which of the two it looks at.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0 numpy==2.4.6 packaging
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import json
import struct

from safetensors import safe_open

header = json.dumps({"w": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}}).encode()
header += b" " * (-len(header) % 8)
with open("w.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + bytes(range(8)))
with safe_open("w.safetensors", "pt") as file:
    part = file.get_slice("w")
    shape, tensor = part.get_shape(), file.get_tensor("w")
    try:
        message = str(part[0:1])
    except RuntimeError as error:
        message = str(error)
print(shape, tuple(tensor.shape), tensor.dtype, message)
assert shape == [2, 8] and tuple(tensor.shape) == (2, 4), (shape, tensor.shape)
assert "invalid for input of size 8" in message, message
EOF

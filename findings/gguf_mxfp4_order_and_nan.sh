#!/usr/bin/env bash
# GGUF's MXFP4 holds the numbers of a block in another order than MX checkpoints, and has no NaN.
#
# Versions: gguf 0.19.0, onnx 1.23.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Input: blocks of one e8m0 scale and 16 bytes, two e2m1 numbers in each.
# Seen:
#     byte 0 is 0x42, so 1 and 2    gguf has them at 0 and 16 of the block, onnx as neighbours at 0 and 1
#     scale 255, numbers 0.5 and 1  gguf gives 2^127 and infinity; the scale alone is NaN in ml_dtypes
#     scale 0, number 1             2^-127 in both
# So a converter cannot copy the bytes, and one that passes a block of NaN on makes numbers of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 onnx==1.23.2 ml_dtypes==0.6.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, quants
from onnx import TensorProto, helper, numpy_helper


def gguf(scale, byte):
    block = np.zeros((1, 17), np.uint8)
    block[0, :2] = scale, byte
    with np.errstate(over="ignore"):
        return quants.dequantize(block, GGMLQuantizationType.MXFP4)[0]


def e8m0(scale):
    return np.array([scale], np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0]


places = {int(i): float(gguf(127, 0x42)[i]) for i in np.flatnonzero(gguf(127, 0x42))}
print("places", places, "scale 255:", gguf(255, 1)[0], gguf(255, 2)[0], e8m0(255))
assert places == {0: 1.0, 16: 2.0}, places
tensor = helper.make_tensor("w", TensorProto.FLOAT4E2M1, [2], bytes([0x42]), raw=True)
assert numpy_helper.to_array(tensor).astype(np.float32).tolist() == [1, 2]
assert gguf(255, 1)[0] == 2.0**127 and gguf(255, 2)[0] == np.inf and np.isnan(e8m0(255))
assert gguf(0, 2)[0] == e8m0(0) == np.float32(2.0**-127)
EOF

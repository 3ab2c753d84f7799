#!/usr/bin/env bash
# Three libraries encode e8m0, the scales of MX formats, in different ways.
#
# Versions: torch 2.13.0, ml_dtypes 0.6.0, onnx 1.23.2 (its reference evaluator), numpy 2.4.6.
# Input: 0, -1, 6 and infinity. e8m0 has neither a sign nor a zero, and code 255 is NaN.
# Seen, as codes:
#     torch       0 → 0 (2^-127)   -1 → 127 (+1)   6 → 130 (8: the tie goes up)   inf → 255
#     ml_dtypes   0 → 255 (NaN)    -1 → 255 (NaN)  6 → 130                        inf → 255
#     onnx        as torch
# So scales that one of them wrote cannot be expected to be what another would have written, and a
# scale of zero (a block of zeros) is tiny in one file and NaN in the other.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 ml_dtypes==0.6.0 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import ml_dtypes
import numpy as np
import onnx.reference
import torch
from onnx import TensorProto, helper

x = np.array([0, -1, 6, np.inf], np.float32)
seen = {
    "torch": torch.from_numpy(x).to(torch.float8_e8m0fnu).view(torch.uint8).tolist(),
    "ml_dtypes": x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist(),
}
there = helper.make_node("Cast", ["x"], ["codes"], to=TensorProto.FLOAT8E8M0)
back = helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT)
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
graph = helper.make_graph([there, back], "g", ends[:1], ends[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
(values,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
seen["onnx"] = [255 if np.isnan(v) else int(np.log2(v)) + 127 for v in values]
print(seen)
assert seen == {
    "torch": [0, 127, 130, 255],
    "ml_dtypes": [255, 255, 130, 255],
    "onnx": [0, 127, 130, 255],
}, seen
EOF

#!/usr/bin/env bash
# Attention's third output in mode 0 is capped by onnx's reference evaluator and not by onnxruntime.
#
# Versions: onnx 1.23.2, onnxruntime 1.32.0 (CPU), numpy 2.4.6.
# Node: Attention (opset 23) with softcap=1, scale=1, qk_matmul_output_mode=0, which the standard calls
# the raw product of queries and keys. q = k = v = [[3, 0], [0, 3]], so it is 9 0 0 9.
# Seen: onnx.reference gives 1 0 0 1 (the capped product, as in mode 1), onnxruntime 9 0 0 9.
# So the reference cannot judge this output.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import onnx.reference
import onnxruntime as ort
from onnx import TensorProto, helper

node = helper.make_node(
    "Attention", ["q", "k", "v"], ["y", "", "", "scores"],
    softcap=1.0, scale=1.0, qk_matmul_output_mode=0,
)
inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 2, 2]) for n in "qkv"]
outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "scores")]
graph = helper.make_graph([node], "g", inputs, outputs)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
feed = dict.fromkeys("qkv", np.array([[[[3, 0], [0, 3]]]], np.float32))
reference = onnx.reference.ReferenceEvaluator(model).run(None, feed)[1]
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
runtime = session.run(None, feed)[1]
print("onnx.reference", reference.ravel(), "onnxruntime", runtime.ravel())
assert np.allclose(reference.ravel(), [1, 0, 0, 1], atol=1e-6), reference
assert np.allclose(runtime.ravel(), [9, 0, 0, 9]), runtime
EOF

#!/usr/bin/env bash
# onnxruntime removes a Relu in front of a QuantizeLinear to float8: negative numbers pass.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2, numpy 2.4.6.
# Graph: Relu → QuantizeLinear (float8e4m3fn, scale 1, zero point 0) → DequantizeLinear.
# Input: -2, -1, 0, 3. The reference evaluator of onnx gives 0 0 0 3.
# Seen at the default optimization level: -2 -1 0 3; without optimizations, and at the basic level: 0 0 0 3.
# The rewrite is right for unsigned integers, whose codes end at the zero point; float8 has a sign.
# A model that has to be right leaves the zero point out, or lowers the level.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

nodes = [
    helper.make_node("Relu", ["x"], ["r"]),
    helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
]
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
constants = [
    helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0]),
    helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], bytes(1), raw=True),
]
graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(level):
    options = ort.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": np.array([-2, -1, 0, 3], np.float32)})[0].tolist()


levels = ort.GraphOptimizationLevel
seen = [run(levels.ORT_DISABLE_ALL), run(levels.ORT_ENABLE_BASIC), run(None)]
print("none", seen[0], "basic", seen[1], "default", seen[2])
assert seen == [[0, 0, 0, 3], [0, 0, 0, 3], [-2, -1, 0, 3]], seen
EOF

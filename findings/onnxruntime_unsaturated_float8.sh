#!/usr/bin/env bash
# onnxruntime's casts to float8 without saturation let 480 through as 448, and make NaN where e5m2 has infinity.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2 (its reference evaluator), numpy 2.4.6.
# Node: Cast with saturate=0, and back to float32.
# Seen:
#     e4m3fn         448   464   465   480   496   inf
#       onnx         448   448   NaN   NaN   NaN   NaN
#       onnxruntime  448   448   NaN   448   NaN   NaN
#     e5m2           57344 61439 61440 65535 65536 inf
#       onnx         57344 57344 inf   inf   inf   inf
#       onnxruntime  57344 57344 NaN   NaN   inf   inf
# So an overflow cannot be found by looking for NaN in the one and infinity in the other.
# With saturate=1, the default, both agree.
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


def cast(to, saturate, numbers):
    nodes = [
        helper.make_node("Cast", ["x"], ["codes"], to=to, saturate=saturate),
        helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [6]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feed = {"x": np.array(numbers, np.float32)}
    (reference,) = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return reference, session.run(None, feed)[0]


nan, inf = np.nan, np.inf
cases = [
    (
        TensorProto.FLOAT8E4M3FN, [448, 464, 465, 480, 496, inf],
        [448, 448, nan, nan, nan, nan], [448, 448, nan, 448, nan, nan],
    ),
    (
        TensorProto.FLOAT8E5M2, [57344, 61439, 61440, 65535, 65536, inf],
        [57344, 57344, inf, inf, inf, inf], [57344, 57344, nan, nan, inf, inf],
    ),
]
for to, numbers, onnx_gives, ort_gives in cases:
    reference, runtime = cast(to, 0, numbers)
    print("onnx", reference, "onnxruntime", runtime)
    np.testing.assert_array_equal(reference, np.array(onnx_gives, np.float32))
    np.testing.assert_array_equal(runtime, np.array(ort_gives, np.float32))
    np.testing.assert_array_equal(*cast(to, 1, numbers))
EOF

#!/usr/bin/env bash
# What lies beyond float8's range becomes the largest number, NaN or infinity: by type, and by library.
#
# Versions: torch 2.13.0 (CPU), ml_dtypes 0.6.0, numpy 2.4.6.
# Input: float32 numbers around the largest one, where rounding to nearest ends, far beyond it, infinity.
# Seen:
#                      448   464   465   1000  inf
#     e4m3fn   torch   448   448   448   448   448
#              ml      448   448   NaN   NaN   NaN
#                      240   247   248   1000  inf
#     e4m3fnuz torch   240   240   NaN   NaN   NaN    ml_dtypes the same
#                      57344 61439 61440 1e6   inf
#     e5m2     torch   57344 57344 inf   inf   inf    ml_dtypes the same
# So torch saturates in one of its types only, an infinity too, and an overflow leaves no trace there.
# Clamp first: then all agree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import ml_dtypes
import numpy as np
import torch

nan, inf = np.nan, np.inf
cases = {  # input, torch's result, ml_dtypes'
    "float8_e4m3fn": ([448, 464, 465, 1000, inf], [448] * 5, [448, 448, nan, nan, nan]),
    "float8_e4m3fnuz": ([240, 247, 248, 1000, inf], *[[240, 240, nan, nan, nan]] * 2),
    "float8_e5m2": ([57344, 61439, 61440, 1e6, inf], *[[57344, 57344, inf, inf, inf]] * 2),
}
for name, (numbers, torch_gives, ml_gives) in cases.items():
    x = np.array(numbers, np.float32)
    seen = torch.from_numpy(x).to(getattr(torch, name)).float().numpy()
    other = x.astype(getattr(ml_dtypes, name)).astype(np.float32)
    print(name, "torch", seen, "ml_dtypes", other)
    np.testing.assert_array_equal(seen, np.array(torch_gives, np.float32))
    np.testing.assert_array_equal(other, np.array(ml_gives, np.float32))
    clamped = x.clip(max=numbers[0])
    same = torch.from_numpy(clamped).to(getattr(torch, name)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(same, clamped.astype(getattr(ml_dtypes, name)).view(np.uint8))
EOF

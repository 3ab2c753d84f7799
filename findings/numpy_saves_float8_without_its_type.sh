#!/usr/bin/env bash
# numpy saves arrays of ml_dtypes without an error and reads them back as bytes, e5m2 not at all.
#
# Versions: numpy 2.4.6, ml_dtypes 0.6.0.
# Input: [1, 2] of each type, through np.save and np.load.
# Seen:
#     bfloat16                            descr <V2, comes back as |V2: bytes
#     float8_e4m3fn, float8_e8m0fnu, int4 descr <V1, comes back as |V1: the types cannot be told apart
#     float8_e5m2                         descr <f1; ValueError: descr is not a valid dtype descriptor
# So the type has to be kept beside the file; saved as uint8 and viewed, every one survives.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import io

import ml_dtypes
import numpy as np


def back(array):
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    try:
        return np.load(file).dtype.str
    except ValueError as error:
        return str(error)


seen = {}
for name in ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "int4", "float8_e5m2"):
    array = np.array([1, 2]).astype(getattr(ml_dtypes, name))
    seen[name] = back(array)
    assert back(array.view(np.uint8)) == "|u1"
print(seen)
assert seen == {
    "bfloat16": "|V2", "float8_e4m3fn": "|V1", "float8_e8m0fnu": "|V1", "int4": "|V1",
    "float8_e5m2": "descr is not a valid dtype descriptor: '<f1'",
}, seen
EOF

"""The one table of element types, against the libraries whose names it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dilu.codegen.kernel_ir import DECODED, ENCODED
from dilu.element_types import BY_DLPACK, BY_SAFETENSORS, BY_TORCH, DTYPES
from dilu.runtime.gpu.dlpack import HOST, Imported, export

CODEGEN = Path(__file__).parent.parent / "codegen"
NAMED = [t for t in DTYPES.values() if t.torch is not None]


def test_no_two_types_share_a_name():
    count = sum(t.torch is not None for t in DTYPES.values())
    assert [len(BY_TORCH), len(BY_SAFETENSORS), len(BY_DLPACK)] == [count] * 3


@pytest.mark.parametrize("t", NAMED, ids=str)
def test_torch_and_safetensors_know_the_names(t):
    tensor = torch.zeros(3, dtype=torch.uint8).view(torch.bool) if t.name == "bool" else None
    if tensor is None:
        tensor = torch.zeros(3 * t.itemsize, dtype=torch.uint8).view(getattr(torch, t.torch))
    assert tensor.element_size() == t.itemsize
    data = save({"x": tensor})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["x"]["dtype"] == t.safetensors


@pytest.mark.parametrize("t", NAMED, ids=str)
def test_dlpack_knows_the_codes(t):
    bits = np.arange(3, dtype=np.uint8).repeat(t.itemsize)

    class Lent:
        def __dlpack_device__(self):
            return HOST, 0

        def __dlpack__(self, stream=None):
            return export(self, bits.ctypes.data, (3,), t.name, (HOST, 0))

    assert Imported(Lent(), 0).element == t.name
    if not t.is_code:  # torch exchanges no floats of 8 bits yet
        assert torch.from_dlpack(Lent()).dtype == getattr(torch, t.torch)


@pytest.mark.parametrize(
    ("library", "function"),
    [("c/lib/formats.h", "dilu_{}_{}"), ("triton/lib/formats.py", "def {}_{}")],
)
def test_kernel_libraries_have_a_function_for_every_type(library, function):
    text = (CODEGEN / library).read_text("utf-8")
    python = library.endswith(".py")
    wanted = [("decode", t) for t in DECODED] + [("encode", t) for t in ENCODED]
    if python:  # Triton converts f16 itself
        wanted.remove(("decode", DTYPES["f16"]))
    missing = [
        f"{kind} of {t}"
        for kind, t in wanted
        if not re.search(rf"\b{function.format(kind, t)}\(", text)
    ]
    assert missing == []
    if not python:
        assert {f"DILU_{t.name.upper()}" for t in DECODED} <= {*re.findall(r"DILU_\w+", text)}


@pytest.mark.parametrize("name", ["f64", "f32", "f16", "i64", "i32", "i16", "i8", "u8", "u16",
                                  "u32"])  # fmt: skip
def test_numpy_has_the_type(name):
    assert DTYPES[name].is_numpys
    assert DTYPES[name].storage == np.dtype(f"<{name[0]}{int(name[1:]) // 8}")


@pytest.mark.parametrize("name", ["bf16", "f8e4m3", "f8e5m2", "f8e8m0", "f4e2m1"])
def test_other_floats_are_raw_bits(name):
    assert not DTYPES[name].is_numpys
    assert DTYPES[name].storage == np.dtype(f"<u{DTYPES[name].itemsize}")

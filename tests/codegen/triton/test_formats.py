"""All codes of the storage formats, through the codecs of the kernel library, interpreted."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest
import torch
from interpreted import module_of

from dilu.codegen.kernel_ir import ENCODED
from dilu.codegen.triton.emit import library_text
from dilu.ir.dtypes import DType, decode, encode

pytestmark = pytest.mark.slow

DECODED = {t.name: t for t in ENCODED}
KERNELS = "import triton\nimport triton.language as tl\n\n\n" + library_text()
for _name in DECODED:
    KERNELS += f"""
@triton.jit
def values_{_name}(codes, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, decoded(tl.load(codes + at), "{_name}"))
"""
NARROW, WIDE, WAYS = ("f8e4m3", "f8e5m2"), ("float16", "bfloat16"), ("portable", "exact")
for _name, _dot, _way in itertools.product(NARROW, WIDE, WAYS):
    KERNELS += f"""
@triton.jit
def operands_{_name}_{_dot}_{_way}(codes, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = exact_operand(tl.load(codes + at), "{_name}", tl.{_dot}, "{_way}")
    tl.store(out + at, as_f32(x))
"""
for _name, _saturate in itertools.product(DECODED, (False, True)):
    KERNELS += f"""
@triton.jit
def codes_{_name}_{_saturate}(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, encode_{_name}(tl.load(x + at), {_saturate}))
"""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return module_of(KERNELS)


CODES = np.arange(256, dtype=np.uint8)


def run(kernels: ModuleType, name: str, given: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    out = torch.zeros(given.size, dtype=dtype)
    getattr(kernels, name)[(1,)](torch.from_numpy(given), out, SIZE=given.size)
    return out.numpy()


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Compare f32 numbers bit for bit, all NaN being one."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    there = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[there], want.view(np.uint32)[there])


@pytest.mark.parametrize("name", DECODED)
def test_decode(kernels, name):
    got = run(kernels, f"values_{name}", CODES, torch.float32)
    want = decode(DECODED[name], CODES)
    assert want.dtype == np.float32
    assert np.isnan(want).sum() == {"f8e4m3": 2, "f8e5m2": 6, "f8e8m0": 1}[name]
    assert_same_bits(got, want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dot", WIDE)
@pytest.mark.parametrize("name", NARROW)
def test_operands(kernels, name, dot, way):
    """Where they are not exact, e4m3's codes of NaN are 480, and in f16 all is 2^-8 of itself."""
    got = run(kernels, f"operands_{name}_{dot}_{way}", CODES, torch.float32)
    want = decode(DECODED[name], CODES)
    if name == "f8e4m3" and way == "portable":
        want = np.where(CODES == 0x7F, 480.0, np.where(CODES == 0xFF, -480.0, want))
        want = (want / 256 if dot == "float16" else want).astype(np.float32)
    assert_same_bits(got, want)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("name", DECODED)
def test_encode(kernels, name, saturate):
    t = DECODED[name]
    x = near(t)
    got = run(kernels, f"codes_{name}_{saturate}", x, torch.uint8)
    want = encode(t, x, saturate=saturate)
    nan = np.isnan(decode(t, want))
    np.testing.assert_array_equal(np.isnan(decode(t, got)), nan)
    np.testing.assert_array_equal(got[~nan], want[~nan])


def near(t: DType) -> np.ndarray:
    """Return f32 numbers: all of a format, those halfway between two, and their neighbours."""
    all_of = np.unique(decode(t, CODES)[np.isfinite(decode(t, CODES))])
    middle = ((all_of[1:] + all_of[:-1]) / 2).astype(np.float32)
    x = np.concatenate([all_of, middle, [-0.0, np.inf, -np.inf, np.nan, 1e9, -1e9, 1e-30]])
    x = x.astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -np.inf)])
    x = x.astype(np.float32)
    return np.resize(x, 1 << (len(x) - 1).bit_length())

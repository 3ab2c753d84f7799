from __future__ import annotations

import numpy as np
import pytest

from dilu.errors import DiluError
from dilu.runtime.arrays import STORAGE, from_numpy, storage, to_numpy


def test_the_table_is_the_compilers():
    from dilu.ir.dtypes import DTYPES

    assert {name: t.storage for name, t in DTYPES.items()} == STORAGE


def test_unknown_type():
    with pytest.raises(DiluError, match="element type 'f7', which this version of dilu lacks"):
        storage("f7")


@pytest.mark.parametrize("name", ["f64", "f32", "f16", "i64", "i32", "i16", "i8", "u8", "u16",
                                  "u32", "bool"])  # fmt: skip
def test_numpy_types_keep_their_names(name):
    array, got = to_numpy(np.zeros((2, 3), STORAGE[name]), "f32")
    assert (got, array.shape) == (name, (2, 3))


def test_raw_bits_pass_for_what_is_expected():
    assert to_numpy(np.zeros(1, np.uint16), "bf16")[1] == "bf16"
    assert to_numpy(np.zeros(1, np.uint16), "u16")[1] == "u16"
    assert to_numpy(np.zeros(1, np.uint8), "f8e4m3")[1] == "f8e4m3"


def test_other_byte_order():
    array, name = to_numpy(np.array([1, 2], ">i4"), "i32")
    assert (name, array.dtype, list(array)) == ("i32", np.dtype("<i4"), [1, 2])


def test_scalars():
    array, name = to_numpy(3, "i64")
    assert (array.shape, array.dtype, name) == ((), np.int64, "i64")
    assert to_numpy(np.float32(2), "f32")[1] == "f32"


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_torch_types_numpy_lacks(name):
    torch = pytest.importorskip("torch")
    tensor = torch.arange(4, dtype=torch.uint8).view(getattr(torch, name))
    array, ours = to_numpy(tensor, "f32")
    again = from_numpy(array, ours, torch=True)
    assert again.dtype == tensor.dtype
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))


def test_torch_gradients_and_negated_views():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(2, requires_grad=True)
    np.testing.assert_array_equal(to_numpy(tensor, "f32")[0], [1, 1])
    imaginary = torch.tensor([1 + 2j]).conj().imag
    np.testing.assert_array_equal(to_numpy(imaginary, "f32")[0], [-2])


def test_unsupported():
    torch = pytest.importorskip("torch")
    with pytest.raises(DiluError, match=r"tensors of torch.complex64 are not supported"):
        to_numpy(torch.zeros(1, dtype=torch.complex64), "f32")
    with pytest.raises(DiluError, match="arrays of object are not supported"):
        to_numpy(np.array([None]), "f32")

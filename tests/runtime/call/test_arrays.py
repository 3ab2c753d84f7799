from __future__ import annotations

import numpy as np
import pytest

from dilu.errors import DiluError
from dilu.runtime.artifact.storage import STORAGE, storage
from dilu.runtime.call.arrays import from_numpy, to_numpy


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


FINE = {
    "f32": [1, 1.5, True, [[1, 2.5]], (), float("nan"), (1.0, (2,))[:1], np.float32(2)],
    "i64": [1, True, [2**40], [], -3],
    "u8": [255, [0, 1]],
    "bool": [True, [False, True]],
}


@pytest.mark.parametrize("name", FINE)
def test_python_numbers_that_fit(name):
    for value in FINE[name]:
        array, got = to_numpy(value, name)
        assert got == name
        np.testing.assert_array_equal(array, np.asarray(value, STORAGE[name]))


UNFIT = {
    "a fraction": (1.5, "i64", "i64 values cannot be made from these Python numbers"),
    "a number for a bool": (1, "bool", "bool values cannot be made from these Python numbers"),
    "too large": (256, "u8", "a number is too large for u8"),
    "negative": (-1, "u32", "a number is too large for u32"),
    "beyond 64 bits": (2**70, "i64", "cannot be made from these Python objects"),
    "ragged": ([[1], [1, 2]], "f32", "these Python numbers form no array"),
    "text": (["a"], "f32", "f32 values cannot be made from these Python objects"),
    "nothing inside": ([None], "f32", "f32 values cannot be made from these Python objects"),
    "arrays inside": ([np.zeros(2), np.zeros(2)], "f32", "cannot be made from these Python"),
    "nothing": (None, "f32", "None is no array"),
    "an object": (object(), "f32", "a object is no array"),
    "a mapping": ({"a": 1}, "f32", "a dict is no array"),
    "masked": (np.ma.masked_array([1.0], [True]), "f32", r"masked arrays are not supported"),
    "dates": (np.zeros(1, "datetime64[s]"), "f32", r"arrays of datetime64\[s\] are not supported"),
    "records": (np.zeros(1, [("a", "f4")]), "f32", "are not supported"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_array_of_the_type(name):
    value, dtype, message = UNFIT[name]
    with pytest.raises(DiluError, match=message):
        to_numpy(value, dtype)


def test_torch_tensors_that_are_not_dense():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    dense = torch.ones(2, 2)
    with FakeTensorMode():
        fake = torch.ones(2, 2)
    for tensor, message in [
        (dense.to_sparse(), "sparse_coo tensors are not supported"),
        (dense.to_sparse_csr(), "sparse_csr tensors are not supported"),
        (torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8), "quantized tensors are not"),
        (torch.nested.nested_tensor([dense, dense]), "nested tensors are not supported"),
        (fake, "a FakeTensor of torch.float32 cannot be read"),
    ]:
        with pytest.raises(DiluError, match=message):
            to_numpy(tensor, "f32")


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_bytes_pass_for_float8_of_torch(name):
    torch = pytest.importorskip("torch")
    ours = {"float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2", "float8_e8m0fnu": "f8e8m0"}[name]
    codes = torch.arange(6, dtype=torch.uint8)
    for given in (codes, codes.view(getattr(torch, name)), codes.numpy()):
        array, got = to_numpy(given, ours)
        assert got == ours
        np.testing.assert_array_equal(array, codes.numpy())
    assert to_numpy(codes, "u8")[1] == to_numpy(codes, "f32")[1] == "u8"
    assert to_numpy(codes.view(torch.int8), ours)[1] == "i8"

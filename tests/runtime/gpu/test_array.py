"""Arrays across the boundary: on the host, on the device, and other libraries' by DLPack.

The fake device's memory is the host's, so arrays "on the device" can be made of numpy's, and a
device that calls its memory the CPU's shares it with torch.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
from fake_gpu import gpu_artifact

import dilu
from dilu.errors import DiluError
from dilu.runtime.gpu import dlpack
from dilu.runtime.gpu.array import DeviceArray, copy_strided
from dilu.runtime.gpu.dlpack import Imported, export
from dilu.runtime.gpu.native import CudaDevice
from dilu.runtime.gpu.open_device import open_device

CUDA = (2, 0)


class Foreign:
    """An array of another library on the device."""

    def __init__(self, array: np.ndarray, element: str = "f32", device=CUDA) -> None:
        self.array, self.element, self.device = array, element, device
        self.streams: list[int] = []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        shape = self.array.shape
        capsule = export(self.array, self.array.ctypes.data, shape, self.element, self.device)
        managed = dlpack._Managed.from_address(dlpack._get_pointer(id(capsule), b"dltensor"))
        for axis, stride in enumerate(self.array.strides):
            managed.tensor.strides[axis] = stride // self.array.itemsize
        return capsule


def aligned(count: int, at: int = 0) -> np.ndarray:
    """Return f32[count] whose address is `at` more than a multiple of 16."""
    raw = np.zeros(4 * count + 32, np.uint8)
    start = -raw.ctypes.data % 16 + at
    array = raw[start : start + 4 * count].view(np.float32)
    array[:] = np.arange(count)
    return array


@pytest.fixture
def session(cuda, tmp_path):
    with dilu.load(gpu_artifact(tmp_path)) as session:
        cuda.clear()
        yield session


def test_device_in_device_out(session, cuda):
    x = Foreign(aligned(6))
    y = session.function("twice")(x)
    assert isinstance(y, DeviceArray)
    assert repr(y) == "DeviceArray(f32[6] on cuda:0)"
    assert (y.shape, y.dtype, y.__dlpack_device__()) == ((6,), np.float32, CUDA)
    np.testing.assert_array_equal(y.numpy(), 2 * x.array)
    np.testing.assert_array_equal(np.asarray(y), 2 * x.array)
    (launch,) = cuda.launches
    assert launch.arguments[0] == x.array.ctypes.data, "read where it is"
    assert not [line for line in cuda.log if line.startswith("upload")]
    assert x.streams == [0x5000]
    assert len(dlpack._exported) == 0, "what was borrowed is given back"


def test_results_outlive_the_session(cuda, tmp_path):
    with dilu.load(gpu_artifact(tmp_path)) as session:
        y = session.function("twice")(Foreign(aligned(4)))
    del session
    gc.collect()
    assert cuda.held.memory == 16
    np.testing.assert_array_equal(y.numpy(), [0, 2, 4, 6])
    again = Imported(y, 0)
    del y
    gc.collect()
    assert cuda.held.memory == 16, "a consumer keeps it"
    assert again.shape == (4,) and again.contiguous
    del again
    gc.collect()
    assert cuda.held.memory == 0


def test_a_result_is_an_argument_again(session, cuda):
    y = session.function("twice")(Foreign(aligned(4)))
    z = session.function("twice")(y)
    np.testing.assert_array_equal(z.numpy(), [0, 4, 8, 12])
    assert cuda.launches[1].arguments[0] == y.address


def test_for_cupy_and_numba(session):
    y = session.function("twice")(Foreign(aligned(4)))
    interface = y.__cuda_array_interface__
    assert interface == {
        "shape": (4,), "typestr": "<f4", "data": (y.address, False), "strides": None, "version": 3,
    }  # fmt: skip
    with pytest.raises(BufferError, match="only be handed over as it is"):
        y.__dlpack__(dl_device=(1, 0))
    with pytest.raises(ValueError, match="cannot be read without a copy"):
        y.__array__(copy=False)


def test_an_array_that_is_not_aligned_is_copied_on_the_device(session, cuda):
    x = Foreign(aligned(6, 4))
    y = session.function("twice")(x)
    np.testing.assert_array_equal(y.numpy(), 2 * x.array)
    assert cuda.launches[0].arguments[0] % 256 == 0
    assert not [line for line in cuda.log if line.startswith("upload")]


@pytest.mark.parametrize("view", [np.s_[:, ::2], np.s_[::-1, :], np.s_[1:, 3:67], np.s_[:]])
def test_any_layout(session, view):
    base = np.arange(3 * 128, dtype=np.float32).reshape(3, 128)
    array = base[view][:, :64]
    y = session.function("chain")(Foreign(array))
    np.testing.assert_array_equal(y.numpy()[0], 2 * (array[0] + 111))


def test_mixed_arguments_and_batches(session):
    main = session.function("main")
    main.allocate({"B": 2})
    tokens = Foreign(np.array([1, 2]), "i64")
    rest = [np.array(a) for a in ([0, 1], [0, 0], [0, 1], [[0, 1]], [1])]
    logits = main(tokens, *rest)
    assert isinstance(logits, DeviceArray) and logits.shape == (1, 8)
    with pytest.raises(DiluError, match="tokens holds 8, which is outside of 0 to 7"):
        main(Foreign(np.array([1, 8]), "i64"), *rest)


def test_raw_bits_on_the_device(session):
    y = session.function("decode")(Foreign(np.zeros(2, np.uint16), "bf16"))
    assert y.element == "bf16"
    assert session.function("decode")(Foreign(np.zeros(2, np.uint16), "u16")).element == "bf16"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Foreign(np.zeros(3, np.float64), "f64"), r"the argument x is f64\[3\], expected f32\[N\]"),
        (Foreign(aligned(3), device=(2, 1)), r"an array on cuda:1 was passed, .* cuda:0 \(Fake"),
    ],
)
def test_wrong_arguments(session, value, message):
    with pytest.raises(DiluError, match=message):
        session.function("twice")(value)


def test_a_producer_that_refuses(session):
    class Refusing(Foreign):
        def __dlpack__(self, *, stream=None):
            raise BufferError("needs a gradient")

    with pytest.raises(DiluError, match="type Refusing cannot be read: needs a gradient"):
        session.function("twice")(Refusing(aligned(2)))


def test_types_that_are_not_ours(session):
    class Complex(Foreign):
        def __dlpack__(self, *, stream=None):
            capsule = super().__dlpack__()
            pointer = dlpack._get_pointer(id(capsule), b"dltensor")
            dlpack._Managed.from_address(pointer).tensor.code = 5
            return capsule

    with pytest.raises(DiluError, match="arrays of DLPack type 5 of 32 bits are not supported"):
        session.function("twice")(Complex(aligned(2)))
    gc.collect()
    assert len(dlpack._exported) == 0


def test_a_capsule_that_nobody_takes_is_released():
    capsule = export(object(), 16, (2, 3), "f32", CUDA)
    assert len(dlpack._exported) == 1
    del capsule
    assert len(dlpack._exported) == 0


def test_copies_of_one_piece_are_one_copy(cuda):
    device = open_device("cuda")
    x, y = np.arange(24.0).reshape(2, 3, 4), np.zeros((2, 5, 4))
    with device.active():
        layouts = [(a.ctypes.data, [s // 8 for s in a.strides]) for a in (y, x)]
        copy_strided(device, *layouts, (2, 3, 4), 8)
        np.testing.assert_array_equal(y[:, :3], x)
        assert [line for line in cuda.log if line.startswith("copy")] == ["copy 96"] * 2
        copy_strided(device, *layouts, (2, 0, 4), 8)
        assert len(cuda.log) == 2
        device.close()


# ------------------------------------------------------------------------------- torch


@pytest.fixture
def shared(cuda, tmp_path, monkeypatch):
    """A session on a device whose memory is torch's too."""
    monkeypatch.setattr(CudaDevice, "dlpack", 1)
    with dilu.load(gpu_artifact(tmp_path)) as session:
        yield session


def test_torch_on_the_device(shared, cuda):
    torch = pytest.importorskip("torch")
    x = torch.arange(64.0, requires_grad=True)
    y = shared.function("twice")(x)
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y, 2 * x)
    assert cuda.launches[0].arguments[0] == x.data_ptr()
    z = shared.function("decode")(torch.zeros(3, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16 and z.shape == (3,)
    before = cuda.held.memory
    del y, z
    gc.collect()
    assert cuda.held.memory == before - 64 * 4 - 3 * 2


def test_torch_float8_on_the_device(shared):
    torch = pytest.importorskip("torch")
    x = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    array, element = shared.engine.argument(x, "f8e4m3")
    assert (element, array.shape) == ("f8e4m3", (2,))
    back = shared.engine.result(array, "f8e4m3", torch=True)
    assert back.dtype == torch.float8_e4m3fn
    assert back.float().tolist() == [1.0, -2.0]


def test_torch_on_the_host(session, cuda):
    torch = pytest.importorskip("torch")
    x = torch.arange(6.0)
    y = session.function("twice")(x)
    assert isinstance(y, torch.Tensor) and torch.equal(y, 2 * x)
    assert [line for line in cuda.log if line.startswith("upload")]


def test_torch_elsewhere(session):
    torch = pytest.importorskip("torch")
    with pytest.raises(DiluError, match=r"a tensor on meta was passed, .* runs on cuda:0 \(Fake"):
        session.function("twice")(torch.zeros(2, device="meta"))

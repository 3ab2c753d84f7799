"""What happens when the driver refuses, fails, or is not there."""

from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import add_target, gpu_artifact, program

import dilu
from dilu.errors import DiluError
from dilu.runtime.gpu.device import DeviceLost, KernelCode
from dilu.runtime.gpu.open_device import find_devices, open_device

X = np.arange(6, dtype=np.float32)


def test_what_is_known_of_a_device(cuda):
    cuda.device(count=2, capability=86, memory=24 << 30)
    devices, problem = find_devices("cuda")
    assert problem is None
    info = devices[1].info
    assert (info.place, info.name, info.arch) == ("cuda:1", "Fake GPU 1", "8.6")
    assert (info.memory, info.driver, info.shared) == (24 << 30, "12.4", 163 << 10)
    assert cuda.held.contexts == 0


def test_what_is_known_of_an_amd_device(hip):
    hip.device(arch="gfx942:sramecc+:xnack-")
    info = open_device("hip").info
    assert (info.arch, info.driver, info.dlpack) == ("gfx942", "6.3", 10)


def test_an_amd_device_without_a_name(hip):
    hip.device(arch="unknown")
    with pytest.raises(DiluError, match="does not tell the architecture of hip:0"):
        open_device("hip")


def test_no_such_device(cuda):
    with pytest.raises(DiluError, match="no device cuda:1: the driver finds 1 device\n"):
        open_device("cuda:1")
    cuda.device(count=0)
    with pytest.raises(DiluError, match="no device cuda:0: the driver finds 0 devices"):
        open_device("cuda")


def test_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("DILU_GPU_LIBRARY", str(tmp_path / "no.so"))
    message = r"no driver for cuda devices: DILU_GPU_LIBRARY=.*no.so cannot be loaded"
    with pytest.raises(DiluError, match=message + r"(.|\n)*or run on the CPU: --device cpu"):
        open_device("cuda")


def test_a_library_that_is_no_driver(cuda):
    with pytest.raises(DiluError, match=r"no driver for hip devices: .*libcuda.so is not one"):
        open_device("hip")


def test_a_driver_older_than_the_code_compiles_the_text(cuda, tmp_path):
    cuda.refuse_binaries()
    with dilu.load(gpu_artifact(tmp_path)) as session:
        np.testing.assert_array_equal(session.function("twice")(X), 2 * X)
        note = "the driver refused the binaries (CUDA_ERROR_NO_BINARY_FOR_GPU) and compiles"
        assert note in session.target_reason
    assert {line for line in cuda.log if line.startswith("module")} == {"module PTX"}


def test_code_that_the_driver_refuses_for_good(cuda, tmp_path):
    cuda.refuse_binaries()
    table = program()
    table["kernels"][0]["variants"][0]["text"] = None
    artifact = gpu_artifact(tmp_path)
    add_target(artifact, "cuda:80", table)
    message = "loading the kernel double: CUDA_ERROR_NO_BINARY_FOR_GPU(.|\n)*update the driver"
    with pytest.raises(DiluError, match=message):
        dilu.load(artifact)
    assert (cuda.held.streams, cuda.held.modules) == (0, 0)


def test_an_error_names_the_kernel(cuda, tmp_path):
    with dilu.load(gpu_artifact(tmp_path)) as session:
        cuda.fail("launch", 1)
        with pytest.raises(DiluError, match="launching the kernel double: CUDA_ERROR_FAKE"):
            session.function("twice")(X)
        np.testing.assert_array_equal(session.function("twice")(X), 2 * X)


def test_a_device_that_is_lost(cuda, tmp_path):
    session = dilu.load(gpu_artifact(tmp_path))
    cuda.fail("launch", 719, at=2)
    message = (
        r"chain: the device cuda:0 \(Fake GPU 0\) failed: "
        r"launching the kernel touch: CUDA_ERROR_LAUNCH_FAILED"
    )
    with pytest.raises(DeviceLost, match=message):
        session.function("chain")(np.zeros((1, 64), np.float32))
    with pytest.raises(DiluError, match=r"session is lost(.|\n)*load the artifact again"):
        session.function("twice")(X)
    session.close()
    session.close()


def test_a_device_lost_while_waiting(cuda, tmp_path, monkeypatch):
    session = dilu.load(gpu_artifact(tmp_path))
    session.function("twice")(X)
    cuda.fail("synchronize", 700)
    message = r"cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS(.|\n)*DILU_GPU_SYNC=1"
    with pytest.raises(DeviceLost, match=message):
        session.function("twice")(X)
    session.close()


def test_waiting_after_each_kernel_names_it(cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("DILU_GPU_SYNC", "1")
    session = dilu.load(gpu_artifact(tmp_path))
    cuda.fail("synchronize", 700, at=4)  # states are made first
    with pytest.raises(DeviceLost, match="running the kernel count: cuStreamSynchronize"):
        session.function("chain")(np.zeros((1, 64), np.float32))
    session.close()


def test_a_capture_that_fails_leaves_no_capture(cuda, tmp_path):
    with dilu.load(gpu_artifact(tmp_path)) as session:
        twice = session.function("twice")
        twice(X)
        cuda.fail("launch", 1)
        with pytest.raises(DiluError, match="launching the kernel double"):
            twice(X)
        np.testing.assert_array_equal(twice(X), 2 * X)


def test_too_much_shared_memory_for_this_device(cuda, tmp_path):
    cuda.shared(48 << 10)
    message = "no variant of the kernel touch fits cuda:0 .* more than the 49152 bytes"
    with pytest.raises(DiluError, match=message):
        dilu.load(gpu_artifact(tmp_path))


def test_a_program_that_cannot_be_read(cuda, tmp_path):
    artifact = gpu_artifact(tmp_path)
    artifact.files["kernels/cuda-80/program.json"] = b'{"kernels": []}'
    with pytest.raises(DiluError, match=r"the program kernels/cuda-80/program.json of gpu cannot"):
        dilu.load(artifact)


def test_kernels_of_two_artifacts_with_the_same_file_names(cuda):
    """A device outlives a session: another artifact's code is not taken for this one's."""
    device = open_device("cuda")
    images = {"a": b"BINARY one\nf\n", "b": b"BINARY other\nf\n"}

    def code(name: str) -> KernelCode:
        read = lambda _: images[name]
        return KernelCode(
            name, "loops", "f", (), 32, 0, 0, {}, "module.py", "f.cubin", None, read
        )  # fmt: skip

    with device.active():
        loaded = [device.load(code(name), text=False) for name in "aba"]
    assert loaded[0].module != loaded[1].module
    assert loaded[0].module == loaded[2].module
    device.close()

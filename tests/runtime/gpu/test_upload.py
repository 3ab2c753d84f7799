from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import gpu_artifact

import dilu
from dilu.errors import DiluError
from dilu.runtime.artifact.weights import Weights
from dilu.runtime.gpu.open_device import open_device
from dilu.runtime.gpu.upload import has_nan, layout, upload


@pytest.fixture
def device(cuda):
    device = open_device("cuda")
    yield device
    with device.active():
        device.close()


def uploaded(device, artifact, chunk):
    steps = []
    image = layout(artifact)
    weights = Weights(artifact)
    memory, nan = upload(
        device, artifact, weights, image, chunk=chunk, progress=lambda *s: steps.append(s)
    )
    content = np.empty(image.nbytes, np.uint8)
    with device.active():
        device.download(content, memory.address)
        device.synchronize()
    return image, content, nan, steps


@pytest.mark.parametrize("chunk", [1 << 20, 256, 100, 7])
def test_constants_are_dense_and_aligned(device, cuda, tmp_path, chunk):
    codes = np.random.default_rng(0).integers(0, 127, 256).astype(np.uint8)
    image, content, nan, steps = uploaded(device, gpu_artifact(tmp_path, codes=codes), chunk)
    assert image.offsets == {"w": 0, "codes": 768}
    assert image.nbytes == 1024
    w = content[:768].view(np.float32).reshape(3, 64)
    np.testing.assert_array_equal(w, np.repeat([[1], [10], [100]], 64, axis=1))
    np.testing.assert_array_equal(content[768:], codes)
    assert not nan
    assert steps[0] == ("upload weights", 0, 1024)
    assert cuda.held.host == 0 and cuda.held.events == 0
    copies = [int(line.split()[1]) for line in cuda.log if line.startswith("upload")]
    assert sum(copies) == 1024
    assert len(copies) <= 1024 / chunk + 5


def test_constants_that_are_not_aligned_leave_gaps(device, tmp_path):
    artifact = gpu_artifact(tmp_path)
    constants = artifact.manifest["constants"]
    constants["codes"] |= {"shape": [2, 100]}
    artifact.manifest["functions"][3]["constants"] = ["codes", "again", "w"]
    artifact.manifest["functions"][2]["constants"] = []
    constants["again"] = constants["codes"] | {}
    image, content, _, _ = uploaded(device, artifact, 300)
    assert image.offsets == {"codes": 0, "again": 0, "w": 256}  # the same bytes, once
    assert content[256:].view(np.float32)[64] == 10


@pytest.mark.parametrize("place", [0, 127, 128, 255])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_found(device, tmp_path, place, code):
    codes = np.zeros(256, np.uint8)
    codes[place] = code
    artifact = gpu_artifact(tmp_path, codes=codes)
    assert uploaded(device, artifact, 64)[2]
    artifact.manifest["constants"]["codes"]["format"] = "u8"  # not codes after all
    assert not uploaded(device, artifact, 64)[2]


def test_has_nan():
    codes = np.arange(256, dtype=np.uint8)
    finite = np.setdiff1d(codes, [0x7F, 0xFF])
    assert not has_nan(np.tile(finite, 20_000))
    assert has_nan(np.append(np.tile(finite, 20_000), np.uint8(0xFF)))
    assert not has_nan(finite[:0])


def test_kernels_for_nan_codes_are_used_where_there_are_any(cuda, tmp_path):
    codes = np.full(256, 0x7F, np.uint8)
    with dilu.load(gpu_artifact(tmp_path, codes=codes)) as session:
        session.function("decode")(np.zeros(1, np.uint16))
        assert session.target_reason.endswith("some weights are NaN, so kernels decode NaN codes")
    assert [launch.symbol for launch in cuda.launches] == ["row", "decode_nan_20us"]


def test_too_little_memory_is_said_before_anything_is_allocated(cuda, tmp_path):
    cuda.device(memory=3000)
    message = (
        r"not enough memory: .* needed \(weights 1\.0 kB, cache .*, working memory .*\), "
        r"3\.0 kB available on cuda:0 \(Fake GPU 0\)"
    )
    with pytest.raises(DiluError, match=message):
        dilu.load(gpu_artifact(tmp_path))
    assert not [line for line in cuda.log if line.startswith("allocate")]
    assert cuda.held.memory == 0


def test_memory_that_runs_out_all_the_same(cuda, tmp_path):
    cuda.fail("allocate", 2)
    message = r"allocating 1024 bytes on cuda:0 \(Fake GPU 0\): CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(DiluError, match=message + r"(.|\n)*hint: close what else uses the device"):
        dilu.load(gpu_artifact(tmp_path))
    assert cuda.held == type(cuda.held)(0, 0, 0, 0, 0, 0, cuda.held.contexts, 0)


def test_an_error_while_uploading_gives_back_what_was_taken(cuda, tmp_path):
    cuda.fail("upload", 1)
    with pytest.raises(DiluError, match="cuMemcpyHtoDAsync_v2: CUDA_ERROR_FAKE"):
        dilu.load(gpu_artifact(tmp_path))
    assert cuda.held.host == cuda.held.memory == cuda.held.modules == 0

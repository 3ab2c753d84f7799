"""Which target runs on which device."""

from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import add_target, gpu_artifact, gpu_target

import dilu
from dilu.errors import DiluError
from dilu.runtime.gpu.choose import fit, own_target
from dilu.runtime.gpu.device import DeviceInfo
from dilu.runtime.targets import choose_target


def info(backend: str, arch: str) -> DeviceInfo:
    return DeviceInfo(backend, 0, "a device", arch, 1 << 30, "1.0", 2)


@pytest.mark.parametrize(
    ("target", "arch", "how"),
    [
        ("cuda:80", "8.0", "code"),
        ("cuda:80", "8.6", "code"),
        ("cuda:86", "8.0", None),
        ("cuda:75", "8.0", "PTX"),
        ("cuda:80", "9.0", "PTX"),
        ("cuda:89", "12.0", "PTX"),
        ("cuda:90", "9.0", "code"),
        ("cuda:90", "10.0", None),
        ("cuda:100", "10.0", "code"),
        ("cuda:100", "10.3", None),
        ("cuda:120", "12.1", None),
        ("hip:gfx942", "gfx942:sramecc+:xnack-", "code"),
        ("hip:gfx942", "gfx950", None),
        ("hip:gfx942", "9.0", None),
    ],
)
def test_fit(target, arch, how):
    backend = "hip" if "gfx" in arch else "cuda"
    found = fit(gpu_target(target), info(backend, arch))
    assert (found and found.reason.split()[0]) == how
    assert found is None or found.text == (how == "PTX")


def test_the_target_of_a_device():
    assert own_target(info("cuda", "8.6")) == "cuda:86"
    assert own_target(info("hip", "gfx90a:sramecc+")) == "hip:gfx90a"


@pytest.mark.parametrize(
    ("capability", "target", "words"),
    [
        (86, "cuda:86", "cuda:86 code on compute capability 8.6 of cuda:0 (Fake GPU 0)"),
        (89, "cuda:86", "cuda:86 code on compute capability 8.9"),
        (90, "cuda:90", "cuda:90 code on compute capability 9.0"),
        (120, "cuda:86", "cuda:86 PTX on compute capability 12.0, compiled by its driver"),
    ],
)
def test_the_best_for_the_device(cuda, tmp_path, capability, target, words):
    cuda.device(capability=capability)
    artifact = gpu_artifact(tmp_path, "cuda:75", "cuda:80", "cuda:86", "cuda:90", "hip:gfx90a")
    choice = choose_target(artifact)
    assert (choice.target, choice.text) == (target, "PTX" in words)
    assert choice.reason.startswith(words)


def test_text_alone_is_loaded_where_the_binary_does_not_run(cuda, tmp_path):
    cuda.device(capability=90)
    with dilu.load(gpu_artifact(tmp_path, "cuda:80")) as session:
        x = np.ones(3, np.float32)
        np.testing.assert_array_equal(session.function("twice")(x), 2 * x)
    assert {line for line in cuda.log if line.startswith("module")} == {"module PTX"}


def test_the_cpu_where_there_is_no_device(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("DILU_GPU_LIBRARY", str(tmp_path / "no.so"))
    add_target(toy, "cuda:80")
    assert choose_target(toy).target == "cpu:baseline"


def test_a_gpu_before_the_cpu(toy, cuda):
    add_target(toy, "cuda:80")
    choice = choose_target(toy)
    assert choice.target == "cuda:80"
    assert choose_target(toy, device="cpu").target == "cpu:baseline"
    assert choose_target(toy, "cpu").target == "cpu:baseline"
    assert choose_target(toy, "cuda").target == "cuda:80"


def test_the_cpu_where_no_target_fits_the_device(toy, cuda):
    cuda.device(capability=75)
    add_target(toy, "cuda:80")
    assert choose_target(toy).target == "cpu:baseline"


def test_a_device_by_its_number(cuda, tmp_path):
    cuda.device(count=2)
    choice = choose_target(gpu_artifact(tmp_path), device="cuda:1")
    assert choice.device is not None and choice.device.info.index == 1


@pytest.mark.parametrize(("rank", "index"), [("0", 0), ("1", 1), ("2", 0)])
@pytest.mark.parametrize("device", [None, "cuda"])
def test_processes_take_turns_with_devices(cuda, monkeypatch, tmp_path, device, rank, index):
    cuda.device(count=2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    choice = choose_target(gpu_artifact(tmp_path), device=device)
    assert choice.device is not None and choice.device.info.index == index


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("wanted", "device", "message"),
    [
        (None, None, r"runs on this machine: cuda:80 fits no device here \(cuda:0 .* is 7.5\)"),
        (None, "cuda", r"which is 7.5: it has cuda:80\n.*dilu compile .* --target cuda:75"),
        ("cuda:80", None, r"no target of gpu runs on cuda:0 \(Fake GPU 0\), which is 7.5"),
        (None, "cpu", "no target of gpu runs on the CPU: it has cuda:80"),
        ("cuda:86", None, "no target 'cuda:86'"),
        (None, "cuda:x", "not a device: 'cuda:x'"),
        (None, "npu", r"no kind of device 'npu'(.|\n)*there are: cpu, cuda, hip"),
    ],
)  # fmt: skip
def test_what_does_not_run(cuda, monkeypatch, tmp_path, wanted, device, message, rank):
    cuda.device(capability=75)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(DiluError, match=message):
        choose_target(gpu_artifact(tmp_path), wanted, device)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_no_driver_for_what_was_asked_for(monkeypatch, tmp_path, rank):
    monkeypatch.setenv("DILU_GPU_LIBRARY", str(tmp_path / "no.so"))
    monkeypatch.setenv("LOCAL_RANK", rank)
    artifact = gpu_artifact(tmp_path)
    with pytest.raises(DiluError, match="cuda:80 has no device here: no driver for cuda devices"):
        choose_target(artifact, "cuda:80")
    with pytest.raises(DiluError, match="no driver for cuda devices"):
        choose_target(artifact, device="cuda")

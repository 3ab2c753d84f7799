"""Devices of other packages, and doubles."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest
from fake_gpu import gpu_artifact

import dilu
from dilu.errors import DiluError
from dilu.runtime.gpu import open_device as devices
from dilu.runtime.gpu.native import CudaDevice
from dilu.runtime.gpu.open_device import backends, find_devices, open_device, parse_place


def opener(index: int) -> CudaDevice:
    """What another package's entry point names."""
    return CudaDevice(index)


@pytest.fixture
def plugged(monkeypatch):
    def plug(value: str) -> None:
        points = EntryPoints([EntryPoint("npu", value, devices.ENTRY_POINTS)])
        monkeypatch.setattr(devices, "entry_points", points.select)

    return plug


def test_places():
    assert parse_place("cuda") == ("cuda", 0)
    assert parse_place("hip:3") == ("hip", 3)
    with pytest.raises(DiluError, match="not a device: ':1'"):
        parse_place(":1")


def test_a_backend_of_another_package(cuda, plugged):
    import sys

    sys.modules["other_package"] = sys.modules[__name__]
    plugged("other_package:opener")
    try:
        assert backends() == ["cuda", "hip", "npu"]
        assert open_device("npu:0").info.name == "Fake GPU 0"
        assert len(find_devices("npu")[0]) == 1
    finally:
        del sys.modules["other_package"]


def test_a_package_that_cannot_be_loaded(plugged):
    plugged("no_such_package:opener")
    with pytest.raises(DiluError, match="brings devices 'npu' cannot be loaded: No module"):
        open_device("npu")


def test_an_opener_of_the_program(cuda, monkeypatch, tmp_path):
    opened = []

    def double(index: int) -> CudaDevice:
        if index:
            raise DiluError("only one")
        opened.append(CudaDevice(0))
        return opened[-1]

    monkeypatch.setitem(devices.OPENERS, "cuda", double)
    with dilu.load(gpu_artifact(tmp_path)) as session:
        assert session.engine.device is opened[0]


def test_an_open_device(cuda, tmp_path):
    device = open_device("cuda")
    with dilu.load(gpu_artifact(tmp_path), device=device) as session:
        assert session.engine.device is device

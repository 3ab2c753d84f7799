"""Sums and gathering on devices: the bits that ranks make on the host."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import InterpretedDevice

from dilu.errors import DiluError
from dilu.runtime.gpu import meet_on_device
from dilu.runtime.gpu.array import Memory
from dilu.runtime.gpu.bind import BoundCollective
from dilu.runtime.gpu.meet_on_device import OnDevice, meeting_place
from dilu.runtime.gpu.program import CollectiveStep
from dilu.runtime.mesh.host import ONE_STEP, _add
from dilu.runtime.mesh.ranks import Ranks


class Group:
    """Ranks as threads, each with the backend of a process group."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=20)
        self.given: list[Any] = [None] * count

    def of(self, own: int) -> Any:
        def meet(given: torch.Tensor) -> list[torch.Tensor]:
            self.given[own] = given.clone()
            self.barrier.wait()
            found = list(self.given)
            self.barrier.wait()
            return found

        def allgather(out: torch.Tensor, x: torch.Tensor) -> Any:
            out.copy_(torch.cat(meet(x)))
            return SimpleNamespace(wait=lambda: None)

        def alltoall(out: torch.Tensor, x: torch.Tensor, *_: Any) -> Any:
            out.copy_(torch.stack([given[own] for given in meet(x)]))
            return SimpleNamespace(wait=lambda: None)

        return SimpleNamespace(_allgather_base=allgather, alltoall_base=alltoall)


def collected(
    xs: np.ndarray, step: CollectiveStep, result: tuple[int, ...]
) -> tuple[list[np.ndarray], list[int]]:
    """Return what every rank gets of `xs[ranks, rows, width]`, and the bytes that it sent."""
    count, rows, width = xs.shape
    group = Group(count)
    outs, sent = [np.zeros(result, xs.dtype) for _ in range(count)], [0] * count

    def run(own: int) -> None:
        device = InterpretedDevice()
        ranks = SimpleNamespace(
            groups={"tp": list(range(count))},
            guarded=lambda call, _: call(),
            wait=lambda works, _: [work.wait() for work in works],
        )
        host: Any = SimpleNamespace(ranks=ranks, sent_bytes=0, exchange=SimpleNamespace())
        meetings = OnDevice(device, host, {"tp": group.of(own)})
        x, y = device.allocate(xs[own].nbytes), device.allocate(outs[own].nbytes)
        device.upload(x, np.ascontiguousarray(xs[own]))
        meetings.collect(BoundCollective(step, x, y), rows, width)
        device.download(outs[own], y)
        sent[own] = host.sent_bytes

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outs, sent


def step_of(gather: bool, itemsize: int, bfloat: bool) -> CollectiveStep:
    return CollectiveStep(gather, "tp", itemsize, bfloat, "R", "W", ("slot", 0), ("slot", 1))


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 1, 7), (3, 2, ONE_STEP // 3), (2, 1, ONE_STEP)])
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_sums(shape, kind):
    x = torch.randn(shape)
    x = {"f32": x, "bf16": x.bfloat16(), "f16": x.half()}[kind]
    bits = x.view(torch.int32 if kind == "f32" else torch.int16).numpy()
    bits = bits.view(f"u{x.element_size()}")
    outs, sent = collected(bits, step_of(False, x.element_size(), kind == "bf16"), shape[1:])
    want = np.zeros(shape[1:], bits.dtype)
    _add(want, kind == "bf16", bits)
    for out in outs:
        np.testing.assert_array_equal(out, want)
    if shape[0] > 2 and bits[0].nbytes > ONE_STEP:  # in two steps: a part of all, twice
        part = -(-bits[0].size // shape[0]) * bits.itemsize
        assert set(sent) == {2 * (shape[0] - 1) * part}
    else:
        assert set(sent) == {(shape[0] - 1) * bits[0].nbytes}


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
def test_gathering(dtype, rng):
    xs = rng.integers(0, 200, (3, 4, 5)).astype(dtype)
    outs, _ = collected(xs, step_of(True, xs.itemsize, False), (4, 3, 5))
    for out in outs:
        np.testing.assert_array_equal(out, xs.transpose(1, 0, 2))


class Lost:
    """Ranks that are gone: a meeting fails, and `abort` ends what waits for them, or waits, too."""

    def __init__(self, aborts: Any) -> None:
        self.device, self.given_up, self.aborted = InterpretedDevice(), False, 0
        ranks = SimpleNamespace(groups={"tp": [0, 1]}, guarded=self.fail, give_up=self.give_up)
        host: Any = SimpleNamespace(ranks=ranks, sent_bytes=0, exchange=SimpleNamespace())
        group = SimpleNamespace(_allgather_base=None, abort=self.abort)
        self.aborts = aborts
        self.meetings = OnDevice(self.device, host, {"tp": group, "ep": group})

    def fail(self, *_: Any) -> None:
        raise DiluError("rank 1 of 2 stopped answering")

    def give_up(self) -> None:
        self.given_up = True

    def abort(self) -> None:
        self.aborts()
        self.aborted += 1


def test_ranks_that_are_gone_end_what_waits_for_them():
    both = threading.Barrier(2, timeout=5)  # each waits for the device, and so for the other
    lost = Lost(both.wait)
    x = Memory(lost.device, 8)
    with pytest.raises(DiluError, match="rank 1 of 2"):
        lost.meetings.collect(BoundCollective(step_of(False, 4, False), x.address, x.address), 1, 2)
    assert lost.aborted == 2
    assert not lost.device.stuck and not lost.given_up
    x.free()
    assert not lost.device.memory


def test_a_device_that_waits_for_ever_is_asked_for_nothing(monkeypatch):
    monkeypatch.setattr(meet_on_device, "_GRACE", 0.1)
    ended = threading.Event()
    lost = Lost(ended.wait)
    x = Memory(lost.device, 8)
    with pytest.raises(DiluError, match="rank 1 of 2"):
        lost.meetings.collect(BoundCollective(step_of(False, 4, False), x.address, x.address), 1, 2)
    ended.set()
    assert lost.device.stuck and lost.given_up
    x.free()
    assert len(lost.device.memory) == 1  # to free it would wait, too


@pytest.mark.parametrize(
    ("places", "kind", "text"),
    [
        ([["nccl", "a"], None], None, "ranks meet on the host"),
        ([None, None], None, "ranks meet on the host"),
        ([["nccl", "a"], ["gloo", "b"]], None, "ranks meet on the host"),
        ([["nccl", "a"], ["nccl", "a"]], None, "ranks meet on the host, since some share a device"),
        ([["nccl", "a"], ["nccl", "b"]], "nccl", "ranks meet on their devices, by nccl"),
    ],
)
def test_ranks_agree_on_where_they_meet(monkeypatch, places, kind, text):
    ranks: Any = object.__new__(Ranks)
    ranks.rank, ranks.size, ranks.mesh = 0, 2, {"dp": 1, "ep": 1, "tp": 2}
    ranks.groups = {"ep": [0], "tp": [0, 1]}
    made = []
    backend = SimpleNamespace(_get_backend=lambda device: f"backend on {device.type}")
    ranks._dist = SimpleNamespace(
        new_group=lambda group, **options: made.append((group, options["backend"])) or backend
    )
    monkeypatch.setattr(ranks, "gather", lambda own: places)
    found, how = ranks.on_devices(places[0])
    assert how == text
    assert found == ({"tp": "backend on cuda"} if kind else {})
    assert made == ([([0, 1], kind)] if kind else [])


@pytest.mark.slow
def test_a_process_that_gave_up_ends():
    code = "from dilu.runtime.mesh import ranks; r = object.__new__(ranks.Ranks); r.give_up()"
    code += "; print('said', end=''); ranks._leave()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "said")


def test_where_ranks_meet(monkeypatch):
    device: Any = InterpretedDevice()
    assert meeting_place(device) is None
    monkeypatch.setenv("DILU_COLLECTIVES", "device")
    place = meeting_place(device)
    assert place is not None and place[0] == "gloo"
    monkeypatch.setenv("DILU_COLLECTIVES", "host")
    assert meeting_place(device) is None

"""Where ranks meet between the launches of a call, on the fake driver."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from fake_gpu import DOUBLE, P, Q, R, gpu_artifact, launch, plan, program, read_f32, step

from dilu.runtime.gpu.array import DeviceArray
from dilu.runtime.gpu.bind import Addresses, arena_bytes
from dilu.runtime.gpu.executor import Executor
from dilu.runtime.gpu.open_device import open_device
from dilu.runtime.gpu.program import parse_program

N, CAPACITY = 6, 20
MADE = ("result", 1)


def sharded_program() -> dict[str, Any]:
    """Double, meet, double; then rows for experts, which are doubled, too."""
    numbers = {"choices": 1, "width": 4, "itemsize": 4, "made_itemsize": 4, "ranks": 2, "slots": 2}
    routed = {
        "routed": 1, "symbol": "A", "capacity": CAPACITY, "tokens": "N", **numbers, "x": list(P),
        "indices": list(Q), "placement": list(Q), "constants": [], "result": list(MADE),
    }  # fmt: skip
    collective = {
        "gather": False, "axis": "tp", "itemsize": 4, "bfloat": False, "rows": 1, "width": "N",
        "x": ["slot", 0], "result": ["slot", 1],
    }  # fmt: skip
    plans = [
        plan(
            "met", ["4*N", "4*N"],
            step(launch(DOUBLE, ["N", 1, 1], P, ("slot", 0), "N")),
            collective,
            step(launch(DOUBLE, ["N", 1, 1], ("slot", 1), R, "N")),
            routed,
        ),
        plan("body", [], step(launch(DOUBLE, ["A", 1, 1], P, R, "4*A"), scratch=("4*A",))),
    ]  # fmt: skip
    entries = [{"plan": 0, "symbols": ["N"], "work": 1}]
    return {"kernels": program()["kernels"], "plans": plans, "entries": entries}


class Met:
    """Adds one at a collective; hands as many rows to the work on them as `rows` says."""

    def __init__(self, device: Any, rows: list[int]) -> None:
        self.device, self.rows = device, rows
        self.seen: list[Any] = []

    def collect(self, bound: Any, rows: int, width: int) -> None:
        self.seen.append(("collect", rows, width))
        values = np.array(read_f32(bound.x, width), np.float32) + 1
        self.device.upload(bound.result, values)

    def route(self, bound: Any, tokens: int, work: Any) -> None:
        self.seen.append(("route", tokens))
        for count in self.rows:
            came = np.arange(4 * count, dtype=np.float32)
            self.device.upload(bound.rows, came)
            work(count)
            assert read_f32(bound.made, 4 * count) == (2 * came).tolist()


@pytest.fixture
def made(cuda, tmp_path):
    """Return (executor, meetings, a call, where its result is)."""
    device = open_device("cuda:0")
    met = Met(device, [3])
    whole = parse_program(sharded_program())
    artifact = gpu_artifact(tmp_path)
    executor = Executor(device, artifact, "cuda:80", whole, text=False, meetings=met)  # type: ignore[arg-type]
    with device.active():
        executor.load({}, nan=False)
        x, y, other, arena = (
            DeviceArray.empty(device, [n], "u8")
            for n in (4 * N, 4 * N, 16 * N, arena_bytes(whole, 0, {"N": N}))
        )
        device.upload(x.address, np.arange(N, dtype=np.float32))
        at = Addresses((x.address, 0), (), (), (y.address, other.address), arena.address)
        cuda.clear()
        yield executor, met, lambda **exact: executor.run(0, {"N": N}, at, exact or None), y
        executor.close()
    device.close()


def test_what_lies_between_two_meetings_is_a_graph(made, cuda):
    _, met, call, y = made
    want = [2 * (2 * n + 1) for n in range(N)]
    for _ in range(3):
        call()
        assert read_f32(y.address, N) == want
    assert met.seen == 3 * [("collect", 1, N), ("route", N)]
    calls = Counter(line.split()[0] for line in cuda.log)
    # One by one the first time; then two graphs and the one for rows, made once.
    assert (calls["graph"], calls["replay"]) == (3, 6)


def test_meetings_know_nothing_of_padding(made):
    _, met, call, _ = made
    call(N=4)
    assert met.seen == [("collect", 1, 4), ("route", 4)]


def test_work_on_few_numbers_of_rows_is_kept(made, cuda):
    executor, met, call, _ = made
    met.rows = [1, 1, 2, 2, 3, 3, 4, 4, CAPACITY, CAPACITY]
    for _ in range(3):
        call()
    assert cuda.held.graphs == 2 + 4
    executor.forget()
    assert cuda.held.graphs == 0


def test_memory_for_the_most_rows(made):
    executor, *_ = made
    # Of 20 rows of 16 bytes, 20 i64 and 20 f32, in multiples of 256 bytes.
    rows, slots, scratch = 512, 256, 256
    assert arena_bytes(executor.program, 0, {"N": N}) == 2 * 256 + 2 * rows + slots + scratch

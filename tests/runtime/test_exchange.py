"""Rows to experts and back, of several ranks in one process: each a thread, with a fake of what
connects processes."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from dilu.runtime.exchange import Exchange, _Routed


class Meeting:
    """Where threads hand things to each other."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=20)
        self.table: list = [None] * count

    def all(self, rank: int, value):
        self.table[rank] = value
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found


class FakeRanks:
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting = rank, meeting
        self.expert_ranks = list(range(len(meeting.table)))

    def gather_counts(self, array):
        return np.stack(self.meeting.all(self.rank, array))

    def all_to_all(self, out, counts, rows, sent):
        parts = self.meeting.all(self.rank, np.split(rows, np.cumsum(sent)[:-1]))
        mine = [part[self.rank] for part in parts]
        assert [len(part) for part in mine] == list(counts)
        out[:] = np.concatenate(mine)

    def wait(self, work):
        pass


def exchanged(tokens, indices, placement, capacity):
    """Return what comes back to every rank, its exchange, and the largest round; expert e adds e,
    and the weights that a rank would need are those of its own slots."""
    meeting = Meeting(len(tokens))
    found: list = [None] * len(tokens)

    def work(rank: int) -> None:
        x, chosen = tokens[rank], indices[rank]
        exchange = Exchange(FakeRanks(rank, meeting))
        result = np.full((*chosen.shape, x.shape[1]), np.nan, np.float32)
        table = np.ascontiguousarray(placement)
        routed = _Routed(
            *chosen.shape, x.shape[1], 4, *placement.shape, capacity,
            x.ctypes.data, chosen.ctypes.data, table.ctypes.data, result.ctypes.data,
        )  # fmt: skip
        exchange.begin()
        answer = SimpleNamespace(contents=routed)
        largest = 0
        while (rows := exchange._answer(0, answer)) >= 0:
            largest = max(largest, rows)
            if rows:
                shape = (rows, x.shape[1])
                taken = _array(routed.rows, shape, np.float32)
                slots = _array(routed.slots_of, (rows,), np.int64)
                _array(routed.made, shape, np.float32)[:] = taken + placement[rank][slots][:, None]
        exchange.finish()
        found[rank] = result, exchange, largest

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(tokens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in found
    return found


def _array(address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def check(tokens, indices, placement, capacity):
    found = exchanged(tokens, indices, placement, capacity)
    for x, chosen, (result, _, largest) in zip(tokens, indices, found, strict=True):
        np.testing.assert_array_equal(result, x[:, None] + chosen[..., None].astype(np.float32))
        assert largest <= capacity
    return found


PLACEMENT = np.array([[0, 1, 2], [3, 4, 5], [0, 4, 6]])  # 0 and 4 are held twice


@pytest.mark.parametrize("capacity", [1, 3, 1000])
def test_every_row_comes_back(capacity):
    rng = np.random.default_rng(capacity)
    counts = [7, 0, 12]
    tokens = [rng.normal(size=(n, 5)).astype(np.float32) for n in counts]
    indices = [rng.integers(0, 7, (n, 2)) for n in counts]
    check(tokens, indices, PLACEMENT, capacity)


def test_all_tokens_for_one_expert_is_slower_and_not_wrong():
    rng = np.random.default_rng(1)
    tokens = [rng.normal(size=(40, 3)).astype(np.float32) for _ in range(3)]
    indices = [np.full((40, 1), 6) for _ in range(3)]
    found = check(tokens, indices, PLACEMENT, 16)
    assert [exchange.rounds for _, exchange, _ in found] == [8, 8, 8]  # 120 rows, 16 at a time
    sent = [exchange.sent_bytes for _, exchange, _ in found]
    assert sent == [40 * 3 * 4, 40 * 3 * 4, 80 * 3 * 4]  # out, out, and what is sent back
    assert all(exchange.load[0].tolist() == [0, 0, 0, 0, 0, 0, 40] for _, exchange, _ in found)


def test_replicas_share_equally():
    tokens = [np.zeros((30, 1), np.float32) for _ in range(3)]
    indices = [np.zeros((30, 1), np.int64) for _ in range(3)]
    found = check(tokens, indices, PLACEMENT, 45)
    assert [largest for _, _, largest in found] == [45, 0, 45]


def test_no_tokens_anywhere():
    tokens = [np.zeros((0, 4), np.float32) for _ in range(3)]
    check(tokens, [np.zeros((0, 2), np.int64) for _ in range(3)], PLACEMENT, 8)


def test_an_error_is_raised_when_the_function_has_returned():
    exchange = Exchange(FakeRanks(0, Meeting(1)))
    exchange.begin()
    broken = SimpleNamespace(contents=SimpleNamespace(placement=None))
    assert exchange._answer(0, broken) == exchange._answer(0, broken) == -1
    with pytest.raises(AttributeError):
        exchange.finish()

"""What native code asks of other ranks, of several ranks in one process: each a thread, with a fake
of what connects processes."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest

from dilu.runtime.mesh.exchange import Routed
from dilu.runtime.mesh.host import Collective, Host
from dilu.runtime.mesh.ranks import AXES


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


class FakeGather:
    def __init__(self, ranks, sizes) -> None:
        self.ranks, self.all = ranks, [np.empty(sum(sizes), np.uint8)]

    def meet(self, own) -> int:
        self.all[0][:] = np.concatenate(self.ranks.meeting.all(self.ranks.rank, own.copy()))
        return 0


class FakeExchange:
    def __init__(self, ranks, sizes) -> None:
        self.ranks, self.most = ranks, sizes[ranks.rank]

    def meet(self, given) -> list:
        parts = self.ranks.meeting.all(self.ranks.rank, [part.copy() for part in given])
        room = np.zeros((len(parts), self.most), np.uint8)
        for row, part in zip(room, parts, strict=True):
            row[: part[self.ranks.rank].size] = part[self.ranks.rank]
        return list(room)


class FakeRanks:
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting = rank, meeting
        self.groups = {axis: list(range(len(meeting.table))) for axis in ("ep", "tp")}

    def small_gather(self, axis, sizes):
        return FakeGather(self, sizes) if sum(sizes) < 1000 else None

    def small_exchange(self, axis, sizes):
        return FakeExchange(self, sizes) if max(sizes) < 400 else None

    def guarded(self, call, what):
        return call()

    def gather_along(self, axis, array, what):
        return np.stack(self.meeting.all(self.rank, array))

    def gather_rows_along(self, axis, rows, counts, what):
        parts = self.meeting.all(self.rank, rows.copy())
        assert [len(part) for part in parts] == list(counts)
        return np.concatenate(parts)

    def all_to_all(self, axis, out, sizes, rows, what):
        parts = self.meeting.all(self.rank, np.split(rows, np.cumsum(sizes[self.rank])[:-1]))
        mine = [part[self.rank] for part in parts]
        assert [len(part) for part in mine] == sizes[:, self.rank].tolist()
        out.view(np.uint8)[:] = np.concatenate(mine).view(np.uint8)

    def sent_rows(self, axis, sizes):
        return int(sizes[self.rank].sum() - sizes[self.rank, self.rank])

    def wait(self, works, what):
        pass


def exchanged(tokens, indices, placement, capacity):
    """Return what comes back to every rank, its exchange, and the largest round; expert e adds e,
    and the weights that a rank would need are those of its own slots."""
    meeting = Meeting(len(tokens))
    found: list = [None] * len(tokens)

    def work(rank: int) -> None:
        x, chosen = tokens[rank], indices[rank]
        host = Host(FakeRanks(rank, meeting))
        result = np.full((*chosen.shape, x.shape[1]), np.nan, np.float32)
        table = np.ascontiguousarray(placement)
        routed = Routed(
            *chosen.shape, x.shape[1], x.itemsize, 4, *placement.shape, capacity,
            x.ctypes.data, chosen.ctypes.data, table.ctypes.data, result.ctypes.data,
        )  # fmt: skip
        host.begin()
        largest = 0
        while (rows := host.next(0, ctypes.addressof(routed))) >= 0:
            largest = max(largest, rows)
            if rows:
                shape = (rows, x.shape[1])
                taken = _array(routed.rows, shape, x.dtype)
                slots = _array(routed.slots_of, (rows,), np.int64)
                _array(routed.made, shape, np.float32)[:] = taken + placement[rank][slots][:, None]
        host.finish()
        found[rank] = result, host.exchange, largest

    run_threads(work, len(tokens))
    assert None not in found
    return found


def run_threads(work, count: int) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def _array(address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def check(tokens, indices, placement, capacity):
    found = exchanged(tokens, indices, placement, capacity)
    for x, chosen, (result, _, largest) in zip(tokens, indices, found, strict=True):
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, x[:, None] + chosen[..., None].astype(np.float32))
        assert largest <= capacity
    return found


PLACEMENT = np.array([[0, 1, 2], [3, 4, 5], [0, 4, 6]])  # 0 and 4 are held twice


@pytest.mark.parametrize("capacity", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_row_comes_back(dtype, capacity):
    rng = np.random.default_rng(capacity)
    counts = [7, 0, 12]
    tokens = [rng.normal(size=(n, 5)).astype(dtype) for n in counts]
    indices = [rng.integers(0, 7, (n, 2)) for n in counts]
    check(tokens, indices, PLACEMENT, capacity)


@pytest.mark.parametrize("choices", [3, 4])
@pytest.mark.parametrize("capacity", [1, 5, 9, 1000])  # the smallest: too few rows for gathering
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_all_rows_for_all_ranks_where_there_are_few(dtype, choices, capacity):
    rng = np.random.default_rng(capacity)
    counts = [7, 0, 12]
    tokens = [rng.normal(size=(n, 5)).astype(dtype) for n in counts]
    indices = [np.argsort(rng.random((n, 7)))[:, :choices].copy() for n in counts]
    found = check(tokens, indices, PLACEMENT, capacity)
    if capacity < 5:
        return
    back = 0
    for rank, chosen in enumerate(indices):
        token = np.arange(chosen.size) // choices
        for t, expert in zip(token, chosen.reshape(-1), strict=True):
            holders = [r for r, own in enumerate(PLACEMENT) if expert in own]
            back += holders[(t + rank) % len(holders)] != rank
    # To both others: the row and its experts.
    out = 2 * sum(counts) * (5 * tokens[0].itemsize + choices * 4)
    assert sum(exchange.sent_bytes for _, exchange, _ in found) == out + back * 5 * 4


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
    host = Host(FakeRanks(0, Meeting(1)))
    host.begin()
    broken = ctypes.addressof(routed := Routed(placement=None))
    assert host.next(0, broken) == host.next(0, broken) == -1 and routed
    with pytest.raises(ValueError):
        host.finish()


# ---------------------------------------------------------------------------- sums and gathering


def collected(parts: list[np.ndarray], *, gather: bool = False, bfloat: bool = False):
    """Return what every rank gets of the ranks' parts `[rows, width]`, and what it sent."""
    meeting = Meeting(len(parts))
    found: list = [None] * len(parts)

    def work(rank: int) -> None:
        x = np.ascontiguousarray(parts[rank])
        width = x.shape[1] * (len(parts) if gather else 1)
        result = np.zeros((x.shape[0], width), x.dtype)
        host = Host(FakeRanks(rank, meeting))
        host.begin()
        asked = Collective(
            gather, AXES.index("tp"), x.itemsize, bfloat, *x.shape, x.ctypes.data,
            result.ctypes.data,
        )  # fmt: skip
        for _ in range(2):  # the second time, what is small is ready
            result[:] = 0
            host.collect(0, ctypes.addressof(asked))
        host.finish()
        found[rank] = result, host.sent_bytes // 2

    run_threads(work, len(parts))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (100, 1001), (0, 4)])
def test_sums_are_added_in_the_order_of_ranks(ranks, shape):
    rng = np.random.default_rng(ranks)
    parts = [rng.normal(size=shape).astype(np.float32) * 10.0**i for i in range(ranks)]
    want = parts[0]
    for other in parts[1:]:
        want = want + other
    for got, sent in collected(parts):
        np.testing.assert_array_equal(got, want)
        assert sent <= (ranks - 1) * want.nbytes
    if want.nbytes > 1 << 16 and ranks > 2:  # a part of it to each, and the sum of a part back
        assert sent == 2 * (ranks - 1) * 4 * -(-want.size // ranks)


def test_bf16_is_added_in_f32_and_rounded_once():
    values = np.array([[1.0, 1.0, 3.0, np.nan, np.inf]], np.float32)
    other = np.array([[2**-8, 2**-8 + 2**-15, -3.0, 1.0, 1.0]], np.float32)
    parts = [(v.view(np.uint32) >> 16).astype(np.uint16) for v in (values, other)]
    for got, _ in collected(parts, bfloat=True):
        wide = (got.astype(np.uint32) << 16).view(np.float32)
        # Half of the last place goes to the even neighbour, a little more up.
        np.testing.assert_array_equal(wide, [[1.0, 1 + 2**-7, 0.0, np.nan, np.inf]])


def test_gathered_rows_lie_side_by_side():
    parts = [np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * rank for rank in range(3)]
    for got, sent in collected(parts, gather=True):
        np.testing.assert_array_equal(got, np.concatenate(parts, 1))
        assert sent == 2 * 24

"""Small messages that are waited for ahead: the right bytes, however often, however few."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dilu.runtime.mesh.swap import SmallExchange, SmallGather, start_swap


class Network:
    """Ranks as threads. A receive that is posted takes the next message of its tag, as Gloo's."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, int, int], deque[np.ndarray]] = {}
        self.new = threading.Condition()


class Group:
    """One rank's backend of a process group."""

    def __init__(self, network: Network, own: int) -> None:
        self.network, self.own = network, own

    def rank(self) -> int:
        return self.own

    def send(self, tensors: list[Any], rank: int, tag: int) -> _Done:
        with self.network.new:
            key = (self.own, rank, tag)
            self.network.sent.setdefault(key, deque()).append(tensors[0].numpy().copy())
            self.network.new.notify_all()
        return _Done()

    def recv(self, tensors: list[Any], rank: int, tag: int) -> _Receipt:
        return _Receipt(self.network, (rank, self.own, tag), tensors[0].numpy())


class _Done:
    def wait(self) -> None: ...


class _Receipt:
    def __init__(self, network: Network, key: tuple[int, int, int], target: np.ndarray) -> None:
        self.network, self.key, self.target = network, key, target

    def wait(self) -> None:
        with self.network.new:
            arrived = self.network.new.wait_for(lambda: self.network.sent.get(self.key), 10)
            assert arrived, "nothing came"
            message = self.network.sent[self.key].popleft()
        assert len(message) <= len(self.target)
        self.target[: len(message)] = message


def on_ranks(count: int, work: Callable[[Group], Any]) -> list[Any]:
    """Return what `work` returns on every rank."""
    network, found = Network(), [None] * count
    errors: list[BaseException] = []

    def run(own: int) -> None:
        try:
            found[own] = work(Group(network, own))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert not any(network.sent.values()), "messages that nobody took"
    return found


def content(rank: int, turn: int, size: int) -> np.ndarray:
    return ((np.arange(size) * 7 + 31 * rank + 101 * turn) % 251).astype(np.uint8)


@pytest.mark.parametrize("sizes", [(8,), (16, 16), (5, 0, 9), (0, 0, 0, 3)])
def test_all_get_what_each_has(sizes):
    def work(group: Group) -> None:
        own = group.rank()
        ready = SmallGather(group, sizes, 1)
        for turn in range(5):
            found = ready.all[ready.meet(content(own, turn, sizes[own]))]
            want = [content(rank, turn, size) for rank, size in enumerate(sizes)]
            np.testing.assert_array_equal(found, np.concatenate(want))

    on_ranks(len(sizes), work)


def test_what_came_stays_until_the_next_time_but_one():
    def work(group: Group) -> None:
        ready = SmallGather(group, (4, 4), 1)
        first = ready.meet(content(group.rank(), 0, 4))
        ready.meet(content(group.rank(), 1, 4))
        np.testing.assert_array_equal(ready.parts[first][1 - group.rank()], content(
            1 - group.rank(), 0, 4
        ))  # fmt: skip

    on_ranks(2, work)


@pytest.mark.parametrize("most", [(12, 12), (6, 0, 20)])
def test_each_gets_what_is_for_it(most):
    def given(source: int, target: int, turn: int) -> np.ndarray:
        return content(
            10 * source + target, turn, (3 * source + 5 * target + turn) % (most[target] + 1)
        )

    def work(group: Group) -> None:
        own = group.rank()
        ready = SmallExchange(group, most, 1)
        for turn in range(4):
            came = ready.meet([given(own, n, turn) for n in range(len(most))])
            for source in range(len(most)):
                want = given(source, own, turn)
                if source != own:
                    np.testing.assert_array_equal(came[source][: len(want)], want)

    on_ranks(len(most), work)


def test_messages_of_different_tags_do_not_mix():
    def work(group: Group) -> None:
        own = group.rank()
        ready = {tag: SmallGather(group, (tag, tag), tag) for tag in (1, 2, 3)}
        for turn, tag in enumerate((1, 3, 2, 2, 1, 3)):
            found = ready[tag].all[ready[tag].meet(content(own, turn, tag))]
            want = [content(rank, turn, tag) for rank in range(2)]
            np.testing.assert_array_equal(found, np.concatenate(want))

    on_ranks(2, work)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_swap_of_any_sizes(count):
    def size(source: int, target: int) -> int:
        return (source + 2 * target) % 3

    def work(group: Group) -> None:
        own = group.rank()
        sources = [content(own, n, size(own, n)) for n in range(count)]
        targets = [np.zeros(size(n, own), np.uint8) for n in range(count)]
        for receipt in start_swap(group, sources, targets):
            receipt.wait()
        for n, target in enumerate(targets):
            np.testing.assert_array_equal(target, content(n, own, size(n, own)))

    on_ranks(count, work)

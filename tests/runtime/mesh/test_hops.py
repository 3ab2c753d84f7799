"""Rows in two hops arrive as in one, and the bytes are those that are counted."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dilu.runtime.mesh.hops import TwoHops, sent_rows, worth_two_hops

WIDTH = 3


class Network:
    """Ranks as threads; each keeps what it sent, by the pair of ranks, in order."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.mail: dict[tuple[int, int], list[np.ndarray]] = {}
        self.new = threading.Condition()

    def swap(self, own: int):
        def start(sources, targets):
            with self.new:
                for n, source in enumerate(sources):
                    if source.size:
                        self.mail.setdefault((own, n), []).append(source.copy())
                self.new.notify_all()
            return [_Receipt(self, n, own, t) for n, t in enumerate(targets) if t.size]

        return start


class _Receipt:
    def __init__(self, network: Network, source: int, own: int, target: np.ndarray) -> None:
        self.network, self.pair, self.target = network, (source, own), target

    def wait(self) -> None:
        with self.network.new:
            assert self.network.new.wait_for(lambda: self.network.mail.get(self.pair), 20)
            self.target[...] = self.network.mail[self.pair].pop(0)


@pytest.mark.parametrize(("machines", "local"), [(2, 4), (4, 2), (3, 3), (2, 2)])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_rows_arrive_in_the_order_of_their_sources(machines, local, most):
    rng = np.random.default_rng(machines * 10 + most)
    count = machines * local
    sizes = rng.integers(0, most + 1, (count, count))
    sizes[rng.integers(count)] = 0  # one has nothing to send
    cells = [[rng.integers(0, 256, (n, WIDTH), np.uint8) for n in row] for row in sizes]
    network = Network(count)
    found: list = [None] * count
    sent = [0] * count

    def work(own: int) -> None:
        out = np.zeros((sizes[:, own].sum(), WIDTH), np.uint8)
        swap = network.swap(own)

        def counted(sources, targets):
            sent[own] += sum(len(s) for n, s in enumerate(sources) if n != own)
            return swap(sources, targets)

        TwoHops(counted, out, sizes, np.concatenate(cells[own]), own, local).wait()
        found[own] = out

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for own in range(count):
        want = np.concatenate([cells[n][own] for n in range(count)])
        np.testing.assert_array_equal(found[own], want)
        assert sent[own] == sent_rows(sizes, own, local)


def test_what_one_hop_sends():
    sizes = np.arange(9).reshape(3, 3)
    assert [sent_rows(sizes, own, 1) for own in range(3)] == [1 + 2, 3 + 5, 6 + 7]


@pytest.mark.parametrize(
    ("ranks", "local", "worth"),
    [(8, 8, False), (8, 1, False), (4, 2, False), (8, 2, True), (8, 4, True), (12, 8, False),
     (32, 8, True)],
)  # fmt: skip
def test_two_hops_where_they_spare_messages(ranks, local, worth):
    assert worth_two_hops(ranks, local) == worth

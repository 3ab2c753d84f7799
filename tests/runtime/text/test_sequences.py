from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilu.errors import DiluError
from dilu.runtime.call.batch import pages_for
from dilu.runtime.text.sequences import PagePool, Sequence, Step, batch


def test_pages_for():
    assert [pages_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_take_and_give_back():
    pool = PagePool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.give_back([1])
    assert (pool.free, pool.used) == (2, 2)
    assert pool.take(2) == [1, 3]
    with pytest.raises(DiluError, match="the cache has 0 free pages, and 1 are needed"):
        pool.take(1)


def test_growing_keeps_what_is_owned():
    pool = PagePool(2)
    assert pool.take(2) == [0, 1]
    pool.grow(4)
    assert (pool.size, pool.take(2)) == (4, [2, 3])
    pool.grow(1)
    assert pool.size == 4


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_page_has_one_owner(demands):
    pool, owned = PagePool(12), []
    for demand in demands:
        if demand > pool.free:
            pool.give_back(owned.pop(0))
        else:
            owned.append(pool.take(demand))
        taken = [page for pages in owned for page in pages]
        assert len(taken) == len(set(taken)) == pool.used


def test_batch():
    one = Sequence([10, 11, 12, 13, 14], pages=[3, 0], done=3)
    two = Sequence([20, 21], pages=[5])
    steps = [Step(one, 5, (4,)), Step(two, 2, (0, 1))]
    tokens, positions, sequence, slots, pages, rows = batch(steps, page_size=4)
    assert tokens.tolist() == [13, 14, 20, 21]
    assert positions.tolist() == [3, 4, 0, 1]
    assert sequence.tolist() == [0, 0, 1, 1]
    assert slots.tolist() == [3 * 4 + 3, 0, 5 * 4, 5 * 4 + 1]
    assert pages.tolist() == [[3, 0], [5, 0]]
    assert rows.tolist() == [1, 2, 3]
    assert {a.dtype for a in (tokens, positions, sequence, slots, pages, rows)} == {
        np.dtype(np.int64)
    }


def test_an_empty_batch():
    tokens, _, _, slots, pages, rows = batch([], page_size=4)
    assert (tokens.shape, slots.shape, pages.shape, rows.shape) == ((0,), (0,), (0, 1), (0,))

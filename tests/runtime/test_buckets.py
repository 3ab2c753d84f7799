from __future__ import annotations

import numpy as np

from dilu.runtime.buckets import pad_batch, padded_count, padded_sizes, padded_tokens
from dilu.runtime.text.sequences import Sequence, Step, batch


def test_tokens():
    pairs = {0: 0, 1: 1, 15: 15, 16: 16, 17: 24, 24: 24, 25: 32, 33: 48, 49: 64, 65: 96}
    pairs |= {129: 192, 257: 384, 385: 512, 512: 512, 513: 1024, 1025: 1536}
    assert {n: padded_tokens(n) for n in pairs} == pairs
    ladder = {padded_tokens(n) for n in range(1, 513)}
    assert len(ladder) == 16 + 10


def test_counts():
    assert [padded_count(n) for n in (0, 1, 2, 3, 4, 5, 9)] == [0, 1, 2, 4, 4, 8, 16]


def test_a_padded_batch_holds_the_batch_and_writes_nothing_more():
    first = Sequence(list(range(10, 40)), [3, 0, 1, 2, 4, 5, 6, 7])
    second, third = Sequence([7], [8]), Sequence([8, 9], [9])
    steps = [Step(first, 30, (29,)), Step(second, 1, (0,)), Step(third, 2, (1,))]
    arrays = batch(steps, 4)
    sizes = padded_sizes({"T": 33, "S": 3, "P": 8, "R": 3, "B": 11})
    assert sizes == {"T": 48, "S": 4, "P": 8, "R": 4, "B": 11}
    padded = pad_batch(arrays, sizes)
    assert [a.shape for a in padded] == [(48,)] * 4 + [(4, 8), (4,)]
    for before, after in zip(arrays, padded, strict=True):
        part = after[tuple(slice(n) for n in before.shape)]
        np.testing.assert_array_equal(part, before)
    tokens, positions, sequence, slots, pages, rows = padded
    assert (slots[33:] == -1).all()
    for zero in (tokens[33:], positions[33:], sequence[33:], pages[3:], rows[3:]):
        assert not zero.any()
    assert all(a.dtype == np.int64 for a in padded)

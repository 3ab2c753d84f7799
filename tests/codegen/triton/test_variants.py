"""Tiles of products: what fits, and that every number of rows has its range."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from dilu.codegen.targets import GPUS
from dilu.codegen.triton.variants import Product, grouped, ranges, splits
from dilu.ir.types import symbol

PRODUCTS = [
    Product(N, K, step, x_bytes, w_bytes, two)
    for (N, K), step, (x_bytes, w_bytes), two in itertools.product(
        [(16, 16), (48, 64), (1536, 2048), (7168, 18432)],
        [16, 128],
        [(4, 1), (2, 1), (4, 4)],
        [False, True],
    )
]


@pytest.mark.parametrize("target", GPUS, ids=str)
def test_tiles_fit(target):
    gpu = target.gpu
    assert gpu is not None
    for p in PRODUCTS:
        for span in [*ranges(p, gpu, symbol("T")), *grouped(p, gpu)]:
            assert span.variants and len(set(span.variants)) == len(span.variants)
            for variant in span.variants:
                size = dict(variant.constants)
                assert all(n >= 16 and n & (n - 1) == 0 for n in size.values())
                assert size["BK"] <= p.step and p.step % size["BK"] == 0
                assert size["BN"] < 2 * max(p.N, 16) and size["BK"] < 2 * max(p.K, 16)
                assert 1 <= variant.warps <= 8 and variant.stages >= 1
                one = size["BM"] * size["BK"] * p.x_bytes
                one += size["BN"] * size["BK"] * p.w_bytes * (2 if p.two else 1)
                if variant.stages > 2:  # with fewer, compiling decides
                    assert one * (variant.stages - 1) <= gpu.shared


@pytest.mark.parametrize("target", GPUS, ids=str)
def test_every_number_of_rows_has_one_range(target):
    gpu = target.gpu
    assert gpu is not None
    for found in (ranges(PRODUCTS[-1], gpu, symbol("T")), grouped(PRODUCTS[-1], gpu)):
        assert found[0].low == 1 and found[-1].high is None
        assert [a.high + 1 for a in found[:-1] if a.high] == [b.low for b in found[1:]]
        assert all(span.rows(symbol("T")) is not None for span in found)
    for rows in (1, 16, 17, 64, 65, 4096):
        (span,) = ranges(PRODUCTS[-1], gpu, rows)
        assert span.low <= rows <= (span.high or rows) and span.rows(rows) is None


def test_k_is_cut_in_powers_of_two_where_columns_are_few():
    gpu = GPUS[2].gpu
    assert gpu is not None
    found = {p: splits(p, gpu) for p in PRODUCTS}
    assert all(1 <= n <= 16 and n & (n - 1) == 0 for n in found.values())
    assert splits(Product(64, 16384, 128, 2, 1), gpu) == 16
    assert splits(Product(64, 512, 128, 2, 1), gpu) == 1  # a part has four steps at least
    assert splits(Product(64 * gpu.programs, 16384, 128, 2, 1), gpu) == 1
    batched = replace(Product(64, 16384, 128, 2, 1), batch=gpu.programs)
    assert splits(batched, gpu) == 1

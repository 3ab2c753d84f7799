"""The largest numbers of rows: a row is one block, from which the largest is taken K times.

Numbers are compared as integers of the same order, in which both zeros are equal and NaN is the
largest; the smallest numbers are the largest in the opposite order. What was taken is told apart by
a mask, not by a value.
"""

import triton
import triton.language as tl


@triton.jit
def topk_ordered(bits, LARGEST: tl.constexpr, INFINITY: tl.constexpr):
    """Return the bits of floats, as signed integers, in the floats' order."""
    magnitude = bits & LARGEST
    order = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > INFINITY, LARGEST, order)


@triton.jit
def topk_key(x):
    """Return integers in the order of `x`: i32 or, where those do not suffice, i64."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return topk_ordered(bits, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)
    elif x.dtype == tl.float32:
        return topk_ordered(x.to(tl.int32, bitcast=True), 0x7FFFFFFF, 0x7F800000)
    elif x.dtype == tl.bfloat16:
        return topk_ordered(x.to(tl.int16, bitcast=True).to(tl.int32), 0x7FFF, 0x7F80)
    elif x.dtype == tl.float16:
        return topk_ordered(x.to(tl.int16, bitcast=True).to(tl.int32), 0x7FFF, 0x7C00)
    elif x.dtype == tl.int64 or x.dtype == tl.uint32:
        return x.to(tl.int64)
    else:
        return x.to(tl.int32)


@triton.jit
def topk_rows(
    x,
    values,
    indices,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,  # N filled up to a power of two
    R: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Store the K largest of R rows of N, descending, lower indices first among equals, and their
    indices; or the K smallest, ascending. Grid: ceil(rows / R)."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    column = tl.arange(0, BN)[None, :]
    here = row.to(tl.int64) * N
    alive = inside[:, None] & (column < N)
    key = topk_key(tl.load(x + (here[:, None] + column), mask=alive, other=0))
    if not LARGEST:
        key = ~key
    SMALLEST: tl.constexpr = -0x8000000000000000 if key.dtype == tl.int64 else -0x80000000
    there = row.to(tl.int64) * K
    for i in range(K):
        largest = tl.max(tl.where(alive, key, SMALLEST), 1)
        found = tl.min(tl.where(alive & (key == largest[:, None]), column, BN), 1)
        alive = alive & (column != found[:, None])
        tl.store(indices + there + i, found.to(tl.int64), mask=inside)
        tl.store(values + there + i, tl.load(x + here + found, mask=inside, other=0), mask=inside)

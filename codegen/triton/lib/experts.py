"""Routed experts as grouped products: assignments of tokens to experts, sorted by expert.

An assignment is a token's j-th choice, number `token * k + j`. A block is BM assignments of one
expert, the last ones of an expert filled up with the number of no assignment. No atomics: the
order is that of the assignments, so that results are the same every time.
"""

import triton
import triton.language as tl


@triton.jit
def count_assignments(indices, counts, total, E: tl.constexpr, BLOCK: tl.constexpr):
    """Store how many assignments an expert (the program's) has. An index out of range is that of
    the nearest expert."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, total, BLOCK):
        at = first + tl.arange(0, BLOCK)
        chosen = clamp_index(tl.load(indices + at, mask=at < total, other=0), E)
        found += ((chosen == expert) & (at < total)).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit
def place_assignments(
    indices,
    counts,
    order,
    expert_of,
    total,
    blocks,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
):
    """Write an expert's assignments where its blocks begin, and whose the blocks are: -1 for
    those of nobody, which the last program marks."""
    expert = tl.program_id(0)
    all_experts = tl.arange(0, EXPERTS)
    each = tl.load(counts + all_experts, mask=all_experts < E, other=0)
    padded = (each + (BM - 1)) // BM
    begin = tl.sum(tl.where(all_experts < expert, padded, 0), 0)
    own = tl.sum(tl.where(all_experts == expert, padded, 0), 0)
    place = begin * BM
    for first in range(0, total, BLOCK):
        at = first + tl.arange(0, BLOCK)
        chosen = clamp_index(tl.load(indices + at, mask=at < total, other=0), E)
        mine = ((chosen == expert) & (at < total)).to(tl.int32)
        rank = tl.cumsum(mine, 0) - mine
        tl.store(order + place + rank, at, mask=mine != 0)
        place += tl.sum(mine, 0)
    lanes = tl.arange(0, BM)
    tl.store(order + place + lanes, total + lanes * 0, mask=place + lanes < (begin + own) * BM)
    for block in range(begin, begin + own):
        tl.store(expert_of + block, expert)
    if expert == E - 1:
        for block in range(begin + own, blocks):
            tl.store(expert_of + block, -1)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))

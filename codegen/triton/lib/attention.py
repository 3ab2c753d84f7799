"""Paged, ragged, causal attention: online softmax over keys in steps of BN places.

Rows of a tile are BT tokens times BH query heads of one key head, filled up to BM rows. Scores are
kept in powers of two, statistics and sums in f32. A row whose token has a negative position sees
nothing and is zero, as is one whose scores are all -inf. Places that no token of the tile sees are
never read.

A head's DK numbers are read as D1 (the largest power of two in DK, at least 16) and the rest,
filled up to D2 (a power of two from 16, or 0); likewise the DV numbers of a value as V1 and V2.
SAME: `values` are `keys`, and a value the first DV numbers of its key; the tile of keys serves
twice where V1 is D1.
Operands of products have type DOT.

Queries stay in registers while keys pass, or, where BC is not 0, are read again for every step, BC
numbers of queries and keys at a time: wide heads in f32 would not fit.
"""

import triton
import triton.language as tl


@triton.jit
def attention_inside(inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return which of numbers FIRST to FIRST + WIDTH of the rows `inside` there are."""
    if FIRST + WIDTH > SIZE:
        return inside[:, None] & (FIRST + tl.arange(0, WIDTH) < SIZE)[None, :]
    else:
        return inside[:, None]


@triton.jit
def attention_load(base, at, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return numbers FIRST to FIRST + WIDTH of the rows that begin at `base + at`, zero where
    there are none."""
    place = base + (at[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :])
    return tl.load(place, mask=attention_inside(inside, FIRST, WIDTH, SIZE), other=0.0)


@triton.jit
def attention_store(
    base, at, inside, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """Store numbers FIRST to FIRST + WIDTH of rows."""
    place = base + (at[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :])
    value = stored_as(value, base.dtype.element_ty)
    tl.store(place, value, mask=attention_inside(inside, FIRST, WIDTH, SIZE))


@triton.jit
def attention_operand(x, DOT: tl.constexpr):
    """Return numbers as an operand."""
    if x.dtype == DOT:
        return x
    else:
        return as_f32(x).to(DOT)


@triton.jit
def attention_rows(
    head_block,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
):
    """Return the key head of a block of query heads and, of the tile's rows, the token (counted
    from the tile's first), the query head, and whether there is such a row."""
    GROUP: tl.constexpr = HQ // HKV
    BLOCKS: tl.constexpr = (GROUP + BH - 1) // BH
    row = tl.arange(0, BM)
    kv_head = head_block // BLOCKS
    head = head_block % BLOCKS * BH + row % BH
    return kv_head, row // BH, kv_head * GROUP + head, (row < BT * BH) & (head < GROUP)


@triton.jit
def attention_queries(
    q,
    at,
    inside,
    DK: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BC: tl.constexpr,
    DOT: tl.constexpr,
):
    """Return the queries' first D1 numbers and the rest as operands; where they are read in chunks,
    nothing of use."""
    FIRST: tl.constexpr = D1 if BC == 0 else 16
    q1 = attention_operand(attention_load(q, at, inside, 0, FIRST, DK), DOT)
    q2 = q1
    if D2 > 0 and BC == 0:
        q2 = attention_operand(attention_load(q, at, inside, D1, D2, DK), DOT)
    return q1, q2


@triton.jit
def attention_chunk(base, at, inside, first, DK: tl.constexpr, BC: tl.constexpr):
    """Return BC numbers, from `first` on, of rows."""
    number = first + tl.arange(0, BC)
    if DK % BC == 0:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (number < DK)[None, :]
    return tl.load(base + (at[:, None] + number[None, :]), mask=mask, other=0.0)


@triton.jit
def attention_scores_chunked(
    q,
    q_at,
    q_inside,
    keys,
    k_at,
    k_inside,
    scores,
    DK: tl.constexpr,
    BC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the products of queries and keys, BC numbers at a time."""
    for c in range(0, DK, BC):
        query = attention_operand(attention_chunk(q, q_at, q_inside, c, DK, BC), DOT)
        key = attention_operand(attention_chunk(keys, k_at, k_inside, c, DK, BC), DOT)
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    return scores


@triton.jit
def attention_walk(
    q,
    q_at,  # where the rows of queries begin
    q_inside,
    q1,
    q2,
    sums1,  # f32 [BM, V1] and [BM, V2]: values times weights
    sums2,
    highest,  # f32 [BM]: the largest score
    total,  # f32 [BM]: of weights
    first,  # i32 [BM]: what places the rows see; none where last < 0
    last,
    keys,
    values,
    pages,  # the sequence's
    head,  # i32: the key head
    start,  # i32: where steps begin
    begin,  # i32: the places that are read
    end,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DVX: tl.constexpr,
    G: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SAME: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the sums, maxima and totals after places `begin` to `end` of one sequence.

    `start` is a multiple of BN: a step lies in one page where BN divides the size of a page.
    """
    SCALE2: tl.constexpr = SCALE * 1.4426950408889634
    lanes = tl.arange(0, BN)
    for n in range(start, end, BN):
        place = n + lanes
        there = (place >= begin) & (place < end)
        if G % BN == 0:
            cell = (tl.load(pages + n // G) * HKV + head) * G + (n % G + lanes)
        else:
            cell = (tl.load(pages + place // G, mask=there, other=0) * HKV + head) * G + place % G
        scores = tl.zeros((highest.shape[0], BN), tl.float32)
        if BC > 0:
            scores = attention_scores_chunked(
                q, q_at, q_inside, keys, cell * DK, there, scores, DK, BC, DOT, PRECISION
            )
        else:
            key = attention_operand(attention_load(keys, cell * DK, there, 0, D1, DK), DOT)
            scores = tl.dot(q1, tl.trans(key), scores, input_precision=PRECISION)
            if D2 > 0:
                rest = attention_operand(attention_load(keys, cell * DK, there, D1, D2, DK), DOT)
                scores = tl.dot(q2, tl.trans(rest), scores, input_precision=PRECISION)
        seen = (place[None, :] <= last[:, None]) & there[None, :]
        if WINDOW > 0:
            seen = seen & (place[None, :] >= first[:, None])
        scores = tl.where(seen, scores * SCALE2, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(highest - finite)
        highest = higher
        total = total * decay + tl.sum(weights, 1)
        p = attention_operand(weights, DOT)
        if (SAME and V1 == D1) and (DV >= V1 and BC == 0):  # Triton 3.2 knows no longer chains
            value = key
        else:
            value = attention_operand(attention_load(values, cell * DVX, there, 0, V1, DV), DOT)
        sums1 = tl.dot(p, value, sums1 * decay[:, None], input_precision=PRECISION)
        if V2 > 0:
            value = attention_operand(attention_load(values, cell * DVX, there, V1, V2, DV), DOT)
            sums2 = tl.dot(p, value, sums2 * decay[:, None], input_precision=PRECISION)
    return sums1, sums2, highest, total


@triton.jit
def attention_prefill(
    q,
    keys,
    values,
    positions,
    sequence,
    pages,
    out,
    T,
    P,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DVX: tl.constexpr,  # numbers of a row of `values`
    G: tl.constexpr,  # places of a page
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SAME: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute BT tokens and BH heads. Grid: ceil(T / BT), HKV * ceil(HQ / HKV / BH).

    Later tokens, which see more, come first. The sequences that tokens of the tile belong to are
    walked one after the other; rows of other sequences see nothing meanwhile.
    """
    BM: tl.constexpr = BT * BH if BT * BH > 16 else 16
    NONE: tl.constexpr = 0x7FFFFFFF
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, token, head, inside = attention_rows(tl.program_id(1), HQ, HKV, BT, BH, BM)
    token += tile * BT
    inside = inside & (token < T)
    last = tl.load(positions + token, mask=inside, other=-1).to(tl.int32)
    owner = tl.load(sequence + token, mask=inside, other=0).to(tl.int32)
    alive = last >= 0
    first = tl.maximum(last - (WINDOW - 1), 0) if WINDOW > 0 else last * 0
    row = token.to(tl.int64) * HQ + head
    q1, q2 = attention_queries(q, row * DK, inside, DK, D1, D2, BC, DOT)
    sums1 = tl.zeros((BM, V1), tl.float32)
    sums2 = tl.zeros((BM, V2 if V2 > 0 else 16), tl.float32)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    lowest_owner = tl.min(tl.where(alive, owner, NONE), 0)
    highest_owner = tl.max(tl.where(alive, owner, -1), 0)
    for s in range(lowest_owner, highest_owner + 1):
        own = alive & (owner == s)
        end = tl.max(tl.where(own, last, -1), 0) + 1
        begin = tl.min(tl.where(own, first, NONE), 0)  # beyond the end where none is of s
        sums1, sums2, highest, total = attention_walk(
            q, row * DK, inside, q1, q2, sums1, sums2, highest, total,
            first, tl.where(own, last, -1), keys, values, pages + tl.cast(s, tl.int64) * P,
            kv_head, begin // BN * BN, begin, end,
            HKV, DK, DV, DVX, G, SCALE, WINDOW, SAME, D1, D2, V1, V2, BN, BC, DOT, PRECISION,
        )  # fmt: skip
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    attention_store(out, row * DV, inside, sums1 * inverse, 0, V1, DV)
    if V2 > 0:
        attention_store(out, row * DV, inside, sums2 * inverse, V1, V2, DV)


@triton.jit
def attention_split(
    q,
    keys,
    values,
    positions,
    sequence,
    pages,
    maxima,  # f32 [T, HQ, SPLITS]
    totals,  # f32 [T, HQ, SPLITS]
    sums,  # f32 [T, HQ, SPLITS, DV]
    P,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DVX: tl.constexpr,
    G: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SAME: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Compute a part of what one token sees. Grid: T, HKV * ceil(HQ / HKV / BH), SPLITS.

    A part is so many whole steps of BN; the last parts may be shorter, or empty: then the maximum
    is -inf, the total zero, and no sums are written.
    """
    BM: tl.constexpr = BH if BH > 16 else 16
    token = tl.program_id(0)
    part = tl.program_id(2)
    kv_head, unused, head, inside = attention_rows(tl.program_id(1), HQ, HKV, 1, BH, BM)
    last = tl.load(positions + token).to(tl.int32)
    owner = tl.load(sequence + token)
    first = tl.maximum(last - (WINDOW - 1), 0) if WINDOW > 0 else last * 0
    start = first // BN * BN
    share = tl.cdiv(tl.cdiv(tl.maximum(last + 1 - start, 0), BN), SPLITS) * BN
    start += part * share
    end = tl.minimum(start + share, last + 1)
    row = tl.cast(token, tl.int64) * HQ + head
    q1, q2 = attention_queries(q, row * DK, inside, DK, D1, D2, BC, DOT)
    lanes = tl.zeros((BM,), tl.int32)
    sums1, sums2, highest, total = attention_walk(
        q, row * DK, inside, q1, q2,
        tl.zeros((BM, V1), tl.float32), tl.zeros((BM, V2 if V2 > 0 else 16), tl.float32),
        tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32),
        lanes + first, lanes + last,
        keys, values, pages + owner * P, kv_head, start, tl.maximum(start, first), end,
        HKV, DK, DV, DVX, G, SCALE, WINDOW, SAME, D1, D2, V1, V2, BN, BC, DOT, PRECISION,
    )  # fmt: skip
    at = row * SPLITS + part
    tl.store(maxima + at, highest, mask=inside)
    tl.store(totals + at, total, mask=inside)
    inside = inside & (lanes + start < end)
    attention_store(sums, at * DV, inside, sums1, 0, V1, DV)
    if V2 > 0:
        attention_store(sums, at * DV, inside, sums2, V1, V2, DV)


@triton.jit
def attention_combine(
    maxima,
    totals,
    sums,
    out,
    DV: tl.constexpr,
    BV: tl.constexpr,  # DV filled up to a power of two
    SPLITS: tl.constexpr,  # a power of two
):
    """Merge the parts of one token and head, in order. Grid: T * HQ."""
    row = tl.cast(tl.program_id(0), tl.int64)
    part = tl.arange(0, SPLITS)
    column = tl.arange(0, BV)
    highest = tl.max(tl.load(maxima + row * SPLITS + part), 0)
    total = tl.zeros((BV,), tl.float32)
    value = tl.zeros((BV,), tl.float32)
    for i in range(SPLITS):
        at = row * SPLITS + i
        here = tl.load(maxima + at + column * 0)
        there = here != float("-inf")  # else nothing was written
        weight = tl.where(there, tl.exp2(here - highest), 0.0)
        total += weight * tl.load(totals + at)
        mask = there & (column < DV)
        value += weight * tl.load(sums + at * DV + column, mask=mask, other=0.0)
    value = tl.where(total == 0.0, 0.0, value / total)
    tl.store(out + row * DV + column, stored_as(value, out.dtype.element_ty), mask=column < DV)

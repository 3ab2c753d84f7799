"""Products of activations and stored weights: tiles of y[M, N] = x[M, K] . W, on weights as they
lie.

Weights are decoded in registers, from the bytes that were loaded, into the operands of matrix
instructions. Where one scale serves a whole step along K it multiplies the step's product; where
it serves all of K, the whole sum; else weights are multiplied one by one and then split into
parts. Sums are f32.

Parameters that travel together stay apart: Triton 3.2, which compiles for cuda:70 and cuda:75,
takes neither tuples nor named tuples as arguments, of values or of constants.

Shapes: a tile has BM rows and BN columns, a step along K has BK.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, tiles_m, tiles_n):
    """Return which tile (m, n) program `pid` makes: eight tiles of m side by side, so that they
    find the weights of their column in the cache."""
    group = pid // (8 * tiles_n)
    first = group * 8
    size = tl.minimum(tiles_m - first, 8)
    within = pid - group * 8 * tiles_n
    return first + within % size, within // size


@triton.jit
def parts_of(x, DOT: tl.constexpr, COUNT: tl.constexpr):
    """Return numbers as sums of COUNT (1, 2 or 3) operands; the others repeat the first."""
    if x.dtype == DOT:
        return x, x, x
    else:
        wide = as_f32(x)
        if DOT == tl.float16:
            wide = tl.minimum(tl.maximum(wide, -65504.0), 65504.0)
        first = wide.to(DOT)
        second = first
        third = first
        if COUNT > 1:
            wide = wide - as_f32(first)
            second = wide.to(DOT)
        if COUNT > 2:
            wide = wide - as_f32(second)
            third = wide.to(DOT)
        return first, second, third


@triton.jit
def exact_operand(code, FORMAT: tl.constexpr, DOT: tl.constexpr, DECODE: tl.constexpr):
    """Return weights as operands that hold them exactly; e4m3 as f16 times 2^-8, where they are
    "packed" or "portable"."""
    if FORMAT == "f8e4m3":
        if DECODE == "exact" or DOT == tl.float32:
            return decode_f8e4m3(code).to(DOT)
        elif DECODE == "native":
            return code.to(tl.float8e4nv, bitcast=True).to(DOT)
        elif DECODE == "packed":
            if DOT == tl.float16:
                return packed_f16(code)
            else:
                return packed_bf16(code)
        elif DOT == tl.float16:
            return portable_f16(code)
        else:
            return portable_bf16(code)
    elif code.dtype == DOT:
        return code
    else:
        return decoded(code, FORMAT).to(DOT)


@triton.jit
def add_dots(sums, x0, x1, x2, w0, w1, w2, X: tl.constexpr, W: tl.constexpr):
    """Add the products of parts that matter: those whose numbers add up to less than the larger
    count of parts."""
    MOST: tl.constexpr = W if W > X else X
    if X > 2:
        sums = tl.dot(x2, w0, sums, input_precision="ieee")
    if W > 2:
        sums = tl.dot(x0, w2, sums, input_precision="ieee")
    if (X > 1 and W > 1) and MOST > 2:
        sums = tl.dot(x1, w1, sums, input_precision="ieee")
    if X > 1:
        sums = tl.dot(x1, w0, sums, input_precision="ieee")
    if W > 1:
        sums = tl.dot(x0, w1, sums, input_precision="ieee")
    return tl.dot(x0, w0, sums, input_precision="ieee")


@triton.jit
def add_step(
    sums,
    x0,
    x1,
    x2,
    codes,
    scales,
    mask,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    MODE: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    DOT: tl.constexpr,
    DECODE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add one step of K, weights at the addresses `codes[BK, BN]`, to sums[BM, BN].

    `scales` are addresses that broadcast to [BM, BN] (MODE "step") or to [BK, BN] ("each").
    """
    if MASKED:
        code = tl.load(codes, mask=mask, other=0)
    else:
        code = tl.load(codes)
    if MODE == "each":
        w0, w1, w2 = parts_of(decoded(code, FORMAT) * decoded(tl.load(scales), SCALE), DOT, W)
        return add_dots(sums, x0, x1, x2, w0, w1, w2, X, W)
    elif W > 1:
        w0, w1, w2 = parts_of(code, DOT, W)
        step = add_dots(tl.zeros_like(sums), x0, x1, x2, w0, w1, w2, X, W)
        if MODE == "step":
            step = step * decoded(tl.load(scales), SCALE)
        return sums + step
    else:
        w = exact_operand(code, FORMAT, DOT, DECODE)
        if MODE == "step":
            step = add_dots(tl.zeros_like(sums), x0, x1, x2, w, w, w, X, W)
            return sums + step * decoded(tl.load(scales), SCALE)
        else:
            return add_dots(sums, x0, x1, x2, w, w, w, X, W)


@triton.jit
def product_tile(
    x,  # addresses [BM, 1] of rows of x
    valid,  # bool [BM, 1]
    w,  # addresses of two matrices, and of their scales; the second pair is for TWO
    w_scales,
    v,
    v_scales,
    first,  # i32: the first column
    row,  # i32: the first row of the matrices, from which scales count
    begin,  # i32: the part of K, in whole steps
    end,
    N,
    K,
    STRIDE,  # numbers from row to row of a matrix
    SCALE_STRIDE,
    N_WHOLE: tl.constexpr,  # the tiles end where the columns end, and the steps where K ends
    K_WHOLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # rows of a matrix are columns of the product
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    MODE: tl.constexpr,  # none, step, each or end
    BLOCK_ROWS: tl.constexpr,  # of a scale; 0: all
    BLOCK_COLUMNS: tl.constexpr,
    ONE_SCALE: tl.constexpr,  # for all columns of the tile
    TWO: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    DOT: tl.constexpr,
    DECODE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Return sums[BM, BN] of one matrix, or of two (the second repeats the first with one)."""
    BM: tl.constexpr = valid.shape[0]
    MASKED: tl.constexpr = not K_WHOLE or not (N_WHOLE or TRANSPOSED)
    k = tl.arange(0, BK)
    columns = first + tl.arange(0, BN)[None, :]
    exists = columns < N
    sums = tl.zeros((BM, BN), tl.float32)
    more = sums
    # Beyond the last column its own weights and scales are read again: nothing lies further on.
    safe = columns if N_WHOLE else tl.minimum(columns, N - 1)
    if TRANSPOSED:
        place = tl.cast(row + safe, tl.int64) * STRIDE + k[:, None]
    else:
        place = tl.cast(row + k[:, None], tl.int64) * STRIDE + columns
    # What does not change along K of the place of a scale.
    across = first if ONE_SCALE else safe
    if TRANSPOSED:
        fixed = (row + across) // BLOCK_ROWS * SCALE_STRIDE if BLOCK_ROWS > 0 else across * 0
    else:
        fixed = across // BLOCK_COLUMNS if BLOCK_COLUMNS > 0 else across * 0
    for k0 in range(begin, end, BK):
        if K_WHOLE:
            a = tl.load(x + (k0 + k[None, :]), mask=valid, other=0.0)
            mask = exists
        else:
            a = tl.load(x + (k0 + k[None, :]), mask=valid & (k0 + k[None, :] < K), other=0.0)
            mask = k0 + k[:, None] < K
            if not TRANSPOSED:
                mask = mask & exists
        x0, x1, x2 = parts_of(a, DOT, X)
        along = tl.minimum(k0 + k[:, None], K - 1) if MODE == "each" else k0
        if TRANSPOSED:
            at = fixed + (along // BLOCK_COLUMNS if BLOCK_COLUMNS > 0 else along * 0)
            step = k0
        else:
            at = fixed + (
                (row + along) // BLOCK_ROWS * SCALE_STRIDE if BLOCK_ROWS > 0 else along * 0
            )
            step = tl.cast(k0, tl.int64) * STRIDE
        sums = add_step(
            sums, x0, x1, x2, w + (place + step), w_scales + at, mask,
            FORMAT, SCALE, MODE, X, W, DOT, DECODE, MASKED,
        )  # fmt: skip
        if TWO:
            more = add_step(
                more, x0, x1, x2, v + (place + step), v_scales + at, mask,
                FORMAT, SCALE, MODE, X, W, DOT, DECODE, MASKED,
            )  # fmt: skip
    if MODE == "end":
        if TRANSPOSED or BLOCK_ROWS == 0:
            at = fixed
        else:
            at = fixed + row // BLOCK_ROWS * SCALE_STRIDE
        sums = sums * decoded(tl.load(w_scales + at), SCALE)
        if TWO:
            more = more * decoded(tl.load(v_scales + at), SCALE)
    SMALL: tl.constexpr = DECODE == "packed" or DECODE == "portable"
    if (FORMAT == "f8e4m3" and DOT == tl.float16) and (SMALL and MODE != "each"):
        sums = sums * 256.0  # operands were 2^-8 of the weights
        more = more * 256.0
    return sums, more

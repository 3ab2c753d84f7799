"""The C micro-kernels against float64 references, on both instruction tables.

Shapes: M rows of activations, N outputs, K reduced; T tokens, S sequences, P pages.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

LIBRARY = Path(__file__).parents[3] / "codegen" / "c" / "lib"
SOURCE = Path(__file__).with_name("kernels_under_test.c")
# The kernels fix the order of every operation, so results are the same at -O3, which compiles for
# three times as long.
FLAGS = [
    "-O1",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
]
ISA_FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}

NONE, F32, BF16, F16, E4M3, E5M2, E8M0 = -1, 0, 1, 2, 3, 4, 5
SIZE = {F32: 4, BF16: 2, F16: 2, E4M3: 1, E5M2: 1, E8M0: 1}
CODE_DTYPE = {
    F32: np.float32,
    BF16: np.uint16,
    F16: np.uint16,
    E4M3: np.uint8,
    E5M2: np.uint8,
    E8M0: np.uint8,
}

# (format, scale format, block rows, block columns); 0 means all.
CONFIGS = [
    (F32, NONE, 0, 0),
    (BF16, NONE, 0, 0),
    (F16, NONE, 0, 0),
    (E4M3, F32, 128, 128),
    (E4M3, BF16, 1, 0),
    (E4M3, F16, 0, 0),
    (E5M2, F32, 1, 128),
    (E4M3, E8M0, 32, 32),
    (E4M3, F32, 40, 48),
]
KN_CONFIGS = [1, 2, 3, 6, 8]  # every way to decode and to scale, without instantiating the rest
NAMES = [
    "f32",
    "bf16",
    "f16",
    "e4m3-128x128",
    "e4m3-channel",
    "e4m3-tensor",
    "e5m2-1x128",
    "mxfp8-32x32",
    "e4m3-40x48",
]


def cpu_flags() -> set[str]:
    """Return the processor's feature names as Linux lists them."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


#: Those this processor runs, the best last: the one that quick tests are about.
ISAS = [i for i in ISA_FLAGS if i == "baseline" or {"avx2", "fma", "f16c"} <= cpu_flags()]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Return `library(isa)`: the test library with an instruction set, compiled when asked for."""
    folder = tmp_path_factory.mktemp("kernels")
    cases = [f"X({i}, {{{', '.join(map(str, c))}}})" for i, c in enumerate(CONFIGS)]
    defines = [
        f"-DCONFIGS={' '.join(cases)}",
        f"-DKN_CONFIGS={' '.join(cases[i] for i in KN_CONFIGS)}",
    ]

    @cache
    def build(isa: str) -> ctypes.CDLL:
        if isa not in ISAS:
            pytest.skip(f"this processor lacks {isa}")
        target = folder / f"{isa}.so"
        command = [
            "gcc",
            *FLAGS,
            *ISA_FLAGS[isa],
            f"-I{LIBRARY}",
            *defines,
            str(SOURCE),
            "-o",
            str(target),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(target))

    return build


@pytest.fixture(
    params=[pytest.param(i, marks=[] if i == ISAS[-1] else pytest.mark.slow) for i in ISA_FLAGS]
)
def lib(request, library):
    return library(request.param)


# ---- formats --------------------------------------------------------------------------------


def decode_small(codes, exponent_bits: int, mantissa_bits: int, infinities: bool):
    """Decode sign-exponent-mantissa codes to float64 by their definition."""
    codes = codes.astype(np.int64)
    bias = 2 ** (exponent_bits - 1) - 1
    exponent = codes >> mantissa_bits & (2**exponent_bits - 1)
    mantissa = codes & (2**mantissa_bits - 1)
    fraction = mantissa / 2.0**mantissa_bits
    value = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias)
    )
    top = exponent == 2**exponent_bits - 1
    if infinities:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where(top & (mantissa == 2**mantissa_bits - 1), np.nan, value)
    return np.where(codes >> (exponent_bits + mantissa_bits) & 1, -value, value)


def decode(fmt: int, codes):
    """Decode an array of codes to float64."""
    if fmt == F32:
        return codes.astype(np.float64)
    if fmt == E8M0:
        return np.where(codes == 255, np.nan, 2.0 ** (codes.astype(np.float64) - 127))
    bits = {BF16: (8, 7, True), F16: (5, 10, True), E4M3: (4, 3, False), E5M2: (5, 2, True)}[fmt]
    return decode_small(codes, *bits)


def pointer(array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("fmt", [BF16, F16, E4M3, E5M2, E8M0])
def test_decode_is_exact_for_every_code(lib, fmt):
    codes = np.arange(256 ** SIZE[fmt]).astype(CODE_DTYPE[fmt])
    out = np.empty(codes.size, np.float32)
    lib.test_decode(fmt, pointer(codes), ctypes.c_int64(codes.size), pointer(out))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out.astype(np.float64), decode(fmt, codes))


@pytest.mark.parametrize("saturate", [0, 1])
@pytest.mark.parametrize("fmt", [BF16, F16, E4M3, E5M2])
def test_encode_rounds_to_nearest_even(lib, rng, fmt, saturate):
    codes = np.arange(256 ** SIZE[fmt] // 2)
    values = decode(fmt, codes.astype(CODE_DTYPE[fmt]))
    finite = codes[np.isfinite(values)]
    grid = values[finite]
    middles = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate(
        [
            grid,
            middles,
            np.nextafter(middles.astype(np.float32), np.float32(0)),
            rng.standard_normal(1000) * grid[-1] / 3,
        ]
    )
    # Halfway to the value that would come next; what lies there goes to the even code, too.
    limit = grid[-1] + (grid[-1] - grid[-2]) / 2
    edge = [limit * (1 - 2**-23), limit, limit * (1 + 2**-23)]
    beyond = [grid[-1] * 1.01, min(grid[-1] * 2, 3.4e38), np.inf]
    with np.errstate(over="ignore"):
        x = np.concatenate([x, edge, beyond]).astype(np.float32)
    x = np.concatenate([x, -x])

    magnitude = np.abs(x.astype(np.float64))
    above = np.searchsorted(grid, magnitude).clip(1, grid.size - 1)
    low, high = magnitude - grid[above - 1], grid[above] - magnitude
    nearest = np.where(
        (high < low) | ((high == low) & (finite[above] % 2 == 0)), finite[above], finite[above - 1]
    )
    overflow = (magnitude > limit) | ((magnitude == limit) & (finite[-1] % 2 == 1))
    beyond_code = finite[-1] if saturate and fmt != BF16 else finite[-1] + 1
    sign = np.signbit(x).astype(np.int64) << (8 * SIZE[fmt] - 1)
    expected = np.where(overflow, beyond_code, nearest) | sign

    out = np.zeros(x.size, CODE_DTYPE[fmt])
    lib.test_encode(fmt, pointer(x), ctypes.c_int64(x.size), saturate, pointer(out))
    np.testing.assert_array_equal(out.astype(np.int64), expected)
    nan = np.array([np.nan], np.float32)
    lib.test_encode(fmt, pointer(nan), ctypes.c_int64(1), saturate, pointer(out))
    assert np.isnan(decode(fmt, out[:1]))[0]


@pytest.mark.parametrize(
    ("which", "reference", "low", "high", "relative", "absolute"),
    [
        (0, np.exp, -103, 88.7, 2e-7, 1.5e-45),
        (1, lambda x: 1 / (1 + np.exp(-x)), -80, 80, 3e-7, 1e-38),
        (2, lambda x: x / (1 + np.exp(-x)), -80, 80, 3e-7, 1e-37),
        (3, np.tanh, -12, 12, 3e-7, 0),
        (4, np.vectorize(math.erf), -5, 5, 4e-7, 2e-7),
    ],
    ids=["exp", "sigmoid", "silu", "tanh", "erf"],
)
def test_elementary_accuracy(lib, rng, which, reference, low, high, relative, absolute):
    x = np.concatenate(
        [rng.uniform(low, high, 20000), rng.standard_normal(20000) * 0.3, [0.0]]
    ).astype(np.float32)
    out = np.empty_like(x)
    lib.test_elementary(which, pointer(x), ctypes.c_int64(x.size), pointer(out))
    np.testing.assert_allclose(out, reference(x.astype(np.float64)), rtol=relative, atol=absolute)


def test_elementary_extremes(lib):
    x = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30], np.float32)
    expected = {
        0: [np.inf, 0, np.nan, np.inf, 0],
        1: [1, 0, np.nan, 1, 0],
        3: [1, -1, np.nan, 1, -1],
        4: [1, -1, np.nan, 1, -1],
    }
    for which, values in expected.items():
        out = np.empty_like(x)
        lib.test_elementary(which, pointer(x), ctypes.c_int64(x.size), pointer(out))
        np.testing.assert_allclose(out, values, rtol=1e-6)


# ---- threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_barriers_and_loops(lib, threads):
    lib.test_rounds.restype = ctypes.c_int64
    assert lib.test_rounds(threads, ctypes.c_int64(20), ctypes.c_int64(20)) == 0


# ---- products -------------------------------------------------------------------------------


class MatmulArgs(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("M", "N", "K", "batch", "batch_rows", "row0")],
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("x_batch_stride", ctypes.c_int64),
        ("codes", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        ("weight_stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("pool", ctypes.c_void_p),
        ("config", ctypes.c_int),
        ("args", ctypes.c_void_p),
        ("out0", ctypes.c_void_p),
        ("out1", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("M", ctypes.c_int64),
        ("K", ctypes.c_int64),
    ]


def aligned(count: int, dtype=np.float32):
    """Return uninitialized memory (filled with NaN bytes) at a 64-byte boundary."""
    raw = np.full(count * np.dtype(dtype).itemsize + 64, 255, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)


def scratch(lib, function: str, *args):
    size = getattr(lib, function)
    size.restype = ctypes.c_size_t
    return aligned(size(*args), np.uint8)


def against_a_wall(array):
    """Copy an array to the very end of mapped memory, unaligned; reading beyond it crashes."""
    page = mmap.PAGESIZE
    room = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    view = np.frombuffer(memory, np.uint8)
    start = room - array.nbytes
    view[start:room] = array.view(np.uint8).ravel()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(view.ctypes.data + room), page, 0) == 0
    return view[start:room]


class Weight:
    """Random codes [rows, cols] with their scales, and the exact values."""

    def __init__(self, rng, config, rows: int, cols: int, codes=None):
        fmt, scale_format, block_rows, block_cols = config
        block_rows, block_cols = block_rows or rows, block_cols or cols
        codes = self.usual_codes(rng, fmt, rows, cols) if codes is None else codes
        self.values = decode(fmt, codes)
        self.codes = against_a_wall(codes)
        grid = (-(-rows // block_rows), -(-cols // block_cols))
        self.scale_stride = grid[1]
        self.scales = None
        if scale_format == NONE:
            return
        if scale_format == F32:
            scales = rng.uniform(0.5, 2, grid).astype(np.float32)
        else:
            low, high = {BF16: (0x3F00, 0x4000), F16: (0x3800, 0x4000), E8M0: (120, 130)}[
                scale_format
            ]
            scales = rng.integers(low, high, grid).astype(CODE_DTYPE[scale_format])
        self.scales = against_a_wall(scales)
        full = decode(scale_format, scales).repeat(block_rows, 0).repeat(block_cols, 1)
        self.values = self.values * full[:rows, :cols]

    @staticmethod
    def usual_codes(rng, fmt: int, rows: int, cols: int):
        """Random codes of every kind that sums survive: finite, not huge, not nearly zero."""
        if fmt == F32:
            return rng.standard_normal((rows, cols)).astype(np.float32)
        codes = rng.integers(0, 256 ** SIZE[fmt], (rows, cols)).astype(CODE_DTYPE[fmt])
        values = decode(fmt, codes)
        usual = (
            np.isfinite(values)
            & (np.abs(values) < 1e4)
            & ((np.abs(values) > 1e-30) | (values == 0))
        )
        return np.where(usual, codes, 0).astype(CODE_DTYPE[fmt])


def address(array) -> int | None:
    return None if array is None else array.ctypes.data


def matmul(
    lib,
    config: int,
    weights,
    x,
    N: int,
    threads: int,
    *,
    batch=1,
    batch_rows=0,
    row0=0,
    transposed=True,
):
    """Run dilu_matmul (or _kn) for x [batch, M, K]; returns both results [M, batch * N]."""
    _, M, K = x.shape
    x = np.ascontiguousarray(x, np.float32)
    packed_stride = -(-K // 32) * 32
    packed = aligned(batch * M * packed_stride)
    space = scratch(lib, "test_matmul_scratch", max(threads, 1))
    out = np.full((2, M, batch * N), np.nan, np.float32)
    args = MatmulArgs(
        M,
        N,
        K,
        batch,
        batch_rows,
        row0,
        weight_stride=0,
        scale_stride=weights[0].scale_stride,
        scratch=space.ctypes.data,
    )
    args.x, args.x_stride, args.x_batch_stride = (
        packed.ctypes.data,
        packed_stride,
        M * packed_stride,
    )
    if not transposed:
        args.x, args.x_stride, args.x_batch_stride = x.ctypes.data, K, M * K
    for i, weight in enumerate(weights):
        args.codes[i], args.scales[i] = address(weight.codes), address(weight.scales)
    call = Call(
        None,
        config,
        ctypes.addressof(args),
        out[0].ctypes.data,
        out[1].ctypes.data,
        batch * N,
        x.ctypes.data,
        K,
        M,
        K,
    )
    (lib.test_matmul if transposed else lib.test_matmul_kn)(threads, ctypes.byref(call))
    return out


def check_products(out, x, values):
    """Compare with x . values^T in float64, within 2e-6 of the sum of magnitudes."""
    expected = x.astype(np.float64) @ values.T
    bound = np.abs(x.astype(np.float64)) @ np.abs(values.T) * 2e-6 + 1e-30
    error = np.abs(out - expected)
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize("config", range(len(CONFIGS)), ids=NAMES)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 70, 300),
        (3, 37, 129),
        (5, 150, 257),
        (150, 101, 1100),
        (2, 5, 20),
        (9, 4, 20),
        (1, 3, 2200),
        (4, 66, 1600),
        (7, 33, 6500),
        (1, 9, 6700),
        (49, 20, 600),
        (260, 6, 520),
    ],
)
def test_matmul(lib, rng, config, M, N, K):
    weights = [Weight(rng, CONFIGS[config], N, K) for _ in range(2)]
    x = rng.standard_normal((1, M, K)).astype(np.float32)
    out = matmul(lib, config, weights, x, N, 2)
    for i in range(2):
        check_products(out[i], x[0], weights[i].values)


@pytest.mark.parametrize("config", range(len(CONFIGS)), ids=NAMES)
def test_matmul_batched_over_weight_rows(lib, rng, config):
    heads, N, K, M = 3, 50, 96, 7
    weights = [Weight(rng, CONFIGS[config], heads * 2 * N, K) for _ in range(2)]
    x = rng.standard_normal((heads, M, K)).astype(np.float32)
    out = matmul(lib, config, weights, x, N, 2, batch=heads, batch_rows=2 * N, row0=N)
    for head in range(heads):
        first = head * 2 * N + N
        check_products(
            out[1][:, head * N : (head + 1) * N], x[head], weights[1].values[first : first + N]
        )


@pytest.mark.parametrize("config", range(len(CONFIGS)), ids=NAMES)
def test_matmul_is_independent_of_rows_and_threads(lib, rng, config):
    M, N, K = 139, 130, 3300
    weights = [Weight(rng, CONFIGS[config], N, K) for _ in range(2)]
    x = rng.standard_normal((1, M, K)).astype(np.float32)
    full = matmul(lib, config, weights, x, N, 2)
    for first, count, threads in [
        (0, 1, 0),
        (1, 2, 3),
        (3, 3, 1),
        (6, 4, 2),
        (10, 5, 1),
        (15, 6, 5),
        (21, 7, 2),
        (28, 8, 1),
        (130, 9, 2),
        (36, 17, 3),
        (80, 48, 2),
        (60, 70, 1),
    ]:
        part = matmul(lib, config, weights, x[:, first : first + count], N, threads)
        np.testing.assert_array_equal(part, full[:, first : first + count])


def sums_by_contract(config, weight: Weight, codes, x):
    """Compute x . W^T operation by operation as matmul.h promises, where nothing is fused."""
    fmt, scale_format, block_rows, block_cols = CONFIGS[config]
    rows, cols = codes.shape
    scales = np.ones((rows, cols), np.float32)
    if scale_format != NONE:
        exact = decode(scale_format, weight.scales.view(CODE_DTYPE[scale_format]))
        grid = exact.reshape(-1, weight.scale_stride).astype(np.float32)
        scales = grid.repeat(block_rows or rows, 0).repeat(block_cols or cols, 1)[:rows, :cols]
    w = decode(fmt, codes).astype(np.float32)
    by_result = scale_format == NONE or not block_cols
    whole = not by_result and block_cols % 32 == 0 and (block_rows == 0 or block_rows >= 64)
    with_x = scales if whole else np.ones_like(scales)
    if not by_result and not whole:
        w = w * scales
    order = {1: lambda i: i % 4 * 8 + i // 4, 2: lambda i: i // 16 * 16 + i % 2 * 8 + i % 16 // 2}
    place = np.array([order.get(SIZE[fmt], lambda i: i)(i) for i in range(32)])
    out = np.empty((len(x), rows), np.float32)
    for m, n in np.ndindex(out.shape):
        products = np.zeros(-(-cols // 32) * 32, np.float32)
        products[np.arange(cols) // 32 * 32 + place[np.arange(cols) % 32]] = w[n] * (
            x[m] * with_x[n]
        )
        total = None
        for chunk in np.split(products, range(512, products.size, 512)):
            lanes = np.zeros(8, np.float32)
            for vector in chunk.reshape(-1, 8):
                lanes = lanes + vector
            for _ in range(3):
                lanes = lanes[0::2] + lanes[1::2]
            total = lanes[0] if total is None else total + lanes[0]
        out[m, n] = total * scales[n, 0] if by_result else total
    return out


@pytest.mark.slow
@pytest.mark.parametrize("config", range(len(CONFIGS)), ids=NAMES)
@pytest.mark.parametrize("M", [1, 4, 8, 13])
def test_matmul_keeps_its_contract(library, rng, config, M):
    """Bit for bit; powers of two that only keep numbers in range change nothing."""
    lib, N, K = library("baseline"), 6, 1100
    codes = Weight.usual_codes(rng, CONFIGS[config][0], N, K)
    weight = Weight(rng, CONFIGS[config], N, K, codes=codes)
    x = rng.standard_normal((1, M, K)).astype(np.float32)
    out = matmul(lib, config, [weight, weight], x, N, 2)[0]
    np.testing.assert_array_equal(out, sums_by_contract(config, weight, codes, x[0]))


@pytest.mark.parametrize("config", KN_CONFIGS, ids=[NAMES[i] for i in KN_CONFIGS])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 70, 128), (5, 33, 300), (70, 512, 129), (2, 3, 5)])
def test_matmul_kn(lib, rng, config, M, N, K):
    heads, row0 = 2, 3
    weight = Weight(rng, CONFIGS[config], row0 + heads * K, N)
    x = rng.standard_normal((heads, M, K)).astype(np.float32)
    out = matmul(
        lib, config, [weight], x, N, 2, batch=heads, batch_rows=K, row0=row0, transposed=False
    )[0]
    for head in range(heads):
        first = row0 + head * K
        check_products(
            out[:, head * N : (head + 1) * N], x[head], weight.values[first : first + K].T
        )
    one = matmul(
        lib,
        config,
        [weight],
        x[:, :1],
        N,
        1,
        batch=heads,
        batch_rows=K,
        row0=row0,
        transposed=False,
    )[0]
    np.testing.assert_array_equal(one, out[:1])


@pytest.mark.parametrize("transposed", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize("config", range(1, len(CONFIGS)), ids=NAMES[1:])
@pytest.mark.parametrize("M", [1, 3, 6, 12, 60])
def test_every_code(lib, rng, config, M, transposed):
    """A weight row (column) with one nonzero number, for every code: NaN, infinite, subnormal."""
    if not transposed and config not in KN_CONFIGS:
        pytest.skip("not instantiated")
    fmt = CONFIGS[config][0]
    codes = np.arange(0, 256 ** SIZE[fmt], 1 if SIZE[fmt] == 1 else 97).astype(CODE_DTYPE[fmt])
    N, K = codes.size, 40
    position = rng.integers(0, K, N)
    raw = np.zeros((N, K), CODE_DTYPE[fmt])
    raw[np.arange(N), position] = codes
    shape = (N, K) if transposed else (K, N)
    weight = Weight(
        rng, CONFIGS[config], *shape, codes=raw if transposed else np.ascontiguousarray(raw.T)
    )
    values = weight.values if transposed else weight.values.T
    x = rng.uniform(1, 2, (1, M, K)).astype(np.float32)
    out = matmul(
        lib, config, [weight, weight] if transposed else [weight], x, N, 1, transposed=transposed
    )[0]
    expected = x[0][:, position].astype(np.float64) * values[np.arange(N), position]
    with np.errstate(over="ignore"):
        expected = expected.astype(np.float32)
    np.testing.assert_allclose(out, expected, rtol=4e-7, atol=1e-37)


@pytest.mark.slow
def test_instruction_tables_agree(library, rng):
    if len(ISAS) < 2:
        pytest.skip("only one instruction table runs here")
    M, N, K = 6, 40, 700
    for config in range(len(CONFIGS)):
        weights = [Weight(rng, CONFIGS[config], N, K) for _ in range(2)]
        x = rng.standard_normal((1, M, K)).astype(np.float32)
        first, second = (matmul(library(isa), config, weights, x, N, 1)[0] for isa in ISAS)
        bound = np.abs(x[0]) @ np.abs(weights[0].values.T) * 5e-7
        assert (np.abs(first - second) <= bound).all()


# ---- experts --------------------------------------------------------------------------------


class ExpertsArgs(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("T", "H", "I", "E", "k")],
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("indices", ctypes.c_void_p),
        ("index_bytes", ctypes.c_int),
        *[
            (n, ctypes.c_void_p)
            for n in ("routing", "gate_up_codes", "gate_up_scales", "down_codes", "down_scales")
        ],
        *[(n, ctypes.c_int64) for n in ("gate_up_scale_stride", "down_scale_stride")],
        ("scratch", ctypes.c_void_p),
    ]


def table(arrays):
    return (ctypes.c_void_p * len(arrays))(*[address(a) for a in arrays])


def experts(lib, x, indices, routing, gate_up, down, I: int, threads: int):
    """Run dilu_experts for x [T, H]; gate_up: 2E weights, down: E weights; returns [T, H]."""
    (T, H), k, E = x.shape, indices.shape[1], len(down)
    packed = aligned(max(T, 1) * -(-H // 32) * 32)
    tables = [
        table([w.codes for w in gate_up]),
        table([w.scales for w in gate_up]),
        table([w.codes for w in down]),
    ]
    args = ExpertsArgs(
        T,
        H,
        I,
        E,
        k,
        packed.ctypes.data,
        -(-H // 32) * 32,
        indices.ctypes.data,
        indices.itemsize,
        routing.ctypes.data,
    )
    args.gate_up_codes, args.gate_up_scales, args.down_codes = map(ctypes.addressof, tables)
    args.gate_up_scale_stride = gate_up[0].scale_stride
    space = scratch(lib, "test_experts_scratch", ctypes.byref(args), threads)
    args.scratch = space.ctypes.data
    out = np.full((T, H), np.nan, np.float32)
    call = Call(None, 0, ctypes.addressof(args), out.ctypes.data, None, H, x.ctypes.data, H, T, H)
    lib.test_experts(threads, ctypes.byref(call))
    return out


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_experts(lib, rng, index_dtype):
    T, H, I, E, k = 45, 200, 150, 7, 3
    gate_up = [Weight(rng, (E4M3, F32, 128, 128), I, H) for _ in range(2 * E)]
    down = [Weight(rng, (BF16, NONE, 0, 0), H, I) for _ in range(E)]
    x = (rng.standard_normal((T, H)) * 0.01).astype(np.float32)
    indices = rng.integers(-1, E + 1, (T, k)).astype(index_dtype)
    indices[:20] = 2  # more rows of one expert than the direct path takes
    routing = rng.uniform(0, 1, (T, k)).astype(np.float32)
    out = experts(lib, x, indices, routing, gate_up, down, I, 2)

    expected, bound = np.zeros((T, H)), np.zeros((T, H))
    for t in range(T):
        for slot in range(k):
            e = indices[t, slot]
            if not 0 <= e < E:
                continue
            gate, up = (w.values @ x[t].astype(np.float64) for w in gate_up[2 * e : 2 * e + 2])
            hidden = gate / (1 + np.exp(-gate)) * up
            expected[t] += routing[t, slot] * (down[e].values @ hidden)
            magnitude = np.prod(
                [np.abs(w.values) @ np.abs(x[t]) for w in gate_up[2 * e : 2 * e + 2]], axis=0
            )
            bound[t] += routing[t, slot] * (np.abs(down[e].values) @ magnitude)
    assert (np.abs(out - expected) <= bound * 5e-6 + 1e-6).all()

    for t in (0, 21, 44):
        alone = experts(
            lib,
            x[t : t + 1],
            indices[t : t + 1].copy(),
            routing[t : t + 1].copy(),
            gate_up,
            down,
            I,
            1,
        )
        np.testing.assert_array_equal(alone[0], out[t])
    assert experts(lib, x[:0], indices[:0], routing[:0], gate_up, down, I, 2).shape == (0, H)


# ---- attention ------------------------------------------------------------------------------


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("T", "Hq", "Hkv", "Dk", "Dv")],
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        *[(n, ctypes.c_void_p) for n in ("k", "v")],
        *[(f"{t}_{n}_stride", ctypes.c_int64) for t in "kv" for n in ("page", "slot", "head")],
        ("page_size", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("sequence", ctypes.c_void_p),
        ("sequence_bytes", ctypes.c_int),
        ("block_tables", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int),
        ("block_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    ]


class Paged:
    """A paged cache with random contents; what no position covers is NaN."""

    def __init__(
        self, rng, fmt: int, lengths, page_size: int, Hkv: int, Dk: int, Dv: int, latent: bool
    ):
        self.fmt, self.page_size, self.Hkv, self.Dk, self.Dv, self.latent = (
            fmt,
            page_size,
            Hkv,
            Dk,
            Dv,
            latent,
        )
        pages = [-(-n // page_size) for n in lengths]
        self.tables = np.zeros((len(lengths), max(pages)), np.int32)
        order = rng.permutation(sum(pages))
        for s, count in enumerate(pages):
            self.tables[s, :count], order = order[:count], order[count:]
        self.k, self.v = (self.fill(rng, sum(pages), lengths, D) for D in (Dk, Dv))
        if latent:
            self.v = None

    def fill(self, rng, pages: int, lengths, D: int):
        values = rng.standard_normal((pages, self.page_size, self.Hkv, D)).astype(np.float32)
        for s, length in enumerate(lengths):
            if length % self.page_size:
                values[self.tables[s, length // self.page_size], length % self.page_size :] = np.nan
        if self.fmt == F32:
            return values
        if self.fmt == F16:
            return values.astype(np.float16).view(np.uint16)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    def rows(self, array, s: int, head: int, end: int):
        gathered = array[self.tables[s], :, head].reshape(-1, array.shape[-1])[:end]
        return decode(self.fmt, gathered)


def attention(lib, cache, q, positions, sequence, scale: float, window: int, threads: int):
    """Run dilu_attention for q [T, Hq, Dk]; returns [T, Hq, Dv]."""
    T, Hq, _ = q.shape
    out = np.full((T, Hq, cache.Dv), np.nan, np.float32)
    space = scratch(
        lib, "test_attention_scratch", ctypes.c_int64(cache.Dk), ctypes.c_int64(cache.Dv), threads
    )
    args = AttentionArgs(
        T,
        Hq,
        cache.Hkv,
        cache.Dk,
        cache.Dv,
        q.ctypes.data,
        q.shape[1] * q.shape[2],
        address(cache.k),
        address(cache.v),
    )
    for name, D in (("k", cache.Dk), ("v", cache.Dv)):
        setattr(args, f"{name}_page_stride", cache.page_size * cache.Hkv * D)
        setattr(args, f"{name}_slot_stride", cache.Hkv * D)
        setattr(args, f"{name}_head_stride", D)
    args.page_size, args.positions, args.scale, args.window = (
        cache.page_size,
        positions.ctypes.data,
        scale,
        window,
    )
    args.sequence, args.sequence_bytes = sequence.ctypes.data, sequence.itemsize
    args.block_tables, args.block_bytes, args.block_stride = (
        cache.tables.ctypes.data,
        cache.tables.itemsize,
        cache.tables.shape[1],
    )
    args.out, args.out_stride, args.scratch = out.ctypes.data, Hq * cache.Dv, space.ctypes.data
    call = Call(None, cache.fmt, ctypes.addressof(args))
    lib.test_attention(threads, ctypes.byref(call))
    return out


@pytest.mark.parametrize(
    ("fmt", "Hq", "Hkv", "Dk", "Dv", "page", "latent", "window"),
    [
        (BF16, 8, 2, 64, 64, 16, False, 0),
        (F16, 6, 6, 40, 24, 5, False, 0),
        (F32, 4, 1, 100, 33, 33, False, 37),
        (BF16, 50, 1, 72, 64, 16, True, 0),
    ],
)
def test_attention(lib, rng, fmt, Hq, Hkv, Dk, Dv, page, latent, window):
    lengths = [70, 1, 133, 40]
    cache = Paged(rng, fmt, lengths, page, Hkv, Dk, Dv, latent)
    # A prefill of 50 tokens, a sequence's first token, one decoded token, and a prefill of 40.
    counts = [50, 1, 1, 40]
    sequence = np.repeat(np.arange(4), counts).astype(np.int32 if latent else np.int64)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    q = rng.standard_normal((sequence.size, Hq, Dk)).astype(np.float32)
    scale = Dk**-0.5
    out = attention(lib, cache, q, positions, sequence, scale, window, 2)

    expected = np.empty_like(out, np.float64)
    for t, (s, position) in enumerate(zip(sequence, positions, strict=True)):
        first = max(0, position - window + 1) if window else 0
        for h in range(Hq):
            head = h // (Hq // Hkv)
            k = cache.rows(cache.k, s, head, position + 1)[first:]
            v = k[:, :Dv] if latent else cache.rows(cache.v, s, head, position + 1)[first:]
            weight = np.exp(scale * (k @ q[t, h].astype(np.float64)))
            expected[t, h] = weight / weight.sum() @ v
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)

    for t0, t1, threads in [(0, 1, 1), (49, 53, 3), (60, 92, 1), (51, 52, 1)]:
        part = attention(
            lib, cache, q[t0:t1], positions[t0:t1], sequence[t0:t1], scale, window, threads
        )
        np.testing.assert_array_equal(part, out[t0:t1])


def test_attention_of_a_padding_token_is_zero(lib, rng):
    cache = Paged(rng, F32, [3], 4, 1, 8, 8, False)
    q = rng.standard_normal((2, 1, 8)).astype(np.float32)
    out = attention(lib, cache, q, np.array([-1, 2]), np.zeros(2, np.int64), 1.0, 0, 1)
    assert (out[0] == 0).all()
    assert np.isfinite(out[1]).all()


def test_attention_where_scores_are_minus_infinity(lib, rng):
    """Keys that nobody can see because their scores are -inf: whole tiles of them, and all."""
    cache = Paged(rng, F32, [70], 16, 1, 8, 8, False)
    cache.k[cache.tables[0, :3]] = -np.inf
    q = np.abs(rng.standard_normal((3, 1, 8))).astype(np.float32)
    out = attention(lib, cache, q, np.array([20, 47, 69]), np.zeros(3, np.int64), 1.0, 0, 1)
    assert (out[:2] == 0).all()
    keys, values = (cache.rows(a, 0, 0, 70)[48:] for a in (cache.k, cache.v))
    weight = np.exp(keys @ q[2, 0].astype(np.float64))
    np.testing.assert_allclose(out[2, 0], weight / weight.sum() @ values, rtol=2e-5, atol=2e-6)

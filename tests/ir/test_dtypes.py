"""The narrow formats against the specifications' own numbers and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from dilu.errors import DiluError
from dilu.ir.dtypes import (
    BF16,
    BOOL,
    DTYPES,
    F4E2M1,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    F16,
    F32,
    F64,
    I8,
    I32,
    I64,
    U8,
    U32,
    decode,
    decode_table,
    dtype,
    encode,
    max_finite,
    promote,
    round_to,
    to_integer,
    to_storage,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

ALL_16 = np.arange(1 << 16, dtype=np.uint16)


# ---------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("t", "code", "value"),
    [
        # OCP 8-bit Floating Point Specification 1.0, table 2
        (F8E4M3, 0b0_0000_000, 0.0),
        (F8E4M3, 0b0_0000_001, 2.0**-9),
        (F8E4M3, 0b0_0000_111, 0.875 * 2.0**-6),
        (F8E4M3, 0b0_0001_000, 2.0**-6),
        (F8E4M3, 0b0_0111_000, 1.0),
        (F8E4M3, 0b0_1111_000, 256.0),
        (F8E4M3, 0b0_1111_110, 448.0),
        (F8E4M3, 0b1_1111_110, -448.0),
        (F8E5M2, 0b0_00000_01, 2.0**-16),
        (F8E5M2, 0b0_00000_11, 0.75 * 2.0**-14),
        (F8E5M2, 0b0_00001_00, 2.0**-14),
        (F8E5M2, 0b0_11110_11, 57344.0),
        (F8E5M2, 0b0_11111_00, np.inf),
        (F8E5M2, 0b1_11111_00, -np.inf),
        # OCP Microscaling Formats 1.0, tables 5 and 7
        (F4E2M1, 0b0_11_1, 6.0),
        (F4E2M1, 0b0_00_1, 0.5),
        (F4E2M1, 0b1_10_1, -3.0),
        (F8E8M0, 0, 2.0**-127),
        (F8E8M0, 127, 1.0),
        (F8E8M0, 254, 2.0**127),
    ],
)
def test_known_codes(t, code, value):
    assert decode_table(t)[code] == value


def test_e4m3_has_no_infinity_and_two_nan():
    table = decode_table(F8E4M3)
    assert np.flatnonzero(np.isnan(table)).tolist() == [0x7F, 0xFF]
    assert not np.isinf(table).any()


def test_e5m2_is_the_upper_byte_of_f16():
    want = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float64)
    assert np.array_equal(decode_table(F8E5M2), want, equal_nan=True)


def test_e2m1_is_its_list():
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert decode_table(F4E2M1).tolist() == positive + [-v for v in positive]


def test_e8m0_is_powers_of_two_and_one_nan():
    table = decode_table(F8E8M0)
    assert table[:-1].tolist() == [2.0**e for e in range(-127, 128)]
    assert np.isnan(table[255])


def test_f16_and_bf16_are_what_the_hardware_says():
    half = ALL_16.view(np.float16).astype(np.float64)
    assert np.array_equal(decode_table(F16), half, equal_nan=True)
    brain = (ALL_16.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert np.array_equal(decode_table(BF16), brain, equal_nan=True)


@pytest.mark.parametrize("t", [F8E4M3, F8E5M2, F4E2M1, F8E8M0, BF16, F16], ids=str)
def test_zeros_keep_their_sign(t):
    zeros = np.flatnonzero(decode_table(t) == 0)
    assert len(zeros) == (0 if t is F8E8M0 else 2)
    assert [np.signbit(decode_table(t)[z]) for z in zeros] == [False, True][: len(zeros)]


# ---------------------------------------------------------------------------------- encoding


def nearest(t, x: float) -> int:
    """Return the code nearest to a number within the range, ties to the even code: brute force."""
    table = decode_table(t)
    candidates = [c for c in range(len(table)) if np.isfinite(table[c])]
    candidates = [c for c in candidates if np.signbit(table[c]) == np.signbit(x)]
    return min(candidates, key=lambda c: (abs(table[c] - x), c & 1))


@pytest.mark.parametrize("t", [F8E4M3, F8E5M2, F4E2M1], ids=str)
def test_every_rounding_boundary(t):
    """Both sides of, and exactly at, the middle between any two neighbours."""
    table = decode_table(t)
    positive = np.sort(table[np.isfinite(table) & ~np.signbit(table)])
    middles = (positive[:-1] + positive[1:]) / 2
    below, above = (np.nextafter(middles.astype(np.float32), d) for d in (-np.inf, np.inf))
    numbers = np.concatenate([middles, below, above, positive]).astype(np.float64)
    numbers = np.concatenate([numbers, -numbers])
    want = [nearest(t, x) for x in numbers]
    assert encode(t, numbers).tolist() == want
    assert encode(t, numbers, saturate=False).tolist() == want


@pytest.mark.parametrize("t", [F8E4M3, F8E5M2, F4E2M1, F8E8M0, BF16], ids=str)
def test_encode_is_the_inverse_of_decode(t):
    table = decode_table(t)
    codes = np.flatnonzero(~np.isnan(table))
    assert np.array_equal(encode(t, table[codes], saturate=False), codes)
    nan = encode(t, np.array([np.nan]))
    assert t is F4E2M1 or np.isnan(table[nan[0]])


@pytest.mark.parametrize(
    ("t", "last", "first_out", "beyond"),
    [
        (F8E4M3, 464.0, np.nextafter(464.0, np.inf), 0x7F),  # the tie goes to the even 448
        (F8E5M2, np.nextafter(61440.0, 0), 61440.0, 0x7C),  # the tie goes to infinity
    ],
)
def test_overflow(t, last, first_out, beyond):
    largest = int(np.flatnonzero(decode_table(t) == max_finite(t))[0])
    numbers = np.array([last, first_out, 1e30, np.inf])
    assert encode(t, numbers).tolist() == [largest] * 4
    assert encode(t, numbers, saturate=False).tolist() == [largest, beyond, beyond, beyond]
    sign = 0x80
    negative = encode(t, -numbers, saturate=False).tolist()
    assert negative[0] == largest | sign
    assert negative[1:] == [beyond | (sign if t is F8E5M2 else 0)] * 3


def test_scales_round_as_torch_does():
    """No sign, ties up, and up all that is between the two smallest numbers."""
    least = 2.0**-127
    numbers = [0.0, -0.0, least / 2, least, 1.01 * least, 2 * least, 1.49, 1.5, -3.0, 2.0**127]
    assert encode(F8E8M0, np.array(numbers)).tolist() == [0, 0, 0, 0, 1, 1, 127, 128, 129, 254]
    above = np.array([1.5 * 2.0**127, 1e300, np.inf, -np.inf])
    assert encode(F8E8M0, above, saturate=False).tolist() == [255] * 4
    assert encode(F8E8M0, above).tolist() == [254] * 4
    assert encode(F8E8M0, np.array([np.nan])).tolist() == [255]


def test_floats_become_integers_by_way_of_wider_ones():
    numbers = np.array([1.9, -1.9, 300.0, -1.0, 2.0**31, 2.0**63, -1e30, np.inf, np.nan])
    low, lowest = -(2**31), -(2**63)
    want = {
        I8: [1, -1, 44, -1, 0, 0, 0, 0, 0],
        U8: [1, 255, 44, 255, 0, 0, 0, 0, 0],
        I32: [1, -1, 300, -1, low, low, low, low, low],
        U32: [1, 2**32 - 1, 300, 2**32 - 1, 2**31, 0, 0, 0, 0],
        I64: [1, -1, 300, -1, 2**31, lowest, lowest, lowest, lowest],
    }
    for t, integers in want.items():
        assert to_integer(t, numbers).tolist() == integers
        assert to_integer(t, numbers).dtype == t.storage


def test_infinities_of_a_format_stay():
    numbers = np.array([np.inf, -np.inf, 57344.0], np.float32)
    assert np.array_equal(round_to(F8E5M2, numbers), numbers)
    assert round_to(F8E5M2, numbers, saturate=True).tolist() == [57344, -57344, 57344]
    assert np.isinf(round_to(BF16, np.array([3.4e38, np.inf]), saturate=True)).all()


def test_narrow_floats_are_rounded_by_way_of_f32():
    """Just above the middle of two numbers of f16, but not in f32."""
    assert round_to(F16, np.array([1 + 2.0**-11 + 2.0**-40])).tolist() == [1.0]
    assert round_to(BF16, np.array([2**24 + 2**16 + 1])).tolist() == [2.0**24]


def test_e2m1_always_saturates():
    assert encode(F4E2M1, np.array([7.0, -100.0, np.inf]), saturate=False).tolist() == [7, 15, 7]


def test_bf16_rounds_as_the_hardware_does():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 20000, dtype=np.uint32)
    bits[:4000] = (bits[:4000] & 0xFFFF0000) | 0x8000  # exactly in the middle
    x = bits.view(np.float32)
    finite = np.isfinite(x)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    assert np.array_equal(to_storage(BF16, x)[finite], nearest_even[finite].astype(np.uint16))


def test_storage_round_trip():
    x = np.array([0.0, -0.0, 1.5, -448.0, 3.25e-3], np.float32)
    for t in (F64, F32, F16, BF16, F8E4M3, F8E5M2):
        once = round_to(t, x)
        assert np.array_equal(decode(t, to_storage(t, once)), once)
        assert once.dtype == t.value
    assert round_to(I8, np.array([3.0, -2.0])).tolist() == [3, -2]


# ------------------------------------------------------------------------------------- types


def test_sizes_and_kinds():
    assert {t.name: t.itemsize for t in DTYPES.values() if t.is_code} == {
        "f8e4m3": 1, "f8e5m2": 1, "f8e8m0": 1, "f4e2m1": 1,
    }  # fmt: skip
    for t in DTYPES.values():
        assert t.storage.itemsize == t.itemsize
        assert dtype(t.name) is t
    assert (F8E4M3.storage, BF16.storage, F16.storage) == (np.uint8, np.uint16, np.float16)


def test_promotion():
    assert promote(F16, BF16) is F32
    assert promote(I64, BF16) is BF16
    assert promote(I32, I64) is I64
    assert promote(BOOL, U8) is U8
    assert promote(F32, F32) is F32


def test_unknown_type():
    with pytest.raises(DiluError, match="unknown element type 'f12'") as caught:
        dtype("f12")
    assert "f8e4m3" in str(caught.value.hint)

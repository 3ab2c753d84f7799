"""Codecs of the storage formats, and the operands of matrix instructions made from them.

A number becomes one or more parts in the type of the matrix instructions, DOT: one where DOT holds
it exactly, else two or three whose sum is the number to f32's precision or nearly so. DECODE says
how FP8 codes become numbers: "packed" by inline assembly, four at a time; "portable" by integer
arithmetic; "native" by conversion instructions. Those take the two NaN codes of e4m3 for +-480;
for "exact" they are NaN.
"""

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------ bits


@triton.jit
def bits_to_f32(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def f32_to_bits(value):
    return value.to(tl.uint32, bitcast=True)


# ---------------------------------------------------------------------------------- decode


@triton.jit
def decode_f8e4m3(code):
    """Return the f32 value of e4m3 codes, NaN included."""
    c = code.to(tl.uint32)
    value = bits_to_f32(((c & 0x80) << 24) | ((c & 0x7F) << 20)) * 1.329227995784916e36  # 2^120
    return tl.where((c & 0x7F) == 0x7F, bits_to_f32(c * 0 + 0x7FC00000), value)


@triton.jit
def decode_f8e5m2(code):
    """Return the f32 value of e5m2 codes: the high bytes of f16 numbers."""
    return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def decode_f8e8m0(code):
    """Return the f32 value of e8m0 codes: powers of two, 2^-127 (subnormal) and NaN included."""
    c = code.to(tl.uint32)
    bits = tl.where(c == 0, 0x00400000, tl.where(c == 0xFF, 0x7FC00000, c << 23))
    return bits_to_f32(bits)


@triton.jit
def decode_bf16(code):
    """Return the f32 value of bf16 numbers, exactly and by integer arithmetic alone."""
    return bits_to_f32(code.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def as_f32(x):
    """Return numbers of any type as f32."""
    if x.dtype == tl.bfloat16:
        return decode_bf16(x)
    else:
        return x.to(tl.float32)


@triton.jit
def decoded(code, FORMAT: tl.constexpr):
    """Return numbers in a storage format, codes or not, as f32."""
    if FORMAT == "f8e4m3":
        return decode_f8e4m3(code)
    elif FORMAT == "f8e5m2":
        return decode_f8e5m2(code)
    elif FORMAT == "f8e8m0":
        return decode_f8e8m0(code)
    else:
        return as_f32(code)


# ---------------------------------------------------------------------------------- encode


@triton.jit
def round_bits(bits, DROP: tl.constexpr):
    """Return magnitude bits without their lowest DROP bits, rounded to nearest even."""
    return (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP


@triton.jit
def encode_bf16(value):
    """Return the bf16 bits (u16) of f32 numbers, rounded to nearest even; NaN stays NaN."""
    bits = f32_to_bits(value)
    nan = 0x7FC0 | ((bits >> 16) & 0x8000)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, nan, round_bits(bits, 16)).to(tl.uint16)


@triton.jit
def encode_magnitude(
    value,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERFLOW: tl.constexpr,
    NAN: tl.constexpr,
):
    """Return the code, without its sign, of f32 numbers in a format of fewer bits.

    A subnormal result comes of adding 2^k whose last place is the format's smallest step: the
    addition itself rounds to nearest even.
    """
    bits = f32_to_bits(value) & 0x7FFFFFFF
    DROP: tl.constexpr = 23 - MANTISSA
    normal = round_bits(bits, DROP) - ((127 - BIAS) << MANTISSA)
    STEP: tl.constexpr = (DROP + 128 - BIAS) << 23
    step = bits_to_f32(bits * 0 + STEP)
    subnormal = f32_to_bits(bits_to_f32(bits) + step) - STEP
    code = tl.where(bits < ((128 - BIAS) << 23), subnormal, normal)
    code = tl.where((code > LARGEST) | (bits >= 0x7F800000), OVERFLOW, code)
    return tl.where(bits > 0x7F800000, NAN, code)


@triton.jit
def encode_f8e4m3(value, SATURATE: tl.constexpr):
    sign = (f32_to_bits(value) >> 24) & 0x80
    code = encode_magnitude(value, 3, 7, 0x7E, 0x7E if SATURATE else 0x7F, 0x7F)
    return (sign | code).to(tl.uint8)


@triton.jit
def encode_f8e5m2(value, SATURATE: tl.constexpr):
    sign = (f32_to_bits(value) >> 24) & 0x80
    code = encode_magnitude(value, 2, 15, 0x7B, 0x7B if SATURATE else 0x7C, 0x7E)
    return (sign | code).to(tl.uint8)


@triton.jit
def encode_f8e8m0(value, SATURATE: tl.constexpr):
    """No sign; ties go up, and so does all between the smallest number, 2^-127, and 2^-126."""
    bits = f32_to_bits(value) & 0x7FFFFFFF
    exponent = bits >> 23
    up = (bits >> 22) & ((exponent > 0) | ((bits & 0x3FFFFF) != 0)).to(tl.uint32)
    code = exponent + up
    code = tl.where(code > 0xFE, 0xFE if SATURATE else 0xFF, code)
    return tl.where(bits > 0x7F800000, 0xFF, code).to(tl.uint8)


@triton.jit
def round_bf16(value):
    """Return f32 numbers rounded to bf16's grid."""
    return bits_to_f32(encode_bf16(value).to(tl.uint32) << 16)


@triton.jit
def round_f16(value):
    """Return f32 numbers rounded to f16's grid."""
    return value.to(tl.float16).to(tl.float32)


@triton.jit
def stored_as(value, TYPE: tl.constexpr):
    """Return f32 numbers in the type TYPE that a buffer has."""
    if TYPE == tl.bfloat16:
        return encode_bf16(value).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(TYPE)


# ------------------------------------------------------------------- operands of products


@triton.jit
def packed_f16(code):
    """Return e4m3 codes as f16, times 2^-8: six instructions for four codes."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lo, hi;
        prmt.b32 lo, $2, 0, 0x9180;
        prmt.b32 hi, $2, 0, 0xB3A2;
        shl.b32 lo, lo, 7;
        shl.b32 hi, hi, 7;
        and.b32 $0, lo, 0xBF80BF80;
        and.b32 $1, hi, 0xBF80BF80;
        }""",
        "=r,=r,r",
        [code],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def packed_bf16(code):
    """Return e4m3 codes as bf16: eight instructions for four codes, the last two multiply by
    2^120 what has e4m3's exponent where bf16 has its own."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lo, hi, scale, zero;
        mov.b32 scale, 0x7B807B80;
        mov.b32 zero, 0x80008000;
        prmt.b32 lo, $2, 0, 0x9180;
        prmt.b32 hi, $2, 0, 0xB3A2;
        shl.b32 lo, lo, 4;
        shl.b32 hi, hi, 4;
        and.b32 lo, lo, 0x87F087F0;
        and.b32 hi, hi, 0x87F087F0;
        fma.rn.bf16x2 $0, lo, scale, zero;
        fma.rn.bf16x2 $1, hi, scale, zero;
        }""",
        "=r,=r,r",
        [code],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def portable_f16(code):
    """Return e4m3 codes as f16, times 2^-8."""
    wide = code.to(tl.int8, bitcast=True).to(tl.int16)
    return ((wide << 7) & -16512).to(tl.float16, bitcast=True)  # 0xBF80


@triton.jit
def portable_bf16(code):
    """Return e4m3 codes as bf16. No step has a subnormal that hardware might flush but the
    multiplication's own operand, and cutting off f32's low bits loses nothing."""
    wide = code.to(tl.int8, bitcast=True).to(tl.int32)
    sparse = (wide << 20) & -2014314496  # 0x87F00000: sign, exponent and mantissa
    value = sparse.to(tl.float32, bitcast=True) * 1.329227995784916e36
    high = (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    return high.to(tl.bfloat16, bitcast=True)

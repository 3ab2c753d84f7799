"""Elementary functions and integer arithmetic with the meaning of the graph's ops.

Relative errors are a few units in the last place of f32; NaN in gives NaN out.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Cephes tanhf: an odd polynomial near zero, where the exponential form cancels."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near_zero = p * z * x + x
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, near_zero, tl.where(x < 0, -far, far))


@triton.jit
def erf(x):
    """Rational minimax approximation for |x| <= 3.8325, beyond which f32 erf is +-1 (the
    coefficients are those of XLA's f32 erf)."""
    x = tl.where(x > 3.8325069, 3.8325069, x)
    x = tl.where(x < -3.8325069, -3.8325069, x)
    z = x * x
    p = 0.00022905065861350646 * z + 0.0034082910107109506
    p = p * z + 0.050955695062380861
    p = p * z + 0.18520832239976145
    p = p * z + 1.128379143519084
    q = -1.1791602954361697e-7 * z + 0.000023547966471313185
    q = q * z + 0.0010179625278914885
    q = q * z + 0.014070470171167667
    q = q * z + 0.11098505178285362
    q = q * z + 0.49746925110067538
    q = q * z + 1.0
    return x * p / q


@triton.jit
def quarter_turns(x):
    """Return how many quarter turns an angle is, and what is left, at most an eighth of a turn.

    In f64, which holds the product of any f32 angle up to 2^30 and 2/pi to 1e-7 of a turn.
    """
    wide = x.to(tl.float64)
    count = tl.floor(wide * 0.6366197723675814 + 0.5)
    return count.to(tl.int64), (wide - count * 1.5707963267948966).to(tl.float32)


@triton.jit
def sine_polynomial(r):
    """Cephes sinf for |r| <= pi/4."""
    z = r * r
    p = -1.9515295891e-4 * z + 8.3321608736e-3
    p = p * z - 1.6666654611e-1
    return p * z * r + r


@triton.jit
def cosine_polynomial(r):
    """Cephes cosf for |r| <= pi/4."""
    z = r * r
    p = 2.443315711809948e-5 * z - 1.388731625493765e-3
    p = p * z + 4.166664568298827e-2
    return p * z * z - 0.5 * z + 1.0


@triton.jit
def sin(x):
    turns, r = quarter_turns(x)
    value = tl.where((turns & 1) != 0, cosine_polynomial(r), sine_polynomial(r))
    return tl.where((turns & 2) != 0, -value, value)


@triton.jit
def cos(x):
    turns, r = quarter_turns(x)
    value = tl.where((turns & 1) != 0, sine_polynomial(r), cosine_polynomial(r))
    return tl.where(((turns + 1) & 2) != 0, -value, value)


@triton.jit
def power(x, y):
    """x ** y, in f64 inside; NaN for a negative x and a y that is no whole number."""
    base, exponent = tl.cast(x, tl.float64), tl.cast(y, tl.float64)
    magnitude = tl.exp(exponent * tl.log(tl.abs(base)))
    whole = tl.floor(exponent) == exponent
    odd = tl.floor(exponent * 0.5) * 2.0 != exponent
    signed = tl.where(odd, -magnitude, magnitude)
    signed = tl.where(whole, signed, float("nan"))
    return tl.where(exponent == 0, 1.0, tl.where(base < 0, signed, magnitude))


@triton.jit
def larger(a, b):
    """The larger of two floats, NaN where either is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    """The smaller of two floats, NaN where either is NaN."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def float_mod(x, y):
    """x - floor(x / y) * y, with the sign of y."""
    return x - tl.floor(x / y) * y


@triton.jit
def int_mod(a, b):
    """The remainder of floor division; zero where the divisor is zero."""
    safe = tl.where(b == 0, 1, b)
    r = a % safe
    r = tl.where((r != 0) & ((r < 0) != (safe < 0)), r + safe, r)
    return tl.where(b == 0, 0, r)


@triton.jit
def int_div(a, b):
    """Floor division; zero where the divisor is zero."""
    safe = tl.where(b == 0, 1, b)
    return tl.where(b == 0, 0, (a - int_mod(a, safe)) // safe)


@triton.jit
def int_power(base, exponent):
    base, left = base.to(tl.int64), exponent.to(tl.int64)
    base, left = base + left * 0, left + base * 0  # of one shape
    out = left * 0 + 1
    for _ in range(63):
        out = tl.where((left & 1) != 0, out * base, out)
        base = base * base
        left = left >> 1
    return out


@triton.jit
def clamp_index(x, size):
    """x held in 0 .. size - 1."""
    return tl.maximum(tl.minimum(x, size - 1), 0)


@triton.jit
def ordered_f32(x):
    """Return i32 that compare as f32 numbers do, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def ordered_f64(x):
    """Return i64 that compare as f64 numbers do, NaN above all."""
    bits = x.to(tl.int64, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFFFFFFFFFF, key)

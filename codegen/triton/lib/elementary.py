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
    beyond = tl.abs(x) >= 3.8325069
    sign = tl.where(x < 0, -1.0, 1.0)
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
    return tl.where(beyond, sign, x * p / q)


@triton.jit
def atan(x):
    """Cephes atanf: an odd polynomial below tan(pi/8), to which the rest is brought by the
    angle's complement or by the difference to pi/4."""
    magnitude = tl.abs(x)
    far = magnitude > 2.41421356
    middle = (magnitude > 0.41421356) & (magnitude <= 2.41421356)
    top = tl.where(far, -1.0, tl.where(middle, magnitude - 1.0, magnitude))
    t = top / tl.where(far, magnitude, tl.where(middle, magnitude + 1.0, 1.0))
    z = t * t
    p = 8.05374449538e-2 * z - 1.38776856032e-1
    p = p * z + 1.99777106478e-1
    p = p * z - 3.33329491539e-1
    angle = p * z * t + t
    angle += tl.where(far, 1.57079637, tl.where(middle, 0.785398185, 0.0))
    return tl.where(x < 0, -angle, angle)


@triton.jit
def atan_f64(x):
    """Cephes atan: a rational function below 0.66, to which the rest is brought as above."""
    magnitude = tl.abs(x)
    far = magnitude > 2.414213562373095
    middle = (magnitude > 0.66) & (magnitude <= 2.414213562373095)
    top = tl.where(far, -1.0, tl.where(middle, magnitude - 1.0, magnitude))
    t = top / tl.where(far, magnitude, tl.where(middle, magnitude + 1.0, 1.0))
    z = t * t
    p = z * -8.750608600031904122785e-1 - 1.615753718733365076637e1
    p = p * z - 7.500855792314704667340e1
    p = p * z - 1.228866684490136173410e2
    p = p * z - 6.485021904942025371773e1
    q = z + 2.485846490142306297962e1
    q = q * z + 1.650270098316988542046e2
    q = q * z + 4.328810604912902668951e2
    q = q * z + 4.853903996359136964868e2
    q = q * z + 1.945506571482613964425e2
    quarters = tl.where(far, 2.0, tl.where(middle, 1.0, 0.0)).to(tl.float64)
    angle = t * (z * p / q) + t + quarters * 3.061616997868382943e-17
    angle = quarters * 0.7853981633974483 + angle
    return tl.where(x < 0, -angle, angle)


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
    base = tl.where(exponent == exponent, base, base)  # of one shape
    exponent = tl.where(base == base, exponent, exponent)
    size = tl.abs(base)
    magnitude = tl.exp(exponent * tl.log(size))
    endless = tl.abs(exponent) == float("inf")
    magnitude = tl.where((size == 1) & endless, 1.0, magnitude)
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(exponent * 0.5) * 2.0 != exponent)
    below = base.to(tl.int64, bitcast=True) < 0  # of -0, too
    signed = tl.where(odd, -magnitude, magnitude)
    signed = tl.where(whole | (size == 0) | (size == float("inf")), signed, float("nan"))
    power = tl.where(below, signed, magnitude)
    power = tl.where((exponent == 0) | (base == 1), 1.0, tl.where(base != base, base, power))
    return power.to(x.dtype)


@triton.jit
def round_even(x):
    """The nearest whole number, the even one of two; a zero has the sign of x."""
    down = tl.floor(x)
    above = x - down
    odd = tl.floor(down * 0.5) * 2.0 != down
    whole = tl.where((above > 0.5) | ((above == 0.5) & odd), down + 1.0, down)
    whole = tl.where(tl.abs(x) < float("inf"), whole, x)
    return copy_sign(whole, x)


@triton.jit
def copy_sign(a, b):
    """The size of the first with the sign bit of the second."""
    INT: tl.constexpr = tl.int64 if a.dtype == tl.float64 else tl.int32
    differ = (a.to(INT, bitcast=True) ^ b.to(INT, bitcast=True)) < 0
    return tl.where(differ, -a, a)


@triton.jit
def multiplied(a, b):
    return a * b


@triton.jit
def shift_left(a, b):
    """What is shifted out is gone: all of it where b is negative or large."""
    wide, by = a.to(tl.int64), b.to(tl.int64)
    inside = (by >= 0) & (by < 64)
    return tl.where(inside, wide << tl.where(inside, by, 0), 0)


@triton.jit
def shift_right(a, b):
    """Rounded down; 0 or -1 where b is negative or large."""
    wide, by = a.to(tl.int64), b.to(tl.int64)
    return wide >> tl.where((by >= 0) & (by < 64), by, 63)


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
    """The remainder of floor division, which has the sign of y; a zero has that of x. Exact.

    Every turn takes off a multiple of |y| by a number of 26 bits. Its products with the halves of
    |y|, of 26 and 27 bits, and what is left after each are exact in f64.
    """
    x = tl.where(y == y, x, x)  # of one shape
    y = tl.where(x == x, y, y)
    a, b = tl.abs(tl.cast(x, tl.float64)), tl.abs(tl.cast(y, tl.float64))
    by = tl.where((b > 0) & (b < float("inf")), b, 1.0)
    high = (by.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
    rest = tl.where(a < float("inf"), a, 0.0)
    TURNS: tl.constexpr = 12 if x.dtype == tl.float32 else 86
    for _ in range(TURNS):
        times = rest / by
        less = (times * (1.0 - 8.881784197001252e-16)).to(tl.int64, bitcast=True)  # 2^-50
        short = (less & -0x8000000).to(tl.float64, bitcast=True)
        times = tl.where(times < 67108864.0, tl.floor(times), short)
        rest = (rest - times * high) - times * (by - high)
        rest = tl.where(rest < 0, rest + by, rest)
    rest = tl.where(b == float("inf"), a, rest)
    bad = (a == float("inf")) | (a != a) | (b == 0) | (b != b)
    rest = tl.where(bad, float("nan"), tl.where(x < 0, -rest, rest)).to(x.dtype)
    other = ((rest < 0) != (y < 0)) & (rest != 0)
    return tl.where(other, rest + y, tl.where(rest == 0, x * 0, rest))


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
    down = (a % safe != 0) & ((a < 0) != (safe < 0))
    return tl.where(b == 0, 0, a // safe - down.to(tl.int32))


@triton.jit
def int_power(base, exponent):
    """The whole part of a power: zero for most negative exponents."""
    base, left = base.to(tl.int64), exponent.to(tl.int64)
    base, left = base + left * 0, left + base * 0  # of one shape
    out = left * 0 + 1
    one = tl.where(base == 1, out, tl.where(base == -1, 1 - 2 * (left & 1), 0))
    negative = left < 0
    for _ in range(63):
        out = tl.where((left & 1) != 0, out * base, out)
        base = base * base
        left = left >> 1
    return tl.where(negative, one, out)


@triton.jit
def to_i64(x):
    """Floats cut off to integers; what does not fit, NaN included, is the smallest one."""
    fits = (x >= -9223372036854775808.0) & (x < 9223372036854775808.0)
    return tl.where(fits, tl.where(fits, x, 0.0).to(tl.int64), -0x8000000000000000)


@triton.jit
def to_i32(x):
    """Floats cut off to integers; what does not fit, NaN included, is the smallest one."""
    fits = (x > -2147483648.0) & (x < 2147483648.0)
    return tl.where(fits, tl.where(fits, x, 0.0).to(tl.int32), -0x80000000)


@triton.jit
def clamp_index(x, size):
    """x held in 0 .. size - 1."""
    return tl.maximum(tl.minimum(x, size - 1), 0)


@triton.jit
def ordered_f32(x):
    """Return i32 that compare as f32 numbers do, NaN above all and both zeros equal."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def ordered_f64(x):
    """Return i64 that compare as f64 numbers do, NaN above all and both zeros equal."""
    bits = x.to(tl.int64, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFFFFFFFFFF), bits)
    return tl.where(x != x, 0x7FFFFFFFFFFFFFFF, key)

/* elementary.h: elementary functions in f32 for generated loops.
 *
 * Each is straight-line code without branches or calls, so a plain loop over an array vectorizes at
 * -O3 without relaxed floating-point flags. NaN in gives NaN out.
 *
 *   float dilu_fmaf(a, b, c)     a*b+c, one rounding where the target has the instruction
 *   float dilu_expf(x)           relative error about 1e-7, subnormal results and overflow included
 *   float dilu_sigmoid(x)        1 / (1 + exp(-x))
 *   float dilu_silu(x)           x * sigmoid(x)
 *   float dilu_tanh(x)           relative error about 2e-7
 *   float dilu_atan(x)           relative error about 2e-7
 *   float dilu_erf(x)            absolute error about 2e-7
 */
#ifndef DILU_ELEMENTARY_H
#define DILU_ELEMENTARY_H

#include "formats.h"

/* The library fmaf of a processor without the instruction would be slow and would not vectorize. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define DILU_FMAF(a, b, c) __builtin_fmaf((a), (b), (c))
#else
#define DILU_FMAF(a, b, c) ((a) * (b) + (c))
#endif

DILU_INLINE float dilu_fmaf(float a, float b, float c) { return DILU_FMAF(a, b, c); }

/* exp(x) = 2^n exp(r), |r| <= ln2/2, polynomial of Cephes expf. 2^n is applied in two factors because
 * for a subnormal result n is below the exponent range. */
DILU_INLINE float dilu_expf(float x) {
  const float magic = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
  x = dilu_select(x > 89.0f, 89.0f, x);
  x = dilu_select(x < -105.0f, -105.0f, x);
  float shifted = DILU_FMAF(x, 1.44269504f, magic);
  float n = shifted - magic;
  float r = DILU_FMAF(n, -0.693359375f, x);
  r = DILU_FMAF(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = DILU_FMAF(p, r, 1.3981999507e-3f);
  p = DILU_FMAF(p, r, 8.3334519073e-3f);
  p = DILU_FMAF(p, r, 4.1665795894e-2f);
  p = DILU_FMAF(p, r, 1.6666665459e-1f);
  p = DILU_FMAF(p, r, 5.0000001201e-1f);
  p = DILU_FMAF(p, r * r, r) + 1.0f;
  int32_t exponent = (int32_t)(dilu_to_bits(shifted) - dilu_to_bits(magic));
  int32_t half = exponent >> 1;
  float first = dilu_from_bits((uint32_t)(half + 127) << 23);
  float second = dilu_from_bits((uint32_t)(exponent - half + 127) << 23);
  return p * first * second;
}

DILU_INLINE float dilu_sigmoid(float x) { return 1.0f / (1.0f + dilu_expf(-x)); }

DILU_INLINE float dilu_silu(float x) { return x / (1.0f + dilu_expf(-x)); }

/* Cephes tanhf: odd polynomial near zero, where the exponential form cancels. */
DILU_INLINE float dilu_tanh(float x) {
  float z = x * x;
  float p = -5.70498872745e-3f;
  p = DILU_FMAF(p, z, 2.06390887954e-2f);
  p = DILU_FMAF(p, z, -5.37397155531e-2f);
  p = DILU_FMAF(p, z, 1.33314422036e-1f);
  p = DILU_FMAF(p, z, -3.33332819422e-1f);
  float near_zero = DILU_FMAF(p * z, x, x);
  float magnitude = dilu_from_bits(dilu_to_bits(x) & 0x7FFFFFFFu);
  float far = 1.0f - 2.0f / (dilu_expf(2.0f * magnitude) + 1.0f);
  far = dilu_from_bits(dilu_to_bits(far) | (dilu_to_bits(x) & 0x80000000u));
  return dilu_select(magnitude < 0.625f, near_zero, far);
}

/* Cephes atanf: an odd polynomial below tan(pi/8), to which the rest is brought by the angle's
 * complement or by the difference to pi/4. */
DILU_INLINE float dilu_atan(float x) {
  float magnitude = dilu_from_bits(dilu_to_bits(x) & 0x7FFFFFFFu);
  int far = magnitude > 2.41421356f, middle = (magnitude > 0.41421356f) & !far;
  float top = dilu_select(far, -1.0f, dilu_select(middle, magnitude - 1.0f, magnitude));
  float t = top / dilu_select(far, magnitude, dilu_select(middle, magnitude + 1.0f, 1.0f));
  float z = t * t;
  float p = 8.05374449538e-2f;
  p = DILU_FMAF(p, z, -1.38776856032e-1f);
  p = DILU_FMAF(p, z, 1.99777106478e-1f);
  p = DILU_FMAF(p, z, -3.33329491539e-1f);
  float angle = DILU_FMAF(p * z, t, t);
  angle += dilu_select(far, 1.57079637f, dilu_select(middle, 0.785398185f, 0.0f));
  return dilu_from_bits(dilu_to_bits(angle) | (dilu_to_bits(x) & 0x80000000u));
}

/* Rational minimax approximation on |x| <= 3.8325, beyond which f32 erf is +-1 (coefficients as in
 * XLA's f32 erf). */
DILU_INLINE float dilu_erf(float x) {
  int beyond = (x >= 3.8325069f) | (x <= -3.8325069f); /* where the quotient is only nearly +-1 */
  float limit = dilu_from_bits((dilu_to_bits(x) & 0x80000000u) | 0x3F800000u);
  x = dilu_select(x > 3.8325069f, 3.8325069f, x);
  x = dilu_select(x < -3.8325069f, -3.8325069f, x);
  float z = x * x;
  float p = 0.00022905065861350646f;
  p = DILU_FMAF(p, z, 0.0034082910107109506f);
  p = DILU_FMAF(p, z, 0.050955695062380861f);
  p = DILU_FMAF(p, z, 0.18520832239976145f);
  p = DILU_FMAF(p, z, 1.128379143519084f);
  float q = -1.1791602954361697e-7f;
  q = DILU_FMAF(q, z, 0.000023547966471313185f);
  q = DILU_FMAF(q, z, 0.0010179625278914885f);
  q = DILU_FMAF(q, z, 0.014070470171167667f);
  q = DILU_FMAF(q, z, 0.11098505178285362f);
  q = DILU_FMAF(q, z, 0.49746925110067538f);
  q = DILU_FMAF(q, z, 1.0f);
  return dilu_select(beyond, limit, x * p / q);
}

#endif

/* formats.h: exact scalar codecs of the storage formats.
 *
 * A format is one of the DILU_* constants below, always a compile-time constant at the call.
 * Decoding is exact for every code (subnormals, infinities, NaN). Encoding rounds to nearest even.
 *
 *   int      dilu_size(format)                       bytes per value
 *   float    dilu_decode_bf16/f16/f8e4m3/f8e5m2/f8e8m0(code)
 *   code     dilu_encode_bf16/f16/f8e4m3/f8e5m2/f8e8m0(value[, saturate])
 *   float    dilu_load(format, base, index)          any format, any alignment
 *   void     dilu_store(format, base, index, value, saturate)
 *
 * saturate = 0: a value beyond the largest finite one becomes NaN (f8e4m3, f8e8m0) or infinity (others).
 * saturate = 1: it becomes the largest finite value, infinities included. NaN stays NaN in both.
 *
 * Nothing here depends on the flush-to-zero state of the processor: no operand or result of a
 * floating-point operation is an f32 subnormal, except where the value itself is one.
 */
#ifndef DILU_FORMATS_H
#define DILU_FORMATS_H

#include <stdint.h>
#include <string.h>

#define DILU_INLINE static inline __attribute__((always_inline, unused))
#define DILU_NOINLINE static __attribute__((noinline, unused))

enum {
  DILU_NONE = -1, /* no scales */
  DILU_F32 = 0,
  DILU_BF16 = 1,
  DILU_F16 = 2,
  DILU_F8E4M3 = 3, /* the "fn" variant: no infinities, NaN is S.1111.111 */
  DILU_F8E5M2 = 4,
  DILU_F8E8M0 = 5, /* powers of two, scales only */
};

/* Weights are mapped from checkpoints at arbitrary offsets, so no access may assume alignment. */
typedef uint16_t __attribute__((aligned(1), may_alias)) dilu_unaligned_u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) dilu_unaligned_u32;
typedef float __attribute__((aligned(1), may_alias)) dilu_unaligned_f32;

DILU_INLINE int dilu_size(int format) {
  return format == DILU_F32 ? 4 : format == DILU_BF16 || format == DILU_F16 ? 2 : 1;
}

DILU_INLINE float dilu_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DILU_INLINE uint32_t dilu_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* condition ? yes : no without a branch: compilers turn a conditional expression into control flow when
 * one side is a constant, and then no longer vectorize the loop around it. */
DILU_INLINE uint32_t dilu_select_bits(int condition, uint32_t yes, uint32_t no) {
  uint32_t mask = -(uint32_t)condition;
  return (yes & mask) | (no & ~mask);
}

DILU_INLINE float dilu_select(int condition, float yes, float no) {
  return dilu_from_bits(dilu_select_bits(condition, dilu_to_bits(yes), dilu_to_bits(no)));
}

/* 2^exponent for -126 <= exponent <= 127. */
DILU_INLINE float dilu_pow2(int exponent) { return dilu_from_bits((uint32_t)(exponent + 127) << 23); }

/* ---- decode ---------------------------------------------------------------------------- */

DILU_INLINE float dilu_decode_bf16(uint16_t code) { return dilu_from_bits((uint32_t)code << 16); }

DILU_INLINE float dilu_decode_f16(uint16_t code) {
  uint32_t sign = (uint32_t)(code & 0x8000u) << 16, magnitude = code & 0x7FFFu;
  uint32_t normal = (magnitude << 13) + (112u << 23);
  uint32_t special = 0x7F800000u | (magnitude & 0x3FFu) << 13;
  uint32_t subnormal = dilu_to_bits((float)(int32_t)magnitude * 0x1p-24f);
  uint32_t bits = dilu_select_bits(magnitude < 0x400u, subnormal, normal);
  bits = dilu_select_bits(magnitude >= 0x7C00u, special, bits);
  return dilu_from_bits(sign | bits);
}

DILU_INLINE float dilu_decode_f8e5m2(uint8_t code) { return dilu_decode_f16((uint16_t)(code << 8)); }

DILU_INLINE float dilu_decode_f8e4m3(uint8_t code) {
  uint32_t sign = (uint32_t)(code & 0x80u) << 24, magnitude = code & 0x7Fu;
  uint32_t normal = (magnitude << 20) + (120u << 23);
  uint32_t subnormal = dilu_to_bits((float)(int32_t)magnitude * 0x1p-9f);
  uint32_t bits = dilu_select_bits(magnitude < 8u, subnormal, normal);
  bits = dilu_select_bits(magnitude == 0x7Fu, 0x7FC00000u, bits);
  return dilu_from_bits(sign | bits);
}

DILU_INLINE float dilu_decode_f8e8m0(uint8_t code) {
  uint32_t bits = code == 0xFFu ? 0x7FC00000u : code == 0 ? 0x00400000u : (uint32_t)code << 23;
  return dilu_from_bits(bits);
}

/* ---- encode ---------------------------------------------------------------------------- */

DILU_INLINE uint16_t dilu_encode_bf16(float value) {
  uint32_t bits = dilu_to_bits(value);
  uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  uint32_t quiet_nan = 0x7FC0u | (bits >> 16 & 0x8000u);
  return (uint16_t)dilu_select_bits((bits & 0x7FFFFFFFu) > 0x7F800000u, quiet_nan, rounded);
}

/* Encodes to a sign, exponent and mantissa format of fewer bits; returns the code without its sign
 * in the low bits. Subnormal results come from adding 2^k, whose last place is the format's smallest
 * step: the addition itself rounds to nearest even. */
DILU_INLINE uint32_t dilu_encode_magnitude(float value, int mantissa, int bias, uint32_t largest,
                                           uint32_t overflow, uint32_t nan) {
  uint32_t bits = dilu_to_bits(value) & 0x7FFFFFFFu;
  int drop = 23 - mantissa;
  uint32_t odd = bits >> drop & 1u;
  uint32_t normal = ((bits + (1u << (drop - 1)) - 1u + odd) >> drop) - ((uint32_t)(127 - bias) << mantissa);
  float step = dilu_pow2(drop + 1 - bias);
  uint32_t subnormal = dilu_to_bits(dilu_from_bits(bits) + step) - dilu_to_bits(step);
  uint32_t code = dilu_select_bits(bits < (uint32_t)(128 - bias) << 23, subnormal, normal);
  code = dilu_select_bits(code > largest, overflow, code); /* infinity's rounded code, too, is above */
  return dilu_select_bits(bits > 0x7F800000u, nan, code);
}

DILU_INLINE uint16_t dilu_encode_f16(float value, int saturate) {
  uint32_t sign = dilu_to_bits(value) >> 16 & 0x8000u;
  return (uint16_t)(sign | dilu_encode_magnitude(value, 10, 15, 0x7BFFu, saturate ? 0x7BFFu : 0x7C00u, 0x7E00u));
}

DILU_INLINE uint8_t dilu_encode_f8e4m3(float value, int saturate) {
  uint32_t sign = dilu_to_bits(value) >> 24 & 0x80u;
  return (uint8_t)(sign | dilu_encode_magnitude(value, 3, 7, 0x7Eu, saturate ? 0x7Eu : 0x7Fu, 0x7Fu));
}

DILU_INLINE uint8_t dilu_encode_f8e5m2(float value, int saturate) {
  uint32_t sign = dilu_to_bits(value) >> 24 & 0x80u;
  return (uint8_t)(sign | dilu_encode_magnitude(value, 2, 15, 0x7Bu, saturate ? 0x7Bu : 0x7Cu, 0x7Eu));
}

/* No sign; ties go up, and so does all between the smallest number, 2^-127, and 2^-126: as in torch. */
DILU_INLINE uint8_t dilu_encode_f8e8m0(float value, int saturate) {
  uint32_t bits = dilu_to_bits(value) & 0x7FFFFFFFu, exponent = bits >> 23;
  uint32_t code = exponent + (bits >> 22 & (exponent > 0 || (bits & 0x3FFFFFu) != 0));
  code = dilu_select_bits(code > 0xFEu, saturate ? 0xFEu : 0xFFu, code);
  return (uint8_t)dilu_select_bits(bits > 0x7F800000u, 0xFFu, code);
}

/* ---- memory ---------------------------------------------------------------------------- */

DILU_INLINE float dilu_load(int format, const void* base, int64_t index) {
  switch (format) {
    case DILU_F32: return ((const dilu_unaligned_f32*)base)[index];
    case DILU_BF16: return dilu_decode_bf16(((const dilu_unaligned_u16*)base)[index]);
    case DILU_F16: return dilu_decode_f16(((const dilu_unaligned_u16*)base)[index]);
    case DILU_F8E4M3: return dilu_decode_f8e4m3(((const uint8_t*)base)[index]);
    case DILU_F8E5M2: return dilu_decode_f8e5m2(((const uint8_t*)base)[index]);
    default: return dilu_decode_f8e8m0(((const uint8_t*)base)[index]);
  }
}

/* format: any but DILU_F8E8M0. */
DILU_INLINE void dilu_store(int format, void* base, int64_t index, float value, int saturate) {
  switch (format) {
    case DILU_F32: ((dilu_unaligned_f32*)base)[index] = value; break;
    case DILU_BF16: ((dilu_unaligned_u16*)base)[index] = dilu_encode_bf16(value); break;
    case DILU_F16: ((dilu_unaligned_u16*)base)[index] = dilu_encode_f16(value, saturate); break;
    case DILU_F8E4M3: ((uint8_t*)base)[index] = dilu_encode_f8e4m3(value, saturate); break;
    default: ((uint8_t*)base)[index] = dilu_encode_f8e5m2(value, saturate); break;
  }
}

#endif

/* group.h: groups of 32 consecutive weights, decoded in registers.
 *
 * A group becomes four vectors in the format's lane order: the order that costs the fewest instructions
 * to reach from the bytes as they lie in memory. Activations are permuted once to match ("packed").
 *
 * Formats narrower than f32 are decoded "in place": the code's exponent and mantissa bits are moved to
 * where f32 has them, without correcting the exponent's bias, which is the value times 2^-gap, exactly,
 * subnormals included. Packed activations carry a factor 2^64 (dilu_prescale), so that products are
 * normal numbers, and sums are multiplied by the rest of the gap (dilu_remainder). Activations must
 * therefore be below 2^63, also times a scale; products lose nothing above 2^-93 times the scale.
 *
 * The code for NaN or infinity is no such product. Kernels gather the largest magnitude byte per row
 * while they decode (dilu_flag), and do rows that hold a special code again, number by number.
 *
 *   int64_t dilu_packed_length(K)                          floats of a packed row: K rounded up to 32
 *   void dilu_pack_row(format, x, K, packed)               x: K floats; packed: zero beyond K
 *   void dilu_pack_strip(format, x, col, count, K, packed) the same for columns col..col+count of a row;
 *                                                          the strip that ends at K also writes the zeros
 *   void dilu_pack_rows(format, x, stride, M, K, packed, packed_stride, pool, thread)
 *                                                          M rows shared among the threads; no barrier
 * `format` is the weights' format, a constant. Strides count floats.
 */
#ifndef DILU_GROUP_H
#define DILU_GROUP_H

#include "isa.h"
#include "pool.h"

#define DILU_GROUP 32

/* ---- lane order and powers of two ------------------------------------------------------ */

/* Where weight i (0..31) of a group stands in the four vectors. */
DILU_INLINE int dilu_lane(int format, int i) {
  switch (dilu_size(format)) {
    case 1: return (i % 4) * 8 + i / 4;
    case 2: return (i / 16) * 16 + (i % 2) * 8 + (i % 16) / 2;
    default: return i;
  }
}

/* A format decoded in place is value * 2^-gap. */
DILU_INLINE int dilu_gap(int format) {
  return format == DILU_F8E4M3 ? 120 : format == DILU_F8E5M2 || format == DILU_F16 ? 112 : 0;
}

DILU_INLINE float dilu_prescale(int format) { return dilu_gap(format) ? 0x1p64f : 1.0f; }

DILU_INLINE float dilu_remainder(int format) { return dilu_gap(format) ? dilu_pow2(dilu_gap(format) - 64) : 1.0f; }

/* ---- decode ---------------------------------------------------------------------------- */

typedef struct {
  v_f32 lane[4];
} dilu_group;

/* Sixteen-bit words hold two codes: the code in the high byte is moved so that the word is the number's
 * bf16, then words are taken apart. */
DILU_INLINE dilu_group dilu_group_bytes(const void* codes, int shift, uint16_t mask) {
  v_bits w = v_bits_load(codes), keep = v_bits_set16(mask), high = v_bits_set32(0xFFFF0000u);
  v_bits odd = v_and(v_sra16(w, shift), keep), even = v_and(v_sra16(v_shl16(w, 8), shift), keep);
  return (dilu_group){{v_as_f32(v_shl32(even, 16)), v_as_f32(v_shl32(odd, 16)), v_as_f32(v_and(even, high)), v_as_f32(v_and(odd, high))}};
}

DILU_INLINE dilu_group dilu_group_words(const char* codes, int shift, uint32_t mask) {
  dilu_group group;
  v_bits keep = v_bits_set32(mask);
  for (int half = 0; half < 2; half++) {
    v_bits w = v_bits_load(codes + half * 32), even = v_shl32(w, 16);
    group.lane[half * 2] = v_as_f32(shift ? v_and(v_sra32(even, shift), keep) : even);
    group.lane[half * 2 + 1] = v_as_f32(v_and(shift ? v_sra32(w, shift) : w, keep));
  }
  return group;
}

DILU_INLINE dilu_group dilu_group_decode(int format, const void* codes) {
  const char* p = codes;
  switch (format) {
    case DILU_F8E4M3: return dilu_group_bytes(p, 4, 0x87F0);
    case DILU_F8E5M2: return dilu_group_bytes(p, 3, 0x8FE0);
    case DILU_F16: return dilu_group_words(p, 3, 0x8FFFE000u);
    case DILU_BF16: return dilu_group_words(p, 0, 0xFFFF0000u);
    default: return (dilu_group){{v_load(p), v_load(p + 32), v_load(p + 64), v_load(p + 96)}};
  }
}

/* ---- special codes --------------------------------------------------------------------- */

/* Whether in-place decoding misses special codes of this format. */
DILU_INLINE int dilu_has_specials(int format) { return dilu_gap(format) != 0; }

/* Adds a group to the flag of a row; f16 is looked at by its high bytes only. */
DILU_INLINE v_bits dilu_flag(int format, const void* codes, v_bits flag) {
  if (!dilu_has_specials(format)) return flag;
  if (format != DILU_F16) return v_bytes_max(flag, v_or(v_bits_load(codes), v_bits_set8(0x80)));
  for (int half = 0; half < 2; half++) {
    v_bits high = v_and(v_bits_load((const char*)codes + half * 32), v_bits_set16(0xFF00));
    flag = v_bytes_max(flag, v_or(high, v_bits_set16(0x8000)));
  }
  return flag;
}

DILU_INLINE int dilu_flag_raised(int format, v_bits flag) {
  return dilu_has_specials(format) && v_bytes_any_ge(flag, format == DILU_F8E4M3 ? 0xFF : 0xFC);
}

/* ---- packing --------------------------------------------------------------------------- */

DILU_INLINE int64_t dilu_packed_length(int64_t K) { return (K + DILU_GROUP - 1) / DILU_GROUP * DILU_GROUP; }

DILU_INLINE void dilu_pack_strip(int format, const float* x, int64_t col, int64_t count, int64_t K, float* packed) {
  int64_t i = 0;
  for (; i < count && (col + i) % DILU_GROUP; i++)
    packed[(col + i) / DILU_GROUP * DILU_GROUP + dilu_lane(format, (int)((col + i) % DILU_GROUP))] = x[i] * dilu_prescale(format);
  for (; i + DILU_GROUP <= count; i += DILU_GROUP)
    for (int j = 0; j < DILU_GROUP; j++) packed[col + i + dilu_lane(format, j)] = x[i + j] * dilu_prescale(format);
  for (; i < count; i++)
    packed[(col + i) / DILU_GROUP * DILU_GROUP + dilu_lane(format, (int)((col + i) % DILU_GROUP))] = x[i] * dilu_prescale(format);
  if (col + count != K) return;
  for (int64_t k = K; k < dilu_packed_length(K); k++)
    packed[k / DILU_GROUP * DILU_GROUP + dilu_lane(format, (int)(k % DILU_GROUP))] = 0.0f;
}

DILU_INLINE void dilu_pack_row(int format, const float* x, int64_t K, float* packed) {
  dilu_pack_strip(format, x, 0, K, K, packed);
}

DILU_INLINE void dilu_pack_rows(int format, const float* x, int64_t stride, int64_t M, int64_t K, float* packed,
                                int64_t packed_stride, dilu_pool* pool, int thread) {
  dilu_loop loop = dilu_loop_begin(pool, thread, M);
  for (int64_t m; (m = dilu_loop_next(&loop)) >= 0;) dilu_pack_row(format, x + m * stride, K, packed + m * packed_stride);
}

#endif

/* weights.h: stored weight matrices, and how their scales enter a product.
 *
 * A matrix is row-major in one of the formats of formats.h, with or without scales of blocks. One rule
 * for each kind of scales (dilu_scaling), whatever the number of activation rows:
 *   one a row, one for all, none     sums are multiplied by the row's scale in the end
 *   blocks of at least 64 rows and whole groups of columns
 *                                    activations are, when they are copied for a block of rows
 *   any other                        weights are, each rounded to f32
 * What depends on the rows' scales is cut where blocks of rows end (dilu_block_end).
 */
#ifndef DILU_WEIGHTS_H
#define DILU_WEIGHTS_H

#include <stddef.h>

#include "group.h"

typedef struct {
  int format;         /* DILU_F32, BF16, F16, F8E4M3 or F8E5M2 */
  int scale_format;   /* DILU_NONE, or F32, BF16, F16, F8E8M0 */
  int64_t block_rows; /* weight rows per scale; 0: all */
  int64_t block_cols; /* weight columns per scale; 0: all */
} dilu_weight_type;

/* One weight matrix. */
typedef struct {
  const char* codes;
  const char* scales;
  int64_t stride, scale_stride; /* values */
} dilu_matrix;

/* One weight row. */
typedef struct {
  const char* codes;
  const char* scales;
} dilu_matrix_row;

/* ---- scales ---------------------------------------------------------------------------- */

enum { DILU_SCALE_SUMS, DILU_SCALE_ACTIVATIONS, DILU_SCALE_WEIGHTS };

DILU_INLINE int dilu_scaling(dilu_weight_type type) {
  if (type.scale_format == DILU_NONE || type.block_cols <= 0) return DILU_SCALE_SUMS;
  int whole = type.block_cols % DILU_GROUP == 0 && (type.block_rows <= 0 || type.block_rows >= 64);
  return whole ? DILU_SCALE_ACTIVATIONS : DILU_SCALE_WEIGHTS;
}

/* The row after those that share their scales with `row`, at most `end`. */
DILU_INLINE int64_t dilu_block_end(dilu_weight_type type, int64_t row, int64_t end) {
  if (dilu_scaling(type) != DILU_SCALE_ACTIVATIONS || type.block_rows <= 0) return end;
  int64_t next = (row / type.block_rows + 1) * type.block_rows;
  return next < end ? next : end;
}

/* A number for the rows that share their scales with `row`. */
DILU_INLINE int64_t dilu_block_of(dilu_weight_type type, int64_t row) {
  return dilu_scaling(type) != DILU_SCALE_ACTIVATIONS || type.block_rows <= 0 ? 0 : row / type.block_rows;
}

/* The scale of column k, from the scales of the row's blocks. */
DILU_INLINE float dilu_scale(dilu_weight_type type, const void* scales, int64_t k) {
  if (type.scale_format == DILU_NONE) return 1.0f;
  return dilu_load(type.scale_format, scales, type.block_cols > 0 ? k / type.block_cols : 0);
}

DILU_INLINE dilu_matrix_row dilu_row(dilu_weight_type type, const dilu_matrix* w, int64_t row) {
  dilu_matrix_row r = {w->codes + row * w->stride * dilu_size(type.format), w->scales};
  if (type.scale_format != DILU_NONE && type.block_rows > 0)
    r.scales += row / type.block_rows * w->scale_stride * dilu_size(type.scale_format);
  return r;
}

/* What a row's sum is multiplied by in the end: what decoding in place and packing left to do, and the
 * row's scale. */
DILU_INLINE float dilu_sum_scale(dilu_weight_type type, dilu_matrix_row row, float sum) {
  if (dilu_scaling(type) == DILU_SCALE_WEIGHTS) return sum * (1.0f / dilu_prescale(type.format));
  sum *= dilu_remainder(type.format);
  return dilu_scaling(type) == DILU_SCALE_SUMS && type.scale_format != DILU_NONE ? sum * dilu_scale(type, row.scales, 0) : sum;
}

/* ---- groups of weights ----------------------------------------------------------------- */

/* The codes of columns k..k+32 of a row: in place, or from the last, incomplete group copied to the
 * buffer, so that nothing beyond the row is read. */
DILU_INLINE const char* dilu_group_at(int format, const char* codes, int64_t k, int64_t K, char* buffer) {
  codes += k * dilu_size(format);
  if (__builtin_expect(K - k >= DILU_GROUP, 1)) return codes;
  memset(buffer, 0, DILU_GROUP * 4);
  memcpy(buffer, codes, (size_t)((K - k) * dilu_size(format)));
  return buffer;
}

/* One group number by number: special codes and, with `scaled`, scales of any block. */
DILU_NOINLINE dilu_group dilu_group_slow(dilu_weight_type type, int scaled, dilu_matrix_row row, int64_t k, int64_t K) {
  float half = scaled ? 1.0f : dilu_pow2(-(dilu_gap(type.format) / 2)); /* 2^-gap in two exact steps */
  float out[DILU_GROUP];
  for (int i = 0; i < DILU_GROUP; i++) {
    float value = k + i < K ? dilu_load(type.format, row.codes, k + i) * half * half : 0.0f;
    out[dilu_lane(type.format, i)] = scaled && k + i < K ? value * dilu_scale(type, row.scales, k + i) : value;
  }
  return (dilu_group){{v_load(out), v_load(out + 8), v_load(out + 16), v_load(out + 24)}};
}

/* Columns k..k+32 of a row as products want them, but for special codes, which are added to the flag.
 * `codes` is where dilu_group_at found them. */
DILU_INLINE dilu_group dilu_group_weights(dilu_weight_type type, dilu_matrix_row row, const char* codes, int64_t k, int64_t K, v_bits* flag) {
  if (dilu_scaling(type) == DILU_SCALE_WEIGHTS && type.block_cols % DILU_GROUP) return dilu_group_slow(type, 1, row, k, K);
  dilu_group group = dilu_group_decode(type.format, codes);
  *flag = dilu_flag(type.format, codes, *flag);
  if (dilu_scaling(type) != DILU_SCALE_WEIGHTS) return group;
  v_f32 whole = v_set(dilu_pow2(dilu_gap(type.format))), scale = v_set(dilu_scale(type, row.scales, k));
  for (int j = 0; j < 4; j++) group.lane[j] = v_mul(v_mul(group.lane[j], whole), scale);
  return group;
}

/* Whether a row holds codes that decoding in place misses. */
DILU_NOINLINE int dilu_row_special(dilu_weight_type type, dilu_matrix_row row, int64_t K) {
  v_bits flag = v_bits_zero();
  for (int64_t k = 0; k < K; k += DILU_GROUP) {
    char buffer[DILU_GROUP * 4];
    flag = dilu_flag(type.format, dilu_group_at(type.format, row.codes, k, K, buffer), flag);
  }
  return dilu_flag_raised(type.format, flag);
}

/* The result of a weight row that holds NaN or infinity, number by number, for a packed row of
 * activations. It is NaN or infinite, and which of them does not depend on the order of the sum. */
DILU_NOINLINE float dilu_special_result(dilu_weight_type type, dilu_matrix_row row, const float* x, int64_t K) {
  float sum = 0.0f;
  for (int64_t k = 0; k < K; k++) {
    int64_t lane = k / DILU_GROUP * DILU_GROUP + dilu_lane(type.format, (int)(k % DILU_GROUP));
    sum += dilu_load(type.format, row.codes, k) * dilu_scale(type, row.scales, k) * (x[lane] / dilu_prescale(type.format));
  }
  return sum;
}

/* ---- activations ------------------------------------------------------------------------ */

typedef struct {
  const float* x;
  int64_t stride;
  const int32_t* rows; /* NULL: row i is row i; else row i is rows[i], at x + rows[i]/divisor*stride */
  int64_t divisor;
} dilu_rows;

DILU_INLINE const float* dilu_row_x(const dilu_rows* rows, int64_t i) {
  return rows->x + (rows->rows ? rows->rows[i] / rows->divisor : i) * rows->stride;
}

/* Interleaves columns k0..k0+length of `count` activation rows from m on, `width` rows wide:
 * out[column / 8][row][lane]. They are multiplied by a weight row's scales where the type's rule says so. */
DILU_NOINLINE void dilu_interleave(dilu_weight_type type, const dilu_rows* rows, int64_t m, int64_t count, dilu_matrix_row weights,
                                   int64_t k0, int64_t length, int64_t width, float* out) {
  const int scaled = dilu_scaling(type) == DILU_SCALE_ACTIVATIONS;
  for (int64_t k = 0, end; k < length; k = end) {
    end = scaled ? k + type.block_cols - (k0 + k) % type.block_cols : length;
    end = end < length ? end : length;
    v_f32 scale = v_set(scaled ? dilu_scale(type, weights.scales, k0 + k) : 1.0f);
    for (int64_t i = 0; i < count; i++) {
      const float* x = dilu_row_x(rows, m + i) + k0;
      for (int64_t at = k; at < end; at += DILU_LANES) {
        v_f32 value = v_load(x + at);
        v_store(out + at * width + i * DILU_LANES, scaled ? v_mul(value, scale) : value);
      }
    }
  }
}

#endif

/* matmul_kn.h: activations times stored weights that lie transposed, y[M,N] = x[M,K] . W[K,N].
 *
 * void dilu_matmul_kn(type, args, epilogue, ctx, pool, thread)
 *   W is row-major [K,N]; x is plain rows, not packed, and weight rows count along K. Scales are indexed
 *   by (row / block_rows, n / block_cols). The rest is as for dilu_matmul (matmul.h).
 *
 * Numerics: f32. Each result is a sum over chunks of up to 128 weight rows, cut where blocks of scales
 * end, in order; in a chunk, products are added along K from zero, and the sum is multiplied by the
 * block's scale. No choice of M or threads changes a bit of any result.
 */
#ifndef DILU_MATMUL_KN_H
#define DILU_MATMUL_KN_H

#include "matmul.h"

#define DILU_KN_CHUNK 128 /* weight rows whose products are added before a scale is applied */
#define DILU_KN_ROWS 64 /* activation rows that use a decoded panel */

typedef struct {
  _Alignas(64) float panel[DILU_KN_CHUNK * DILU_GROUP]; /* [k][lane order of 32 columns] */
  _Alignas(64) float x[DILU_KN_ROWS * DILU_KN_CHUNK];   /* prescaled */
  _Alignas(64) float sums[DILU_KN_ROWS * DILU_GROUP];
  float scales[DILU_GROUP];
} dilu_kn_space;

_Static_assert(sizeof(dilu_kn_space) <= sizeof(dilu_matmul_space), "both kinds of product share a scratch");

/* Decodes weight rows k0..k1 (absolute), columns n..n+count (count <= 32), into the panel. */
DILU_INLINE void dilu_kn_panel(dilu_weight_type type, const dilu_matrix* w, int64_t k0, int64_t k1, int64_t n, int64_t count,
                               dilu_kn_space* space) {
  for (int64_t k = k0; k < k1; k++) {
    char buffer[DILU_GROUP * 4];
    float* out = space->panel + (k - k0) * DILU_GROUP;
    dilu_matrix_row row = dilu_row(type, w, k);
    const char* codes = dilu_group_at(type.format, row.codes, n, n + count, buffer);
    dilu_group group = dilu_group_decode(type.format, codes);
    if (__builtin_expect(dilu_flag_raised(type.format, dilu_flag(type.format, codes, v_bits_zero())), 0))
      group = dilu_group_slow(type, 0, row, n, n + count);
    for (int j = 0; j < 4; j++) v_store(out + j * DILU_LANES, group.lane[j]);
  }
  const char* scales = dilu_row(type, w, k0).scales;
  for (int i = 0; i < DILU_GROUP; i++)
    space->scales[dilu_lane(type.format, i)] = i < count ? dilu_scale(type, scales, n + i) * dilu_remainder(type.format) : 0.0f;
}

/* sums[m] += (x[m] . panel) * scales for `count` activation rows and `length` weight rows. */
DILU_INLINE void dilu_kn_tile_rows(int count, dilu_kn_space* space, int64_t m, int64_t length) {
  v_f32 acc[2][4];
  for (int r = 0; r < count; r++)
    for (int j = 0; j < 4; j++) acc[r][j] = v_zero();
  for (int64_t k = 0; k < length; k++)
    for (int r = 0; r < count; r++) {
      v_f32 x = v_set(space->x[(m + r) * DILU_KN_CHUNK + k]);
      for (int j = 0; j < 4; j++) acc[r][j] = v_fma(v_load(space->panel + k * DILU_GROUP + j * DILU_LANES), x, acc[r][j]);
    }
  for (int r = 0; r < count; r++)
    for (int j = 0; j < 4; j++) {
      float* sum = space->sums + (m + r) * DILU_GROUP + j * DILU_LANES;
      v_store(sum, v_fma(acc[r][j], v_load(space->scales + j * DILU_LANES), v_load(sum)));
    }
}

DILU_NOINLINE void dilu_kn_tiles(dilu_kn_space* space, int64_t count, int64_t length) {
  int64_t m = 0;
  for (; m + 2 <= count; m += 2) dilu_kn_tile_rows(2, space, m, length);
  if (m < count) dilu_kn_tile_rows(1, space, m, length);
}

/* The end of the chunk that starts at weight row k (absolute): chunks of 128 from the first row, cut
 * where blocks of scales end. */
DILU_INLINE int64_t dilu_kn_chunk_end(dilu_weight_type type, int64_t k, int64_t first, int64_t end) {
  int64_t stop = k + DILU_KN_CHUNK - (k - first) % DILU_KN_CHUNK;
  if (type.scale_format != DILU_NONE && type.block_rows > 0) {
    int64_t block_end = (k / type.block_rows + 1) * type.block_rows;
    stop = block_end < stop ? block_end : stop;
  }
  return stop < end ? stop : end;
}

/* Activation rows m0..m1 (at most DILU_KN_ROWS) times columns n..n+count (at most 32). */
DILU_INLINE void dilu_kn_block(dilu_weight_type type, const dilu_matrix* w, int64_t row0, int64_t K, int64_t n, int64_t count,
                               const float* x, int64_t x_stride, int64_t m0, int64_t m1, dilu_kn_space* space) {
  memset(space->sums, 0, (size_t)(m1 - m0) * DILU_GROUP * sizeof(float));
  for (int64_t k = row0, end; k < row0 + K; k = end) {
    end = dilu_kn_chunk_end(type, k, row0, row0 + K);
    dilu_kn_panel(type, w, k, end, n, count, space);
    for (int64_t m = m0; m < m1; m++)
      for (int64_t i = k; i < end; i++)
        space->x[(m - m0) * DILU_KN_CHUNK + i - k] = x[m * x_stride + i - row0] * dilu_prescale(type.format);
    dilu_kn_tiles(space, m1 - m0, end - k);
  }
}

DILU_INLINE void dilu_matmul_kn(dilu_weight_type type, const dilu_matmul_args* a, dilu_epilogue epilogue, const void* ctx,
                                dilu_pool* pool, int thread) {
  int64_t batch = a->batch > 0 ? a->batch : 1, strips = dilu_ceil(a->N, 2 * DILU_GROUP), m_tasks = dilu_ceil(a->M, DILU_KN_ROWS);
  dilu_kn_space* space = (dilu_kn_space*)((dilu_matmul_space*)a->scratch + thread);
  dilu_matrix w = {a->codes[0], a->scales[0], a->weight_stride ? a->weight_stride : a->N, a->scale_stride};
  dilu_loop loop = dilu_loop_begin(pool, thread, batch * strips * m_tasks);
  for (int64_t task; (task = dilu_loop_next(&loop)) >= 0;) {
    int64_t b = task / (strips * m_tasks), m0 = task % m_tasks * DILU_KN_ROWS, first = task / m_tasks % strips * 2 * DILU_GROUP;
    int64_t m1 = m0 + DILU_KN_ROWS < a->M ? m0 + DILU_KN_ROWS : a->M;
    for (int64_t n = first; n < first + 2 * DILU_GROUP && n < a->N; n += DILU_GROUP) {
      int64_t count = a->N - n < DILU_GROUP ? a->N - n : DILU_GROUP;
      dilu_kn_block(type, &w, a->row0 + b * a->batch_rows, a->K, n, count, a->x + b * a->x_batch_stride, a->x_stride, m0, m1, space);
      for (int64_t m = m0; m < m1; m++) {
        float row[DILU_GROUP];
        for (int i = 0; i < DILU_GROUP; i++) row[i] = space->sums[(m - m0) * DILU_GROUP + dilu_lane(type.format, i)];
        epilogue(ctx, m, b * a->N + n, count, row, 0);
      }
    }
  }
}

#endif

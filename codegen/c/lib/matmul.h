/* matmul.h: activations times stored weights, y[M,N] = x[M,K] . W[N,K]^T, on weights as they lie.
 *
 * W is row-major in one of the formats of formats.h, optionally with block scales; it is decoded in
 * registers or into a panel that fits the cache, never as a whole. See group.h for packed activations.
 *
 * void dilu_matmul(dilu_weight_type type, int weights, const dilu_matmul_args* args,
 *                  dilu_epilogue epilogue, const void* ctx, dilu_pool* pool, int thread)
 *   type      compile-time constants: format, scale format, block shape
 *   weights   1 or 2, constant: with 2, both matrices are multiplied with the same x (gate and up)
 *   args      sizes and pointers, below
 *   epilogue  called for strips of results; inlined when given as a function's name:
 *             epilogue(ctx, row, col, count, acc0, acc1): results of activation row `row`, columns
 *             col..col+count; acc0, acc1 (NULL with one weight): count floats each, valid for the call
 *   All threads of the pool call it alike; a barrier is the caller's business. With pool NULL the
 *   calling thread does everything.
 *
 * void dilu_matmul_kn(type, args, epilogue, ctx, pool, thread)
 *   y[M,N] = x[M,K] . W[K,N], W row-major [K,N]. Here x is plain rows, not packed, and weight rows
 *   count along K. Scales are indexed by (row / block_rows, n / block_cols).
 *
 * Batches: args.batch products; product b uses x + b*x_batch_stride and the weight rows starting at
 * row0 + b*batch_rows, and its columns are reported to the epilogue as b*N + n. That is a product per
 * head with results [M, heads, N]. Scales are always indexed by the absolute weight row.
 *
 * size_t dilu_matmul_scratch(int threads): bytes of args.scratch for either function, any sizes; a
 * scratch may be used by the next kernel after a barrier (or at once by the same kind of call).
 *
 * Numerics: f32. Each result is a sum over chunks of up to 128 columns, in order; in a chunk eight
 * lanes are accumulated along K from zero; chunk sums are multiplied by the block's scale and added.
 * No choice of M, threads or tiling changes a bit of any result. When block_cols is neither a multiple
 * of 32 nor the whole of K, weights are multiplied by their scales one by one instead (slower).
 */
#ifndef DILU_MATMUL_H
#define DILU_MATMUL_H

#include <stddef.h>

#include "group.h"

typedef struct {
  int format;         /* DILU_F32, BF16, F16, F8E4M3 or F8E5M2 */
  int scale_format;   /* DILU_NONE, or F32, BF16, F16, F8E8M0 */
  int64_t block_rows; /* weight rows per scale; 0: all */
  int64_t block_cols; /* weight columns per scale; 0: all */
} dilu_weight_type;

typedef struct {
  int64_t M, N, K;
  int64_t batch;           /* 0 counts as 1 */
  int64_t batch_rows;      /* weight rows from one product of the batch to the next */
  int64_t row0;            /* first weight row */
  const float* x;          /* dilu_matmul: packed rows; dilu_matmul_kn: plain rows */
  int64_t x_stride;        /* floats from row to row */
  int64_t x_batch_stride;  /* floats from product to product */
  const void* codes[2];    /* weights, any alignment; [1] only with two weights */
  const void* scales[2];   /* NULL without scales */
  int64_t weight_stride;   /* values from weight row to row; 0: K (dilu_matmul), N (dilu_matmul_kn) */
  int64_t scale_stride;    /* scales from row of blocks to row of blocks */
  void* scratch;           /* dilu_matmul_scratch(threads) bytes, 64-byte aligned */
} dilu_matmul_args;

typedef void (*dilu_epilogue)(const void* ctx, int64_t row, int64_t col, int64_t count, const float* acc0, const float* acc1);

/* ---- sizes of the tiling --------------------------------------------------------------- */

#define DILU_CHUNK 128       /* columns accumulated before a scale is applied; scale blocks may shorten it */
#define DILU_DIRECT_ROWS 4   /* up to so many activation rows, weights go from memory to registers */
#define DILU_DIRECT_SEGMENT 4096 /* activations, over all rows, that share the first-level cache with weights */
#define DILU_FETCH_AHEAD 3072 /* bytes; what the memory delivers while one core works on as much */
#define DILU_STRIP 64        /* columns per strip on the direct path, at most */
#define DILU_PANEL_ROWS 48   /* weight rows decoded at once; a multiple of 4 and of DILU_TILE_COLS */
#define DILU_PANEL_COLS 512  /* columns decoded at once; a multiple of DILU_CHUNK */
#define DILU_PANEL_BATCH 128 /* activation rows that use a decoded panel */
#define DILU_TILE_ROWS 4     /* results in registers: rows times columns, eight lanes each */
#define DILU_TILE_COLS 3
#define DILU_FEW_TILES 4     /* up to so many tiles of activation rows stay in the first-level cache */

/* What a thread works in. */
typedef struct {
  _Alignas(64) float panel[DILU_PANEL_ROWS * DILU_PANEL_COLS];
  _Alignas(64) float x[DILU_FEW_TILES * DILU_TILE_ROWS * DILU_PANEL_COLS];
  _Alignas(64) float sums[DILU_PANEL_BATCH * DILU_PANEL_ROWS * DILU_LANES];
  float scales[DILU_PANEL_ROWS * (DILU_PANEL_COLS / DILU_GROUP)];
  float results[2][DILU_PANEL_BATCH * DILU_PANEL_ROWS];
} dilu_matmul_space;

DILU_INLINE size_t dilu_matmul_scratch(int threads) { return (size_t)threads * sizeof(dilu_matmul_space); }

/* ---- scales ---------------------------------------------------------------------------- */

/* Whether no chunk of columns would have one scale. */
DILU_INLINE int dilu_scales_elementwise(dilu_weight_type type, int64_t K) {
  return type.scale_format != DILU_NONE && type.block_cols % DILU_GROUP != 0 && type.block_cols < K;
}

/* Columns per chunk: the largest of 128, 64 and 32 that divides the blocks. */
DILU_INLINE int64_t dilu_chunk(dilu_weight_type type, int64_t K) {
  if (type.scale_format == DILU_NONE || type.block_cols <= 0 || type.block_cols >= K) return DILU_CHUNK;
  if (dilu_scales_elementwise(type, K)) return DILU_CHUNK;
  return type.block_cols % 128 == 0 ? 128 : type.block_cols % 64 == 0 ? 64 : 32;
}

/* The scale of column k, from the scales of the row's blocks. */
DILU_INLINE float dilu_scale(dilu_weight_type type, const void* scales, int64_t k) {
  if (type.scale_format == DILU_NONE) return 1.0f;
  return dilu_load(type.scale_format, scales, type.block_cols > 0 ? k / type.block_cols : 0);
}

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

DILU_INLINE dilu_matrix_row dilu_row(dilu_weight_type type, const dilu_matrix* w, int64_t row) {
  dilu_matrix_row r = {w->codes + row * w->stride * dilu_size(type.format), w->scales};
  if (type.scale_format != DILU_NONE && type.block_rows > 0)
    r.scales += row / type.block_rows * w->scale_stride * dilu_size(type.scale_format);
  return r;
}

/* The codes of columns k..k+32 of a row: in place, or from the last, incomplete group copied to the
 * buffer, so that nothing beyond the row is read. */
DILU_INLINE const char* dilu_group_at(int format, const char* codes, int64_t k, int64_t K, char* buffer) {
  codes += k * dilu_size(format);
  if (__builtin_expect(K - k >= DILU_GROUP, 1)) return codes;
  memset(buffer, 0, DILU_GROUP * 4);
  memcpy(buffer, codes, (size_t)((K - k) * dilu_size(format)));
  return buffer;
}

/* ---- direct path: weights from memory to registers -------------------------------------- */

typedef struct {
  const float* x;
  int64_t stride;
  const int32_t* rows; /* NULL: row i is row i; else row i is rows[i], at x + rows[i]/divisor*stride */
  int64_t divisor;
} dilu_rows;

DILU_INLINE int64_t dilu_row_name(const dilu_rows* rows, int64_t i) { return rows->rows ? rows->rows[i] : i; }

DILU_INLINE const float* dilu_row_x(const dilu_rows* rows, int64_t i) {
  return rows->x + (rows->rows ? rows->rows[i] / rows->divisor : i) * rows->stride;
}

/* Adds one group of a weight row, times `count` activation rows, to acc. */
DILU_INLINE v_bits dilu_group_dot(int format, int count, const char* codes, const float* const* x, int64_t k, v_f32* acc, v_bits flag) {
  dilu_group w = dilu_group_decode(format, codes);
  for (int j = 0; j < 4; j++)
    for (int m = 0; m < count; m++) acc[m] = v_fma(w.lane[j], v_load(x[m] + k + j * DILU_LANES), acc[m]);
  return dilu_flag(format, codes, flag);
}

/* Adds columns k0..k1 of a weight row, times `count` activation rows, to sums; returns the flag of
 * special codes. What lies `ahead` bytes further on is fetched into the cache meanwhile. */
DILU_INLINE v_bits dilu_row_dot(dilu_weight_type type, int count, dilu_matrix_row row, int64_t ahead, const float* const* x,
                                int64_t K, int64_t k0, int64_t k1, v_f32* sums) {
  const int64_t chunk = dilu_chunk(type, K), size = dilu_size(type.format);
  const float remainder = dilu_remainder(type.format);
  v_bits flag = v_bits_zero();
  v_f32 acc[DILU_DIRECT_ROWS];
  int64_t k = k0;
  for (; k + chunk <= k1; k += chunk) {
    for (int m = 0; m < count; m++) acc[m] = v_zero();
    for (int64_t byte = 0; byte < chunk * size; byte += DILU_LINE) __builtin_prefetch(row.codes + k * size + ahead + byte);
    for (int g = 0; g < 4; g++)
      if (g * DILU_GROUP < chunk)
        flag = dilu_group_dot(type.format, count, row.codes + (k + g * DILU_GROUP) * size, x, k + g * DILU_GROUP, acc, flag);
    v_f32 scale = v_set(dilu_scale(type, row.scales, k) * remainder);
    for (int m = 0; m < count; m++) sums[m] = v_fma(acc[m], scale, sums[m]);
  }
  if (k == k1) return flag;
  v_f32 scale = v_set(dilu_scale(type, row.scales, k) * remainder);
  for (int m = 0; m < count; m++) acc[m] = v_zero();
  for (; k < K; k += DILU_GROUP) {
    char buffer[DILU_GROUP * 4];
    const char* codes = dilu_group_at(type.format, row.codes, k, K, buffer);
    flag = dilu_group_dot(type.format, count, codes, x, k, acc, flag);
  }
  for (int m = 0; m < count; m++) sums[m] = v_fma(acc[m], scale, sums[m]);
  return flag;
}

/* The result of a weight row that holds NaN or infinity, number by number. It is NaN or infinite, and
 * which of them does not depend on the order of the sum. */
DILU_NOINLINE float dilu_special_result(dilu_weight_type type, dilu_matrix_row row, const float* x, int64_t K) {
  float sum = 0.0f;
  for (int64_t k = 0; k < K; k++) {
    int64_t lane = k / DILU_GROUP * DILU_GROUP + dilu_lane(type.format, (int)(k % DILU_GROUP));
    sum += dilu_load(type.format, row.codes, k) * dilu_scale(type, row.scales, k) * (x[lane] / dilu_prescale(type.format));
  }
  return sum;
}

/* results[m*DILU_STRIP + n-n0] for weight rows n0..n1 and `count` activation rows. Long rows are done in
 * segments, all weight rows for each, so that the activations' segments stay in the first-level cache. */
DILU_INLINE void dilu_direct_columns(dilu_weight_type type, int count, const dilu_matrix* w, int64_t row0, int64_t n0, int64_t n1,
                                     int64_t K, const float* const* x, dilu_matmul_space* space, float* results) {
  const int64_t segment = DILU_DIRECT_SEGMENT / count / DILU_CHUNK * DILU_CHUNK, size = dilu_size(type.format);
  const int64_t next_rows = 1 + DILU_FETCH_AHEAD / (segment * size);
  const int64_t ahead = K <= segment ? DILU_FETCH_AHEAD : next_rows * w->stride * size;
  char special[DILU_STRIP] = {0};
  for (int64_t k0 = 0; k0 < K; k0 += segment) {
    int64_t k1 = k0 + segment < K ? k0 + segment : K;
    for (int64_t n = n0; n < n1; n++) {
      v_f32 sums[DILU_DIRECT_ROWS];
      float* kept = space->sums + (n - n0) * DILU_DIRECT_ROWS * DILU_LANES;
      for (int m = 0; m < count; m++) sums[m] = k0 ? v_load(kept + m * DILU_LANES) : v_zero();
      v_bits flag = dilu_row_dot(type, count, dilu_row(type, w, row0 + n), ahead, x, K, k0, k1, sums);
      special[n - n0] |= (char)dilu_flag_raised(type.format, flag);
      for (int m = 0; m < count; m++) v_store(kept + m * DILU_LANES, sums[m]);
    }
  }
  for (int64_t n = n0; n < n1; n++)
    for (int m = 0; m < count; m++) {
      float* result = results + m * DILU_STRIP + n - n0;
      *result = v_hsum(v_load(space->sums + ((n - n0) * DILU_DIRECT_ROWS + m) * DILU_LANES));
      if (__builtin_expect(special[n - n0], 0)) *result = dilu_special_result(type, dilu_row(type, w, row0 + n), x[m], K);
    }
}

/* For up to DILU_DIRECT_ROWS activation rows and DILU_STRIP weight rows. */
DILU_INLINE void dilu_direct(dilu_weight_type type, const dilu_matrix* w, int64_t row0, int64_t n0, int64_t n1, int64_t K,
                             const dilu_rows* rows, int64_t m0, int64_t m1, dilu_matmul_space* space, float* results) {
  const float* x[DILU_DIRECT_ROWS];
  for (int64_t m = m0; m < m1; m++) x[m - m0] = dilu_row_x(rows, m);
  switch (m1 - m0) {
    case 1: dilu_direct_columns(type, 1, w, row0, n0, n1, K, x, space, results); break;
    case 2: dilu_direct_columns(type, 2, w, row0, n0, n1, K, x, space, results); break;
    case 3: dilu_direct_columns(type, 3, w, row0, n0, n1, K, x, space, results); break;
    default: dilu_direct_columns(type, 4, w, row0, n0, n1, K, x, space, results); break;
  }
}

/* ---- panel path: weights decoded to f32 in cache ----------------------------------------- */

/* Panels and activations are interleaved by tiles, [tile][column / 8][row of the tile][lane], so that a
 * tile kernel reads two sequential streams: rows far apart by a power of two would evict each other. */
#define DILU_PANEL_TILE (DILU_TILE_COLS * DILU_PANEL_COLS)
#define DILU_X_TILE (DILU_TILE_ROWS * DILU_PANEL_COLS)

/* Stores the decoded group of columns k..k+32 as one row of a panel's tile. */
DILU_INLINE void dilu_panel_store(float* tile, int64_t k, dilu_group group) {
  for (int j = 0; j < 4; j++) v_store(tile + (k / DILU_LANES + j) * DILU_TILE_COLS * DILU_LANES, group.lane[j]);
}

/* One group the slow way: `elementwise` with its weights' own scales, else as in-place decoding would
 * give it but for special codes. */
DILU_NOINLINE dilu_group dilu_group_slow(dilu_weight_type type, int elementwise, dilu_matrix_row row, int64_t k, int64_t K) {
  float half = elementwise ? 1.0f : dilu_pow2(-(dilu_gap(type.format) / 2)); /* 2^-gap in two exact steps */
  float out[DILU_GROUP];
  for (int i = 0; i < DILU_GROUP; i++) {
    float value = k + i < K ? dilu_load(type.format, row.codes, k + i) * half * half : 0.0f;
    out[dilu_lane(type.format, i)] = elementwise && k + i < K ? value * dilu_scale(type, row.scales, k + i) : value;
  }
  return (dilu_group){{v_load(out), v_load(out + 8), v_load(out + 16), v_load(out + 24)}};
}

/* Decodes columns k0..k1 of one weight row into a row of a panel's tile; scales[c*DILU_TILE_COLS] gets the
 * factor of chunk c (with elementwise scales: what undoes the prescale). `ahead` as in dilu_row_dot. */
DILU_INLINE void dilu_panel_row(dilu_weight_type type, dilu_matrix_row row, int64_t ahead, int64_t K, int64_t k0, int64_t k1,
                                float* tile, float* scales) {
  const int64_t chunk = dilu_chunk(type, K);
  const int elementwise = dilu_scales_elementwise(type, K);
  const float remainder = elementwise ? 1.0f / dilu_prescale(type.format) : dilu_remainder(type.format);
  v_bits flag = v_bits_zero();
  for (int64_t k = k0; k < k1; k += chunk, scales += DILU_TILE_COLS)
    *scales = elementwise ? remainder : dilu_scale(type, row.scales, k) * remainder;
  for (int64_t k = k0; k < k1 && !elementwise; k += DILU_GROUP) {
    char buffer[DILU_GROUP * 4];
    const char* codes = dilu_group_at(type.format, row.codes, k, K, buffer);
    for (int64_t byte = 0; byte < DILU_GROUP * dilu_size(type.format); byte += DILU_LINE) __builtin_prefetch(codes + ahead + byte);
    dilu_panel_store(tile, k - k0, dilu_group_decode(type.format, codes));
    flag = dilu_flag(type.format, codes, flag);
  }
  if (!elementwise && __builtin_expect(!dilu_flag_raised(type.format, flag), 1)) return;
  for (int64_t k = k0; k < k1; k += DILU_GROUP) dilu_panel_store(tile, k - k0, dilu_group_slow(type, elementwise, row, k, K));
}

/* Decodes columns k0..k1 of weight rows row..row+count as one tile. A tile that is not full repeats its
 * last row; nobody reads those results. */
DILU_INLINE void dilu_panel_tile(dilu_weight_type type, const dilu_matrix* w, int64_t row, int64_t count, int64_t K, int64_t k0,
                                 int64_t k1, float* tile, float* scales) {
#pragma GCC unroll 1
  for (int64_t n = 0; n < DILU_TILE_COLS; n++)
    dilu_panel_row(type, dilu_row(type, w, row + (n < count ? n : count - 1)), DILU_TILE_COLS * w->stride * dilu_size(type.format), K, k0,
                   k1, tile + n * DILU_LANES, scales + n);
}

/* A tile of results over the panel's columns. */
typedef struct {
  const float *x, *panel, *scales; /* interleaved; scales [chunk][column] */
  float* sums;                     /* [row][column][lane], rows of DILU_PANEL_ROWS columns */
  int64_t length, chunk;           /* columns, a multiple of 32; columns per scale */
  int first;                       /* sums start at zero */
} dilu_tile;

DILU_INLINE void dilu_tile_rows(int count, const dilu_tile* t) {
  const float *x = t->x, *w = t->panel, *scales = t->scales;
  for (int64_t k = 0; k < t->length; k += t->chunk, scales += DILU_TILE_COLS) {
    int64_t length = k + t->chunk < t->length ? t->chunk : t->length - k;
    v_f32 acc[DILU_TILE_ROWS][DILU_TILE_COLS];
    for (int m = 0; m < count; m++)
      for (int n = 0; n < DILU_TILE_COLS; n++) acc[m][n] = v_zero();
    for (const float* end = x + length * DILU_TILE_ROWS; x < end; x += DILU_TILE_ROWS * DILU_LANES, w += DILU_TILE_COLS * DILU_LANES) {
      v_f32 weight[DILU_TILE_COLS];
      for (int n = 0; n < DILU_TILE_COLS; n++) weight[n] = v_load(w + n * DILU_LANES);
      for (int m = 0; m < count; m++) {
        v_f32 value = v_load(x + m * DILU_LANES);
        for (int n = 0; n < DILU_TILE_COLS; n++) acc[m][n] = v_fma(weight[n], value, acc[m][n]);
      }
    }
    for (int n = 0; n < DILU_TILE_COLS; n++) {
      v_f32 scale = v_set(scales[n]);
      for (int m = 0; m < count; m++) {
        float* sum = t->sums + (m * DILU_PANEL_ROWS + n) * DILU_LANES;
        v_store(sum, v_fma(acc[m][n], scale, t->first && k == 0 ? v_zero() : v_load(sum)));
      }
    }
  }
}

/* The tile kernels do not depend on the weights' format: one copy serves a whole module. */
DILU_NOINLINE void dilu_tile_1(const dilu_tile* t) { dilu_tile_rows(1, t); }
DILU_NOINLINE void dilu_tile_2(const dilu_tile* t) { dilu_tile_rows(2, t); }
DILU_NOINLINE void dilu_tile_3(const dilu_tile* t) { dilu_tile_rows(3, t); }
DILU_NOINLINE void dilu_tile_4(const dilu_tile* t) { dilu_tile_rows(4, t); }

/* Activation rows are cut into tiles of nearly equal size. */
DILU_INLINE int64_t dilu_row_tiles(int64_t rows) { return (rows + DILU_TILE_ROWS - 1) / DILU_TILE_ROWS; }

/* Interleaves columns k0..k0+length of activation rows m..m+count. */
DILU_NOINLINE void dilu_x_tile(const dilu_rows* rows, int64_t m, int64_t count, int64_t k0, int64_t length, float* tile) {
  for (int64_t i = 0; i < count; i++) {
    const float* x = dilu_row_x(rows, m + i) + k0;
    for (int64_t k = 0; k < length; k += DILU_LANES) v_store(tile + k * DILU_TILE_ROWS + i * DILU_LANES, v_load(x + k));
  }
}

/* Fetches a share (the columns n.. of a panel of `columns`) of the next tile's rows, from m on. */
DILU_INLINE void dilu_x_fetch(const dilu_rows* rows, int64_t m, int64_t m1, int64_t k0, int64_t length, int64_t n, int64_t columns) {
  const int64_t line = DILU_LINE / (int64_t)sizeof(float), lines = length / line;
  int64_t first = lines * n / columns, last = lines * (n + DILU_TILE_COLS) / columns;
  for (int64_t i = m; i < m + DILU_TILE_ROWS && i < m1; i++)
    for (int64_t at = first; at < last && at < lines; at++) __builtin_prefetch(dilu_row_x(rows, i) + k0 + at * line);
}

DILU_NOINLINE void dilu_tile_multiply(int64_t count, const dilu_tile* tile) {
  switch (count) {
    case 1: dilu_tile_1(tile); break;
    case 2: dilu_tile_2(tile); break;
    case 3: dilu_tile_3(tile); break;
    default: dilu_tile_4(tile); break;
  }
}

/* results[m][n] = sums over lanes. Columns up to the next multiple of four are summed, too. */
DILU_NOINLINE void dilu_panel_results(const dilu_matmul_space* space, int64_t count, int64_t columns, float* results) {
  for (int64_t m = 0; m < count; m++)
    for (int64_t n = 0; n < columns; n += 4) {
      const float* sum = space->sums + (m * DILU_PANEL_ROWS + n) * DILU_LANES;
      v_hsum4(v_load(sum), v_load(sum + 8), v_load(sum + 16), v_load(sum + 24), results + m * DILU_PANEL_ROWS + n);
    }
}

/* The tile of results of activation rows m.. and weight rows n.. (both from the part's first). */
DILU_INLINE dilu_tile dilu_tile_at(dilu_matmul_space* space, int64_t x_tile, int64_t panel_tile, int64_t m, int64_t n, int64_t length,
                                   int64_t chunk, int first) {
  return (dilu_tile){space->x + x_tile * DILU_X_TILE, space->panel + panel_tile * DILU_PANEL_TILE,
                     space->scales + panel_tile * (DILU_PANEL_TILE / DILU_GROUP), space->sums + (m * DILU_PANEL_ROWS + n) * DILU_LANES,
                     length, chunk, first};
}

/* Many activation rows: all weight rows of the panel are decoded first, then x tiles pass over them. */
DILU_NOINLINE void dilu_panel_multiply(dilu_matmul_space* space, const dilu_rows* rows, int64_t m0, int64_t m1, int64_t columns,
                                       int64_t k0, int64_t length, int64_t chunk) {
  int64_t tiles = dilu_row_tiles(m1 - m0);
  for (int64_t i = 0; i < tiles; i++) {
    int64_t m = (m1 - m0) * i / tiles, count = (m1 - m0) * (i + 1) / tiles - m;
    dilu_x_tile(rows, m0 + m, count, k0, length, space->x);
    for (int64_t n = 0; n < columns; n += DILU_TILE_COLS) {
      dilu_x_fetch(rows, m0 + m + count, m1, k0, length, n, columns);
      dilu_tile tile = dilu_tile_at(space, 0, n / DILU_TILE_COLS, m, n, length, chunk, k0 == 0);
      dilu_tile_multiply(count, &tile);
    }
  }
}

/* Few activation rows: one tile of weights is decoded at a time and used by all of them at once. */
DILU_NOINLINE void dilu_few_multiply(dilu_matmul_space* space, int64_t rows, int64_t n, int64_t length, int64_t chunk, int first) {
  int64_t tiles = dilu_row_tiles(rows);
  for (int64_t i = 0; i < tiles; i++) {
    int64_t m = rows * i / tiles, count = rows * (i + 1) / tiles - m;
    dilu_tile tile = dilu_tile_at(space, i, 0, m, n, length, chunk, first);
    dilu_tile_multiply(count, &tile);
  }
}

/* results[(m-m0)*DILU_PANEL_ROWS + n-n0] for up to DILU_PANEL_BATCH activation and DILU_PANEL_ROWS weight rows. */
DILU_INLINE void dilu_panel(dilu_weight_type type, const dilu_matrix* w, int64_t row0, int64_t n0, int64_t n1, int64_t K,
                            const dilu_rows* rows, int64_t m0, int64_t m1, dilu_matmul_space* space, float* results) {
  const int64_t chunk = dilu_chunk(type, K), tiles = dilu_row_tiles(m1 - m0);
  const int few = tiles <= DILU_FEW_TILES;
  for (int64_t k0 = 0; k0 < K; k0 += DILU_PANEL_COLS) {
    int64_t k1 = k0 + DILU_PANEL_COLS < K ? k0 + DILU_PANEL_COLS : K, length = dilu_packed_length(k1 - k0);
    for (int64_t i = 0; few && i < tiles; i++) {
      int64_t m = (m1 - m0) * i / tiles;
      dilu_x_tile(rows, m0 + m, (m1 - m0) * (i + 1) / tiles - m, k0, length, space->x + i * DILU_X_TILE);
    }
    for (int64_t n = n0; n < n1; n += DILU_TILE_COLS) {
      int64_t slot = few ? 0 : (n - n0) / DILU_TILE_COLS, count = n1 - n < DILU_TILE_COLS ? n1 - n : DILU_TILE_COLS;
      dilu_panel_tile(type, w, row0 + n, count, K, k0, k1, space->panel + slot * DILU_PANEL_TILE,
                      space->scales + slot * (DILU_PANEL_TILE / DILU_GROUP));
      if (few) dilu_few_multiply(space, m1 - m0, n - n0, length, chunk, k0 == 0);
    }
    if (!few) dilu_panel_multiply(space, rows, m0, m1, n1 - n0, k0, length, chunk);
  }
  dilu_panel_results(space, m1 - m0, n1 - n0, results);
}

/* ---- blocks of a product ----------------------------------------------------------------- */

/* A walk over the parts of a block of results that are computed at once. */
typedef struct {
  int direct;
  int64_t n, n_end, m, m_end;           /* the part */
  int64_t n1, m0, m1, step_n, step_m;
  int64_t stride;                       /* of the results, per activation row */
} dilu_part;

DILU_INLINE dilu_part dilu_parts(dilu_weight_type type, int64_t K, int64_t n0, int64_t n1, int64_t m0, int64_t m1) {
  int direct = m1 - m0 <= DILU_DIRECT_ROWS && !dilu_scales_elementwise(type, K);
  int64_t step_m = direct ? DILU_DIRECT_ROWS : DILU_PANEL_BATCH, step_n = direct ? DILU_STRIP : DILU_PANEL_ROWS;
  return (dilu_part){direct, n0 - step_n, n0, m1, m1, n1, m0, m1, step_n, step_m, step_n};
}

DILU_INLINE int dilu_parts_next(dilu_part* p) {
  p->m = p->m_end;
  if (p->m >= p->m1) {
    p->m = p->m0;
    p->n += p->step_n;
  }
  p->m_end = p->m + p->step_m < p->m1 ? p->m + p->step_m : p->m1;
  p->n_end = p->n + p->step_n < p->n1 ? p->n + p->step_n : p->n1;
  return p->n < p->n1 && p->m < p->m1;
}

/* Computes space->results[i][(m - p->m) * p->stride + n - p->n] for the weights i. */
DILU_INLINE void dilu_part_compute(dilu_weight_type type, int weights, const dilu_matrix* w, int64_t row0, int64_t K,
                                   const dilu_rows* rows, const dilu_part* p, dilu_matmul_space* space) {
#pragma GCC unroll 1 /* one copy of the kernels, not one per weight */
  for (int i = 0; i < weights; i++) {
    if (K <= 0) /* nothing is added up: a size of 0 that only a call tells */
      memset(space->results[i], 0, (size_t)(p->stride * (p->m_end - p->m)) * sizeof(float));
    else if (p->direct)
      dilu_direct(type, &w[i], row0, p->n, p->n_end, K, rows, p->m, p->m_end, space, space->results[i]);
    else
      dilu_panel(type, &w[i], row0, p->n, p->n_end, K, rows, p->m, p->m_end, space, space->results[i]);
  }
}

/* How a product of M rows and N columns is cut into tasks. */
typedef struct {
  int64_t rows, cols;             /* of one task */
  int64_t row_tasks, col_tasks;
} dilu_tasks;

DILU_INLINE int64_t dilu_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Few rows: about 64 KiB of weights per task. Many: one panel and all rows, and fewer rows where that
 * would leave threads without work. */
DILU_INLINE dilu_tasks dilu_cut(int format, int64_t M, int64_t N, int64_t K, int64_t batch, int threads) {
  dilu_tasks t = {M, DILU_PANEL_ROWS, 1, 1};
  if (M <= DILU_DIRECT_ROWS) {
    int64_t fit = 65536 / (K * dilu_size(format) + 1);
    t.cols = fit > DILU_STRIP ? DILU_STRIP : fit < 4 ? 4 : fit / 4 * 4;
  }
  t.col_tasks = dilu_ceil(N, t.cols);
  while (t.rows > 64 && t.col_tasks * batch * dilu_ceil(M, t.rows) < 4 * threads) t.rows = dilu_ceil(t.rows / 2, 4) * 4;
  t.row_tasks = t.rows ? dilu_ceil(M, t.rows) : 0;
  return t;
}

DILU_INLINE void dilu_matmul(dilu_weight_type type, int weights, const dilu_matmul_args* a, dilu_epilogue epilogue,
                             const void* ctx, dilu_pool* pool, int thread) {
  int64_t batch = a->batch > 0 ? a->batch : 1;
  dilu_tasks cut = dilu_cut(type.format, a->M, a->N, a->K, batch, dilu_pool_threads(pool));
  dilu_matmul_space* space = (dilu_matmul_space*)a->scratch + thread;
  dilu_matrix w[2];
  for (int i = 0; i < 2; i++)
    w[i] = (dilu_matrix){a->codes[i], a->scales[i], a->weight_stride ? a->weight_stride : a->K, a->scale_stride};
  dilu_loop loop = dilu_loop_begin(pool, thread, batch * cut.row_tasks * cut.col_tasks);
  for (int64_t task; (task = dilu_loop_next(&loop)) >= 0;) {
    int64_t b = task / (cut.row_tasks * cut.col_tasks), n0 = task / cut.row_tasks % cut.col_tasks * cut.cols;
    int64_t m0 = task % cut.row_tasks * cut.rows;
    int64_t n1 = n0 + cut.cols < a->N ? n0 + cut.cols : a->N, m1 = m0 + cut.rows < a->M ? m0 + cut.rows : a->M;
    dilu_rows rows = {a->x + b * a->x_batch_stride, a->x_stride, 0, 1};
    dilu_part part = dilu_parts(type, a->K, n0, n1, m0, m1);
    while (dilu_parts_next(&part)) {
      dilu_part_compute(type, weights, w, a->row0 + b * a->batch_rows, a->K, &rows, &part, space);
      for (int64_t m = part.m; m < part.m_end; m++) {
        const float* acc = space->results[0] + (m - part.m) * part.stride;
        const float* acc1 = weights == 2 ? space->results[1] + (m - part.m) * part.stride : 0;
        epilogue(ctx, m, b * a->N + part.n, part.n_end - part.n, acc, acc1);
      }
    }
  }
}

/* ---- y = x . W, weight rows along K ------------------------------------------------------- */

#define DILU_KN_ROWS 64 /* activation rows that use a decoded panel */

typedef struct {
  _Alignas(64) float panel[DILU_CHUNK * DILU_GROUP]; /* [k][lane order of 32 columns] */
  _Alignas(64) float x[DILU_KN_ROWS * DILU_CHUNK];   /* prescaled */
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
      v_f32 x = v_set(space->x[(m + r) * DILU_CHUNK + k]);
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
  int64_t stop = k + DILU_CHUNK - (k - first) % DILU_CHUNK;
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
        space->x[(m - m0) * DILU_CHUNK + i - k] = x[m * x_stride + i - row0] * dilu_prescale(type.format);
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

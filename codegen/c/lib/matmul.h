/* matmul.h: activations times stored weights, y[M,N] = x[M,K] . W[N,K]^T, on weights as they lie.
 *
 * W is decoded in registers or into tiles that fit the cache, never as a whole. See weights.h for its
 * formats and scales, group.h for packed activations, matmul_kn.h for weights that lie transposed.
 *
 * DILU_WEIGHT_KERNELS(name, {format, scale format, block rows, block columns})
 *   defines `name`, a dilu_weight_kernels: what is compiled for one type of weights.
 * void dilu_matmul(const dilu_weight_kernels* kernels, int weights, const dilu_matmul_args* args,
 *                  dilu_epilogue epilogue, const void* ctx, dilu_pool* pool, int thread)
 *   weights   1 or 2: with 2, both matrices are multiplied with the same x (gate and up)
 *   args      sizes and pointers, below
 *   epilogue  called for strips of results:
 *             epilogue(ctx, row, col, count, acc0, acc1): results of activation row `row`, columns
 *             col..col+count; acc0, acc1 (NULL with one weight): count floats each, valid for the call
 *   All threads of the pool call it alike; a barrier is the caller's business. With pool NULL the
 *   calling thread does everything.
 *
 * Batches: args.batch products; product b uses x + b*x_batch_stride and the weight rows starting at
 * row0 + b*batch_rows, and its columns are reported to the epilogue as b*N + n. That is a product per
 * head with results [M, heads, N]. Scales are always indexed by the absolute weight row.
 *
 * size_t dilu_matmul_scratch(int threads): bytes of args.scratch for either function, any sizes; a
 * scratch may be used by the next kernel after a barrier (or at once by the same kind of call).
 *
 * Numerics: f32. Columns are cut into chunks of 512 from the first one. In a chunk, eight lanes are
 * accumulated along K from zero, each product fused with its addition where the processor can; the
 * lanes are added as v_hsum does, and the chunks' totals in order. Scales enter by the rule of their
 * kind (weights.h): activations times the block's scale, rounded once; or the total times the row's
 * scale; or weights times their scales, each rounded. No choice of M, threads or tiling changes a bit
 * of any result. Packed activations are below 2^63, also times a scale.
 */
#ifndef DILU_MATMUL_H
#define DILU_MATMUL_H

#include "matmul_many.h"

/* What is compiled for one type of weights: a kernel for each number of activation rows up to 8, and the
 * one that decodes a tile of weights. */
typedef struct {
  dilu_weight_type type;
  void (*few[DILU_FEW_ROWS])(const dilu_few* job);
  int (*decode)(const dilu_tile* tile, const dilu_tile_source* source);
} dilu_weight_kernels;

#define DILU_FEW_KERNEL(name, rows, ...) \
  DILU_NOINLINE void name##_##rows(const dilu_few* job) { dilu_few_job((dilu_weight_type)__VA_ARGS__, rows, job); }
#define DILU_WEIGHT_KERNELS(name, ...)                                                              \
  DILU_FEW_KERNEL(name, 1, __VA_ARGS__)                                                             \
  DILU_FEW_KERNEL(name, 2, __VA_ARGS__)                                                             \
  DILU_FEW_KERNEL(name, 3, __VA_ARGS__)                                                             \
  DILU_FEW_KERNEL(name, 4, __VA_ARGS__)                                                             \
  DILU_FEW_KERNEL(name, 5, __VA_ARGS__)                                                             \
  DILU_FEW_KERNEL(name, 6, __VA_ARGS__)                                                             \
  DILU_FEW_KERNEL(name, 7, __VA_ARGS__)                                                             \
  DILU_FEW_KERNEL(name, 8, __VA_ARGS__)                                                             \
  DILU_NOINLINE int name##_decode(const dilu_tile* tile, const dilu_tile_source* source) {          \
    return dilu_tile_decode((dilu_weight_type)__VA_ARGS__, tile, source);                           \
  }                                                                                                 \
  static const dilu_weight_kernels name = {__VA_ARGS__,                                             \
                                           {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8}, \
                                           name##_decode};

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

/* What a thread works in. `kept` says for which block of which weight few rows' activations are there. */
typedef struct {
  _Alignas(64) float weights[DILU_STRIP * DILU_CHUNK];
  _Alignas(64) float x[DILU_FEW_TILES * DILU_X_TILE];
  _Alignas(64) float few_x[2][DILU_SEGMENT];
  float results[2][DILU_BATCH * DILU_STRIP];
  float totals[(DILU_STRIP + 4) * DILU_FEW_ROWS];
  char special[DILU_STRIP + 4];
  int64_t kept[2];
} dilu_matmul_space;

DILU_INLINE size_t dilu_matmul_scratch(int threads) { return (size_t)threads * sizeof(dilu_matmul_space); }

/* ---- parts: up to 258 activation rows times up to 128 weight rows of one block ------------- */

/* The rows of a part: activation rows m0..m1, weight rows n0..n1 from row0 on. */
typedef struct {
  int64_t row0, n0, n1, m0, m1;
} dilu_part;

/* results[(m-m0)*DILU_STRIP + n-n0] of a part with few activation rows. `block` names the block of scales;
 * activations that were copied for it before are used again. */
DILU_NOINLINE void dilu_few_part(const dilu_weight_kernels* kernels, const dilu_matrix* w, int64_t K, const dilu_rows* rows,
                                 const dilu_part* p, int64_t block, int which, dilu_matmul_space* space) {
  const dilu_weight_type type = kernels->type;
  const int64_t count = p->m1 - p->m0, segment = dilu_segment(count);
  const dilu_matrix_row first = dilu_row(type, w, p->row0 + p->n0);
  const int in_place = count == 1 && dilu_scaling(type) != DILU_SCALE_ACTIVATIONS;
  dilu_few job = {w, p->row0 + p->n0, p->n1 - p->n0, K, 0, 0, 0, space->totals, space->special};
  memset(space->special, 0, sizeof space->special);
  for (job.k0 = 0; job.k0 < K; job.k0 = job.k1) {
    job.k1 = job.k0 + segment < K ? job.k0 + segment : K;
    job.x = in_place ? dilu_row_x(rows, p->m0) + job.k0 : space->few_x[which];
    if (!in_place && space->kept[which] != block)
      dilu_interleave(type, rows, p->m0, count, first, job.k0, dilu_packed_length(job.k1 - job.k0), count, space->few_x[which]);
    space->kept[which] = K <= segment ? block : -1;
    kernels->few[count - 1](&job);
  }
  float* results = space->results[which];
  for (int64_t n = p->n0; n < p->n1; n++) {
    dilu_matrix_row row = dilu_row(type, w, p->row0 + n);
    int64_t place = dilu_few_place(count, p->n1 - p->n0, n - p->n0);
    int special = space->special[place] && dilu_row_special(type, row, K);
    for (int64_t m = 0; m < count; m++) {
      float total = space->totals[place * count + m];
      results[m * DILU_STRIP + n - p->n0] =
          special ? dilu_special_result(type, row, dilu_row_x(rows, p->m0 + m), K) : dilu_sum_scale(type, row, total);
    }
  }
}

/* Fetches a share of the next tiles' activations: rows m..m1 at `columns` weight rows, of which n.. are next. */
DILU_INLINE void dilu_x_fetch(const dilu_rows* rows, int64_t m, int64_t m1, int64_t k0, int64_t length, int64_t n, int64_t columns) {
  const int64_t line = DILU_LINE / (int64_t)sizeof(float), lines = length / line;
  int64_t first = lines * n / columns, last = lines * (n + DILU_TILE_COLS) / columns;
  for (int64_t i = m; i < m1; i++)
    for (int64_t at = first; at < last && at < lines; at++) __builtin_prefetch(dilu_row_x(rows, i) + k0 + at * line);
}

/* One tile of totals; the first tile of activations decodes its weights. */
DILU_INLINE void dilu_part_tile(const dilu_weight_kernels* kernels, int decode, int64_t count, const dilu_tile* tile,
                                const dilu_tile_source* source) {
  if (decode && !kernels->decode(tile, source)) return;
  if (decode) dilu_tile_decode_slow(kernels->type, tile, source);
  dilu_tile_multiply(count, tile);
}

DILU_INLINE dilu_tile_source dilu_part_source(dilu_weight_type type, const dilu_matrix* w, const dilu_part* p, int64_t n, int64_t k0,
                                              int64_t K) {
  dilu_tile_source source = {.k0 = k0, .K = K, .ahead = DILU_TILE_COLS * w->stride * dilu_size(type.format)};
  for (int64_t i = 0; i < DILU_TILE_COLS; i++) /* a tile that is not full repeats its last row; nobody reads those results */
    source.rows[i] = dilu_row(type, w, p->row0 + (n + i < p->n1 ? n + i : p->n1 - 1));
  return source;
}

/* Columns k0..k0+length of the part: all weights for `together` tiles of activations at once. */
DILU_NOINLINE void dilu_many_chunk(const dilu_weight_kernels* kernels, const dilu_matrix* w, int64_t K, const dilu_rows* rows,
                                   const dilu_part* p, int64_t k0, int64_t length, dilu_matmul_space* space, float* results) {
  const int64_t M = p->m1 - p->m0, tiles = (M + DILU_TILE_ROWS - 1) / DILU_TILE_ROWS;
  const int64_t together = tiles <= DILU_FEW_TILES ? tiles : 2;
  const dilu_matrix_row first = dilu_row(kernels->type, w, p->row0 + p->n0);
#define DILU_TILE_START(i) ((M * (i) + tiles - 1) / tiles) /* tiles of nearly equal size, the first one full */
  for (int64_t t = 0; t < tiles; t += together) {
    int64_t end = t + together < tiles ? t + together : tiles, next = end + together < tiles ? end + together : tiles;
    for (int64_t i = t; i < end; i++)
      dilu_interleave(kernels->type, rows, p->m0 + DILU_TILE_START(i), DILU_TILE_START(i + 1) - DILU_TILE_START(i), first, k0, length,
                      DILU_TILE_ROWS, space->x + (i - t) * DILU_X_TILE);
    for (int64_t n = p->n0; n < p->n1; n += DILU_TILE_COLS) {
      int64_t slot = together == tiles ? 0 : (n - p->n0) / DILU_TILE_COLS;
      dilu_tile_source source;
      if (t == 0) source = dilu_part_source(kernels->type, w, p, n, k0, K);
      dilu_x_fetch(rows, p->m0 + DILU_TILE_START(end), p->m0 + DILU_TILE_START(next), k0, length, n - p->n0, p->n1 - p->n0);
      for (int64_t i = t; i < end; i++) {
        int64_t m = DILU_TILE_START(i), count = DILU_TILE_START(i + 1) - m;
        dilu_tile tile = {space->x + (i - t) * DILU_X_TILE, space->weights + slot * DILU_WEIGHT_TILE, results + m * DILU_STRIP + n - p->n0,
                          length, k0 == 0};
        dilu_part_tile(kernels, i == 0, count, &tile, &source);
      }
    }
  }
#undef DILU_TILE_START
}

/* results[(m-m0)*DILU_STRIP + n-n0] of a part with many activation rows. */
DILU_NOINLINE void dilu_many_part(const dilu_weight_kernels* kernels, const dilu_matrix* w, int64_t K, const dilu_rows* rows,
                                  const dilu_part* p, dilu_matmul_space* space, float* results) {
  for (int64_t k0 = 0; k0 < K; k0 += DILU_CHUNK) {
    int64_t length = dilu_packed_length(K - k0 < DILU_CHUNK ? K - k0 : DILU_CHUNK);
    dilu_many_chunk(kernels, w, K, rows, p, k0, length, space, results);
  }
  for (int64_t n = p->n0; n < p->n1; n++) {
    dilu_matrix_row row = dilu_row(kernels->type, w, p->row0 + n);
    for (int64_t m = 0; m < p->m1 - p->m0; m++) {
      float* result = results + m * DILU_STRIP + n - p->n0;
      *result = dilu_sum_scale(kernels->type, row, *result);
    }
  }
}

/* Computes space->results[i][(m-m0)*DILU_STRIP + n-n0] for the weights i. `block`: see dilu_few_part. */
DILU_INLINE void dilu_part_compute(const dilu_weight_kernels* kernels, int weights, const dilu_matrix* w, int64_t K, const dilu_rows* rows,
                                   const dilu_part* p, int64_t block, dilu_matmul_space* space) {
  for (int i = 0; i < weights; i++) {
    if (K <= 0) /* nothing is added up: a size of 0 that only a call tells */
      memset(space->results[i], 0, (size_t)(DILU_STRIP * (p->m1 - p->m0)) * sizeof(float));
    else if (p->m1 - p->m0 <= DILU_FEW_ROWS)
      dilu_few_part(kernels, &w[i], K, rows, p, block, i, space);
    else
      dilu_many_part(kernels, &w[i], K, rows, p, space, space->results[i]);
  }
}

/* Makes `p` the next part of weight rows p->n1..n_end and activation rows 0..M; returns 0 after the last. It
 * begins with an empty part that ends where the first one starts. */
DILU_INLINE int dilu_part_next(dilu_weight_type type, dilu_part* p, int64_t M, int64_t n_end) {
  p->m0 = p->m1;
  if (p->m0 >= M) {
    p->m0 = 0;
    p->n0 = p->n1;
    p->n1 = p->n0 + DILU_STRIP < n_end ? p->n0 + DILU_STRIP : n_end;
    p->n1 = dilu_block_end(type, p->row0 + p->n0, p->row0 + p->n1) - p->row0;
  }
  p->m1 = p->m0 + DILU_BATCH < M ? p->m0 + DILU_BATCH : M;
  return p->n0 < n_end && M > 0;
}

/* ---- products ---------------------------------------------------------------------------- */

/* How a product of M rows and N columns is cut into tasks. */
typedef struct {
  int64_t rows, cols;             /* of one task */
  int64_t row_tasks, col_tasks;
} dilu_tasks;

DILU_INLINE int64_t dilu_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Weight rows of a task for few activation rows: about 256 KiB. */
DILU_INLINE int64_t dilu_few_cols(int format, int64_t K) {
  int64_t fit = 262144 / (K * dilu_size(format) + 1);
  return fit > DILU_STRIP ? DILU_STRIP : fit < 4 ? 4 : fit / 4 * 4;
}

/* Few rows: about 256 KiB of weights per task. Many: one strip and all rows. Both less where that would
 * leave threads without work. */
DILU_INLINE dilu_tasks dilu_cut(int format, int64_t M, int64_t N, int64_t K, int64_t batch, int threads) {
  dilu_tasks t = {M, M <= DILU_FEW_ROWS ? dilu_few_cols(format, K) : DILU_STRIP, 1, 1};
  int64_t wanted = threads > 1 ? 4 * threads : 1, least = M <= DILU_FEW_ROWS ? 4 : 32;
  while (t.rows > 64 && dilu_ceil(N, t.cols) * batch * dilu_ceil(M, t.rows) < wanted) t.rows = dilu_ceil(t.rows / 2, 3) * 3;
  t.row_tasks = t.rows ? dilu_ceil(M, t.rows) : 0;
  while (t.cols >= 2 * least && dilu_ceil(N, t.cols) * batch * t.row_tasks < wanted) t.cols /= 2;
  t.col_tasks = dilu_ceil(N, t.cols);
  return t;
}

DILU_NOINLINE void dilu_matmul(const dilu_weight_kernels* kernels, int weights, const dilu_matmul_args* a, dilu_epilogue epilogue,
                               const void* ctx, dilu_pool* pool, int thread) {
  int64_t batch = a->batch > 0 ? a->batch : 1;
  dilu_tasks cut = dilu_cut(kernels->type.format, a->M, a->N, a->K, batch, dilu_pool_threads(pool));
  dilu_matmul_space* space = (dilu_matmul_space*)a->scratch + thread;
  dilu_matrix w[2];
  for (int i = 0; i < 2; i++)
    w[i] = (dilu_matrix){a->codes[i], a->scales[i], a->weight_stride ? a->weight_stride : a->K, a->scale_stride};
  space->kept[0] = space->kept[1] = -1;
  dilu_loop loop = dilu_loop_begin(pool, thread, batch * cut.row_tasks * cut.col_tasks);
  for (int64_t task, last = -1; (task = dilu_loop_next(&loop)) >= 0;) {
    int64_t b = task / (cut.row_tasks * cut.col_tasks), n0 = task / cut.row_tasks % cut.col_tasks * cut.cols;
    int64_t m0 = task % cut.row_tasks * cut.rows;
    int64_t n1 = n0 + cut.cols < a->N ? n0 + cut.cols : a->N, m1 = m0 + cut.rows < a->M ? m0 + cut.rows : a->M;
    dilu_rows rows = {a->x + b * a->x_batch_stride + m0 * a->x_stride, a->x_stride, 0, 1};
    dilu_part part = {a->row0 + b * a->batch_rows, n0, n0, 0, m1 - m0};
    if (b * cut.row_tasks + task % cut.row_tasks != last) space->kept[0] = space->kept[1] = -1; /* other activations */
    last = b * cut.row_tasks + task % cut.row_tasks;
    while (dilu_part_next(kernels->type, &part, m1 - m0, n1)) {
      dilu_part_compute(kernels, weights, w, a->K, &rows, &part, dilu_block_of(kernels->type, part.row0 + part.n0), space);
      for (int64_t m = part.m0; m < part.m1; m++) {
        const float* acc = space->results[0] + (m - part.m0) * DILU_STRIP;
        const float* acc1 = weights == 2 ? space->results[1] + (m - part.m0) * DILU_STRIP : 0;
        epilogue(ctx, m0 + m, b * a->N + part.n0, part.n1 - part.n0, acc, acc1);
      }
    }
  }
}

#endif

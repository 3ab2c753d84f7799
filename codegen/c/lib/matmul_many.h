/* matmul_many.h: products of more than 8 activation rows, in tiles of 3 activation by 4 weight rows.
 *
 * Activations and decoded weights are interleaved by tiles, [column / 8][row of the tile][lane], so that
 * a tile kernel reads two sequential streams: rows far apart by a power of two would evict each other.
 * Weights are decoded by the first tile of activations that meets them, while it multiplies; the others
 * find them in the cache. Of up to DILU_FEW_TILES tiles of activations all stay in the cache, and one
 * tile of weights at a time is used by all; of more, two at a time pass over all weights of the part.
 */
#ifndef DILU_MATMUL_MANY_H
#define DILU_MATMUL_MANY_H

#include "matmul_few.h"

#define DILU_TILE_ROWS 3  /* activation rows of a tile */
#define DILU_TILE_COLS 4  /* weight rows of a tile */
#define DILU_FEW_TILES 16
#define DILU_BATCH 258    /* activation rows that use weights decoded once */
#define DILU_X_TILE (DILU_TILE_ROWS * DILU_CHUNK)
#define DILU_WEIGHT_TILE (DILU_TILE_COLS * DILU_CHUNK)

/* A tile of totals over the columns of a chunk. */
typedef struct {
  const float* x;
  float* weights;
  float* totals;  /* [activation row][weight row], rows of DILU_STRIP */
  int64_t length; /* columns, a multiple of 32 */
  int first;      /* totals start here */
} dilu_tile;

/* Where a tile's weights come from: its rows, in columns k0..k0+length of K. */
typedef struct {
  dilu_matrix_row rows[DILU_TILE_COLS];
  int64_t k0, K, ahead; /* ahead: bytes to what is wanted next */
} dilu_tile_source;

/* acc += weights . x over the vectors of columns k..k+length. */
DILU_INLINE void dilu_tile_step(int rows, const float* x, const float* weights, int64_t length, v_f32 acc[DILU_TILE_ROWS][DILU_TILE_COLS]) {
  for (const float* end = weights + length * DILU_TILE_COLS; weights < end; weights += DILU_TILE_COLS * DILU_LANES) {
    v_f32 value[DILU_TILE_ROWS];
#pragma GCC unroll 3
    for (int m = 0; m < rows; m++) value[m] = v_load(x + m * DILU_LANES);
#pragma GCC unroll 4
    for (int n = 0; n < DILU_TILE_COLS; n++) {
      v_f32 weight = v_load(weights + n * DILU_LANES);
#pragma GCC unroll 3
      for (int m = 0; m < rows; m++) acc[m][n] = v_fma(weight, value[m], acc[m][n]);
    }
    x += DILU_TILE_ROWS * DILU_LANES;
  }
}

DILU_INLINE void dilu_tile_start(int rows, v_f32 acc[DILU_TILE_ROWS][DILU_TILE_COLS]) {
#pragma GCC unroll 3
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
    for (int n = 0; n < DILU_TILE_COLS; n++) acc[m][n] = v_zero();
}

DILU_INLINE void dilu_tile_totals(int rows, const dilu_tile* t, v_f32 acc[DILU_TILE_ROWS][DILU_TILE_COLS]) {
#pragma GCC unroll 3
  for (int m = 0; m < rows; m++) {
    float sums[DILU_TILE_COLS], *totals = t->totals + m * DILU_STRIP;
    v_hsum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3], sums);
    for (int n = 0; n < DILU_TILE_COLS; n++) totals[n] = t->first ? sums[n] : totals[n] + sums[n];
  }
}

DILU_INLINE void dilu_tile_rows(int rows, const dilu_tile* t) {
  v_f32 acc[DILU_TILE_ROWS][DILU_TILE_COLS];
  dilu_tile_start(rows, acc);
  dilu_tile_step(rows, t->x, t->weights, t->length, acc);
  dilu_tile_totals(rows, t, acc);
}

/* They do not depend on the weights' format: one copy serves a whole module. */
DILU_NOINLINE void dilu_tile_1(const dilu_tile* t) { dilu_tile_rows(1, t); }
DILU_NOINLINE void dilu_tile_2(const dilu_tile* t) { dilu_tile_rows(2, t); }
DILU_NOINLINE void dilu_tile_3(const dilu_tile* t) { dilu_tile_rows(3, t); }

DILU_INLINE void dilu_tile_multiply(int64_t rows, const dilu_tile* t) {
  switch (rows) {
    case 1: dilu_tile_1(t); break;
    case 2: dilu_tile_2(t); break;
    default: dilu_tile_3(t); break;
  }
}

/* Decodes one group, columns k..k+32 of the chunk, into the tile. */
DILU_INLINE void dilu_tile_decode_group(dilu_weight_type type, const dilu_tile* t, const dilu_tile_source* s, int64_t k, v_bits* flag) {
#pragma GCC unroll 4
  for (int n = 0; n < DILU_TILE_COLS; n++) {
    char buffer[DILU_GROUP * 4];
    const char* codes = dilu_group_at(type.format, s->rows[n].codes, s->k0 + k, s->K, buffer);
    for (int64_t byte = 0; byte < DILU_GROUP * dilu_size(type.format); byte += DILU_LINE) __builtin_prefetch(codes + s->ahead + byte);
    dilu_group group = dilu_group_weights(type, s->rows[n], codes, s->k0 + k, s->K, flag);
    for (int j = 0; j < 4; j++) v_store(t->weights + ((k / DILU_LANES + j) * DILU_TILE_COLS + n) * DILU_LANES, group.lane[j]);
  }
}

/* A whole tile that decodes its weights first, a group ahead of what it multiplies. Returns 1, and leaves
 * the totals alone, where there may be special codes. */
DILU_INLINE int dilu_tile_decode(dilu_weight_type type, const dilu_tile* t, const dilu_tile_source* s) {
  v_f32 acc[DILU_TILE_ROWS][DILU_TILE_COLS];
  v_bits flag = v_bits_zero();
  dilu_tile_start(DILU_TILE_ROWS, acc);
  dilu_tile_decode_group(type, t, s, 0, &flag);
  for (int64_t k = 0; k < t->length; k += DILU_GROUP) {
    if (k + DILU_GROUP < t->length) dilu_tile_decode_group(type, t, s, k + DILU_GROUP, &flag);
    dilu_tile_step(DILU_TILE_ROWS, t->x + k * DILU_TILE_ROWS, t->weights + k * DILU_TILE_COLS, DILU_GROUP, acc);
  }
  if (dilu_flag_raised(type.format, flag)) return 1;
  dilu_tile_totals(DILU_TILE_ROWS, t, acc);
  return 0;
}

DILU_NOINLINE void dilu_tile_decode_slow(dilu_weight_type type, const dilu_tile* t, const dilu_tile_source* s) {
  for (int n = 0; n < DILU_TILE_COLS; n++)
    for (int64_t k = 0; k < t->length; k += DILU_GROUP) {
      dilu_group group = dilu_group_slow(type, dilu_scaling(type) == DILU_SCALE_WEIGHTS, s->rows[n], s->k0 + k, s->K);
      for (int j = 0; j < 4; j++) v_store(t->weights + ((k / DILU_LANES + j) * DILU_TILE_COLS + n) * DILU_LANES, group.lane[j]);
    }
}

#endif

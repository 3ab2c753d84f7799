/* matmul_few.h: products of up to 8 activation rows: weights go from memory to registers.
 *
 * The fewer activation rows, the more weight rows are done at once: one chain of additions alone would
 * wait for itself. They are far apart: the weight rows of a part are cut into streams, which memory
 * delivers faster than rows that lie side by side. Columns are done in segments whose activations fit
 * the first-level cache; chunk totals are kept in between.
 */
#ifndef DILU_MATMUL_FEW_H
#define DILU_MATMUL_FEW_H

#include "weights.h"

#define DILU_CHUNK 512        /* columns that lanes are added up over */
#define DILU_FEW_ROWS 8       /* activation rows, at most */
#define DILU_SEGMENT 6144     /* activations of a segment, over all rows */
#define DILU_STRIP 128        /* weight rows of a part, at most */
#define DILU_FETCH_AHEAD 2048 /* bytes, in each stream of weights */

/* Weight rows row..row+count times columns k0..k1 of the activations. */
typedef struct {
  const dilu_matrix* w;
  int64_t row, count;
  int64_t K, k0, k1;
  const float* x;  /* interleaved, from k0 on */
  float* totals;   /* [place of a weight row][activation row], see dilu_few_place */
  char* special;   /* [place of a weight row]: may hold special codes */
} dilu_few;

/* Adds one group of a weight row, times `rows` activation rows, to acc. */
DILU_INLINE void dilu_few_row(dilu_weight_type type, int rows, dilu_matrix_row w, int whole, int64_t k, int64_t K, const float* x,
                              v_f32* acc, v_bits* flag) {
  char buffer[DILU_GROUP * 4];
  const char* codes = whole ? w.codes + k * dilu_size(type.format) : dilu_group_at(type.format, w.codes, k, K, buffer);
  dilu_group group = dilu_group_weights(type, w, codes, k, K, flag);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) acc[m] = v_fma(group.lane[j], v_load(x + (j * rows + m) * DILU_LANES), acc[m]);
}

/* The same for `wide` weight rows: 1, 2 or 4. (In a loop over them, accumulators would stay in memory.) */
DILU_INLINE void dilu_few_group(dilu_weight_type type, int rows, int wide, const dilu_matrix_row* w, int whole, int64_t k, int64_t K,
                                const float* x, v_f32* acc, v_bits* flag) {
  dilu_few_row(type, rows, w[0], whole, k, K, x, acc, flag);
  if (wide > 1) dilu_few_row(type, rows, w[1], whole, k, K, x, acc + rows, flag);
  if (wide > 2) dilu_few_row(type, rows, w[2], whole, k, K, x, acc + 2 * rows, flag);
  if (wide > 2) dilu_few_row(type, rows, w[3], whole, k, K, x, acc + 3 * rows, flag);
}

/* Adds the lanes of four accumulators up, of which `count` are meant. */
DILU_INLINE void dilu_few_four(int count, const v_f32* acc, int first, float* totals) {
  float sums[4];
  v_hsum4(acc[0], acc[1], acc[2], acc[3], sums);
  for (int i = 0; i < count && i < 4; i++) totals[i] = first ? sums[i] : totals[i] + sums[i];
}

/* Adds a chunk's lanes up: totals of `wide` weight rows and `rows` activation rows. */
DILU_INLINE void dilu_few_totals(int rows, int wide, const v_f32* acc, int first, float* totals) {
  dilu_few_four(wide * rows, acc, first, totals);
  if (wide * rows > 4) dilu_few_four(wide * rows - 4, acc + 4, first, totals + 4);
  if (wide * rows > 8) dilu_few_four(wide * rows - 8, acc + 8, first, totals + 8);
}

/* `wide` weight rows over the segment; returns whether there may be special codes among them. */
DILU_INLINE int dilu_few_rows(dilu_weight_type type, int rows, int wide, const dilu_few* job, const dilu_matrix_row* w, float* totals) {
  const int64_t size = dilu_size(type.format), span = (job->k1 - job->k0) * size;
  /* In a segment of the columns, what comes next in a stream is the next row's part of it. */
  const int64_t ahead = job->k1 - job->k0 == job->K ? DILU_FETCH_AHEAD : (1 + DILU_FETCH_AHEAD / span) * job->w->stride * size;
  const float* x = job->x;
  v_bits flag = v_bits_zero();
  for (int64_t k = job->k0, end; k < job->k1; k = end) {
    const int first = k == 0;
    v_f32 acc[12]; /* up to 10, and what fills the last four */
    end = k + DILU_CHUNK < job->k1 ? k + DILU_CHUNK : job->k1;
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) acc[i] = v_zero();
    for (; k + 2 * DILU_GROUP <= end; k += 2 * DILU_GROUP, x += 2 * DILU_GROUP * rows) {
#pragma GCC unroll 4
      for (int n = 0; n < wide; n++)
        for (int line = 0; line < size; line++) __builtin_prefetch(w[n].codes + k * size + ahead + line * DILU_LINE);
      dilu_few_group(type, rows, wide, w, 1, k, job->K, x, acc, &flag);
      dilu_few_group(type, rows, wide, w, 1, k + DILU_GROUP, job->K, x + DILU_GROUP * rows, acc, &flag);
    }
    for (; k < end; k += DILU_GROUP, x += DILU_GROUP * rows) dilu_few_group(type, rows, wide, w, 0, k, job->K, x, acc, &flag);
    dilu_few_totals(rows, wide, acc, first, totals);
  }
  return dilu_flag_raised(type.format, flag);
}

/* How many weight rows are done at once. They are far apart: each is one of as many streams of rows. */
DILU_INLINE int dilu_few_wide(int64_t rows) { return rows <= 2 ? 4 : rows <= 5 ? 2 : 1; }

/* Rows of a stream: of `count` weight rows, the first stream has rows 0..length, and so on. */
DILU_INLINE int64_t dilu_few_stream(int64_t rows, int64_t count) { return (count + dilu_few_wide(rows) - 1) / dilu_few_wide(rows); }

/* Where a weight row's totals are. */
DILU_INLINE int64_t dilu_few_place(int64_t rows, int64_t count, int64_t row) {
  int64_t length = dilu_few_stream(rows, count);
  return row % length * dilu_few_wide(rows) + row / length;
}

/* The whole job; where streams end, their last rows may be done again. */
DILU_INLINE void dilu_few_job(dilu_weight_type type, int rows, const dilu_few* job) {
  const int wide = dilu_few_wide(rows);
  const int64_t length = dilu_few_stream(rows, job->count);
  for (int64_t n = 0; n < length; n++) {
    dilu_matrix_row w[4];
    for (int i = 0; i < wide; i++) {
      int64_t row = n + i * length;
      w[i] = dilu_row(type, job->w, job->row + (row < job->count ? row : job->count - 1));
    }
    if (dilu_few_rows(type, rows, wide, job, w, job->totals + n * wide * rows)) memset(job->special + n * wide, 1, (size_t)wide);
  }
}

/* Columns of a segment: whole chunks. */
DILU_INLINE int64_t dilu_segment(int64_t rows) { return DILU_SEGMENT / rows / DILU_CHUNK * DILU_CHUNK; }

#endif

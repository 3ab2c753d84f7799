/* attention.h: paged attention with online softmax, for ragged batches of tokens.
 *
 * Token t attends to positions 0..positions[t] of its sequence's cache, or to the last `window` of
 * them: out[t,h] = softmax(scale * q[t,h] . k[p, h / (Hq/Hkv)]) . v[p, h / (Hq/Hkv)].
 * The keys and values of the tokens of this batch must already stand in the cache.
 *
 * void dilu_attention(int cache_format, const dilu_attention_args* args, dilu_pool* pool, int thread)
 *   cache_format  DILU_F32, BF16 or F16, constant. All threads call it alike; no barrier inside.
 *
 * Cache: the value d of key-value head g of slot s of page p is at
 *   k + (p * k_page_stride + s * k_slot_stride + g * k_head_stride + d) values, likewise v;
 * position i of sequence q is slot i % page_size of page block_tables[q, i / page_size].
 * v NULL: the value is the first Dv numbers of the key (the latent form of multi-head latent
 * attention; Hkv = 1 there, Dk = latent + rope).
 *
 * size_t dilu_attention_scratch(Dk, Dv, threads): bytes of args.scratch.
 *
 * Numerics: f32, keys in tiles at fixed absolute positions, so that a token's result depends neither on
 * the other tokens of the batch nor on threads. Positions beyond a token's own may be computed with
 * weight zero when other tokens of the batch reach them; what they hold must then be finite.
 * A token with a negative position, or whose scores are all -inf, gets zeros.
 */
#ifndef DILU_ATTENTION_H
#define DILU_ATTENTION_H

#include <stddef.h>

#include "elementary.h"
#include "isa.h"
#include "pool.h"

typedef struct {
  int64_t T, Hq, Hkv, Dk, Dv;
  const float* q;         /* [T,Hq,Dk] */
  int64_t q_stride;       /* floats from token to token */
  const void* k;
  const void* v;
  int64_t k_page_stride, k_slot_stride, k_head_stride; /* values */
  int64_t v_page_stride, v_slot_stride, v_head_stride;
  int64_t page_size;      /* slots per page */
  const int64_t* positions; /* [T] */
  const void* sequence;   /* [T]: row of block_tables */
  int sequence_bytes;     /* 4: int32, 8: int64 */
  const void* block_tables; /* [sequences, pages of a sequence] */
  int block_bytes;        /* 4 or 8 */
  int64_t block_stride;   /* entries from sequence to sequence */
  float scale;
  int64_t window;         /* 0: no limit */
  float* out;             /* [T,Hq,Dv] */
  int64_t out_stride;     /* floats from token to token */
  void* scratch;          /* dilu_attention_scratch bytes, 64-byte aligned */
} dilu_attention_args;

#define DILU_KEYS 32       /* positions per tile */
#define DILU_QUERIES 48    /* rows (token, head) that share a tile */
#define DILU_QUERY_TILE 3  /* rows in registers, times four vectors */

/* One thread's working set. Rows are padded with zeros to a multiple of 32 floats. */
typedef struct {
  int64_t k_width, v_width;
  float* k; /* [DILU_KEYS, k_width] */
  float* v; /* [DILU_KEYS, v_width]; k itself when values are part of the keys */
  int64_t v_stride;
  float* q; /* [DILU_QUERIES, k_width] */
  float* o; /* [DILU_QUERIES, v_width] */
  float* p; /* [DILU_QUERIES, DILU_KEYS]: scores, then weights */
  float* maximum;
  float* sum;
  float* decay; /* [DILU_QUERIES] each */
  int64_t* first;
  int64_t* last; /* [DILU_QUERIES]: the positions a row attends to; none if first > last */
} dilu_attention_space;

DILU_INLINE int64_t dilu_round32(int64_t n) { return (n + 31) / 32 * 32; }

DILU_INLINE size_t dilu_attention_thread_bytes(int64_t Dk, int64_t Dv) {
  int64_t k = dilu_round32(Dk), v = dilu_round32(Dv);
  int64_t floats = DILU_KEYS * (k + v) + DILU_QUERIES * (k + v + DILU_KEYS + 3);
  return ((size_t)floats * sizeof(float) + 2 * DILU_QUERIES * sizeof(int64_t) + 63) / 64 * 64;
}

DILU_INLINE size_t dilu_attention_scratch(int64_t Dk, int64_t Dv, int threads) {
  return (size_t)threads * dilu_attention_thread_bytes(Dk, Dv);
}

DILU_NOINLINE dilu_attention_space dilu_attention_layout(const dilu_attention_args* a, int thread) {
  dilu_attention_space s = {dilu_round32(a->Dk), dilu_round32(a->Dv), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  char* base = (char*)a->scratch + (size_t)thread * dilu_attention_thread_bytes(a->Dk, a->Dv);
  s.first = (int64_t*)base;
  s.last = s.first + DILU_QUERIES;
  s.k = (float*)(s.last + DILU_QUERIES);
  s.v = s.k + DILU_KEYS * s.k_width;
  s.q = s.v + DILU_KEYS * s.v_width;
  s.o = s.q + DILU_QUERIES * s.k_width;
  s.p = s.o + DILU_QUERIES * s.v_width;
  s.maximum = s.p + DILU_QUERIES * DILU_KEYS;
  s.sum = s.maximum + DILU_QUERIES;
  s.decay = s.sum + DILU_QUERIES;
  s.v_stride = s.v_width;
  if (!a->v) {
    s.v = s.k;
    s.v_stride = s.k_width;
  }
  return s;
}

DILU_INLINE int64_t dilu_integer(const void* base, int bytes, int64_t index) {
  return bytes == 8 ? ((const int64_t*)base)[index] : ((const int32_t*)base)[index];
}

/* ---- loading ----------------------------------------------------------------------------- */

/* Eight cache values in natural order. */
DILU_INLINE v_f32 dilu_cache_lanes(int format, const char* p) {
  if (format == DILU_F32) return v_load(p);
  return format == DILU_BF16 ? v_load_bf16(p) : v_load_f16(p);
}

/* `width` floats from `count` cache values; the rest is zero. */
DILU_INLINE void dilu_cache_row(int format, const char* from, int64_t count, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + DILU_LANES <= count; i += DILU_LANES) v_store(to + i, dilu_cache_lanes(format, from + i * dilu_size(format)));
  for (; i < count; i++) to[i] = dilu_load(format, from, i);
  for (; i < width; i++) to[i] = 0.0f;
}

/* A walk over the positions of a sequence: where the key and the value of one lie. */
typedef struct {
  const dilu_attention_args* a;
  int64_t sequence, head, size, page, slot; /* page: of the sequence; size: bytes of a value */
  const char *k, *v;
} dilu_cache_walk;

DILU_INLINE void dilu_cache_enter(dilu_cache_walk* w) {
  const dilu_attention_args* a = w->a;
  int64_t page = dilu_integer(a->block_tables, a->block_bytes, w->sequence * a->block_stride + w->page);
  w->k = (const char*)a->k + (page * a->k_page_stride + w->slot * a->k_slot_stride + w->head * a->k_head_stride) * w->size;
  w->v = (const char*)a->v + (page * a->v_page_stride + w->slot * a->v_slot_stride + w->head * a->v_head_stride) * w->size;
}

DILU_INLINE dilu_cache_walk dilu_cache_begin(const dilu_attention_args* a, int64_t sequence, int64_t head, int64_t position, int64_t size) {
  dilu_cache_walk w = {a, sequence, head, size, position / a->page_size, position % a->page_size, 0, 0};
  dilu_cache_enter(&w);
  return w;
}

/* Goes on to the next position, which must be one of the sequence. */
DILU_INLINE void dilu_cache_next(dilu_cache_walk* w) {
  if (++w->slot == w->a->page_size) {
    w->page++;
    w->slot = 0;
    dilu_cache_enter(w);
  } else {
    w->k += w->a->k_slot_stride * w->size;
    w->v += w->a->v_slot_stride * w->size;
  }
}

/* Fetches a row of the cache. */
DILU_INLINE void dilu_cache_fetch(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += DILU_LINE) __builtin_prefetch(row + at);
}

/* Loads positions begin..end (a part of one tile) of a sequence, and fetches those a tile further on that
 * are before `fetch`; tile rows count from `tile`. */
DILU_INLINE void dilu_attention_load(int format, const dilu_attention_args* a, const dilu_attention_space* s, int64_t sequence,
                                     int64_t head, int64_t tile, int64_t begin, int64_t end, int64_t fetch) {
  const int64_t size = dilu_size(format);
  dilu_cache_walk at = dilu_cache_begin(a, sequence, head, begin, size);
  for (int64_t i = begin;; dilu_cache_next(&at)) {
    dilu_cache_row(format, at.k, a->Dk, s->k_width, s->k + (i - tile) * s->k_width);
    if (a->v) dilu_cache_row(format, at.v, a->Dv, s->v_width, s->v + (i - tile) * s->v_width);
    if (++i == end) break;
  }
  if (begin + DILU_KEYS >= fetch) return;
  at = dilu_cache_begin(a, sequence, head, begin + DILU_KEYS, size);
  for (int64_t i = begin + DILU_KEYS;; dilu_cache_next(&at)) {
    dilu_cache_fetch(at.k, a->Dk * size);
    if (a->v) dilu_cache_fetch(at.v, a->Dv * size);
    if (++i == end + DILU_KEYS || i == fetch) break;
  }
}

/* ---- the three steps of a tile ------------------------------------------------------------- */

/* Scores of `count` rows with four keys. */
DILU_INLINE void dilu_scores_tile(int count, const float* q, const float* k, int64_t width, float* p) {
  v_f32 acc[DILU_QUERY_TILE][4];
  for (int r = 0; r < count; r++)
    for (int j = 0; j < 4; j++) acc[r][j] = v_zero();
  for (int64_t d = 0; d < width; d += DILU_LANES) {
    v_f32 x[DILU_QUERY_TILE];
    for (int r = 0; r < count; r++) x[r] = v_load(q + r * width + d);
    for (int j = 0; j < 4; j++) {
      v_f32 key = v_load(k + j * width + d);
      for (int r = 0; r < count; r++) acc[r][j] = v_fma(x[r], key, acc[r][j]);
    }
  }
  for (int r = 0; r < count; r++) v_hsum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], p + r * DILU_KEYS);
}

DILU_NOINLINE void dilu_scores(const dilu_attention_space* s, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < rows; r += DILU_QUERY_TILE)
    for (int64_t j = begin / 4 * 4; j < end; j += 4) {
      const float *q = s->q + r * s->k_width, *k = s->k + j * s->k_width;
      float* p = s->p + r * DILU_KEYS + j;
      switch (rows - r) {
        case 1: dilu_scores_tile(1, q, k, s->k_width, p); break;
        case 2: dilu_scores_tile(2, q, k, s->k_width, p); break;
        default: dilu_scores_tile(3, q, k, s->k_width, p); break;
      }
    }
}

/* dilu_expf of every lane, operation by operation. */
DILU_INLINE v_f32 dilu_exp_lanes(v_f32 x) {
  const v_f32 magic = v_set(0x1.8p23f);
  x = v_max(v_set(-105.0f), v_min(v_set(89.0f), x));
  v_f32 shifted = v_fma(x, v_set(1.44269504f), magic), n = v_sub(shifted, magic);
  v_f32 r = v_fma(n, v_set(2.12194440e-4f), v_fma(n, v_set(-0.693359375f), x));
  v_f32 p = v_fma(v_set(1.9875691500e-4f), r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
  v_bits exponent = v_sub32(v_as_bits(shifted), v_as_bits(magic)), half = v_sra32(exponent, 1), bias = v_bits_set32(127);
  v_f32 first = v_as_f32(v_shl32(v_add32(half, bias), 23));
  v_f32 second = v_as_f32(v_shl32(v_add32(v_sub32(exponent, half), bias), 23));
  return v_mul(v_mul(p, first), second);
}

/* Turns a row's scores of the tile at position `tile` into weights, whose sum `fresh` gets. What the row
 * has summed so far decays by exp(*decay). Keys outside the row's positions get weight zero. */
DILU_INLINE void dilu_softmax_row(float* p, int64_t tile, int64_t first, int64_t last, v_f32 scale, float* maximum, float* fresh,
                                  float* decay) {
  v_f32 score[DILU_KEYS / DILU_LANES], top = v_set(*maximum), total = v_zero();
  if (tile > last || tile + DILU_KEYS <= first) { /* nothing here for this row */
    memset(p, 0, DILU_KEYS * sizeof(float));
    *fresh = *decay = 0.0f;
    return;
  }
  for (int i = 0; i < DILU_KEYS / DILU_LANES; i++) score[i] = v_mul(v_load(p + i * DILU_LANES), scale);
  if (first > tile || last - tile < DILU_KEYS - 1) {
    for (int i = 0; i < DILU_KEYS / DILU_LANES; i++) v_store(p + i * DILU_LANES, score[i]);
    for (int64_t i = 0; i < DILU_KEYS; i++)
      if (tile + i < first || tile + i > last) p[i] = -__builtin_inff();
    for (int i = 0; i < DILU_KEYS / DILU_LANES; i++) score[i] = v_load(p + i * DILU_LANES);
  }
  for (int i = 0; i < DILU_KEYS / DILU_LANES; i++) top = v_max(score[i], top);
  float highest = v_hmax(top), from = highest > -__builtin_inff() ? highest : 0.0f; /* scores may all be -inf so far */
  for (int i = 0; i < DILU_KEYS / DILU_LANES; i++) {
    score[i] = dilu_exp_lanes(v_sub(score[i], v_set(from)));
    v_store(p + i * DILU_LANES, score[i]);
    total = v_add(total, score[i]);
  }
  *fresh = v_hsum(total);
  *decay = *maximum - from;
  *maximum = highest;
}

DILU_NOINLINE void dilu_softmax(const dilu_attention_space* s, int64_t rows, int64_t tile, float scale) {
  float fresh[DILU_QUERIES];
  for (int64_t r = 0; r < rows; r++)
    dilu_softmax_row(s->p + r * DILU_KEYS, tile, s->first[r], s->last[r], v_set(scale), s->maximum + r, fresh + r, s->decay + r);
  for (int64_t r = 0; r < rows; r += DILU_LANES) v_store(s->decay + r, dilu_exp_lanes(v_load(s->decay + r)));
  for (int64_t r = 0; r < rows; r++) s->sum[r] = DILU_FMAF(s->sum[r], s->decay[r], fresh[r]);
}

/* o = o * decay + p . v for `count` rows and 32 columns. */
DILU_INLINE void dilu_values_tile(int count, const float* p, const float* v, int64_t v_stride, int64_t begin, int64_t end,
                                  const float* decay, float* o, int64_t width) {
  v_f32 acc[DILU_QUERY_TILE][4];
  for (int r = 0; r < count; r++)
    for (int j = 0; j < 4; j++) acc[r][j] = v_mul(v_load(o + r * width + j * DILU_LANES), v_set(decay[r]));
  for (int64_t i = begin; i < end; i++) {
    v_f32 weight[DILU_QUERY_TILE];
    for (int r = 0; r < count; r++) weight[r] = v_set(p[r * DILU_KEYS + i]);
    for (int j = 0; j < 4; j++) {
      v_f32 value = v_load(v + i * v_stride + j * DILU_LANES);
      for (int r = 0; r < count; r++) acc[r][j] = v_fma(weight[r], value, acc[r][j]);
    }
  }
  for (int r = 0; r < count; r++)
    for (int j = 0; j < 4; j++) v_store(o + r * width + j * DILU_LANES, acc[r][j]);
}

DILU_NOINLINE void dilu_values(const dilu_attention_space* s, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t d = 0; d < s->v_width; d += 32)
    for (int64_t r = 0; r < rows; r += DILU_QUERY_TILE) {
      const float *p = s->p + r * DILU_KEYS, *v = s->v + d, *decay = s->decay + r;
      float* o = s->o + r * s->v_width + d;
      switch (rows - r) {
        case 1: dilu_values_tile(1, p, v, s->v_stride, begin, end, decay, o, s->v_width); break;
        case 2: dilu_values_tile(2, p, v, s->v_stride, begin, end, decay, o, s->v_width); break;
        default: dilu_values_tile(3, p, v, s->v_stride, begin, end, decay, o, s->v_width); break;
      }
    }
}

/* ---- blocks of rows ------------------------------------------------------------------------ */

/* Prepares the rows of tokens t0..t1 and query heads h0..h1: row (t - t0) * (h1 - h0) + h - h0. */
DILU_NOINLINE void dilu_attention_begin(const dilu_attention_args* a, const dilu_attention_space* s, int64_t t0, int64_t t1,
                                        int64_t h0, int64_t h1) {
  int64_t row = 0;
  for (int64_t t = t0; t < t1; t++)
    for (int64_t h = h0; h < h1; h++, row++) {
      dilu_cache_row(DILU_F32, (const char*)(a->q + t * a->q_stride + h * a->Dk), a->Dk, s->k_width, s->q + row * s->k_width);
      memset(s->o + row * s->v_width, 0, (size_t)s->v_width * sizeof(float));
      s->maximum[row] = -__builtin_inff();
      s->sum[row] = 0.0f;
      s->last[row] = a->positions[t];
      s->first[row] = a->window > 0 && a->positions[t] >= a->window ? a->positions[t] - a->window + 1 : 0;
    }
}

DILU_NOINLINE void dilu_attention_finish(const dilu_attention_args* a, const dilu_attention_space* s, int64_t t0, int64_t t1,
                                         int64_t h0, int64_t h1) {
  int64_t row = 0;
  for (int64_t t = t0; t < t1; t++)
    for (int64_t h = h0; h < h1; h++, row++) {
      float* out = a->out + t * a->out_stride + h * a->Dv;
      float inverse = s->sum[row] == 0.0f ? 0.0f : 1.0f / s->sum[row]; /* it sees no key, or scores are -inf */
      for (int64_t d = 0; d < a->Dv; d++) out[d] = s->o[row * s->v_width + d] * inverse;
    }
}

/* Tokens t0..t1 of one sequence, query heads h0..h1 of key-value head `head`. */
DILU_INLINE void dilu_attention_block(int format, const dilu_attention_args* a, const dilu_attention_space* s, int64_t t0, int64_t t1,
                                      int64_t head, int64_t h0, int64_t h1) {
  int64_t rows = (t1 - t0) * (h1 - h0), begin = INT64_MAX, end = 0;
  int64_t sequence = dilu_integer(a->sequence, a->sequence_bytes, t0);
  dilu_attention_begin(a, s, t0, t1, h0, h1);
  for (int64_t r = 0; r < rows; r++) {
    begin = s->first[r] < begin ? s->first[r] : begin;
    end = s->last[r] + 1 > end ? s->last[r] + 1 : end;
  }
  for (int64_t tile = begin / DILU_KEYS * DILU_KEYS; tile < end; tile += DILU_KEYS) {
    int64_t from = begin > tile ? begin : tile, to = end < tile + DILU_KEYS ? end : tile + DILU_KEYS;
    dilu_attention_load(format, a, s, sequence, head, tile, from, to, end);
    dilu_scores(s, rows, from - tile, to - tile);
    dilu_softmax(s, rows, tile, a->scale);
    dilu_values(s, rows, from - tile, to - tile);
  }
  dilu_attention_finish(a, s, t0, t1, h0, h1);
}

/* The end of the run of tokens from t on (below `end`) that belong to one sequence. */
DILU_INLINE int64_t dilu_same_sequence(const dilu_attention_args* a, int64_t t, int64_t end) {
  int64_t sequence = dilu_integer(a->sequence, a->sequence_bytes, t);
  while (++t < end && dilu_integer(a->sequence, a->sequence_bytes, t) == sequence) continue;
  return t;
}

DILU_INLINE void dilu_attention(int cache_format, const dilu_attention_args* a, dilu_pool* pool, int thread) {
  dilu_attention_space space = dilu_attention_layout(a, thread);
  int64_t group = a->Hq / a->Hkv, heads = group < DILU_QUERIES ? group : DILU_QUERIES, wanted = 4 * dilu_pool_threads(pool);
  int64_t tokens = DILU_QUERIES / heads;
  while (tokens > 1 && (a->T + tokens - 1) / tokens * a->Hkv < wanted) tokens = (tokens + 1) / 2;
  while (heads > 6 && a->T * a->Hkv * ((group + heads - 1) / heads) < dilu_pool_threads(pool)) heads = (heads + 1) / 2;
  int64_t token_blocks = (a->T + tokens - 1) / tokens, head_blocks = (group + heads - 1) / heads;
  dilu_loop loop = dilu_loop_begin(pool, thread, token_blocks * a->Hkv * head_blocks);
  for (int64_t task; (task = dilu_loop_next(&loop)) >= 0;) {
    /* Later tokens see more keys: the longest tasks come first. */
    int64_t t0 = (token_blocks - 1 - task / (a->Hkv * head_blocks)) * tokens, t1 = t0 + tokens < a->T ? t0 + tokens : a->T;
    int64_t head = task / head_blocks % a->Hkv, h0 = head * group + task % head_blocks * heads;
    int64_t h1 = h0 + heads < (head + 1) * group ? h0 + heads : (head + 1) * group;
    for (int64_t t = t0, end; t < t1; t = end) {
      end = dilu_same_sequence(a, t, t1);
      dilu_attention_block(cache_format, a, &space, t, end, head, h0, h1);
    }
  }
}

#endif

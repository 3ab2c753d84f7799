/* experts.h: grouped experts of a mixture-of-experts layer, on stored weights.
 *
 * out[t] = sum over slots s, in order, of routing[t,s] * down_e . activation(gate_e . x[t], up_e . x[t])
 * with e = indices[t,s]. A slot whose index is outside 0..E-1 contributes nothing.
 *
 * void dilu_experts(const dilu_weight_kernels* gate_up, const dilu_weight_kernels* down,
 *                   const dilu_experts_args* args, dilu_gated activation, dilu_epilogue epilogue,
 *                   const void* ctx, dilu_pool* pool, int thread)
 *   gate_up, down  kernels for the types of the weights, see matmul.h
 *   activation     activation(ctx, count, gate, up, hidden): hidden[i] = f(gate[i]) * up[i] or the like;
 *                  hidden may be written at will, gate and up only read
 *   epilogue       epilogue(ctx, token, col, count, acc, NULL) for strips of the result
 *   All threads call it alike. It has barriers inside; before another kernel reads the results there
 *   must be one more.
 *
 * size_t dilu_experts_scratch(args, threads): bytes of args->scratch; reads T, H, I, E and k only.
 *
 * Numerics: as dilu_matmul, so independent of threads and of which tokens are computed together.
 */
#ifndef DILU_EXPERTS_H
#define DILU_EXPERTS_H

#include "matmul.h"

typedef struct {
  int64_t T, H, I, E, k;     /* tokens, hidden size, expert size, experts, slots per token */
  const float* x;            /* [T] rows packed for the gate_up format */
  int64_t x_stride;          /* floats */
  const void* indices;       /* [T,k] */
  int index_bytes;           /* 4: int32, 8: int64 */
  const float* routing;      /* [T,k] */
  const void* const* gate_up_codes;  /* [E,2]: gate [I,H], up [I,H] */
  const void* const* gate_up_scales; /* [E,2], or NULL */
  const void* const* down_codes;     /* [E]: [H,I] */
  const void* const* down_scales;    /* [E], or NULL */
  int64_t gate_up_scale_stride, down_scale_stride; /* scales from row of blocks to row of blocks */
  void* scratch;             /* dilu_experts_scratch bytes, 64-byte aligned */
} dilu_experts_args;

typedef void (*dilu_gated)(const void* ctx, int64_t count, const float* gate, const float* up, float* hidden);

#define DILU_EXPERT_TOKENS 1024 /* tokens handled at once; bounds the scratch */
#define DILU_COMBINE_STRIP 256

/* The parts of the scratch. An entry is a (token, slot) pair, numbered token * k + slot. */
typedef struct {
  dilu_matmul_space* spaces; /* one per thread */
  float* hidden;             /* [entries] rows packed for the down format */
  float* y;                  /* [entries, H] */
  int32_t* order;            /* entries sorted by expert */
  int32_t* offsets;          /* [E+1]: where each expert's entries start in order */
  int32_t* active;           /* [E]: experts with entries; active[E] counts them */
  size_t bytes;
} dilu_experts_space;

DILU_INLINE size_t dilu_take(size_t* used, size_t bytes) {
  size_t at = *used;
  *used += (bytes + 63) / 64 * 64;
  return at;
}

DILU_NOINLINE dilu_experts_space dilu_experts_layout(const dilu_experts_args* a, int threads) {
  int64_t tokens = a->T < DILU_EXPERT_TOKENS ? a->T : DILU_EXPERT_TOKENS, entries = tokens * a->k;
  char* base = a->scratch;
  size_t used = 0;
  dilu_experts_space s;
  s.spaces = (dilu_matmul_space*)(base + dilu_take(&used, dilu_matmul_scratch(threads)));
  s.hidden = (float*)(base + dilu_take(&used, (size_t)(entries * dilu_packed_length(a->I)) * sizeof(float)));
  s.y = (float*)(base + dilu_take(&used, (size_t)(entries * a->H) * sizeof(float)));
  s.order = (int32_t*)(base + dilu_take(&used, (size_t)entries * sizeof(int32_t)));
  s.offsets = (int32_t*)(base + dilu_take(&used, (size_t)(a->E + 1) * sizeof(int32_t)));
  s.active = (int32_t*)(base + dilu_take(&used, (size_t)(a->E + 1) * sizeof(int32_t)));
  s.bytes = used;
  return s;
}

DILU_INLINE size_t dilu_experts_scratch(const dilu_experts_args* a, int threads) {
  dilu_experts_args sizes = *a;
  sizes.scratch = 0;
  return dilu_experts_layout(&sizes, threads).bytes;
}

/* The expert of an entry (numbered from the first token of all), -1 when out of range. */
DILU_INLINE int64_t dilu_expert_of(const dilu_experts_args* a, int64_t entry) {
  int64_t e = a->index_bytes == 8 ? ((const int64_t*)a->indices)[entry] : ((const int32_t*)a->indices)[entry];
  return e >= 0 && e < a->E ? e : -1;
}

/* Counting sort of the entries of tokens t0.. by expert; stable, so the order is deterministic. */
DILU_NOINLINE void dilu_experts_sort(const dilu_experts_args* a, const dilu_experts_space* s, int64_t t0, int64_t tokens,
                                     int64_t* counts) {
  int64_t entries = tokens * a->k;
  memset(s->offsets, 0, (size_t)(a->E + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < entries; i++) {
    int64_t e = dilu_expert_of(a, t0 * a->k + i);
    if (e >= 0) s->offsets[e]++;
  }
  int32_t total = 0, active = 0;
  for (int64_t e = 0; e < a->E; e++) { /* offsets: from counts to ends */
    if (s->offsets[e]) s->active[active++] = (int32_t)e;
    if (counts) counts[e] += s->offsets[e];
    total += s->offsets[e];
    s->offsets[e] = total;
  }
  s->offsets[a->E] = total;
  s->active[a->E] = active;
  for (int64_t i = entries - 1; i >= 0; i--) { /* backwards, ends become starts */
    int64_t e = dilu_expert_of(a, t0 * a->k + i);
    if (e >= 0) s->order[--s->offsets[e]] = (int32_t)i;
  }
}

/* One strip of gate and up results of an entry, through the activation, packed for the down product. */
DILU_INLINE void dilu_experts_hidden(int down_format, dilu_gated activation, const void* ctx, int64_t col, int64_t count, int64_t I,
                                     const float* gate, const float* up, float* packed) {
  float hidden[DILU_STRIP];
  activation(ctx, count, gate, up, hidden);
  dilu_pack_strip(down_format, hidden, col, count, I, packed);
}

/* One of the two products for all experts: tasks are (expert, strip of N columns). With two weights
 * (gate and up) results go through the activation to the hidden rows, with one (down) to y. `divisor`
 * maps an entry to its row of x. */
DILU_NOINLINE void dilu_experts_product(const dilu_weight_kernels* kernels, int weights, int down_format, dilu_gated activation,
                                        const void* ctx, const dilu_experts_args* a, const dilu_experts_space* s,
                                        const void* const* codes, const void* const* scales, int64_t scale_stride, int64_t N, int64_t K,
                                        const float* x, int64_t x_stride, int64_t divisor, dilu_pool* pool, int thread) {
  const dilu_weight_type type = kernels->type;
  int64_t active = s->active[a->E], entries = s->offsets[a->E];
  int64_t cols = entries <= active * DILU_FEW_ROWS ? dilu_few_cols(type.format, K) : DILU_STRIP;
  while (cols >= 32 && active * dilu_ceil(N, cols) < 4 * dilu_pool_threads(pool)) cols = cols / 8 * 4;
  int64_t strips = dilu_ceil(N, cols);
  dilu_matmul_space* space = s->spaces + thread;
  dilu_loop loop = dilu_loop_begin(pool, thread, active * strips);
  for (int64_t task; (task = dilu_loop_next(&loop)) >= 0;) {
    int64_t e = s->active[task / strips], n0 = task % strips * cols, n1 = n0 + cols < N ? n0 + cols : N;
    int64_t count = s->offsets[e + 1] - s->offsets[e];
    dilu_matrix w[2];
    for (int i = 0; i < weights; i++)
      w[i] = (dilu_matrix){codes[e * weights + i], scales ? scales[e * weights + i] : 0, K, scale_stride};
    dilu_rows rows = {x, x_stride, s->order + s->offsets[e], divisor};
    dilu_part part = {0, n0, n0, 0, count};
    space->kept[0] = space->kept[1] = -1;
    while (dilu_part_next(type, &part, count, n1)) {
      dilu_part_compute(kernels, weights, w, K, &rows, &part, dilu_block_of(type, part.n0), space);
      for (int64_t m = part.m0; m < part.m1; m++) {
        const float *acc0 = space->results[0] + (m - part.m0) * DILU_STRIP, *acc1 = space->results[1] + (m - part.m0) * DILU_STRIP;
        int64_t entry = rows.rows[m], columns = part.n1 - part.n0;
        if (weights == 2)
          dilu_experts_hidden(down_format, activation, ctx, part.n0, columns, N, acc0, acc1, s->hidden + entry * dilu_packed_length(N));
        else
          memcpy(s->y + entry * N + part.n0, acc0, (size_t)columns * sizeof(float));
      }
    }
  }
}

DILU_NOINLINE void dilu_experts_combine(const dilu_experts_args* a, const dilu_experts_space* s, int64_t t0, int64_t tokens,
                                      dilu_epilogue epilogue, const void* ctx, dilu_pool* pool, int thread) {
  int64_t strips = dilu_ceil(a->H, DILU_COMBINE_STRIP);
  dilu_loop loop = dilu_loop_begin(pool, thread, tokens * strips);
  for (int64_t task; (task = dilu_loop_next(&loop)) >= 0;) {
    int64_t t = task / strips, n0 = task % strips * DILU_COMBINE_STRIP;
    int64_t count = a->H - n0 < DILU_COMBINE_STRIP ? a->H - n0 : DILU_COMBINE_STRIP;
    float sum[DILU_COMBINE_STRIP];
    memset(sum, 0, sizeof sum);
    for (int64_t slot = 0; slot < a->k; slot++) {
      if (dilu_expert_of(a, (t0 + t) * a->k + slot) < 0) continue;
      const float weight = a->routing[(t0 + t) * a->k + slot], *y = s->y + (t * a->k + slot) * a->H + n0;
      for (int64_t i = 0; i < count; i++) sum[i] += weight * y[i];
    }
    epilogue(ctx, t0 + t, n0, count, sum, 0);
  }
}

DILU_NOINLINE void dilu_experts(const dilu_weight_kernels* gate_up, const dilu_weight_kernels* down, const dilu_experts_args* a,
                                dilu_gated activation, dilu_epilogue epilogue, const void* ctx, dilu_pool* pool, int thread) {
  dilu_experts_space space = dilu_experts_layout(a, dilu_pool_threads(pool));
  for (int64_t t0 = 0; t0 < a->T; t0 += DILU_EXPERT_TOKENS) {
    int64_t tokens = a->T - t0 < DILU_EXPERT_TOKENS ? a->T - t0 : DILU_EXPERT_TOKENS;
    if (thread == 0) dilu_experts_sort(a, &space, t0, tokens, pool->counts);
    dilu_barrier(pool, thread);
    dilu_experts_product(gate_up, 2, down->type.format, activation, ctx, a, &space, a->gate_up_codes, a->gate_up_scales,
                         a->gate_up_scale_stride, a->I, a->H, a->x + t0 * a->x_stride, a->x_stride, a->k, pool, thread);
    dilu_barrier(pool, thread);
    dilu_experts_product(down, 1, down->type.format, activation, ctx, a, &space, a->down_codes, a->down_scales, a->down_scale_stride,
                         a->H, a->I, space.hidden, dilu_packed_length(a->I), 1, pool, thread);
    dilu_barrier(pool, thread);
    dilu_experts_combine(a, &space, t0, tokens, epilogue, ctx, pool, thread);
    /* No barrier here: the next tokens' order and hidden rows may be written while y is still read. */
  }
  if (thread == 0 && pool->counts) pool->counts += a->E;
}

#endif

/* program.h: what generated loops and plans use beside the micro-kernels.
 *
 *   dilu_call                the arguments of one run of a function, see dilu_run
 *   dilu_constant            a constant's pieces, and how far into its only piece a layer's part lies
 *   dilu_share               the rows of a loop nest that are a thread's
 *   dilu_<op>_<type>         scalar ops where C has none with the meaning of the graph's ops
 */
#ifndef DILU_PROGRAM_H
#define DILU_PROGRAM_H

#include <math.h>
#include <stdint.h>

#include "formats.h"
#include "pool.h"

typedef double __attribute__((aligned(1), may_alias)) dilu_unaligned_f64;
typedef int64_t __attribute__((aligned(1), may_alias)) dilu_unaligned_i64;
typedef int32_t __attribute__((aligned(1), may_alias)) dilu_unaligned_i32;
typedef int16_t __attribute__((aligned(1), may_alias)) dilu_unaligned_i16;

typedef struct {
  const int64_t* sizes;                 /* one per symbol */
  void* const* parameters;
  void* const* states;
  const void* const* const* constants;  /* constants[i][j]: piece j of constant i, any alignment */
  void* const* results;
  char* arena;                          /* dilu_arena_bytes() bytes, 64-byte aligned */
  struct dilu_host* host;               /* of functions that speak with other ranks, else NULL */
  int64_t* counts;                      /* entries of every expert are added here, block by block, or NULL */
} dilu_call;

/* Rows on their way to experts: what a function hands to the host, and what the host lends it. */
typedef struct {
  int64_t tokens, choices, width;
  int64_t itemsize, made_itemsize; /* bytes of a number, and of what becomes of it */
  int64_t ranks, slots, capacity;
  const void* x;         /* [tokens, width] */
  const void* indices;   /* i64[tokens, choices] */
  const void* placement; /* i64[ranks, slots] */
  void* result;          /* [tokens, choices, width], written by the host */
  void* rows;            /* the host's: [n, width] that came to this rank, */
  void* slots_of;        /* i64[n] for whom, */
  void* made;            /* and where what becomes of them goes */
} dilu_routed;

/* What ranks do with each other's numbers: add them up, or put them one after another. */
typedef struct {
  int64_t gather, axis;     /* 1 or 0; which axis of the mesh */
  int64_t itemsize, bfloat; /* of a number: bytes, and 1 where it is a bf16 */
  int64_t rows, width;
  const void* x;            /* [rows, width] */
  void* result;             /* the same; where gathered, [rows, ranks, width] */
} dilu_collective;

typedef struct dilu_host {
  int64_t (*next)(void* context, dilu_routed*);
  void (*collect)(void* context, const dilu_collective*);
  void* context;
  int64_t count;
  struct {
    void *rows, *slots, *made;
  } lent;
} dilu_host;

typedef struct {
  const void* const* pieces;
  int64_t offset; /* bytes, into pieces[0] */
} dilu_constant;

DILU_INLINE const void* dilu_constant_data(dilu_constant c) { return (const char*)c.pieces[0] + c.offset; }

/* out[i]: part i of a constant whose every piece holds `per_piece` parts of `bytes` bytes. */
DILU_INLINE const void* const* dilu_constant_parts(dilu_constant c, int64_t count, int64_t per_piece, int64_t bytes,
                                                   const void** out) {
  if (per_piece == 1) return c.pieces;
  for (int64_t i = 0; i < count; i++) out[i] = (const char*)c.pieces[i / per_piece] + c.offset + i % per_piece * bytes;
  return out;
}

DILU_INLINE int64_t dilu_align(int64_t bytes) { return (bytes + 63) / 64 * 64; }
DILU_INLINE int64_t dilu_larger(int64_t a, int64_t b) { return a > b ? a : b; }
DILU_INLINE int64_t dilu_smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Work below this many operations is not worth another thread. */
#define DILU_GRAIN 16384

/* Rows begin..end of `rows` for this thread, when a row takes about `cost` operations. */
DILU_INLINE void dilu_share(int64_t rows, int64_t cost, int thread, int threads, int64_t* begin, int64_t* end) {
  double work = (double)rows * (double)cost / DILU_GRAIN;
  int64_t active = work < threads ? (int64_t)work + 1 : threads;
  if (active > threads) active = threads;
  *begin = thread < active ? rows * thread / active : 0;
  *end = thread < active ? rows * (thread + 1) / active : 0;
}

/* Floor division and its remainder; zero where the divisor is zero. */
DILU_INLINE int64_t dilu_mod_i64(int64_t a, int64_t b) {
  if (b == 0 || b == -1) return 0;
  int64_t r = a % b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

DILU_INLINE int64_t dilu_div_i64(int64_t a, int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return -a;
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

/* The whole part of a power: zero for most negative exponents. */
DILU_INLINE int64_t dilu_pow_i64(int64_t base, int64_t exponent) {
  int64_t out = 1;
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? 1 - 2 * (exponent & 1) : 0;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) out *= base;
  return out;
}

/* What is shifted out is gone: all of it where `by` is negative or large. */
DILU_INLINE int64_t dilu_shift_left_i64(int64_t x, int64_t by) {
  return (uint64_t)by > 63 ? 0 : (int64_t)((uint64_t)x << by);
}
DILU_INLINE int64_t dilu_shift_right_i64(int64_t x, int64_t by) {
  return x >> ((uint64_t)by > 63 ? 63 : by);
}
DILU_INLINE int64_t dilu_abs_i64(int64_t x) { return x < 0 ? -x : x; }
DILU_INLINE int64_t dilu_max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
DILU_INLINE int64_t dilu_min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

/* x held in 0 .. size - 1. */
DILU_INLINE int64_t dilu_clamp(int64_t x, int64_t size) { return x < 0 || size <= 0 ? 0 : x < size ? x : size - 1; }

/* Maxima and minima of loops. The built-in reductions of some compilers start at the largest finite
 * number, where all values may be infinite. */
#pragma omp declare reduction(dilu_max : float, double : omp_out = omp_in > omp_out ? omp_in : omp_out) \
    initializer(omp_priv = -INFINITY)
#pragma omp declare reduction(dilu_min : float, double : omp_out = omp_in < omp_out ? omp_in : omp_out) \
    initializer(omp_priv = INFINITY)

/* NaN where either is NaN. */
DILU_INLINE float dilu_max_f32(float a, float b) { return a > b || a != a ? a : b; }
DILU_INLINE float dilu_min_f32(float a, float b) { return a < b || a != a ? a : b; }
DILU_INLINE double dilu_max_f64(double a, double b) { return a > b || a != a ? a : b; }
DILU_INLINE double dilu_min_f64(double a, double b) { return a < b || a != a ? a : b; }

/* Remainder with the sign of the divisor; a zero has that of the dividend. */
DILU_INLINE double dilu_mod_f64(double a, double b) {
  double r = fmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

DILU_INLINE float dilu_mod_f32(float a, float b) {
  float r = fmodf(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

/* Truncation; what does not fit, NaN included, becomes the smallest integer. */
DILU_INLINE int64_t dilu_to_i64(double x) {
  return x >= -0x1p63 && x < 0x1p63 ? (int64_t)x : INT64_MIN;
}

DILU_INLINE int32_t dilu_to_i32(double x) {
  return x > -0x1p31 && x < 0x1p31 ? (int32_t)x : INT32_MIN;
}

/* The rows to work on next, lent by the host; -1 when there are no more and the result is there. */
DILU_INLINE int64_t dilu_host_next(dilu_host* host, dilu_pool* pool, int thread, dilu_routed* routed) {
  dilu_barrier(pool, thread);
  if (thread == 0) {
    host->count = host->next(host->context, routed);
    host->lent.rows = routed->rows;
    host->lent.slots = routed->slots_of;
    host->lent.made = routed->made;
  }
  dilu_barrier(pool, thread);
  return host->count;
}

/* Wait until the host has done what `collective` says; what x holds must be there by now. */
DILU_INLINE void dilu_host_collect(dilu_host* host, dilu_pool* pool, int thread, const dilu_collective* collective) {
  dilu_barrier(pool, thread);
  if (thread == 0) host->collect(host->context, collective);
  dilu_barrier(pool, thread);
}

#endif

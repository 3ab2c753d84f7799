/* A module with the C interface of compiled ones, small enough to be written by hand.
 *
 * 0 main   a language model: the next token is the sum of all tokens so far, modulo the vocabulary.
 *          What it knows of earlier tokens is in the paged cache alone.
 * 1 scale  x[N,3] * w[0] + w[1], and N
 * 2 bits   bf16[N] as it is, and the sum of its f32 state[N] after adding 1 to each
 * 3 broken always fails
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { VOCABULARY = 260, PAGE = 4 };

typedef struct {
  const int64_t *sizes;
  void *const *parameters;
  void *const *states;
  const void *const *const *constants;
  void *const *results;
  char *arena;
} dilu_call;

typedef struct dilu_pool { int threads; } dilu_pool;

dilu_pool *dilu_pool_create(int threads) {
  dilu_pool *pool = malloc(sizeof *pool);
  pool->threads = threads;
  return pool;
}

void dilu_pool_destroy(dilu_pool *pool) { free(pool); }

int64_t dilu_arena_bytes(int function, const int64_t *sizes, int threads) {
  return function == 0 ? 64 * sizes[0] * threads : 64;
}

static int run_main(const dilu_call *call) {
  const int64_t P = call->sizes[2], R = call->sizes[3], B = call->sizes[4], T = call->sizes[0];
  const int64_t *tokens = call->parameters[0], *positions = call->parameters[1];
  const int64_t *sequence = call->parameters[2], *slots = call->parameters[3];
  const int64_t *pages = call->parameters[4], *rows = call->parameters[5];
  float *sums = call->states[0], *marks = sums + B * PAGE, *logits = call->results[0];
  float bias[VOCABULARY]; /* a constant may lie at any address */
  memcpy(bias, call->constants[0][0], sizeof bias);
  if ((uintptr_t)call->arena % 64) return 3;
  if (T) memset(call->arena, 1, 64 * T);
  for (int64_t t = 0; t < T; t++) {
    sums[slots[t]] = (float)tokens[t];
    marks[slots[t]] = 1;
  }
  for (int64_t r = 0; r < R; r++) {
    const int64_t t = rows[r];
    int64_t sum = 0;
    for (int64_t p = 0; p <= positions[t]; p++) {
      const int64_t at = pages[sequence[t] * P + p / PAGE] * PAGE + p % PAGE;
      if (marks[at] != 1) return 7;
      sum += (int64_t)sums[at];
    }
    memcpy(logits + r * VOCABULARY, bias, sizeof bias);
    logits[r * VOCABULARY + sum % VOCABULARY] += 10;
  }
  return 0;
}

static int run_scale(const dilu_call *call) {
  const float *x = call->parameters[0];
  float w[2][3], *y = call->results[0];
  for (int i = 0; i < 2; i++) memcpy(w[i], call->constants[0][i], sizeof w[i]);
  for (int64_t i = 0; i < call->sizes[0] * 3; i++) y[i] = x[i] * w[0][i % 3] + w[1][i % 3];
  *(int64_t *)call->results[1] = call->sizes[0];
  return 0;
}

static int run_bits(const dilu_call *call) {
  float *state = call->states[0], sum = 0;
  memcpy(call->results[0], call->parameters[0], 2 * call->sizes[0]);
  for (int64_t i = 0; i < call->sizes[0]; i++) sum += state[i] += 1;
  *(float *)call->results[1] = sum;
  return 0;
}

int dilu_run(dilu_pool *pool, int function, const dilu_call *call) {
  if (!pool || pool->threads < 1) return 2;
  if (function == 0) return run_main(call);
  if (function == 1) return run_scale(call);
  return function == 2 ? run_bits(call) : 5;
}

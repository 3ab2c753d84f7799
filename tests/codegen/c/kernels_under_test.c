/* Exports the always-inlined kernels for the tests. CONFIGS and KN_CONFIGS, lists of X(index, type),
 * come from the test, which compiles this file once per instruction set. */
#include "kernels.h"

#define X(index, ...) DILU_WEIGHT_KERNELS(weights_##index, __VA_ARGS__)
CONFIGS
#undef X
DILU_WEIGHT_KERNELS(experts_gate_up, {DILU_F8E4M3, DILU_F32, 128, 128})
DILU_WEIGHT_KERNELS(experts_down, {DILU_BF16, DILU_NONE, 0, 0})

typedef struct {
  float *out0, *out1;
  int64_t stride;
} stores;

static void store_strip(const void* ctx, int64_t row, int64_t col, int64_t count, const float* acc0, const float* acc1) {
  const stores* s = ctx;
  memcpy(s->out0 + row * s->stride + col, acc0, (size_t)count * sizeof(float));
  if (acc1) memcpy(s->out1 + row * s->stride + col, acc1, (size_t)count * sizeof(float));
}

static void silu_times(const void* ctx, int64_t count, const float* gate, const float* up, float* hidden) {
  (void)ctx;
  for (int64_t i = 0; i < count; i++) hidden[i] = dilu_silu(gate[i]) * up[i];
}

/* One call of a kernel, as every thread of a pool executes it. */
typedef struct {
  dilu_pool* pool;
  int config;
  void* args;
  stores stores;
  const float* x;
  int64_t x_stride, M, K;
} call;

static void run_matmul(void* arg, int thread, int threads) {
  const call* c = arg;
  dilu_matmul_args* a = c->args;
  int64_t batch = a->batch > 0 ? a->batch : 1;
  (void)threads;
  switch (c->config) {
#define X(index, ...)                                                                                                         \
  case index:                                                                                                                 \
    for (int64_t b = 0; b < batch; b++)                                                                                       \
      dilu_pack_rows(((dilu_weight_type)__VA_ARGS__).format, c->x + b * c->M * c->x_stride, c->x_stride, c->M, c->K,         \
                     (float*)a->x + b * a->x_batch_stride, a->x_stride, c->pool, thread);                                     \
    dilu_barrier(c->pool, thread);                                                                                            \
    dilu_matmul(&weights_##index, 2, a, store_strip, &c->stores, c->pool, thread);                                           \
    break;
    CONFIGS
#undef X
  }
}

static void run_matmul_kn(void* arg, int thread, int threads) {
  const call* c = arg;
  (void)threads;
  switch (c->config) {
#define X(index, ...) \
  case index: dilu_matmul_kn((dilu_weight_type)__VA_ARGS__, c->args, store_strip, &c->stores, c->pool, thread); break;
    KN_CONFIGS
#undef X
  }
}

static void run_experts(void* arg, int thread, int threads) {
  const call* c = arg;
  dilu_experts_args* a = c->args;
  (void)threads;
  dilu_pack_rows(DILU_F8E4M3, c->x, c->x_stride, c->M, c->K, (float*)a->x, a->x_stride, c->pool, thread);
  dilu_barrier(c->pool, thread);
  dilu_experts(&experts_gate_up, &experts_down, a, silu_times, store_strip, &c->stores, c->pool, thread);
}

static void run_attention(void* arg, int thread, int threads) {
  const call* c = arg;
  (void)threads;
  switch (c->config) {
    case DILU_F32: dilu_attention(DILU_F32, c->args, c->pool, thread); break;
    case DILU_BF16: dilu_attention(DILU_BF16, c->args, c->pool, thread); break;
    default: dilu_attention(DILU_F16, c->args, c->pool, thread); break;
  }
}

static void run(void (*fn)(void*, int, int), int threads, call* c) {
  c->pool = threads ? dilu_pool_create(threads) : 0;
  dilu_pool_run(c->pool, fn, c);
  dilu_pool_destroy(c->pool);
}

void test_matmul(int threads, call* c) { run(run_matmul, threads, c); }
void test_matmul_kn(int threads, call* c) { run(run_matmul_kn, threads, c); }
void test_experts(int threads, call* c) { run(run_experts, threads, c); }
void test_attention(int threads, call* c) { run(run_attention, threads, c); }
size_t test_matmul_scratch(int threads) { return dilu_matmul_scratch(threads); }
size_t test_experts_scratch(const dilu_experts_args* a, int threads) { return dilu_experts_scratch(a, threads); }
size_t test_attention_scratch(int64_t Dk, int64_t Dv, int threads) { return dilu_attention_scratch(Dk, Dv, threads); }

void test_decode(int format, const void* codes, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = dilu_load(format, codes, i);
}

void test_encode(int format, const float* x, int64_t count, int saturate, void* out) {
  for (int64_t i = 0; i < count; i++) dilu_store(format, out, i, x[i], saturate);
}

void test_elementary(int which, const float* x, int64_t count, float* out) {
  switch (which) {
    case 0: for (int64_t i = 0; i < count; i++) out[i] = dilu_expf(x[i]); break;
    case 1: for (int64_t i = 0; i < count; i++) out[i] = dilu_sigmoid(x[i]); break;
    case 2: for (int64_t i = 0; i < count; i++) out[i] = dilu_silu(x[i]); break;
    case 3: for (int64_t i = 0; i < count; i++) out[i] = dilu_tanh(x[i]); break;
    default: for (int64_t i = 0; i < count; i++) out[i] = dilu_erf(x[i]); break;
  }
}

/* Counts rounds in which some thread saw another one out of step, or a task not done exactly once. */
typedef struct {
  dilu_pool* pool;
  int64_t rounds, errors;
  int64_t done[64];
  float tiny;
} rounds;

static void run_rounds(void* arg, int thread, int threads) {
  rounds* r = arg;
  (void)threads;
  if (r->tiny * 0.5f == 0.0f) __atomic_add_fetch(&r->errors, 1, __ATOMIC_RELAXED);
  for (int64_t round = 0; round < r->rounds; round++) {
    for (int repeat = 0; repeat < 2; repeat++) {
      dilu_loop loop = dilu_loop_begin(r->pool, thread, 64);
      for (int64_t task; (task = dilu_loop_next(&loop)) >= 0;) __atomic_add_fetch(&r->done[task], 1, __ATOMIC_RELAXED);
    }
    dilu_barrier(r->pool, thread);
    for (int i = 0; i < 64; i++)
      if (r->done[i] != 2 * (round + 1)) __atomic_add_fetch(&r->errors, 1, __ATOMIC_RELAXED);
    dilu_barrier(r->pool, thread);
  }
}

/* Also with the caller's processor set to flush subnormals, which a run must suspend and restore. */
int64_t test_rounds(int threads, int64_t runs, int64_t count) {
  rounds r = {dilu_pool_create(threads), count, 0, {0}, 0x1p-126f};
#if defined(__x86_64__)
  uint32_t before = __builtin_ia32_stmxcsr(), flushing = before | 0x8040u;
  __builtin_ia32_ldmxcsr(flushing);
#endif
  for (int64_t i = 0; i < runs; i++) {
    memset(r.done, 0, sizeof r.done);
    dilu_pool_run(r.pool, run_rounds, &r);
  }
#if defined(__x86_64__)
  r.errors += __builtin_ia32_stmxcsr() != flushing;
  __builtin_ia32_ldmxcsr(before);
#endif
  dilu_pool_destroy(r.pool);
  return r.errors;
}

/* Times dilu_matmul against this machine's own limits, measured between the products.
 * Usage: matmul THREADS ROUNDS. Prints one line per measurement, see matmul.py. */
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include "kernels.h"

#define WEIGHT_BYTES ((size_t)256 << 20) /* far beyond any cache: products cycle through as many copies */
#define MAX_ROWS 512

typedef struct {
  const char* name;
  int64_t N, K;
  int bf16;
} shape;

static const shape SHAPES[] = {
    {"2048x2048 e4m3", 2048, 2048, 0},
    {"5632x2048 e4m3", 5632, 2048, 0},
    {"2048x5632 e4m3", 2048, 5632, 0},
    {"32000x2048 bf16", 32000, 2048, 1},
};

typedef struct {
  dilu_pool* pool;
  const shape* shape;
  int64_t M, copies;
  char *weights, *scratch;
  float *scales, *x, *packed, *out;
  float sink;
} job;

DILU_WEIGHT_KERNELS(fp8, {DILU_F8E4M3, DILU_F32, 128, 128})
DILU_WEIGHT_KERNELS(bf16, {DILU_BF16, DILU_NONE, 0, 0})

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void* pages(size_t bytes) {
  size_t size = (bytes + ((size_t)2 << 20)) >> 21 << 21;
  void* p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) exit(1);
  madvise(p, size, MADV_HUGEPAGE);
  return p;
}

static void store(const void* ctx, int64_t row, int64_t col, int64_t count, const float* acc0, const float* acc1) {
  const job* j = ctx;
  (void)acc1;
  memcpy(j->out + row * j->shape->N + col, acc0, (size_t)count * sizeof(float));
}

static void run_products(void* arg, int thread, int threads) {
  job* j = arg;
  const shape* s = j->shape;
  (void)threads;
  for (int64_t copy = 0; copy < j->copies; copy++) {
    char* codes = j->weights + copy * s->N * s->K * (s->bf16 ? 2 : 1);
    dilu_matmul_args a = {.M = j->M, .N = s->N, .K = s->K, .x = j->packed, .x_stride = s->K, .codes = {codes}, .scales = {j->scales},
                          .scale_stride = dilu_ceil(s->K, 128), .scratch = j->scratch};
    dilu_matmul(s->bf16 ? &bf16 : &fp8, 1, &a, store, j, j->pool, thread);
    dilu_barrier(j->pool, thread);
  }
}

static void run_pack(void* arg, int thread, int threads) {
  job* j = arg;
  (void)threads;
  dilu_pack_rows(j->shape->bf16 ? DILU_BF16 : DILU_F8E4M3, j->x, j->shape->K, MAX_ROWS, j->shape->K, j->packed, j->shape->K, j->pool, thread);
}

/* Reads the weights once. */
static void run_read(void* arg, int thread, int threads) {
  job* j = arg;
  size_t part = WEIGHT_BYTES / (size_t)threads / 256 * 256;
  const char* p = j->weights + part * (size_t)thread;
  v_bits any[8];
  for (int i = 0; i < 8; i++) any[i] = v_bits_zero();
  for (size_t at = 0; at < part; at += 256) {
    for (int i = 0; i < 256; i += 64) __builtin_prefetch(p + at + 4096 + i);
    for (int i = 0; i < 8; i++) any[i] = v_or(any[i], v_bits_load(p + at + 32 * i));
  }
  for (int i = 1; i < 8; i++) any[0] = v_or(any[0], any[i]);
  if (v_bytes_any_ge(any[0], 1)) __atomic_store_n((int*)&j->sink, 1, __ATOMIC_RELAXED);
}

#define FMA_STEPS 4000000

static void run_fma(void* arg, int thread, int threads) {
  job* j = arg;
  v_f32 acc[12], x = v_set(0.999f), y = v_set(1e-3f);
  (void)threads;
  for (int i = 0; i < 12; i++) acc[i] = v_set((float)(i + thread));
  for (int64_t step = 0; step < FMA_STEPS; step++) {
    for (int i = 0; i < 12; i++) acc[i] = v_fma(acc[i], x, y);
    __asm__ volatile("" : "+m"(*j)); /* keeps the loop as it is */
  }
  float total = 0;
  for (int i = 0; i < 12; i++) total += v_hsum(acc[i]);
  if (total == 0.5f) j->sink = total;
}

static double timed(job* j, void (*fn)(void*, int, int)) {
  double start = seconds();
  dilu_pool_run(j->pool, fn, j);
  return seconds() - start;
}

int main(int argc, char** argv) {
  int threads = argc > 1 ? atoi(argv[1]) : 2, rounds = argc > 2 ? atoi(argv[2]) : 5;
  job j = {.pool = dilu_pool_create(threads)};
  j.weights = pages(WEIGHT_BYTES + ((size_t)1 << 20));
  j.scratch = pages(dilu_matmul_scratch(threads));
  j.scales = pages((size_t)4 << 20);
  j.x = pages((size_t)MAX_ROWS * 5632 * sizeof(float));
  j.packed = pages((size_t)MAX_ROWS * 5632 * sizeof(float));
  j.out = pages((size_t)MAX_ROWS * 32000 * sizeof(float));
  uint32_t state = 1;
  for (size_t i = 0; i < WEIGHT_BYTES; i++) {
    state = state * 1664525u + 1013904223u;
    j.weights[i] = (char)((state >> 24 & 0xBF) % 0x7F | (state >> 24 & 0x80)); /* no NaN in either format */
  }
  for (size_t i = 0; i < (size_t)1 << 20; i++) j.scales[i] = 0.01f;
  for (size_t i = 0; i < (size_t)MAX_ROWS * 5632; i++) j.x[i] = (float)(i % 17) - 8;
  for (int round = 0; round < rounds; round++)
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
      const shape* s = j.shape = &SHAPES[i];
      size_t bytes = (size_t)(s->N * s->K) * (s->bf16 ? 2 : 1);
      timed(&j, run_pack);
      for (j.M = 1; j.M <= 8; j.M++) {
        double read = (double)WEIGHT_BYTES / timed(&j, run_read);
        j.copies = (int64_t)(WEIGHT_BYTES / bytes);
        double rate = (double)j.copies * (double)bytes / timed(&j, run_products);
        printf("%s|%d|GB/s|%.3f|%.4f\n", s->name, (int)j.M, rate * 1e-9, rate / read);
      }
      j.M = MAX_ROWS;
      j.copies = 1;
      double peak = 2.0 * 8 * 12 * FMA_STEPS * threads / timed(&j, run_fma);
      double rate = 2.0 * (double)(MAX_ROWS * s->N * s->K) / timed(&j, run_products);
      printf("%s|%d|GF/s|%.3f|%.4f\n", s->name, (int)j.M, rate * 1e-9, rate / peak);
    }
  dilu_pool_destroy(j.pool);
  return 0;
}

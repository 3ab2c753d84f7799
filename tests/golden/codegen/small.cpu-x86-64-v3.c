/* ---- generated from the graph ---------------------------------------- */

/* loops */
DILU_NOINLINE void kernel_norm(dilu_pool* pool, int thread, char* scratch, int64_t dim_T, const uint16_t* restrict t_x, dilu_constant constant_t_gain, float* restrict t_o) {
  const int threads = dilu_pool_threads(pool);
  (void)threads; (void)scratch;
  const dilu_unaligned_f32* const t_gain = dilu_constant_data(constant_t_gain);
  {
    {
      int64_t begin, end;
      dilu_share(dim_T, 513, thread, threads, &begin, &end);
      for (int64_t row = begin; row < end; row++) {
        const int64_t i0 = row;
        (void)i0;
        float r0 = 0;
        #pragma omp simd reduction(+:r0)
        for (int64_t k0 = 0; k0 < 64; k0++) {
          const float v1 = dilu_decode_bf16(t_x[i0*64 + k0]);
          r0 += v1 * v1;
        }
        const float v3 = 1.0f / sqrtf(r0);
        #pragma omp simd
        for (int64_t j0 = 0; j0 < 64; j0++) {
          t_o[i0*64 + j0] = (dilu_decode_bf16(t_x[i0*64 + j0]) * v3) * t_gain[j0];
        }
      }
    }
  }
}

/* cache_update */
DILU_NOINLINE void kernel_keep(dilu_pool* pool, int thread, char* scratch, int64_t dim_B, int64_t dim_T, float* restrict t_v, float* restrict t_cache) {
  const int threads = dilu_pool_threads(pool);
  (void)threads; (void)scratch;
  {
    {
      int64_t begin, end;
      dilu_share(dim_T, 135, thread, threads, &begin, &end);
      for (int64_t row = begin; row < end; row++) {
        const int64_t i0 = row;
        (void)i0;
        const int64_t v0 = (int64_t)i0;
        const uint8_t v3 = (v0 >= (int64_t)0) & (v0 < (dim_B*4));
        #pragma omp simd
        for (int64_t j0 = 0; j0 < 64; j0++) {
          if (v3) t_cache[v0*64 + j0] = t_v[i0*64 + j0];
        }
      }
    }
  }
}

DILU_WEIGHT_KERNELS(weights_f8e4m3_f32_128_128, {DILU_F8E4M3, DILU_F32, 128, 128})

/* matmul */
typedef struct {
  uint16_t* t_z;
} kernel_product_context;

DILU_NOINLINE void kernel_product_epilogue(const void* ctx, int64_t m0, int64_t column, int64_t count, const float* sums0, const float* sums1) {
  uint16_t* const t_z = ((const kernel_product_context*)ctx)->t_z;
  (void)sums1;
  const int64_t first = column;
  #pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const int64_t n0 = first + i;
    const float acc0 = sums0[i];
    t_z[m0*48 + n0] = dilu_encode_bf16(acc0);
  }
}

DILU_NOINLINE void kernel_product(dilu_pool* pool, int thread, char* scratch, int64_t dim_T, const float* restrict t_y, dilu_constant constant_t_w, dilu_constant constant_t_w_s, uint16_t* restrict t_z) {
  const int threads = dilu_pool_threads(pool);
  (void)threads; (void)scratch;
  const uint8_t* const t_w = dilu_constant_data(constant_t_w);
  const dilu_unaligned_f32* const t_w_s = dilu_constant_data(constant_t_w_s);
  char* const space0_ = scratch;
  char* const space1_ = space0_ + dilu_align(dim_T * dilu_packed_length(64) * 4);
  const kernel_product_context context = {.t_z = t_z};
  {
    float* const packed1_ = (float*)space0_;
    dilu_pack_rows(DILU_F8E4M3, t_y, 64, dim_T, 64, packed1_, dilu_packed_length(64), pool, thread);
    dilu_barrier(pool, thread);
    {
      const dilu_matmul_args args = {
        .M = dim_T,
        .N = 48,
        .K = 64,
        .batch = 1,
        .batch_rows = 0,
        .row0 = 0,
        .x = packed1_,
        .x_stride = dilu_packed_length(64),
        .x_batch_stride = dim_T * dilu_packed_length(64),
        .codes = {t_w},
        .scales = {t_w_s},
        .weight_stride = 64,
        .scale_stride = 1,
        .scratch = space1_,
      };
      dilu_matmul(&weights_f8e4m3_f32_128_128, 1, &args, kernel_product_epilogue, &context, pool, thread);
    }
  }
}

DILU_INLINE int64_t kernel_product_scratch(int threads, int64_t dim_T) {
  (void)threads;
  (void)dim_T;
  return dilu_align(dim_T * dilu_packed_length(64) * 4) + dilu_align(dilu_matmul_scratch(threads));
}

DILU_NOINLINE void run_main(dilu_pool* pool, int thread, char* scratch, int64_t dim_B, int64_t dim_T, void* const* parameters, char* const* states, const dilu_constant* constants, void* const* results, char* arena) {
  (void)scratch; (void)parameters; (void)states; (void)constants; (void)results;
  char* const slot0 = arena;
  char* const rest = slot0 + dilu_align(dim_T*256);
  (void)rest;
  kernel_norm(pool, thread, scratch, dim_T, (void*)parameters[0], constants[0], (void*)slot0);
  dilu_barrier(pool, thread);
  kernel_keep(pool, thread, scratch, dim_B, dim_T, (void*)slot0, (void*)states[0]);
  kernel_product(pool, thread, scratch, dim_T, (void*)slot0, constants[1], constants[2], (void*)results[0]);
  dilu_barrier(pool, thread);
}

DILU_NOINLINE int64_t run_main_bytes(int unused, int64_t dim_B, int64_t dim_T) {
  (void)unused; (void)dim_B; (void)dim_T;
  int64_t slots = 0, rest = 0;
  slots += dilu_align(dim_T*256);
  return slots + rest;
}

DILU_NOINLINE int64_t run_main_scratch(int threads, int64_t dim_B, int64_t dim_T) {
  (void)threads; (void)dim_B; (void)dim_T;
  int64_t most = 0;
  most = dilu_larger(most, kernel_product_scratch(threads, dim_T));
  return most;
}

typedef struct {
  const dilu_call* call;
  dilu_pool* pool;
} dilu_entry;

static void entry_0(void* arg, int thread, int threads) {
  const dilu_call* const call = ((dilu_entry*)arg)->call;
  dilu_pool* const pool = ((dilu_entry*)arg)->pool;
  const int64_t* const sizes = call->sizes;
  (void)threads; (void)sizes;
  dilu_constant constants[3];
  for (int i = 0; i < 3; i++) constants[i] = (dilu_constant){call->constants[i], 0};
  char* const scratch = call->arena + dilu_align(run_main_bytes(0, sizes[1], sizes[0]));
  run_main(pool, thread, scratch, sizes[1], sizes[0], call->parameters, (char* const*)call->states, constants, call->results, call->arena);
}

__attribute__((visibility("default"))) int64_t dilu_arena_bytes(int function, const int64_t* sizes, int threads) {
  (void)sizes;
  if (function == 0) return dilu_align(run_main_bytes(0, sizes[1], sizes[0])) + run_main_scratch(threads, sizes[1], sizes[0]);
  return -1;
}

__attribute__((visibility("default"))) int dilu_run(dilu_pool* pool, int function, const dilu_call* call) {
  const int64_t* const sizes = call->sizes;
  (void)sizes;
  pool->counts = call->counts;
  if (function == 0) {
    if ((sizes[0]*64) != 0) dilu_pool_run(pool, entry_0, &(dilu_entry){call, pool});
    return 0;
  }
  return 1;
}

__attribute__((visibility("default"))) dilu_pool* dilu_pool_create(int threads) {
  return dilu_pool_create_(threads);
}
__attribute__((visibility("default"))) void dilu_pool_destroy(dilu_pool* pool) {
  dilu_pool_destroy_(pool);
}

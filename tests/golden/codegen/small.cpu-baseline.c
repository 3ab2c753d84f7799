/* ---- generated from the graph ---------------------------------------- */

/* loops */
DILU_NOINLINE void norm(dilu_pool* pool, int thread, char* scratch, int64_t T, const uint16_t* restrict x, dilu_constant gain_constant, float* restrict o) {
  const int threads = dilu_pool_threads(pool);
  (void)threads; (void)scratch;
  const dilu_unaligned_f32* const gain = dilu_constant_data(gain_constant);
  {
    {
      int64_t begin, end;
      dilu_share(T, 513, thread, threads, &begin, &end);
      for (int64_t row = begin; row < end; row++) {
        const int64_t i0 = row;
        (void)i0;
        float r0 = 0;
        #pragma omp simd reduction(+:r0)
        for (int64_t k0 = 0; k0 < 64; k0++) {
          const float v1 = dilu_decode_bf16(x[i0*64 + k0]);
          r0 += v1 * v1;
        }
        const float v3 = 1.0f / sqrtf(r0);
        #pragma omp simd
        for (int64_t j0 = 0; j0 < 64; j0++) {
          o[i0*64 + j0] = (dilu_decode_bf16(x[i0*64 + j0]) * v3) * gain[j0];
        }
      }
    }
  }
}

/* cache_update */
DILU_NOINLINE void keep(dilu_pool* pool, int thread, char* scratch, int64_t B, int64_t T, float* restrict v, float* restrict cache) {
  const int threads = dilu_pool_threads(pool);
  (void)threads; (void)scratch;
  {
    {
      int64_t begin, end;
      dilu_share(T, 135, thread, threads, &begin, &end);
      for (int64_t row = begin; row < end; row++) {
        const int64_t i0 = row;
        (void)i0;
        const int64_t v0 = (int64_t)i0;
        const uint8_t v3 = (v0 >= (int64_t)0) & (v0 < (B*4));
        #pragma omp simd
        for (int64_t j0 = 0; j0 < 64; j0++) {
          if (v3) cache[v0*64 + j0] = v[i0*64 + j0];
        }
      }
    }
  }
}

DILU_NOINLINE void matmul_1_f8e4m3_f32_128_128(const dilu_matmul_args* args, dilu_epilogue epilogue,
  const void* ctx, dilu_pool* pool, int thread) {
  dilu_matmul((dilu_weight_type){DILU_F8E4M3, DILU_F32, 128, 128}, 1, args, epilogue, ctx, pool, thread);
}

/* matmul */
typedef struct {
  uint16_t* z;
} product_context;

DILU_NOINLINE void product_epilogue(const void* ctx, int64_t m0, int64_t column, int64_t count, const float* sums0, const float* sums1) {
  uint16_t* const z = ((const product_context*)ctx)->z;
  (void)sums1;
  const int64_t first = column;
  #pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const int64_t n0 = first + i;
    const float acc0 = sums0[i];
    z[m0*48 + n0] = dilu_encode_bf16(acc0);
  }
}

DILU_NOINLINE void product(dilu_pool* pool, int thread, char* scratch, int64_t T, const float* restrict y, dilu_constant w_constant, dilu_constant w_s_constant, uint16_t* restrict z) {
  const int threads = dilu_pool_threads(pool);
  (void)threads; (void)scratch;
  const uint8_t* const w = dilu_constant_data(w_constant);
  const dilu_unaligned_f32* const w_s = dilu_constant_data(w_s_constant);
  char* const space0_ = scratch;
  char* const space1_ = space0_ + dilu_align(T * dilu_packed_length(64) * 4);
  const product_context context = {.z = z};
  {
    float* const packed1_ = (float*)space0_;
    dilu_pack_rows(DILU_F8E4M3, y, 64, T, 64, packed1_, dilu_packed_length(64), pool, thread);
    dilu_barrier(pool, thread);
    {
      const dilu_matmul_args args = {
        .M = T,
        .N = 48,
        .K = 64,
        .batch = 1,
        .batch_rows = 0,
        .row0 = 0,
        .x = packed1_,
        .x_stride = dilu_packed_length(64),
        .x_batch_stride = T * dilu_packed_length(64),
        .codes = {w},
        .scales = {w_s},
        .weight_stride = 64,
        .scale_stride = 1,
        .scratch = space1_,
      };
      matmul_1_f8e4m3_f32_128_128(&args, product_epilogue, &context, pool, thread);
    }
  }
}

DILU_INLINE int64_t product_scratch(int threads, int64_t T) {
  (void)threads;
  (void)T;
  return dilu_align(T * dilu_packed_length(64) * 4) + dilu_align(dilu_matmul_scratch(threads));
}

DILU_NOINLINE void run_main(dilu_pool* pool, int thread, char* scratch, int64_t B, int64_t T, void* const* parameters, char* const* states, const dilu_constant* constants, void* const* results, char* arena) {
  (void)scratch; (void)parameters; (void)states; (void)constants; (void)results;
  char* const slot0 = arena;
  char* const rest = slot0 + dilu_align(T*256);
  (void)rest;
  norm(pool, thread, scratch, T, (void*)parameters[0], constants[0], (void*)slot0);
  dilu_barrier(pool, thread);
  keep(pool, thread, scratch, B, T, (void*)slot0, (void*)states[0]);
  product(pool, thread, scratch, T, (void*)slot0, constants[1], constants[2], (void*)results[0]);
  dilu_barrier(pool, thread);
}

DILU_NOINLINE int64_t run_main_bytes(int unused, int64_t B, int64_t T) {
  (void)unused; (void)B; (void)T;
  int64_t slots = 0, rest = 0;
  slots += dilu_align(T*256);
  return slots + rest;
}

DILU_NOINLINE int64_t run_main_scratch(int threads, int64_t B, int64_t T) {
  (void)threads; (void)B; (void)T;
  int64_t most = 0;
  most = dilu_larger(most, product_scratch(threads, T));
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

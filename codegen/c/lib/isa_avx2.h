/* isa_avx2.h: the instruction table of x86-64 with AVX2 and FMA; see isa.h for the meanings. */
#ifndef DILU_ISA_AVX2_H
#define DILU_ISA_AVX2_H

#include <immintrin.h>

DILU_INLINE v_f32 v_fma(v_f32 a, v_f32 b, v_f32 c) { return (v_f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

DILU_INLINE v_f32 v_max(v_f32 a, v_f32 b) { return (v_f32)_mm256_max_ps((__m256)a, (__m256)b); }

DILU_INLINE void v_hsum4(v_f32 a, v_f32 b, v_f32 c, v_f32 d, float* out) {
  __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  __m256 quarters = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
}

DILU_INLINE float v_hsum(v_f32 v) {
  float sums[4];
  v_hsum4(v, v, v, v, sums);
  return sums[0];
}

DILU_INLINE v_u8 v_bytes_max(v_u8 a, v_u8 b) { return (v_u8)_mm256_max_epu8((__m256i)a, (__m256i)b); }

DILU_INLINE int v_bytes_any_ge(v_u8 v, uint8_t limit) {
  __m256i bound = _mm256_set1_epi8((char)limit);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8((__m256i)v, bound), (__m256i)v)) != 0;
}

DILU_INLINE v_u32 v_load_u16(const void* p) { return (v_u32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }

#ifdef __F16C__
DILU_INLINE v_f32 v_load_f16(const void* p) { return (v_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
DILU_INLINE v_f32 v_load_f16(const void* p) { return v_widen_f16(v_load_u16(p)); }
#endif

#endif

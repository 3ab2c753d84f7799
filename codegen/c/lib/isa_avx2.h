/* isa_avx2.h: the instruction table of x86-64 with AVX2, FMA and F16C; see isa.h for the meanings. */
#ifndef DILU_ISA_AVX2_H
#define DILU_ISA_AVX2_H

#include <immintrin.h>

typedef __m256 v_f32;
typedef __m256i v_bits;

DILU_INLINE v_f32 v_load(const void* p) { return _mm256_loadu_ps((const float*)p); }
DILU_INLINE void v_store(float* p, v_f32 v) { _mm256_storeu_ps(p, v); }
DILU_INLINE v_f32 v_set(float x) { return _mm256_set1_ps(x); }
DILU_INLINE v_f32 v_zero(void) { return _mm256_setzero_ps(); }
DILU_INLINE v_f32 v_add(v_f32 a, v_f32 b) { return _mm256_add_ps(a, b); }
DILU_INLINE v_f32 v_sub(v_f32 a, v_f32 b) { return _mm256_sub_ps(a, b); }
DILU_INLINE v_f32 v_max(v_f32 a, v_f32 b) { return _mm256_max_ps(a, b); }
DILU_INLINE v_f32 v_min(v_f32 a, v_f32 b) { return _mm256_min_ps(a, b); }
DILU_INLINE v_f32 v_mul(v_f32 a, v_f32 b) { return _mm256_mul_ps(a, b); }
DILU_INLINE v_f32 v_fma(v_f32 a, v_f32 b, v_f32 c) { return _mm256_fmadd_ps(a, b, c); }

DILU_INLINE void v_hsum4(v_f32 a, v_f32 b, v_f32 c, v_f32 d, float* out) {
  __m256 quarters = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
}

DILU_INLINE float v_hsum(v_f32 v) {
  __m256 pairs = _mm256_hadd_ps(v, v), quarters = _mm256_hadd_ps(pairs, pairs);
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
}

DILU_INLINE float v_hmax(v_f32 v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

DILU_INLINE v_bits v_bits_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
DILU_INLINE v_bits v_bits_zero(void) { return _mm256_setzero_si256(); }
DILU_INLINE v_bits v_bits_set8(uint8_t x) { return _mm256_set1_epi8((char)x); }
DILU_INLINE v_bits v_bits_set16(uint16_t x) { return _mm256_set1_epi16((short)x); }
DILU_INLINE v_bits v_bits_set32(uint32_t x) { return _mm256_set1_epi32((int)x); }
DILU_INLINE v_bits v_and(v_bits a, v_bits b) { return _mm256_and_si256(a, b); }
DILU_INLINE v_bits v_or(v_bits a, v_bits b) { return _mm256_or_si256(a, b); }
DILU_INLINE v_f32 v_as_f32(v_bits v) { return _mm256_castsi256_ps(v); }
DILU_INLINE v_bits v_as_bits(v_f32 v) { return _mm256_castps_si256(v); }
DILU_INLINE v_bits v_add32(v_bits a, v_bits b) { return _mm256_add_epi32(a, b); }
DILU_INLINE v_bits v_sub32(v_bits a, v_bits b) { return _mm256_sub_epi32(a, b); }
DILU_INLINE v_bits v_shl16(v_bits v, int n) { return _mm256_slli_epi16(v, n); }
DILU_INLINE v_bits v_sra16(v_bits v, int n) { return _mm256_srai_epi16(v, n); }
DILU_INLINE v_bits v_shl32(v_bits v, int n) { return _mm256_slli_epi32(v, n); }
DILU_INLINE v_bits v_sra32(v_bits v, int n) { return _mm256_srai_epi32(v, n); }
DILU_INLINE v_bits v_bytes_max(v_bits a, v_bits b) { return _mm256_max_epu8(a, b); }

DILU_INLINE int v_bytes_any_ge(v_bits v, uint8_t limit) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(v, v_bits_set8(limit)), v)) != 0;
}

DILU_INLINE v_f32 v_load_bf16(const void* p) {
  return v_as_f32(v_shl32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

DILU_INLINE v_f32 v_load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

#endif

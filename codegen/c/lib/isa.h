/* isa.h: eight-lane vectors of f32, and the table of instructions that kernels are written in.
 *
 * Types and most operators are the GNU vector extension of gcc and clang, the same for every machine
 * (a + b, a * b, shifts and masks of lanes work on any target). Where one instruction set has something
 * better, the function is in its table:
 *
 *   isa_baseline.h   any C11 compiler with the GNU vector extension
 *   isa_avx2.h       x86-64 with AVX2 and FMA
 *
 * Each table defines, with the same lane order and the same order of additions:
 *   v_fma(a, b, c)            a*b+c per lane; the baseline rounds twice
 *   v_max(a, b)
 *   v_hsum(v)                 ((v0+v1)+(v2+v3)) + ((v4+v5)+(v6+v7))
 *   v_hsum4(a, b, c, d, out)  the v_hsum of four vectors
 *   v_bytes_max(a, b)         per byte, unsigned
 *   v_bytes_any_ge(v, limit)  whether any byte >= limit
 *   v_load_u16(p)             eight u16, zero-extended
 *   v_load_f16(p)             eight f16 as f32, exact
 */
#ifndef DILU_ISA_H
#define DILU_ISA_H

#include "formats.h"

#define DILU_LANES 8

typedef float v_f32 __attribute__((vector_size(32)));
typedef int32_t v_i32 __attribute__((vector_size(32)));
typedef uint32_t v_u32 __attribute__((vector_size(32)));
typedef int16_t v_i16 __attribute__((vector_size(32)));
typedef uint16_t v_u16 __attribute__((vector_size(32)));
typedef uint8_t v_u8 __attribute__((vector_size(32)));
typedef float v_f32_unaligned __attribute__((vector_size(32), aligned(1), may_alias));
typedef int16_t v_i16_unaligned __attribute__((vector_size(32), aligned(1), may_alias));

#if defined(__GNUC__) && !defined(__AVX__)
/* Vectors wider than the machine's registers never cross a real call here: everything is inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

DILU_INLINE v_f32 v_load(const void* p) { return *(const v_f32_unaligned*)p; }
DILU_INLINE void v_store(float* p, v_f32 v) { *(v_f32_unaligned*)p = v; }
DILU_INLINE v_f32 v_set(float x) { return (v_f32){x, x, x, x, x, x, x, x}; }
DILU_INLINE v_f32 v_zero(void) { return (v_f32){0, 0, 0, 0, 0, 0, 0, 0}; }
DILU_INLINE v_i16 v_load_bits(const void* p) { return *(const v_i16_unaligned*)p; }

/* f16 codes, zero-extended, to f32: moving the bits gives the value * 2^-112; infinity and NaN, whose
 * exponent stops at 2^16, are raised to f32's own by a second factor. */
DILU_INLINE v_f32 v_widen_f16(v_u32 codes) {
  v_u32 sign = (codes & 0x8000u) << 16, magnitude = (codes & 0x7FFFu) << 13;
  v_u32 special = (v_u32)(magnitude >= 0x0F800000u) & 0x7F800000u;
  return (v_f32)(sign | special | (v_u32)((v_f32)magnitude * v_set(0x1p112f)));
}

#if defined(__AVX2__) && defined(__FMA__)
#include "isa_avx2.h"
#else
#include "isa_baseline.h"
#endif

#endif

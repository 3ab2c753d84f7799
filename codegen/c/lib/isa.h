/* isa.h: eight-lane vectors, and the table of instructions that kernels are written in.
 *
 *   isa_baseline.h   any C compiler with the GNU vector extension; pairs of 16-byte vectors
 *   isa_avx2.h       x86-64 with AVX2 and FMA
 *
 * Each table defines the types v_f32 (eight f32) and v_bits (32 bytes, or eight 32-bit or sixteen
 * 16-bit words), and these functions, with the same lane order and the same order of additions:
 *
 *   v_load(p) v_store(p, v) v_set(x) v_zero()    p: any alignment
 *   v_add(a, b) v_sub(a, b) v_mul(a, b)
 *   v_fma(a, b, c)                               a*b+c; the baseline rounds twice
 *   v_max(a, b) v_min(a, b)                      b where one of them is NaN
 *   v_hmax(v)                                    the largest; no lane is NaN
 *   v_hsum(v)                                    ((v0+v1)+(v2+v3)) + ((v4+v5)+(v6+v7))
 *   v_hsum4(a, b, c, d, out)                     the v_hsum of four vectors
 *   v_bits_load(p) v_bits_zero() v_bits_set8/16/32(x)
 *   v_and(a, b) v_or(a, b) v_as_f32(bits) v_as_bits(f32)
 *   v_add32(a, b) v_sub32(a, b)
 *   v_shl16(v, n) v_sra16(v, n) v_shl32(v, n) v_sra32(v, n)   left; right with the sign
 *   v_bytes_max(a, b)                            per byte, unsigned
 *   v_bytes_any_ge(v, limit)                     whether any byte >= limit
 *   v_load_bf16(p) v_load_f16(p)                 eight values as f32, exact
 */
#ifndef DILU_ISA_H
#define DILU_ISA_H

#include "formats.h"

#define DILU_LANES 8

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx2.h"
#else
#include "isa_baseline.h"
#endif

#endif

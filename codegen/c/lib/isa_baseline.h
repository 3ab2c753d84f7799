/* isa_baseline.h: the instruction table of any machine; see isa.h for the meanings. */
#ifndef DILU_ISA_BASELINE_H
#define DILU_ISA_BASELINE_H

DILU_INLINE v_f32 v_fma(v_f32 a, v_f32 b, v_f32 c) { return a * b + c; }

DILU_INLINE v_f32 v_max(v_f32 a, v_f32 b) {
  v_i32 greater = (v_i32)(a > b);
  return (v_f32)((greater & (v_i32)a) | (~greater & (v_i32)b));
}

DILU_INLINE float v_hsum(v_f32 v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

DILU_INLINE void v_hsum4(v_f32 a, v_f32 b, v_f32 c, v_f32 d, float* out) {
  out[0] = v_hsum(a);
  out[1] = v_hsum(b);
  out[2] = v_hsum(c);
  out[3] = v_hsum(d);
}

DILU_INLINE v_u8 v_bytes_max(v_u8 a, v_u8 b) {
  v_u8 greater = (v_u8)(a > b);
  return (greater & a) | (~greater & b);
}

DILU_INLINE int v_bytes_any_ge(v_u8 v, uint8_t limit) {
  uint8_t bytes[32];
  int any = 0;
  memcpy(bytes, &v, sizeof bytes);
  for (int i = 0; i < 32; i++) any |= bytes[i] >= limit;
  return any;
}

DILU_INLINE v_u32 v_load_u16(const void* p) {
  typedef uint16_t half __attribute__((vector_size(16), aligned(1), may_alias));
  return __builtin_convertvector(*(const half*)p, v_u32);
}

DILU_INLINE v_f32 v_load_f16(const void* p) { return v_widen_f16(v_load_u16(p)); }

#endif

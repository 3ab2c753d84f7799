/* isa_baseline.h: the instruction table of any machine; see isa.h for the meanings.
 *
 * Vectors are pairs of 16 bytes, which gcc and clang map to SSE2, NEON or plain registers. (Vectors of
 * 32 bytes are valid on any machine too, but gcc takes them apart lane by lane where it has none.)
 */
#ifndef DILU_ISA_BASELINE_H
#define DILU_ISA_BASELINE_H

typedef float dilu_q_f32 __attribute__((vector_size(16), may_alias));
typedef uint8_t dilu_q_u8 __attribute__((vector_size(16), may_alias));
typedef int16_t dilu_q_i16 __attribute__((vector_size(16), may_alias));
typedef uint16_t dilu_q_u16 __attribute__((vector_size(16), may_alias));
typedef int32_t dilu_q_i32 __attribute__((vector_size(16), may_alias));
typedef uint32_t dilu_q_u32 __attribute__((vector_size(16), may_alias));

typedef struct {
  dilu_q_f32 low, high;
} v_f32;

typedef struct {
  dilu_q_u32 low, high;
} v_bits;

DILU_INLINE v_f32 v_load(const void* p) {
  v_f32 v;
  memcpy(&v, p, sizeof v);
  return v;
}
DILU_INLINE void v_store(float* p, v_f32 v) { memcpy(p, &v, sizeof v); }
DILU_INLINE v_f32 v_set(float x) { return (v_f32){{x, x, x, x}, {x, x, x, x}}; }
DILU_INLINE v_f32 v_zero(void) { return v_set(0.0f); }
DILU_INLINE v_f32 v_add(v_f32 a, v_f32 b) { return (v_f32){a.low + b.low, a.high + b.high}; }
DILU_INLINE v_f32 v_sub(v_f32 a, v_f32 b) { return (v_f32){a.low - b.low, a.high - b.high}; }

/* Lanes of a where the mask is set, else of b. */
DILU_INLINE dilu_q_f32 dilu_q_select(dilu_q_u32 mask, dilu_q_f32 a, dilu_q_f32 b) {
  return (dilu_q_f32)((mask & (dilu_q_u32)a) | (~mask & (dilu_q_u32)b));
}
DILU_INLINE v_f32 v_max(v_f32 a, v_f32 b) {
  return (v_f32){dilu_q_select((dilu_q_u32)(a.low > b.low), a.low, b.low), dilu_q_select((dilu_q_u32)(a.high > b.high), a.high, b.high)};
}
DILU_INLINE v_f32 v_min(v_f32 a, v_f32 b) {
  return (v_f32){dilu_q_select((dilu_q_u32)(a.low < b.low), a.low, b.low), dilu_q_select((dilu_q_u32)(a.high < b.high), a.high, b.high)};
}
DILU_INLINE v_f32 v_mul(v_f32 a, v_f32 b) { return (v_f32){a.low * b.low, a.high * b.high}; }
DILU_INLINE v_f32 v_fma(v_f32 a, v_f32 b, v_f32 c) { return (v_f32){a.low * b.low + c.low, a.high * b.high + c.high}; }

DILU_INLINE float v_hsum(v_f32 v) {
  return ((v.low[0] + v.low[1]) + (v.low[2] + v.low[3])) + ((v.high[0] + v.high[1]) + (v.high[2] + v.high[3]));
}

DILU_INLINE void v_hsum4(v_f32 a, v_f32 b, v_f32 c, v_f32 d, float* out) {
  out[0] = v_hsum(a);
  out[1] = v_hsum(b);
  out[2] = v_hsum(c);
  out[3] = v_hsum(d);
}

DILU_INLINE float v_hmax(v_f32 v) {
  float top = v.low[0];
  for (int i = 1; i < 8; i++) {
    float lane = i < 4 ? v.low[i] : v.high[i - 4];
    top = lane > top ? lane : top;
  }
  return top;
}

DILU_INLINE v_bits v_bits_load(const void* p) {
  v_bits v;
  memcpy(&v, p, sizeof v);
  return v;
}
DILU_INLINE v_bits v_bits_set32(uint32_t x) { return (v_bits){{x, x, x, x}, {x, x, x, x}}; }
DILU_INLINE v_bits v_bits_set16(uint16_t x) { return v_bits_set32(x * 0x00010001u); }
DILU_INLINE v_bits v_bits_set8(uint8_t x) { return v_bits_set32(x * 0x01010101u); }
DILU_INLINE v_bits v_bits_zero(void) { return v_bits_set32(0); }
DILU_INLINE v_bits v_and(v_bits a, v_bits b) { return (v_bits){a.low & b.low, a.high & b.high}; }
DILU_INLINE v_bits v_or(v_bits a, v_bits b) { return (v_bits){a.low | b.low, a.high | b.high}; }
DILU_INLINE v_f32 v_as_f32(v_bits v) { return (v_f32){(dilu_q_f32)v.low, (dilu_q_f32)v.high}; }
DILU_INLINE v_bits v_as_bits(v_f32 v) { return (v_bits){(dilu_q_u32)v.low, (dilu_q_u32)v.high}; }
DILU_INLINE v_bits v_add32(v_bits a, v_bits b) { return (v_bits){a.low + b.low, a.high + b.high}; }
DILU_INLINE v_bits v_sub32(v_bits a, v_bits b) { return (v_bits){a.low - b.low, a.high - b.high}; }

#define DILU_HALVES(type, operation) \
  (v_bits) { (dilu_q_u32)((type)v.low operation), (dilu_q_u32)((type)v.high operation) }
DILU_INLINE v_bits v_shl16(v_bits v, int n) { return DILU_HALVES(dilu_q_u16, << n); }
DILU_INLINE v_bits v_sra16(v_bits v, int n) { return DILU_HALVES(dilu_q_i16, >> n); }
DILU_INLINE v_bits v_shl32(v_bits v, int n) { return DILU_HALVES(dilu_q_u32, << n); }
DILU_INLINE v_bits v_sra32(v_bits v, int n) { return DILU_HALVES(dilu_q_i32, >> n); }
#undef DILU_HALVES

DILU_INLINE dilu_q_u32 dilu_q_bytes_max(dilu_q_u32 a, dilu_q_u32 b) {
  dilu_q_u32 greater = (dilu_q_u32)((dilu_q_u8)a > (dilu_q_u8)b);
  return (greater & a) | (~greater & b);
}
DILU_INLINE v_bits v_bytes_max(v_bits a, v_bits b) {
  return (v_bits){dilu_q_bytes_max(a.low, b.low), dilu_q_bytes_max(a.high, b.high)};
}

DILU_INLINE int v_bytes_any_ge(v_bits v, uint8_t limit) {
  uint8_t bytes[32];
  int any = 0;
  memcpy(bytes, &v, sizeof bytes);
  for (int i = 0; i < 32; i++) any |= bytes[i] >= limit;
  return any;
}

DILU_INLINE v_f32 v_load_bf16(const void* p) {
  float values[8];
  for (int i = 0; i < 8; i++) values[i] = dilu_load(DILU_BF16, p, i);
  return v_load(values);
}

DILU_INLINE v_f32 v_load_f16(const void* p) {
  float values[8];
  for (int i = 0; i < 8; i++) values[i] = dilu_load(DILU_F16, p, i);
  return v_load(values);
}

#endif

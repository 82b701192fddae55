// Vectors of AArch64's NEON, with or without products of bf16: see simd.h, which includes this.
#pragma once

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr int kLanes = 4;
using F = float32x4_t;
using U = uint32x4_t;
struct Mask {
  uint32x4_t lanes;  // all bits set where true
};

DALLE_INLINE F zero() { return vdupq_n_f32(0.f); }
DALLE_INLINE F set(float x) { return vdupq_n_f32(x); }
DALLE_INLINE U set(uint32_t x) { return vdupq_n_u32(x); }
DALLE_INLINE U iota() { return U{0, 1, 2, 3}; }
DALLE_INLINE F as_float(U x) { return vreinterpretq_f32_u32(x); }
DALLE_INLINE U as_words(F x) { return vreinterpretq_u32_f32(x); }
DALLE_INLINE F convert(U x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }  // as signed integers

DALLE_INLINE Mask operator&(Mask a, Mask b) { return {vandq_u32(a.lanes, b.lanes)}; }
DALLE_INLINE Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.lanes, b.lanes)}; }
DALLE_INLINE Mask operator~(Mask a) { return {vmvnq_u32(a.lanes)}; }
DALLE_INLINE bool any(Mask a) { return vmaxvq_u32(a.lanes) != 0; }
DALLE_INLINE uint32_t bits(Mask a) { return vaddvq_u32(vandq_u32(a.lanes, U{1, 2, 4, 8})); }
DALLE_INLINE Mask from_bits(uint32_t x) { return {vtstq_u32(set(x), U{1, 2, 4, 8})}; }
DALLE_INLINE Mask first(int n) { return {vcgtq_s32(vdupq_n_s32(n), vreinterpretq_s32_u32(iota()))}; }
DALLE_INLINE Mask greater(F a, F b) { return {vcgtq_f32(a, b)}; }
DALLE_INLINE Mask greater_equal(F a, F b) { return {vcgeq_f32(a, b)}; }
DALLE_INLINE Mask equal(F a, F b) { return {vceqq_f32(a, b)}; }
DALLE_INLINE Mask equal(U a, U b) { return {vceqq_u32(a, b)}; }
DALLE_INLINE Mask not_below(U a, U b) { return {vcgeq_u32(a, b)}; }
DALLE_INLINE Mask is_nan(F a) { return {vmvnq_u32(vceqq_f32(a, a))}; }
DALLE_INLINE F select(Mask m, F yes, F no) { return vbslq_f32(m.lanes, yes, no); }
DALLE_INLINE U select(Mask m, U yes, U no) { return vbslq_u32(m.lanes, yes, no); }

DALLE_INLINE F load(const float* p) { return vld1q_f32(p); }
DALLE_INLINE U load(const uint32_t* p) { return vld1q_u32(p); }
DALLE_INLINE F load(const float* p, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
DALLE_INLINE void store(float* p, F x) { vst1q_f32(p, x); }
DALLE_INLINE void store(uint32_t* p, U x) { vst1q_u32(p, x); }
DALLE_INLINE void store(float* p, F x, int n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

DALLE_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }            // a b + c
// a b[kElement] + c: an element of a register serves as it is, where a broadcast would be an instruction.
template <int kElement>
DALLE_INLINE F fma_element(F a, F b, F c) { return vfmaq_laneq_f32(c, a, b, kElement); }
DALLE_INLINE F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }           // c - a b
DALLE_INLINE F max(F a, F b) { return select(greater(a, b), a, b); }        // b where either is NaN, unlike fmax
DALLE_INLINE F min(F a, F b) { return select(greater(b, a), a, b); }        // b where either is NaN, unlike fmin
DALLE_INLINE F round(F a) { return vrndnq_f32(a); }
DALLE_INLINE F sqrt(F a) { return vsqrtq_f32(a); }
DALLE_INLINE U exclusive_or(U a, U b, U c) { return a ^ b ^ c; }

DALLE_INLINE float sum(F a) { return vaddvq_f32(a); }
DALLE_INLINE float largest(F a) { return vmaxnmvq_f32(a); }
DALLE_INLINE float smallest(F a) { return vminnmvq_f32(a); }

// Words as they are: the products of four come in two halves, which unzip into low and high words.
constexpr int kHalves = 1;
using W = U;
DALLE_INLINE W wide_set(uint32_t x) { return set(x); }
struct WideProduct {
  W low, high;
};
DALLE_INLINE WideProduct wide_multiply(W a, W b) {
  const U front = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(b)));
  const U back = vreinterpretq_u32_u64(vmull_high_u32(a, b));
  return {vuzp1q_u32(front, back), vuzp2q_u32(front, back)};
}
DALLE_INLINE void widen(U x, W halves[kHalves]) { halves[0] = x; }
DALLE_INLINE U narrow(const W halves[kHalves]) { return halves[0]; }

// The lanes where m holds, moved to the front in their order; the others are unspecified.
struct CompressTable {
  uint8_t bytes[16][16];
  constexpr CompressTable() : bytes() {
    for (int mask = 0; mask < 16; mask++)
      for (int lane = 0, count = 0; lane < 4; lane++)
        if (mask >> lane & 1)
          for (int byte = 0; byte < 4; byte++) bytes[mask][count++] = uint8_t(4 * lane + byte);
  }
};
static constexpr CompressTable kCompress;
DALLE_INLINE F compress(Mask m, F x) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), vld1q_u8(kCompress.bytes[bits(m)])));
}

// x 2^whole for whole numbers -127 <= whole <= 128; the exponent 0 makes 2^-127 an exact 0.
DALLE_INLINE F scale_by_power(F x, F whole) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127));
  return x * vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}
DALLE_INLINE F scale_or_zero(Mask m, F x, F whole) {
  return as_float(vandq_u32(m.lanes, as_words(scale_by_power(x, whole))));
}
DALLE_INLINE Mask not_less(F a, F b) { return ~greater(b, a); }  // true for NaN
constexpr float kZeroExponent = -127.f;  // exp2_bounded makes an exact 0 of it
constexpr bool kAnyExponent = false;     // and takes nothing below
DALLE_INLINE F clamp_exponent(F x) { return min(set(128.f), max(set(kZeroExponent), x)); }

// x = mantissa 2^exponent with 0.75 <= mantissa < 1.5, for positive normal x.
DALLE_INLINE F split(F x, F* exponent) {
  const int32x4_t words = vreinterpretq_s32_f32(x);
  const int32x4_t power = vshrq_n_s32(vsubq_s32(words, vdupq_n_s32(0x3F400000)), 23);
  *exponent = vcvtq_f32_s32(power);
  return vreinterpretq_f32_s32(vsubq_s32(words, vshlq_n_s32(power, 23)));
}

DALLE_INLINE F load(const bf16* p) { return as_float(vshll_n_u16(vld1_u16((const uint16_t*)p), 16)); }
DALLE_INLINE F load(const bf16* p, int n) {
  bf16 lanes[kLanes] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
DALLE_INLINE U bf16_words(F x);
DALLE_INLINE uint16x4_t pack_bf16(F x) {
#if defined(DALLE_PAIRS)
  return vreinterpret_u16_bf16(vcvt_bf16_f32(x));
#else
  return vmovn_u32(bf16_words(x));
#endif
}
DALLE_INLINE void store(bf16* p, F x) { vst1_u16((uint16_t*)p, pack_bf16(x)); }
DALLE_INLINE void store(bf16* p, F x, int n) {
  bf16 lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

DALLE_INLINE F load(const int8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(word)))));
}

#if defined(DALLE_PAIRS)
// A pair of bf16 values per 32-bit lane: low half from `low`, high half from `high`.
DALLE_INLINE U pair(F low, F high) {
  const uint16x4_t a = pack_bf16(low), b = pack_bf16(high);
  return vreinterpretq_u32_u16(vcombine_u16(vzip1_u16(a, b), vzip2_u16(a, b)));
}

// c + a.low b.low + a.high b.high, pairs of bf16 in each lane, accumulated in float32.
DALLE_INLINE F dot(U a, U b, F c) { return vbfdotq_f32(c, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b)); }
template <int kElement>
DALLE_INLINE F dot_element(U a, U b, F c) {
  return vbfdotq_laneq_f32(c, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b), kElement);
}

// Two vectors as bfloat16, one after the other.
DALLE_INLINE void store(bf16* p, F first, F second) {
  store(p, first);
  store(p + kLanes, second);
}
#endif

// Turns kLanes vectors into their transpose.
DALLE_INLINE void transpose(F* r) {
  const float64x2_t even_low = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1])), odd_low = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
  const float64x2_t even_high = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3])), odd_high = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
  r[0] = vreinterpretq_f32_f64(vtrn1q_f64(even_low, even_high));
  r[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd_low, odd_high));
  r[2] = vreinterpretq_f32_f64(vtrn2q_f64(even_low, even_high));
  r[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd_low, odd_high));
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

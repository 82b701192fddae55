// Vectors of AVX-512, with or without products of bf16: see simd.h, which includes this.
#pragma once

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr int kLanes = 16;
using F = __m512;
using U = uint32_t __attribute__((vector_size(64)));
struct Mask {
  __mmask16 lanes;
};

DALLE_INLINE F zero() { return _mm512_setzero_ps(); }
DALLE_INLINE F set(float x) { return _mm512_set1_ps(x); }
DALLE_INLINE U set(uint32_t x) { return (U)_mm512_set1_epi32(int(x)); }
DALLE_INLINE U iota() { return U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
DALLE_INLINE F as_float(U x) { return (F)x; }
DALLE_INLINE U as_words(F x) { return (U)x; }
DALLE_INLINE F convert(U x) { return _mm512_cvtepi32_ps((__m512i)x); }  // as signed integers

DALLE_INLINE Mask operator&(Mask a, Mask b) { return {__mmask16(a.lanes & b.lanes)}; }
DALLE_INLINE Mask operator|(Mask a, Mask b) { return {__mmask16(a.lanes | b.lanes)}; }
DALLE_INLINE Mask operator~(Mask a) { return {__mmask16(~a.lanes)}; }
DALLE_INLINE bool any(Mask a) { return a.lanes != 0; }
DALLE_INLINE uint32_t bits(Mask a) { return a.lanes; }
DALLE_INLINE Mask from_bits(uint32_t x) { return {__mmask16(x)}; }
DALLE_INLINE Mask first(int n) { return {__mmask16((1u << n) - 1u)}; }
DALLE_INLINE Mask greater(F a, F b) { return {_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)}; }
DALLE_INLINE Mask greater_equal(F a, F b) { return {_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ)}; }
DALLE_INLINE Mask equal(F a, F b) { return {_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)}; }
DALLE_INLINE Mask equal(U a, U b) { return {_mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b)}; }
DALLE_INLINE Mask not_below(U a, U b) { return {_mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b)}; }
DALLE_INLINE Mask is_nan(F a) { return {_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q)}; }
DALLE_INLINE F select(Mask m, F yes, F no) { return _mm512_mask_mov_ps(no, m.lanes, yes); }
DALLE_INLINE U select(Mask m, U yes, U no) {
  return (U)_mm512_mask_mov_epi32((__m512i)no, m.lanes, (__m512i)yes);
}

DALLE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
DALLE_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n).lanes, p); }
DALLE_INLINE U load(const uint32_t* p) { return (U)_mm512_loadu_si512(p); }
DALLE_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
DALLE_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n).lanes, x); }
DALLE_INLINE void store(uint32_t* p, U x) { _mm512_storeu_si512(p, (__m512i)x); }

DALLE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
DALLE_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
DALLE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }              // b where either is NaN
DALLE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }              // b where either is NaN
DALLE_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
DALLE_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
DALLE_INLINE U exclusive_or(U a, U b, U c) {
  return (U)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}

DALLE_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
DALLE_INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }

DALLE_INLINE float smallest(F a) { return -largest(zero() - a); }

// Words in the low halves of 64-bit lanes, the even lanes of a U and the odd ones; the high halves hold anything.
constexpr int kHalves = 2;
using W = uint64_t __attribute__((vector_size(64)));
DALLE_INLINE W wide_set(uint32_t x) { return (W)_mm512_set1_epi64(x); }
DALLE_INLINE W exclusive_or(W a, W b, W c) {
  return (W)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
struct WideProduct {
  W low, high;
};
DALLE_INLINE WideProduct wide_multiply(W a, W b) {
  const W product = (W)_mm512_mul_epu32((__m512i)a, (__m512i)b);
  return {product, product >> 32};
}
DALLE_INLINE void widen(U x, W halves[kHalves]) { halves[0] = (W)x, halves[1] = (W)x >> 32; }
DALLE_INLINE U narrow(const W halves[kHalves]) {
  return (U)_mm512_mask_mov_epi32((__m512i)halves[0], 0xAAAA, _mm512_slli_epi64((__m512i)halves[1], 32));
}

// The lanes where m holds, moved to the front in their order; the others are unspecified.
DALLE_INLINE F compress(Mask m, F x) { return _mm512_maskz_compress_ps(m.lanes, x); }

DALLE_INLINE F scale_by_power(F x, F whole) { return _mm512_scalef_ps(x, whole); }
DALLE_INLINE F scale_or_zero(Mask m, F x, F whole) { return _mm512_maskz_scalef_ps(m.lanes, x, whole); }
DALLE_INLINE Mask not_less(F a, F b) { return {_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ)}; }  // true for NaN
constexpr float kZeroExponent = -256.f;  // exp2_bounded makes an exact 0 of it
constexpr bool kAnyExponent = true;      // and takes anything below
DALLE_INLINE F clamp_exponent(F x) { return min(set(256.f), max(set(kZeroExponent), x)); }

// x = mantissa 2^exponent with 0.75 <= mantissa < 1.5, for positive normal x.
DALLE_INLINE F split(F x, F* exponent) {
  *exponent = _mm512_getexp_ps(x * set(4.f / 3.f));
  return _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
}

DALLE_INLINE F widen_bf16(__m256i x) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
DALLE_INLINE F load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
DALLE_INLINE F load(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n).lanes, p)); }
DALLE_INLINE U bf16_words(F x);
DALLE_INLINE __m256i pack_bf16(F x) {
#if defined(DALLE_ISA_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  return _mm512_cvtepi32_epi16((__m512i)bf16_words(x));
#endif
}
DALLE_INLINE void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, pack_bf16(x)); }
DALLE_INLINE void store(bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n).lanes, pack_bf16(x)); }

DALLE_INLINE F load(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }

#if defined(DALLE_PAIRS)
// A pair of bf16 values per 32-bit lane: low half from `low`, high half from `high`.
DALLE_INLINE U pair(F low, F high) {
  U order = iota();  // 16-bit positions: lane i takes value i (low) and value 16 + i (high)
  order |= (order + set(16u)) << 16;
  return (U)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// c + a.low b.low + a.high b.high, pairs of bf16 in each lane, accumulated in float32.
DALLE_INLINE F dot(U a, U b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

// Two vectors as bfloat16, one after the other.
DALLE_INLINE void store(bf16* p, F first, F second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
#endif

// Turns kLanes vectors into their transpose.
DALLE_INLINE void transpose(F* r) {
  F t[16];
  DALLE_UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  DALLE_UNROLL for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  DALLE_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xDD);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xDD);
  }
  DALLE_UNROLL for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xDD);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xDD);
  }
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

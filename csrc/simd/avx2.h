// Vectors of AVX2: see simd.h, which includes this.
#pragma once

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr int kLanes = 8;
using F = __m256;
using U = uint32_t __attribute__((vector_size(32)));
struct Mask {
  __m256i lanes;  // all bits set where true
};

DALLE_INLINE F zero() { return _mm256_setzero_ps(); }
DALLE_INLINE F set(float x) { return _mm256_set1_ps(x); }
DALLE_INLINE U set(uint32_t x) { return (U)_mm256_set1_epi32(int(x)); }
DALLE_INLINE U iota() { return U{0, 1, 2, 3, 4, 5, 6, 7}; }
DALLE_INLINE F as_float(U x) { return (F)x; }
DALLE_INLINE U as_words(F x) { return (U)x; }
DALLE_INLINE F convert(U x) { return _mm256_cvtepi32_ps((__m256i)x); }  // as signed integers

DALLE_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_si256(a.lanes, b.lanes)}; }
DALLE_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_si256(a.lanes, b.lanes)}; }
DALLE_INLINE Mask operator~(Mask a) { return {_mm256_xor_si256(a.lanes, _mm256_set1_epi32(-1))}; }
DALLE_INLINE bool any(Mask a) { return !_mm256_testz_si256(a.lanes, a.lanes); }
DALLE_INLINE uint32_t bits(Mask a) { return uint32_t(_mm256_movemask_ps((F)a.lanes)); }
DALLE_INLINE Mask from_bits(uint32_t x) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(x)), lane_bit), lane_bit)};
}
DALLE_INLINE Mask first(int n) { return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), (__m256i)iota())}; }
DALLE_INLINE Mask greater(F a, F b) { return {(__m256i)_mm256_cmp_ps(a, b, _CMP_GT_OQ)}; }
DALLE_INLINE Mask greater_equal(F a, F b) { return {(__m256i)_mm256_cmp_ps(a, b, _CMP_GE_OQ)}; }
DALLE_INLINE Mask equal(F a, F b) { return {(__m256i)_mm256_cmp_ps(a, b, _CMP_EQ_OQ)}; }
DALLE_INLINE Mask equal(U a, U b) { return {_mm256_cmpeq_epi32((__m256i)a, (__m256i)b)}; }
DALLE_INLINE Mask not_below(U a, U b) { return {_mm256_cmpeq_epi32(_mm256_max_epu32((__m256i)a, (__m256i)b), (__m256i)a)}; }
DALLE_INLINE Mask is_nan(F a) { return {(__m256i)_mm256_cmp_ps(a, a, _CMP_UNORD_Q)}; }
DALLE_INLINE F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, (F)m.lanes); }
DALLE_INLINE U select(Mask m, U yes, U no) { return (U)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, m.lanes); }

DALLE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
DALLE_INLINE F load(const float* p, int n) { return _mm256_maskload_ps(p, first(n).lanes); }
DALLE_INLINE U load(const uint32_t* p) { return (U)_mm256_loadu_si256((const __m256i*)p); }
DALLE_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
DALLE_INLINE void store(float* p, F x, int n) { _mm256_maskstore_ps(p, first(n).lanes, x); }
DALLE_INLINE void store(uint32_t* p, U x) { _mm256_storeu_si256((__m256i*)p, (__m256i)x); }

DALLE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
DALLE_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
DALLE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }              // b where either is NaN
DALLE_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }              // b where either is NaN
DALLE_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
DALLE_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
DALLE_INLINE U exclusive_or(U a, U b, U c) { return a ^ b ^ c; }

DALLE_INLINE float sum(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
DALLE_INLINE float largest(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

DALLE_INLINE float smallest(F a) { return -largest(zero() - a); }

// Words in the low halves of 64-bit lanes, the even lanes of a U and the odd ones; the high halves hold anything.
constexpr int kHalves = 2;
using W = uint64_t __attribute__((vector_size(32)));
DALLE_INLINE W wide_set(uint32_t x) { return (W)_mm256_set1_epi64x(x); }
DALLE_INLINE W exclusive_or(W a, W b, W c) { return a ^ b ^ c; }
struct WideProduct {
  W low, high;
};
DALLE_INLINE WideProduct wide_multiply(W a, W b) {
  const W product = (W)_mm256_mul_epu32((__m256i)a, (__m256i)b);
  return {product, product >> 32};
}
DALLE_INLINE void widen(U x, W halves[kHalves]) { halves[0] = (W)x, halves[1] = (W)x >> 32; }
DALLE_INLINE U narrow(const W halves[kHalves]) {
  return (U)_mm256_blend_epi32((__m256i)halves[0], _mm256_slli_epi64((__m256i)halves[1], 32), 0xAA);
}

// The lanes where m holds, moved to the front in their order; the others are unspecified.
struct CompressTable {
  uint8_t lanes[256][8];
  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; mask++)
      for (int lane = 0, count = 0; lane < 8; lane++)
        if (mask >> lane & 1) lanes[mask][count++] = uint8_t(lane);
  }
};
static constexpr CompressTable kCompress;
DALLE_INLINE F compress(Mask m, F x) {
  return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kCompress.lanes[bits(m)])));
}

// x 2^whole for whole numbers -127 <= whole <= 128; the exponent 0 makes 2^-127 an exact 0.
DALLE_INLINE F scale_by_power(F x, F whole) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return x * (F)_mm256_slli_epi32(exponent, 23);
}
DALLE_INLINE F scale_or_zero(Mask m, F x, F whole) { return _mm256_and_ps((F)m.lanes, scale_by_power(x, whole)); }
DALLE_INLINE Mask not_less(F a, F b) { return {(__m256i)_mm256_cmp_ps(a, b, _CMP_NLT_UQ)}; }  // true for NaN
constexpr float kZeroExponent = -127.f;  // exp2_bounded makes an exact 0 of it
constexpr bool kAnyExponent = false;     // and takes nothing below
DALLE_INLINE F clamp_exponent(F x) { return min(set(128.f), max(set(kZeroExponent), x)); }

// x = mantissa 2^exponent with 0.75 <= mantissa < 1.5, for positive normal x.
DALLE_INLINE F split(F x, F* exponent) {
  const __m256i words = (__m256i)x;
  const __m256i power = _mm256_srai_epi32(_mm256_sub_epi32(words, _mm256_set1_epi32(0x3F400000)), 23);
  *exponent = _mm256_cvtepi32_ps(power);
  return (F)_mm256_sub_epi32(words, _mm256_slli_epi32(power, 23));
}

DALLE_INLINE U bf16_words(F x);
DALLE_INLINE F load(const bf16* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
DALLE_INLINE F load(const bf16* p, int n) {
  alignas(16) bf16 lanes[kLanes] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
DALLE_INLINE __m128i pack_bf16(F x) {
  const __m256i words = (__m256i)bf16_words(x);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return _mm256_castsi256_si128(halves);
}
DALLE_INLINE void store(bf16* p, F x) { _mm_storeu_si128((__m128i*)p, pack_bf16(x)); }
DALLE_INLINE void store(bf16* p, F x, int n) {
  alignas(16) bf16 lanes[kLanes];
  _mm_store_si128((__m128i*)lanes, pack_bf16(x));
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

DALLE_INLINE F load(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }

// Turns kLanes vectors into their transpose.
DALLE_INLINE void transpose(F* r) {
  F t[8];
  DALLE_UNROLL for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  DALLE_UNROLL for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  DALLE_UNROLL for (int i = 0; i < 4; i++) t[i] = r[i];
  DALLE_UNROLL for (int i = 0; i < 4; i++) {
    const F low = t[i], high = r[4 + i];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    t[4 + i] = _mm256_permute2f128_ps(low, high, 0x31);
  }
  DALLE_UNROLL for (int i = 4; i < 8; i++) r[i] = t[i];
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

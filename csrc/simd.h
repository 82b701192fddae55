// Vectors, once for every instruction set.
//
// A kernel is written once, as templates over the types below, in a header; a small translation unit per instruction
// set turns it into code:
//
//     #define DALLE_ISA_AVX512          // or DALLE_ISA_AVX2, DALLE_ISA_AVX512_BF16
//     #include "simd.h"                 // switches the rest of this file to that instruction set
//     #include "codebook/gumbel.h"      // the kernel, in namespace dalle::DALLE_ISA
//
// The switch is a target pragma, so every source is compiled with the same portable flags. Two rules keep code of a
// wide instruction set from leaking into a program that runs on a narrow processor: standard headers are included
// here, before the pragma; and kernels call no function template or inline function of the standard library (the
// linker would be free to keep the wide copy for everyone).
//
// Names, in namespace dalle::DALLE_ISA:
//   kLanes        float32 values in a vector: 8 or 16
//   F, U, Mask    vectors of float32, of uint32, and a condition per lane. F and U are compiler vectors: + - * ^ & >>
//                 work lane by lane. Compare with greater() and its friends, which give a Mask.
// Functions with a trailing `int n` touch only the first n lanes in memory, 0 <= n <= kLanes; the others load as 0.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include <immintrin.h>

#include "bf16.h"

#if defined(DALLE_ISA_AVX512_BF16)
#define DALLE_ISA avx512_bf16
#elif defined(DALLE_ISA_AVX512)
#define DALLE_ISA avx512
#elif defined(DALLE_ISA_AVX2)
#define DALLE_ISA avx2
#else
#error "define DALLE_ISA_AVX2, DALLE_ISA_AVX512 or DALLE_ISA_AVX512_BF16 before including simd.h"
#endif

#define DALLE_INLINE static inline __attribute__((always_inline))
#define DALLE_UNROLL _Pragma("GCC unroll 32")

#if defined(DALLE_ISA_AVX2) || defined(DALLE_EMULATE_AVX512)
#pragma GCC target("avx2,fma")
#if !defined(DALLE_ISA_AVX2)
#include "tests/avx512.h"
#endif
#elif defined(DALLE_ISA_AVX512)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace dalle::DALLE_ISA {

#if defined(DALLE_ISA_AVX2)

// ---------------------------------------------------------------------------------------------------------- AVX2

constexpr int kLanes = 8;
constexpr bool kHasPairDot = false;  // dot() exists everywhere; here it is two FMAs and some shifts
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

// The low 32 bits of each 64-bit half times each other, 64 bits wide.
using W = uint64_t __attribute__((vector_size(32)));
DALLE_INLINE W wide_set(uint64_t x) { return (W)_mm256_set1_epi64x((long long)x); }
DALLE_INLINE W wide_iota() { return W{0, 1, 2, 3}; }
DALLE_INLINE W wide_multiply(W a, W b) { return (W)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
DALLE_INLINE W exclusive_or(W a, W b, W c) { return a ^ b ^ c; }
// Lane 2 i from the low half of even[i], lane 2 i + 1 from the low half of odd[i].
DALLE_INLINE U interleave_low(W even, W odd) {
  return (U)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
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
DALLE_INLINE F clamp_exponent(F x) { return min(set(128.f), max(set(kZeroExponent), x)); }

// x = mantissa 2^exponent with 0.75 <= mantissa < 1.5, for positive normal x.
DALLE_INLINE F split(F x, F* exponent) {
  const __m256i words = (__m256i)x;
  const __m256i power = _mm256_srai_epi32(_mm256_sub_epi32(words, _mm256_set1_epi32(0x3F400000)), 23);
  *exponent = _mm256_cvtepi32_ps(power);
  return (F)_mm256_sub_epi32(words, _mm256_slli_epi32(power, 23));
}

DALLE_INLINE F load(const bf16* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
DALLE_INLINE F load(const bf16* p, int n) {
  alignas(16) bf16 lanes[kLanes] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}
DALLE_INLINE __m128i pack_bf16(F x);
DALLE_INLINE void store(bf16* p, F x) { _mm_storeu_si128((__m128i*)p, pack_bf16(x)); }
DALLE_INLINE void store(bf16* p, F x, int n) {
  alignas(16) bf16 lanes[kLanes];
  _mm_store_si128((__m128i*)lanes, pack_bf16(x));
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

#else

// ------------------------------------------------------------------------------------------------------- AVX-512

constexpr int kLanes = 16;
#if defined(DALLE_ISA_AVX512_BF16)
constexpr bool kHasPairDot = true;
#else
constexpr bool kHasPairDot = false;  // dot() exists everywhere; here it is two FMAs and some shifts
#endif
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

// The low 32 bits of each 64-bit half times each other, 64 bits wide.
using W = uint64_t __attribute__((vector_size(64)));
DALLE_INLINE W wide_set(uint64_t x) { return (W)_mm512_set1_epi64((long long)x); }
DALLE_INLINE W wide_iota() { return W{0, 1, 2, 3, 4, 5, 6, 7}; }
DALLE_INLINE W wide_multiply(W a, W b) { return (W)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
DALLE_INLINE W exclusive_or(W a, W b, W c) {
  return (W)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
// Lane 2 i from the low half of even[i], lane 2 i + 1 from the low half of odd[i].
DALLE_INLINE U interleave_low(W even, W odd) {
  return (U)_mm512_mask_mov_epi32((__m512i)even, 0xAAAA, _mm512_slli_epi64((__m512i)odd, 32));
}

// The lanes where m holds, moved to the front in their order; the others are unspecified.
DALLE_INLINE F compress(Mask m, F x) { return _mm512_maskz_compress_ps(m.lanes, x); }

DALLE_INLINE F scale_by_power(F x, F whole) { return _mm512_scalef_ps(x, whole); }
DALLE_INLINE F scale_or_zero(Mask m, F x, F whole) { return _mm512_maskz_scalef_ps(m.lanes, x, whole); }
DALLE_INLINE Mask not_less(F a, F b) { return {_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ)}; }  // true for NaN
constexpr float kZeroExponent = -256.f;  // exp2_bounded makes an exact 0 of it
DALLE_INLINE F clamp_exponent(F x) { return min(set(256.f), max(set(kZeroExponent), x)); }

// x = mantissa 2^exponent with 0.75 <= mantissa < 1.5, for positive normal x.
DALLE_INLINE F split(F x, F* exponent) {
  *exponent = _mm512_getexp_ps(x * set(4.f / 3.f));
  return _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
}

DALLE_INLINE F widen_bf16(__m256i x) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
DALLE_INLINE F load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
DALLE_INLINE F load(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n).lanes, p)); }
DALLE_INLINE __m256i pack_bf16(F x);
DALLE_INLINE void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, pack_bf16(x)); }
DALLE_INLINE void store(bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n).lanes, pack_bf16(x)); }

#endif

// ----------------------------------------------------------------------------------------- every instruction set

// 2^r for -1/2 <= r <= 1/2: minimax, relative error 2.0e-9, below the rounding of its evaluation.
DALLE_INLINE F exp2_reduced(F r) {
  F p = set(0x1.41fbbcp-13f);
  p = fma(p, r, set(0x1.5f3e52p-10f));
  p = fma(p, r, set(0x1.3b2d4cp-7f));
  p = fma(p, r, set(0x1.c6aee8p-5f));
  p = fma(p, r, set(0x1.ebfbdcp-3f));
  p = fma(p, r, set(0x1.62e430p-1f));
  return fma(p, r, set(1.f));
}

// 2^x for kZeroExponent <= x <= 128; NaN where x is NaN.
DALLE_INLINE F exp2_bounded(F x) {
  const F whole = round(x);
  return scale_by_power(exp2_reduced(x - whole), whole);
}

// 2^x for x <= 128, and 0 below -126 (-inf included): never a denormal, which products would stumble over.
DALLE_INLINE F exp2_or_zero(F x) {
  const F whole = round(x);
  return scale_or_zero(not_less(x, set(-126.f)), exp2_reduced(x - whole), whole);
}

// 2^x for any x: 0 below the normal range (-inf included), inf above it, NaN for NaN.
DALLE_INLINE F exp2(F x) { return exp2_bounded(clamp_exponent(x)); }

// Sign log(x) for a positive normal number, Sign 1 or -1 (so that a negation costs nothing), within about 1 ulp.
// With x = mantissa 2^exponent and t = Sign (mantissa - 1), exact, in [-1/4, 1/2) Sign:
// Sign log(mantissa) = t - Sign t^2 / 2 + t^3 P(Sign t), P minimax, relative error of the whole 4.9e-9.
template <int Sign>
DALLE_INLINE F signed_log(F x) {
  F exponent;
  const F mantissa = split(x, &exponent);
  const F t = Sign > 0 ? mantissa - set(1.f) : set(1.f) - mantissa;
  F p = set(Sign * -0x1.7140b6p-5f);
  p = fma(p, t, set(0x1.ac90bep-4f));
  p = fma(p, t, set(Sign * -0x1.0d8a90p-3f));
  p = fma(p, t, set(0x1.28847cp-3f));
  p = fma(p, t, set(Sign * -0x1.54efdcp-3f));
  p = fma(p, t, set(0x1.9969b0p-3f));
  p = fma(p, t, set(Sign * -0x1.000040p-2f));
  p = fma(p, t, set(0x1.5555a4p-2f));
  p = fma(p, t, set(Sign * -0.5f));
  return fma(exponent, set(Sign * 0x1.62e430p-1f), fma(p, t * t, t));
}

DALLE_INLINE F log(F x) { return signed_log<1>(x); }
DALLE_INLINE F minus_log(F x) { return signed_log<-1>(x); }

// The even and the odd lanes of x in the low halves of 64-bit lanes; the high halves are unspecified.
DALLE_INLINE W wide_even(U x) { return (W)x; }
DALLE_INLINE W wide_odd(U x) { return (W)x >> 32; }

// Rounds to bfloat16, to nearest even; the result sits in the low 16 bits of each lane. NaN stays NaN.
DALLE_INLINE U bf16_words(F x) {
  const U words = as_words(x);
  const U rounded = (words + set(0x7FFFu) + ((words >> 16) & set(1u))) >> 16;
  return select(is_nan(x), set(0x7FC0u), rounded);
}

#if defined(DALLE_ISA_AVX2)
DALLE_INLINE __m128i pack_bf16(F x) {
  const __m256i words = (__m256i)bf16_words(x);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return _mm256_castsi256_si128(halves);
}
#elif defined(DALLE_ISA_AVX512)
DALLE_INLINE __m256i pack_bf16(F x) { return _mm512_cvtepi32_epi16((__m512i)bf16_words(x)); }
#else
DALLE_INLINE __m256i pack_bf16(F x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#endif

// A pair of bf16 values per 32-bit lane: low half from `low`, high half from `high`.
DALLE_INLINE U pair(F low, F high) {
#if defined(DALLE_ISA_AVX512_BF16)
  U order = iota();  // 16-bit positions: lane i takes value i (low) and value 16 + i (high)
  order |= (order + set(16u)) << 16;
  return (U)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
  return bf16_words(low) | (bf16_words(high) << 16);
#endif
}

// c + a.low b.low + a.high b.high, pairs of bf16 in each lane, accumulated in float32.
DALLE_INLINE F dot(U a, U b, F c) {
#if defined(DALLE_ISA_AVX512_BF16)
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  const U high = set(0xFFFF0000u);
  c = fma(as_float(a << 16), as_float(b << 16), c);
  return fma(as_float(a & high), as_float(b & high), c);
#endif
}

DALLE_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace dalle::DALLE_ISA

// Vectors, once for every instruction set.
//
// A kernel is written once, as templates over the types below, in a header; a small translation unit per instruction
// set turns it into code:
//
//     #if defined(__x86_64__)           // on other processors the unit is empty
//     #define DALLE_ISA_AVX512          // or another of those below
//     #include "codebook/table.h"       // includes this file and the kernels, in namespace dalle::DALLE_ISA
//     #endif
//
// Kernels stand between DALLE_TARGET_BEGIN and DALLE_TARGET_END, which let the compiler use the instruction set there
// and nowhere else: every source is compiled with the same portable flags, and headers may be included in any order.
// One rule keeps code of a wide instruction set from leaking into a program that runs on a narrow processor: kernels
// call no function template or inline function from outside (the linker would be free to keep the wide copy for
// everyone).
//
// Names, in namespace dalle::DALLE_ISA (simd/ has what differs between instruction sets):
//   kLanes        float32 values in a vector: 4, 8 or 16
//   F, U, Mask    vectors of float32, of uint32, and a condition per lane. F and U are compiler vectors: + - * ^ & >>
//                 work lane by lane. Compare with greater() and its friends, which give a Mask.
//   W             the words of a U as wide_multiply() wants them, in kHalves parts: see noise.h.
// Functions with a trailing `int n` touch only the first n lanes in memory, 0 <= n <= kLanes; the others load as 0.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "bf16.h"

// DALLE_PAIRS: an instruction multiplies pairs of bf16 values and adds them up in float32. DALLE_WITHOUT_PAIRS is then
// the same instruction set but for that, whose float32 kernels serve both.
#if defined(DALLE_ISA_AVX2)
#define DALLE_ISA avx2
#define DALLE_TARGET "avx2,fma"
#elif defined(DALLE_ISA_AVX512)
#define DALLE_ISA avx512
#define DALLE_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#elif defined(DALLE_ISA_AVX512_BF16)
#define DALLE_ISA avx512_bf16
#define DALLE_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define DALLE_PAIRS
#define DALLE_WITHOUT_PAIRS avx512
#elif defined(DALLE_ISA_NEON)
#define DALLE_ISA neon
#define DALLE_TARGET "arch=armv8-a"
#elif defined(DALLE_ISA_NEON_BF16)
#define DALLE_ISA neon_bf16
#define DALLE_TARGET "arch=armv8.2-a+bf16"
#define DALLE_PAIRS
#define DALLE_WITHOUT_PAIRS neon
#else
#error "define DALLE_ISA_AVX2, _AVX512, _AVX512_BF16, _NEON or _NEON_BF16 before including simd.h"
#endif
#if defined(DALLE_EMULATE_AVX512)
#undef DALLE_TARGET
#define DALLE_TARGET "avx2,fma"
#endif

#define DALLE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define DALLE_TARGET_PUSH(features) \
  DALLE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DALLE_TARGET_BEGIN DALLE_TARGET_PUSH(DALLE_TARGET)
#define DALLE_TARGET_END _Pragma("clang attribute pop")
#define DALLE_UNROLL _Pragma("clang loop unroll(full)")
#define DALLE_UNROLL_BY_TWO _Pragma("clang loop unroll_count(2)")
#else
#define DALLE_TARGET_PUSH(features) _Pragma("GCC push_options") DALLE_PRAGMA(GCC target(features))
#define DALLE_TARGET_BEGIN DALLE_TARGET_PUSH(DALLE_TARGET)
#define DALLE_TARGET_END _Pragma("GCC pop_options")
#define DALLE_UNROLL _Pragma("GCC unroll 32")
#define DALLE_UNROLL_BY_TWO _Pragma("GCC unroll 2")
#endif
#define DALLE_INLINE static inline __attribute__((always_inline))

#if defined(DALLE_EMULATE_AVX512) && !defined(DALLE_ISA_AVX2)
#include "tests/avx512.h"
#endif
#if defined(__aarch64__)
#include "simd/neon.h"
#elif defined(DALLE_ISA_AVX2)
#include "simd/avx2.h"
#else
#include "simd/avx512.h"
#endif

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

// (2^r - 1) / r for -1/2 <= r <= 1/2, so that 2^r, minimax, has a relative error of 2.0e-9, below the rounding of its
// evaluation.
DALLE_INLINE F exp2_slope(F r) {
  F p = set(0x1.41fbbcp-13f);
  p = fma(p, r, set(0x1.5f3e52p-10f));
  p = fma(p, r, set(0x1.3b2d4cp-7f));
  p = fma(p, r, set(0x1.c6aee8p-5f));
  p = fma(p, r, set(0x1.ebfbdcp-3f));
  return fma(p, r, set(0x1.62e430p-1f));
}
DALLE_INLINE F exp2_reduced(F r) { return fma(exp2_slope(r), r, set(1.f)); }

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

// tanh(x) = e / (e + 2) with e = exp(2 x) - 1, within 2.5e-7 of itself for any x, and never beyond 1. NaN stays NaN.
DALLE_INLINE F tanh(F x) {
  x = min(set(9.5f), max(set(-9.5f), x));  // in this order; beyond, it is 1 in float32
  const F powers = set(0x1.715476p1f), whole = round(x * powers), r = fma(x, powers, zero() - whole);
  const F scale = scale_by_power(set(1.f), whole), e = fma(scale, r * exp2_slope(r), scale - set(1.f));
  return e / (e + set(2.f));
}

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

// Rounds to bfloat16, to nearest even; the result sits in the low 16 bits of each lane. NaN stays NaN.
DALLE_INLINE U bf16_words(F x) {
  const U words = as_words(x);
  const U rounded = (words + set(0x7FFFu) + ((words >> 16) & set(1u))) >> 16;
  return select(is_nan(x), set(0x7FC0u), rounded);
}

DALLE_INLINE F load(const int8_t* p, int n) {
  int8_t lanes[kLanes] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
}

DALLE_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

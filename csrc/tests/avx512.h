// The AVX-512 instructions that simd.h uses, lane by lane in plain C++: with -DDALLE_EMULATE_AVX512 the kernels for
// AVX-512 and its bf16 dot products compile to code that any AVX2 processor runs. For tests, and slow.
//
// simd.h includes this in place of its target pragma. The functions carry the intrinsics' own names in the namespace of
// the instruction set, where name lookup finds them before the real ones.
#pragma once

#undef _mm512_cmp_ps_mask
#undef _mm512_getexp_ps
#undef _mm512_getmant_ps
#undef _mm512_roundscale_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi32
#undef _mm512_slli_epi64
#undef _mm512_ternarylogic_epi32
#undef _mm512_ternarylogic_epi64

// Not inlined: the kernels' code would grow a hundredfold, and compile for minutes.
#define DALLE_EMULATED static __attribute__((noinline, unused))

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

using Floats = __m512;
using Words = uint32_t __attribute__((vector_size(64)));
using LongWords = uint64_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(64)));
using Bytes = int8_t __attribute__((vector_size(16)));
using HalfWords = uint16_t __attribute__((vector_size(32)));

template <class V, class Lane>
DALLE_INLINE V by_lane(const Lane& lane) {
  V result{};
  for (int i = 0; i < int(sizeof(V) / sizeof(result[0])); i++) result[i] = lane(i);
  return result;
}
template <class Test>
DALLE_EMULATED __mmask16 mask_by_lane(const Test& test) {
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= unsigned(test(i)) << i;
  return __mmask16(mask);
}

DALLE_EMULATED __m512 _mm512_setzero_ps() { return Floats{}; }
DALLE_EMULATED __m512 _mm512_set1_ps(float x) { return by_lane<Floats>([&](int) { return x; }); }
DALLE_EMULATED __m512i _mm512_set1_epi32(int x) { return (__m512i)by_lane<Words>([&](int) { return uint32_t(x); }); }
DALLE_EMULATED __m512i _mm512_set1_epi64(long long x) { return (__m512i)by_lane<LongWords>([&](int) { return uint64_t(x); }); }

// Memory: masked lanes are neither read nor written.
DALLE_EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) {
  return by_lane<Floats>([&](int i) { return m >> i & 1 ? ((const float*)p)[i] : 0.f; });
}
DALLE_EMULATED __m512 _mm512_loadu_ps(const void* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
DALLE_EMULATED __m512i _mm512_loadu_si512(const void* p) { return (__m512i)_mm512_loadu_ps(p); }
DALLE_EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  return (__m256i)by_lane<HalfWords>([&](int i) { return m >> i & 1 ? ((const uint16_t*)p)[i] : uint16_t(0); });
}
DALLE_EMULATED void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof x); }
DALLE_EMULATED void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
DALLE_EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 x) {
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) ((float*)p)[i] = x[i];
}
DALLE_EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i x) {
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) ((uint16_t*)p)[i] = ((HalfWords)x)[i];
}

// Arithmetic.
DALLE_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_lane<Floats>([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
DALLE_EMULATED __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_lane<Floats>([&](int i) { return __builtin_fmaf(-a[i], b[i], c[i]); });
}
DALLE_EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) { return by_lane<Floats>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; }); }
DALLE_EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) { return by_lane<Floats>([&](int i) { return a[i] < b[i] ? a[i] : b[i]; }); }
DALLE_EMULATED __m512 _mm512_sqrt_ps(__m512 a) { return by_lane<Floats>([&](int i) { return __builtin_sqrtf(a[i]); }); }
DALLE_EMULATED __m512 _mm512_roundscale_ps(__m512 a, int) { return by_lane<Floats>([&](int i) { return __builtin_rintf(a[i]); }); }
DALLE_EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) { return by_lane<Floats>([&](int i) { return float(int32_t(((Words)a)[i])); }); }
DALLE_EMULATED __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  return (__m512i)by_lane<LongWords>([&](int i) { return (((LongWords)a)[i] & 0xFFFFFFFFu) * (((LongWords)b)[i] & 0xFFFFFFFFu); });
}
DALLE_EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return (__m512i)((Words)a << n); }
DALLE_EMULATED __m512i _mm512_slli_epi64(__m512i a, unsigned n) { return (__m512i)((LongWords)a << n); }
DALLE_EMULATED __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  __m512i result{};
  for (int bit = 0; bit < 8; bit++)
    if (table >> bit & 1) result |= (bit & 4 ? a : ~a) & (bit & 2 ? b : ~b) & (bit & 1 ? c : ~c);
  return result;
}
DALLE_EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  return _mm512_ternarylogic_epi64(a, b, c, table);
}

// x 2^floor(power).
DALLE_EMULATED float scaled(float x, float power) {
  if (__builtin_isnan(x) || __builtin_isnan(power)) return NAN;
  const float whole = __builtin_floorf(power);
  return __builtin_ldexpf(x, whole < -1000.f ? -1000 : whole > 1000.f ? 1000 : int(whole));
}
DALLE_EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 b) { return by_lane<Floats>([&](int i) { return scaled(a[i], b[i]); }); }
DALLE_EMULATED __m512 _mm512_maskz_scalef_ps(__mmask16 m, __m512 a, __m512 b) {
  return by_lane<Floats>([&](int i) { return m >> i & 1 ? scaled(a[i], b[i]) : 0.f; });
}
DALLE_EMULATED __m512 _mm512_getexp_ps(__m512 a) { return by_lane<Floats>([&](int i) { return __builtin_logbf(a[i]); }); }
// The mantissa in [0.75, 1.5), which is all that simd.h asks for. A macro: its last arguments have a type of the real
// function's namespace, where name lookup would find that one as well.
#define _mm512_getmant_ps(a, interval, sign) mantissa(a)
DALLE_EMULATED __m512 mantissa(__m512 a) {
  return by_lane<Floats>([&](int i) {
    if (__builtin_isnan(a[i])) return a[i];
    if (a[i] == 0.f || __builtin_isinf(a[i])) return __builtin_copysignf(1.f, a[i]);
    int exponent;
    const float half = __builtin_frexpf(a[i], &exponent);  // in [0.5, 1)
    return __builtin_fabsf(half) < 0.75f ? 2.f * half : half;
  });
}

// Sums and maxima fold the upper half onto the lower.
template <class Fold>
DALLE_INLINE float folded(__m512 a, const Fold& fold) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) a[i] = fold(a[i], a[i + half]);
  return a[0];
}
DALLE_EMULATED float _mm512_reduce_add_ps(__m512 a) { return folded(a, [](float x, float y) { return x + y; }); }
DALLE_EMULATED float _mm512_reduce_max_ps(__m512 a) { return folded(a, [](float x, float y) { return x > y ? x : y; }); }

// Masks.
DALLE_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int kind) {
  return mask_by_lane([&](int i) {
    switch (kind) {
      case _CMP_GT_OQ: return a[i] > b[i];
      case _CMP_GE_OQ: return a[i] >= b[i];
      case _CMP_EQ_OQ: return a[i] == b[i];
      case _CMP_UNORD_Q: return __builtin_isnan(a[i]) || __builtin_isnan(b[i]);
      case _CMP_NLT_UQ: return !(a[i] < b[i]);
    }
    __builtin_trap();
  });
}
DALLE_EMULATED __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  return mask_by_lane([&](int i) { return ((Words)a)[i] == ((Words)b)[i]; });
}
DALLE_EMULATED __mmask16 _mm512_cmpge_epu32_mask(__m512i a, __m512i b) {
  return mask_by_lane([&](int i) { return ((Words)a)[i] >= ((Words)b)[i]; });
}
DALLE_EMULATED __m512 _mm512_mask_mov_ps(__m512 no, __mmask16 m, __m512 yes) {
  return by_lane<Floats>([&](int i) { return m >> i & 1 ? yes[i] : no[i]; });
}
DALLE_EMULATED __m512i _mm512_mask_mov_epi32(__m512i no, __mmask16 m, __m512i yes) {
  return (__m512i)by_lane<Words>([&](int i) { return m >> i & 1 ? ((Words)yes)[i] : ((Words)no)[i]; });
}
DALLE_EMULATED __m512 _mm512_maskz_compress_ps(__mmask16 m, __m512 a) {
  Floats result{};
  for (int i = 0, n = 0; i < 16; i++)
    if (m >> i & 1) result[n++] = a[i];
  return result;
}

// Lanes moved about.
DALLE_EMULATED __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return by_lane<Floats>([&](int i) {
    const int from = i / 4 * 4 + i % 4 / 2;
    return i % 2 ? b[from] : a[from];
  });
}
DALLE_EMULATED __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return by_lane<Floats>([&](int i) {
    const int from = i / 4 * 4 + 2 + i % 4 / 2;
    return i % 2 ? b[from] : a[from];
  });
}
DALLE_EMULATED __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
  return by_lane<Floats>([&](int i) {
    const int from = i / 4 * 4 + (order >> i % 4 * 2 & 3);
    return i % 4 < 2 ? a[from] : b[from];
  });
}
DALLE_EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  return by_lane<Floats>([&](int i) {
    const int from = (order >> i / 4 * 2 & 3) * 4 + i % 4;
    return i < 8 ? a[from] : b[from];
  });
}
DALLE_EMULATED __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a) {
  return (__m512i)by_lane<Halves>([&](int i) { return ((Halves)a)[((Halves)order)[i] & 31]; });
}
DALLE_EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return (__m512i)by_lane<Words>([&](int i) { return uint32_t(((HalfWords)a)[i]); });
}
DALLE_EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return (__m512i)by_lane<Words>([&](int i) { return uint32_t(int32_t(((Bytes)a)[i])); });
}
DALLE_EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return (__m256i)by_lane<HalfWords>([&](int i) { return uint16_t(((Words)a)[i]); });
}

// bfloat16: denormals count as zero, NaN stays NaN, otherwise to nearest even.
DALLE_EMULATED float flushed(float x) { return __builtin_fabsf(x) < FLT_MIN ? __builtin_copysignf(0.f, x) : x; }
DALLE_EMULATED uint16_t to_bf16(float x) {
  x = flushed(x);
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (__builtin_isnan(x)) return uint16_t(word >> 16 | 0x40);
  return uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}
DALLE_EMULATED float from_bf16(uint32_t half) {
  const uint32_t word = half << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return flushed(x);
}
DALLE_EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) { return (__m256bh)by_lane<HalfWords>([&](int i) { return to_bf16(a[i]); }); }
DALLE_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return (__m512bh)by_lane<Halves>([&](int i) { return to_bf16(i < 16 ? low[i] : high[i - 16]); });
}
// The odd products first, each rounded once into the sum.
DALLE_EMULATED __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  return by_lane<Floats>([&](int i) {
    const uint32_t x = ((Words)a)[i], y = ((Words)b)[i];
    const float odd = flushed(__builtin_fmaf(from_bf16(x >> 16), from_bf16(y >> 16), flushed(c[i])));
    return flushed(__builtin_fmaf(from_bf16(x & 0xFFFF), from_bf16(y & 0xFFFF), odd));
  });
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

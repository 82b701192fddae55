// The small product that every matrix multiplication of the kernels is made of.
//
// Everything is a sum over units of 32 bits: a float32, or a pair of bfloat16 that one instruction multiplies and adds
// (PairProduct). One side is broadcast a unit at a time, the other fills the vectors; M rows times N vectors of sums
// stay in registers.
#pragma once

#include "simd.h"

#define DALLE_METHOD inline __attribute__((always_inline))
#define DALLE_APART __attribute__((noinline))  // what few calls need: it must cost the others no registers

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

// A 32-bit unit at any address: rows of bfloat16 need not be aligned to more.
using unit __attribute__((aligned(2), may_alias)) = float;
DALLE_INLINE F broadcast(const void* p) { return set(float(*(const unit*)p)); }

struct FloatProduct {
  static constexpr int kDepth = 1;  // values per unit
  DALLE_INLINE F multiply_add(F a, F b, F c) { return fma(a, b, c); }
#if defined(__aarch64__)
  template <int kElement>
  DALLE_INLINE F multiply_element(F a, F b, F c) {
    return fma_element<kElement>(a, b, c);
  }
#endif
};

#if defined(DALLE_PAIRS)
struct PairProduct {
  static constexpr int kDepth = 2;
  DALLE_INLINE F multiply_add(F a, F b, F c) { return dot(as_words(a), as_words(b), c); }
#if defined(__aarch64__)
  template <int kElement>
  DALLE_INLINE F multiply_element(F a, F b, F c) {
    return dot_element<kElement>(as_words(a), as_words(b), c);
  }
#endif
  DALLE_INLINE U pack(F low, F high) { return pair(low, high); }
};
#endif

// What products of T's are made of: bf16 in pairs where the processor multiplies them, else as float32.
template <class T>
struct ProductOf {
  using Type = FloatProduct;
};
#if defined(DALLE_PAIRS)
template <>
struct ProductOf<bf16> {
  using Type = PairProduct;
};
#endif

template <int N>
struct Int {
  static constexpr int value = N;
};

// Of a left-hand side, what lies side by side in memory: the units of four steps, those of four rows, or neither.
enum class Adjacent { steps, rows, nothing };

// Where the left-hand side finds its units: in rows wherever they lie; in a row, or a column, of a table [.., kLd].
template <int M>
struct ScatteredRows {
  static constexpr Adjacent kAdjacent = Adjacent::steps;
  const float* rows[M];
  ptrdiff_t step = 0;

  DALLE_METHOD explicit ScatteredRows(const float* const* pointers) {
    DALLE_UNROLL for (int i = 0; i < M; i++) rows[i] = pointers[i];
  }
  DALLE_METHOD const float* at(int i) const { return rows[i] + step; }
  DALLE_METHOD void advance(ptrdiff_t steps) { step += steps; }
};
template <int kLd>
struct TableRows {
  static constexpr Adjacent kAdjacent = Adjacent::steps;
  const float* data;

  DALLE_METHOD const float* at(int i) const { return data + i * kLd; }
  DALLE_METHOD void advance(ptrdiff_t steps) { data += steps; }
};
template <int kLd>
struct TableColumns {
  static constexpr Adjacent kAdjacent = Adjacent::rows;
  const float* data;

  DALLE_METHOD const float* at(int i) const { return data + i; }
  DALLE_METHOD void advance(ptrdiff_t steps) { data += steps * kLd; }
};

// Where the right-hand side finds its vectors: in lines that follow one another, `stride` floats apart, or out of a list.
struct Lines {
  const float* data;
  ptrdiff_t stride;

  DALLE_METHOD const float* at(ptrdiff_t step) const { return data + step * stride; }
  DALLE_METHOD void advance(ptrdiff_t steps) { data += steps * stride; }
};
struct ListedLines {
  const float* const* rows;
  ptrdiff_t column;

  DALLE_METHOD const float* at(ptrdiff_t step) const { return rows[step] + column; }
  DALLE_METHOD void advance(ptrdiff_t steps) { rows += steps; }
};

template <int N>
DALLE_INLINE void load_line(const float* line, F (&vectors)[N]) {
  DALLE_UNROLL for (int v = 0; v < N; v++) vectors[v] = load(line + v * kLanes);
}

// sums[i][v] += the sum over `count` steps of left.at(i) times the vectors of right. With two chains, even and odd steps
// have sums of their own, those of odd ones after those of even ones: `sums` has kChains M rows, `count` is even.
template <class P, int M, int N, int kChains = 1, class Left, class Right>
DALLE_INLINE void multiply(F (&sums)[kChains * M][N], ptrdiff_t count, Left left, Right right) {
  F vectors[N];
#if defined(__aarch64__)
  // Elements of a vector of units are multiplied one by one: a load for four units, and no broadcast.
  if constexpr (Left::kAdjacent == Adjacent::steps) {
    for (; count >= 4; count -= 4, left.advance(4), right.advance(4)) {
      F units[M];
      DALLE_UNROLL for (int i = 0; i < M; i++) units[i] = load(left.at(i));
      const auto step = [&](auto s) __attribute__((always_inline)) {
        asm volatile("" ::: "memory");  // or the lines of all four steps are loaded at once, and registers run out
        load_line(right.at(s.value), vectors);
        DALLE_UNROLL for (int i = 0; i < M; i++)
          DALLE_UNROLL for (int v = 0; v < N; v++)
            sums[i][v] = P::template multiply_element<s.value>(vectors[v], units[i], sums[i][v]);
      };
      step(Int<0>{}), step(Int<1>{}), step(Int<2>{}), step(Int<3>{});
    }
  }
  if constexpr (Left::kAdjacent == Adjacent::rows && M % 4 == 0) {
    for (; count > 0; count--, left.advance(1), right.advance(1)) {
      load_line(right.at(0), vectors);
      DALLE_UNROLL for (int i = 0; i < M; i += 4) {
        const F units = load(left.at(i));
        const auto row = [&](auto r) __attribute__((always_inline)) {
          DALLE_UNROLL for (int v = 0; v < N; v++)
            sums[i + r.value][v] = P::template multiply_element<r.value>(vectors[v], units, sums[i + r.value][v]);
        };
        row(Int<0>{}), row(Int<1>{}), row(Int<2>{}), row(Int<3>{});
      }
    }
    return;
  }
#endif
  DALLE_UNROLL_BY_TWO
  for (; count > 0; count -= kChains) {
    DALLE_UNROLL for (int c = 0; c < kChains; c++, left.advance(1), right.advance(1)) {
      load_line(right.at(0), vectors);
      DALLE_UNROLL for (int i = 0; i < M; i++) {
        const F x = broadcast(left.at(i));
        DALLE_UNROLL for (int v = 0; v < N; v++)
          sums[c * M + i][v] = P::multiply_add(x, vectors[v], sums[c * M + i][v]);
      }
    }
  }
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

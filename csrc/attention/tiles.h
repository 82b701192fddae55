// The small products that attention is made of, and the rows that they read. See simd.h for how this becomes code.
//
// They are sums over units, as in multiply.h. What is broadcast comes straight from the rows of a tensor wherever they
// lie.
//
//   dot_rows        sums[i][lane] = sum_u  rows[i][u] b[u][lane]            scores of M keys for 16 N queries
//   mix_rows        c[i][lane]   += sum_u  a[u][i] rows[u][lane]            output of M queries out of value rows
//   accumulate_rows c[i][lane]   += sum_u  a[i][u] b[u][lane]               gradient of M queries out of key rows
#pragma once

#include "attention/kernels.h"
#include "multiply.h"
#include "round_up.h"
#include "simd.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

using namespace dalle::attention;

constexpr int kVectors = kGroup / kLanes;                 // vectors in a group of 16 positions
constexpr int kWide = kLanes == 8 ? 2 : 4;                // vectors side by side in the registers of a wide product
constexpr int kTileRows = kLanes == 4 ? 4 : 6;            // rows of a full tile that are multiplied at a time
constexpr int kListRows = kLanes == 16 ? 8 : kTileRows;   // and of a list
constexpr int kListChains = kLanes == 16 ? 2 : 1;         // with one vector a group, two keep both multipliers busy
constexpr float kNothing = -1e38f;                        // running maximum of a query that has seen no key
constexpr float kLog2E = 0x1.715476p0f;

// 2^x for any finite x <= 128, 0 far below; undefined (but harmless) beyond.
DALLE_INLINE F power(F x) {
  if constexpr (!kAnyExponent) x = max(set(kZeroExponent), x);  // in this order NaN stays NaN
  return exp2_bounded(x);
}
// The same to a relative error of 2.8e-6, ample for what is rounded to bfloat16 next.
DALLE_INLINE F power_coarse(F x) {
  if constexpr (!kAnyExponent) x = max(set(kZeroExponent), x);  // in this order NaN stays NaN
  const F whole = round(x), r = x - whole;
  F p = set(0.00958285201f);
  p = fma(p, r, set(0.0559064262f));
  p = fma(p, r, set(0.240240991f));
  p = fma(p, r, set(0.693124175f));
  p = fma(p, r, set(1.f));
  return scale_by_power(p, whole);
}

// exp(scale (score - top)) with slope = scale log2(e). In float32 a query's maximum is kept as it is, so that the
// difference of large scores is as exact as they are; where bfloat16 follows, it comes times the slope, an instruction
// less. That product was rounded: where it is `far` from 0 by more than matters, those of the scores must be too.
template <bool kCoarse>
DALLE_INLINE F top_of(F highest, F slope) {
  return kCoarse ? highest * slope : highest;
}
template <bool kCoarse>
DALLE_INLINE bool far(F top) {
  return kCoarse && any(greater(max(top, zero() - top), set(0x1p20f)));
}
template <bool kCoarse, bool kFar>
DALLE_INLINE F exponential(F score, F slope, F top) {
  // The maximum, which changes nothing, keeps a compiler from contracting the product, which must be rounded, to an fma.
  if constexpr (kCoarse && kFar) return power_coarse(max(set(-3e38f), score * slope) - top);
  if constexpr (kCoarse) return power_coarse(fma(slope, score, zero() - top));
  return power((score - top) * slope);
}

// exp(scale score - lse), for the backward pass, with slope and lse in kUnits of their natural ones. A log-sum-exp is
// rounded to its own size, which for large scores is much; no weight may come out above 1 for that. NaN stays NaN.
template <bool kCoarse>
constexpr float kUnits = kCoarse ? kLog2E : 1.f;

template <bool kCoarse>
DALLE_INLINE F share(F score, F slope, F lse) {
  const F x = min(zero(), fma(slope, score, zero() - lse));
  if constexpr (kCoarse) return power_coarse(x);
  return power(x * set(kLog2E));
}

// --------------------------------------------------------------------------------------------------- the products

// b is [units, kTile]; emit(sums) takes F sums[M][N]. Several chains of sums hide the latency where M N is small.
template <class Dot, int M, int N, int kChains, class Emit>
DALLE_INLINE void dot_rows(const float* const* rows, const float* b, int units, const Emit& emit) {
  F chains[kChains * M][N], sums[M][N];
  DALLE_UNROLL for (int i = 0; i < kChains * M; i++)
    DALLE_UNROLL for (int v = 0; v < N; v++) chains[i][v] = zero();
  multiply<Dot, M, N, kChains>(chains, units, ScatteredRows<M>(rows), Lines{b, kTile});
  DALLE_UNROLL for (int i = 0; i < M; i++)
    DALLE_UNROLL for (int v = 0; v < N; v++) {
      sums[i][v] = chains[i][v];
      DALLE_UNROLL for (int c = 1; c < kChains; c++) sums[i][v] += chains[c * M + i][v];
    }
  emit(sums);
}

enum class Start { zero, add, scale };  // what a sum starts from: 0, c, or factor[i] c

template <class Dot, int M, int N, Start kStart, int kLda>
DALLE_INLINE void mix_rows(const float* a, const float* const* rows, ptrdiff_t column, int count, float* c, ptrdiff_t ldc,
                           const float* factor) {
  F sums[M][N];
  DALLE_UNROLL for (int i = 0; i < M; i++)
    DALLE_UNROLL for (int v = 0; v < N; v++) {
      if constexpr (kStart == Start::zero) sums[i][v] = zero();
      if constexpr (kStart == Start::add) sums[i][v] = load(c + i * ldc + v * kLanes);
      if constexpr (kStart == Start::scale) sums[i][v] = set(factor[i]) * load(c + i * ldc + v * kLanes);
    }
  multiply<Dot, M, N>(sums, count, TableColumns<kLda>{a}, ListedLines{rows, column});
  DALLE_UNROLL for (int i = 0; i < M; i++)
    DALLE_UNROLL for (int v = 0; v < N; v++) store(c + i * ldc + v * kLanes, sums[i][v]);
}

template <class Dot, int M, int N, int kLda>
DALLE_INLINE void accumulate_rows(const float* a, const float* b, ptrdiff_t ldb, int count, float* const* c,
                                  ptrdiff_t column) {
  F sums[M][N];
  DALLE_UNROLL for (int i = 0; i < M; i++)
    DALLE_UNROLL for (int v = 0; v < N; v++) sums[i][v] = load(c[i] + column + v * kLanes);
  multiply<Dot, M, N>(sums, count, TableRows<kLda>{a}, Lines{b + column, ldb});
  DALLE_UNROLL for (int i = 0; i < M; i++)
    DALLE_UNROLL for (int v = 0; v < N; v++) store(c[i] + column + v * kLanes, sums[i][v]);
}

// Cuts `count` (even) rows into blocks of kMost, 4 and 2: body(Int<M>, first).
template <int kMost, class Body>
DALLE_INLINE void for_rows(int count, const Body& body) {
  int i = 0;
  for (; i + kMost <= count; i += kMost) body(Int<kMost>{}, i);
  if constexpr (kMost > 4)
    for (; i + 4 <= count; i += 4) body(Int<4>{}, i);
  for (; i < count; i += 2) body(Int<2>{}, i);
}

// Cuts a row of `vectors` vectors into even blocks of at most kWide: body(Int<N>, first lane).
template <class Body>
DALLE_INLINE void for_columns(int vectors, const Body& body) {
  int first = 0;
  for (int blocks = (vectors + kWide - 1) / kWide; blocks > 0; blocks--) {
    const int n = (vectors - first + blocks - 1) / blocks;
    const int lane = first * kLanes;
    if constexpr (kWide >= 4) {
      if (n == 4) body(Int<4>{}, lane);
      if (n == 3) body(Int<3>{}, lane);
    }
    if (n == 2) body(Int<2>{}, lane);
    if (n == 1) body(Int<1>{}, lane);
    first += n;
  }
}

// Rows a block: as many as the registers hold besides N vectors and a broadcast.
template <int N>
constexpr int kRowsBeside = kLanes == 4 ? (N >= 3 ? 4 : 8) : N >= 4 || kLanes == 8 ? 6 : 8;

// c[row][0 .. width) = start + sum_u a[u][row] rows[u], over kLda rows: a is [count, kLda].
template <class Dot, Start kStart, int kLda>
DALLE_INLINE void mix_at(const float* a, const float* const* rows, int count, float* c, int ldc, const float* factor) {
  for_columns(ldc / kLanes, [&](auto n, int lane) __attribute__((always_inline)) {
    for_rows<kRowsBeside<n.value>>(kLda, [&](auto m, int i) __attribute__((always_inline)) {
      mix_rows<Dot, m.value, n.value, kStart, kLda>(a + i, rows, lane, count, c + i * int64_t(ldc) + lane, ldc,
                                                    kStart == Start::scale ? factor + i : nullptr);
    });
  });
}
template <class Dot, Start kStart, int kLda>
static void mix(const float* a, const float* const* rows, int count, float* c, int ldc, const float* factor) {
  if (ldc == 64) {  // the usual head: rows lie at distances that the instructions hold
    mix_at<Dot, kStart, kLda>(a, rows, count, c, 64, factor);
  } else {
    mix_at<Dot, kStart, kLda>(a, rows, count, c, ldc, factor);
  }
}

// c[row] += sum_u a[row][u] b[u], over `rows_out` rows.
template <class Dot, int kLda>
static void accumulate(const float* a, const float* b, int width, int count, int rows_out, float* const* c) {
  for_columns(width / kLanes, [&](auto n, int lane) __attribute__((always_inline)) {
    for_rows<kRowsBeside<n.value>>(rows_out, [&](auto m, int i) __attribute__((always_inline)) {
      accumulate_rows<Dot, m.value, n.value, kLda>(a + i * kLda, b, width, count, c + i, lane);
    });
  });
}

// ------------------------------------------------------------------------------------------------------- the rows

// A float32 or bfloat16 vector of a row, the lanes past `width` zero.
template <class T>
DALLE_INLINE F load_row(const T* row, int d, int width) {
  return d + kLanes <= width ? load(row + d) : load(row + d, width - d);
}
template <class T>
DALLE_INLINE void store_row(T* row, int d, int width, F x) {
  if (d + kLanes <= width) {
    store(row + d, x);
  } else {
    store(row + d, x, width - d);
  }
}

// How one head's rows of a tensor are read, by position. `units(p)` is row p as 32-bit units; `mixed(u)` is the u-th row
// that mix() takes: row u, or with PairProduct the pairs of elements of rows 2 u and 2 u + 1. Rows that cannot be read in
// place, or that lie so far apart that they would compete for the same lines of the cache, are packed, a tile at a time,
// when first needed. Rows past the end are zero.
template <class T, class Dot>
struct Rows {
  static constexpr bool kPairs = Dot::kDepth == 2;

  const T* base;
  int64_t stride;
  const int32_t* order;
  int length, width, rounded;
  float* packed_units;  // [positions, rounded] (with PairProduct: [positions, width / 2]); null: read in place
  float* packed_mixed;  // [positions / 2, rounded] pairs, or the same memory as packed_units; null: read in place
  uint8_t* ready;       // [tiles]
  const float* zeros;   // a row of zeros

  // Memory for what has to be packed: `scattered` says that rows do not follow one another.
  template <class Carver>
  void carve(Carver& carver, int tiles, bool scattered) {
    const int64_t positions = int64_t(tiles) * kTile;
    if (kPairs) {
      packed_mixed = carver.floats(positions / 2 * rounded);
      if (scattered) packed_units = carver.floats(positions * (width / 2));
    } else if (sizeof(T) == 2 || width % kLanes != 0 || scattered) {
      packed_mixed = packed_units = carver.floats(positions * rounded);
    }
    ready = carver.template of<uint8_t>(tiles);
  }
  void forget(int tiles) const { std::memset(ready, 0, size_t(tiles)); }

  DALLE_METHOD const float* in_place(int position) const {
    return position < length ? (const float*)(base + order[position] * stride) : zeros;
  }
  DALLE_METHOD const float* units(int position) const {
    if (packed_units) return packed_units + int64_t(position) * (kPairs ? width / 2 : rounded);
    return in_place(position);
  }
  DALLE_METHOD const float* mixed(int u) const {
    if (packed_mixed) return packed_mixed + int64_t(u) * rounded;
    return in_place(u);
  }
  DALLE_METHOD const T* row(int position) const {
    return position < length ? base + order[position] * stride : (const T*)zeros;
  }
  DALLE_METHOD void prepare(int tile) const {
    if (ready[tile]) return;
    ready[tile] = 1;
    if (packed_mixed) pack_into(tile, packed_mixed + int64_t(tile) * (kTile / Dot::kDepth) * rounded);
    if (kPairs && packed_units)
      for (int p = tile * kTile; p < (tile + 1) * kTile; p++)
        std::memcpy(packed_units + int64_t(p) * (width / 2), in_place(p), size_t(width) * sizeof(T));
  }
  // Tile `tile` of the packed rows into `out`.
  void pack_into(int tile, float* out) const {
    for (int i = 0; i < kTile; i += Dot::kDepth, out += rounded) {
      const T* first = row(tile * kTile + i);
      if constexpr (Dot::kDepth == 2) {
        const T* second = row(tile * kTile + i + 1);
        for (int d = 0; d < rounded; d += kLanes) {
          const U low = as_words(load_row(first, d, width)) >> 16, high = as_words(load_row(second, d, width));
          store(out + d, as_float(low | high));
        }
      } else {
        for (int d = 0; d < rounded; d += kLanes) store(out + d, load_row(first, d, width));
      }
    }
  }

  // out[unit][position], 64 positions: the transpose of a tile's units.
  void transpose_into(int tile, float* out) const {
    const int count = width / Dot::kDepth;
    for (int i = 0; i < kTile; i += kLanes)
      for (int u = 0; u < count; u += kLanes) {
        F block[kLanes];
        DALLE_UNROLL for (int j = 0; j < kLanes; j++) {
          const T* source = row(tile * kTile + i + j);
          if constexpr (Dot::kDepth == 2) {
            const float* units = (const float*)source;
            block[j] = u + kLanes <= count ? load(units + u) : load(units + u, count - u);
          } else {
            block[j] = load_row(source, u, count);
          }
        }
        transpose(block);
        const int lines = count - u < kLanes ? count - u : kLanes;
        for (int j = 0; j < lines; j++) store(out + (u + j) * kTile + i, block[j]);
      }
  }
};

// Hands out a thread's scratch memory in cache lines. A dry run (null memory) counts it.
struct Carver {
  float* memory;
  int64_t used = 0;

  DALLE_METHOD float* floats(int64_t n) {
    float* start = memory ? memory + used : nullptr;
    used += (n + 15) / 16 * 16;
    return start;
  }
  template <class T>
  DALLE_METHOD T* of(int64_t n) {
    return (T*)floats((n * int64_t(sizeof(T)) + 3) / 4);
  }
};

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

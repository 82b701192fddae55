// Attention of one query. Its work is to read the keys and values once, so both loops go through the rows one after
// another in memory order: scores a vector of keys at a time (a row each, then the transpose adds up the lanes), and
// the weighted sum of value rows in registers. A block of 256 entries keeps its scores in the first cache.
//
// Attention of many queries that see the same keys, as the continuations of one prompt do: there the work is
// arithmetic. Queries lie across the lanes, so that scores are products of broadcast keys, the softmax runs down the
// rows, and a block of 64 keys serves up to 64 queries while it is in the first cache.
#pragma once

#include "attention/tiles.h"
#include "decode/kernels.h"

DALLE_TARGET_BEGIN
namespace dalle::DALLE_ISA {

constexpr int kBlock = 256;

template <class T>
constexpr bool kEightBit = sizeof(T) == 1;

DALLE_INLINE int64_t visible_slot(const decode::Visible& visible, int32_t entry) {
  return entry < visible.prefix ? entry : visible.slots[entry - visible.prefix];
}

DALLE_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch((const char*)row + i);
}

// Scores of kLanes keys.
template <class T>
DALLE_INLINE F scores_of(const float* q, const T* const* rows, int width) {
  F sums[kLanes];
  DALLE_UNROLL for (int j = 0; j < kLanes; j++) {
    F even = zero(), odd = zero();
    int d = 0;
    for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
      even = fma(load(q + d), load(rows[j] + d), even);
      odd = fma(load(q + d + kLanes), load(rows[j] + d + kLanes), odd);
    }
    for (; d < width; d += kLanes) even = fma(load(q + d), load_row(rows[j], d, width), even);
    sums[j] = even + odd;
  }
  transpose(sums);
  DALLE_UNROLL for (int step = kLanes / 2; step > 0; step /= 2)
    DALLE_UNROLL for (int j = 0; j < step; j++) sums[j] += sums[j + step];
  return sums[0];
}

// sums[lane] = decay sums[lane] + sum_j weights[j] rows[j][lane], over N vectors from `lane` on.
template <int N, class T>
DALLE_INLINE void add_values(const T* const* rows, const float* weights, int count, int lane, int width, F decay,
                             float* sums) {
  F even[N], odd[N];
  DALLE_UNROLL for (int v = 0; v < N; v++) {
    even[v] = decay * load(sums + lane + v * kLanes);
    odd[v] = zero();
  }
  for (int j = 0; j + 1 < count; j += 2) {
    const F first = set(weights[j]), second = set(weights[j + 1]);
    DALLE_UNROLL for (int v = 0; v < N; v++) {
      even[v] = fma(first, load_row(rows[j], lane + v * kLanes, width), even[v]);
      odd[v] = fma(second, load_row(rows[j + 1], lane + v * kLanes, width), odd[v]);
    }
  }
  if (count % 2) {
    const F first = set(weights[count - 1]);
    DALLE_UNROLL for (int v = 0; v < N; v++)
      even[v] = fma(first, load_row(rows[count - 1], lane + v * kLanes, width), even[v]);
  }
  DALLE_UNROLL for (int v = 0; v < N; v++) store(sums + lane + v * kLanes, even[v] + odd[v]);
}

// The scores of `count` keys, stored a vector after another, softly capped; returns the largest of each lane.
static DALLE_APART F cap_scores(float* scores, int count, float softcap) {
  F high = set(-INFINITY);
  for (int j = 0; j < count; j += kLanes) {
    const F s = set(softcap) * tanh(load(scores + j));
    const F kept = select(::dalle::DALLE_ISA::first(count - j < kLanes ? count - j : kLanes), s, set(-INFINITY));
    store(scores + j, kept);
    high = max(high, kept);
  }
  return high;
}

// Q is the dtype of queries, T that of the cache.
template <class Q, class T>
static decode::Part attend(const void* q_in, const decode::Held& held, int width, float scale, float softcap,
                           const decode::Visible& visible, int32_t first, int32_t last, float* sums) {
  alignas(64) float q[decode::kWidest], weights[kBlock];
  alignas(64) float key_scales[kEightBit<T> ? kBlock : 1], value_scales[kEightBit<T> ? kBlock : 1];
  const T *key_rows[kBlock], *value_rows[kBlock];
  const int rounded = round_up(width, kLanes);
  const F factor = set(scale);
  for (int d = 0; d < width; d += kLanes) {
    store(q + d, factor * load_row((const Q*)q_in, d, width));
    store(sums + d, zero());
  }
  decode::Part part{-INFINITY, 0.f};
  for (int32_t begin = first; begin < last; begin += kBlock) {
    const int count = last - begin < kBlock ? last - begin : kBlock;
    const int padded = round_up(count, kLanes);
    for (int j = 0; j < padded; j++) {
      const int64_t slot = visible_slot(visible, begin + (j < count ? j : count - 1));
      key_rows[j] = (const T*)held.keys + slot * held.row;
      value_rows[j] = (const T*)held.values + slot * held.row;
      if constexpr (kEightBit<T>) {
        key_scales[j] = held.scales[2 * slot];
        value_scales[j] = held.scales[2 * slot + 1];
      }
    }
    F high = set(-INFINITY);
    for (int j = 0; j < padded; j += kLanes) {
      const int alive = count - j < kLanes ? count - j : kLanes;
      for (int i = 0; i < alive; i++) prefetch_row(value_rows[j + i], width * int64_t(sizeof(T)));
      F s = scores_of(q, key_rows + j, width);
      if constexpr (kEightBit<T>) s = s * load(key_scales + j);
      s = select(::dalle::DALLE_ISA::first(alive), s, set(-INFINITY));
      store(weights + j, s);
      high = max(high, s);
    }
    if (softcap != 0) high = cap_scores(weights, count, softcap);
    const float block = largest(high), now = block > part.highest ? block : part.highest;
    const float base = now == -INFINITY ? 0.f : now;  // no visible key so far
    const float decay = expf(part.highest - base);
    F total = zero();
    for (int j = 0; j < padded; j += kLanes) {
      const F s = load(weights + j);
      const F e = select(equal(s, set(-INFINITY)), zero(), power((s - set(base)) * set(kLog2E)));
      if constexpr (kEightBit<T>) {
        store(weights + j, e * load(value_scales + j));
      } else {
        store(weights + j, e);
      }
      total += e;
    }
    part = {now, part.total * decay + sum(total)};
    for_columns(rounded / kLanes, [&](auto n, int lane) __attribute__((always_inline)) {
      add_values<n.value>(value_rows, weights, count, lane, width, set(decay), sums);
    });
  }
  return part;
}

// The block's rows as float32, where products cannot read them in place, times their scales where they are eight-bit.
template <class T>
DALLE_INLINE void widen_rows(const T** rows, const float* scales, int count, int width, int rounded, float* packed,
                             const float** out) {
  for (int j = 0; j < count; j++, packed += rounded) {
    for (int d = 0; d < rounded; d += kLanes) {
      const F x = load_row(rows[j], d, width);
      if constexpr (kEightBit<T>) {
        store(packed + d, x * set(scales[j]));
      } else {
        store(packed + d, x);
      }
    }
    out[j] = packed;
  }
}

// kQueries queries, of which the first `count` are asked for.
template <class Q, class T, int kQueries>
DALLE_INLINE void attend_block(const void* const* q, int count, const decode::Held& held, int width, float scale, float softcap,
                               const decode::Visible& visible, int32_t first, int32_t last, decode::Part* parts,
                               float* sums, int64_t step, int64_t stride, float* memory) {
  constexpr int N = kQueries / kLanes < kWide ? kQueries / kLanes : kWide, kRows = kRowsBeside<N>;
  const int rounded = round_up(width, kLanes);
  const bool packs = sizeof(T) != sizeof(float) || rounded != width;
  Carver carver{memory};
  float* const transposed = carver.floats(int64_t(rounded) * kTile);
  float* const scores = carver.floats(int64_t(kTile) * kQueries);
  float* const out = carver.floats(int64_t(kQueries) * rounded);
  float* const packed = packs ? carver.floats(2 * int64_t(kTile) * rounded) : nullptr;
  alignas(64) float highest[kQueries], total[kQueries], decay[kQueries];
  for (int i = 0; i < kQueries; i += kLanes) {
    store(highest + i, set(-INFINITY));
    store(total + i, zero());
  }
  for (int i = 0; i < kQueries; i += kLanes)
    for (int d = 0; d < rounded; d += kLanes) {
      F block[kLanes];
      DALLE_UNROLL for (int j = 0; j < kLanes; j++)
        block[j] = i + j < count ? set(scale) * load_row((const Q*)q[i + j], d, width) : zero();
      transpose(block);
      DALLE_UNROLL for (int j = 0; j < kLanes; j++) store(transposed + (d + j) * kTile + i, block[j]);
    }
  for (int32_t begin = first; begin < last; begin += kTile) {
    const int here = last - begin < kTile ? last - begin : kTile, even = round_up(here, 2);
    const T *key_rows[kTile], *value_rows[kTile];
    const float *key_units[kTile], *value_units[kTile];
    float key_scales[kEightBit<T> ? kTile : 1], value_scales[kEightBit<T> ? kTile : 1];
    for (int j = 0; j < even; j++) {
      const int64_t slot = visible_slot(visible, begin + (j < here ? j : here - 1));
      key_rows[j] = (const T*)held.keys + slot * held.row;
      value_rows[j] = (const T*)held.values + slot * held.row;
      if constexpr (kEightBit<T>) {
        key_scales[j] = held.scales[2 * slot];
        value_scales[j] = held.scales[2 * slot + 1];
      }
    }
    if (packs) {
      widen_rows(key_rows, key_scales, even, width, rounded, packed, key_units);
      widen_rows(value_rows, value_scales, even, width, rounded, packed + kTile * rounded, value_units);
    } else {
      for (int j = 0; j < even; j++) {
        key_units[j] = (const float*)key_rows[j];
        value_units[j] = (const float*)value_rows[j];
        prefetch_row(value_rows[j], width * int64_t(sizeof(T)));
      }
    }
    for (int lane = 0; lane < kQueries; lane += N * kLanes)
      for_rows<kRows>(even, [&](auto m, int i) __attribute__((always_inline)) {
        constexpr int M = m.value;
        dot_rows<FloatProduct, M, N, 1>(key_units + i, transposed + lane, width,
                                     [&](const F(&s)[M][N]) __attribute__((always_inline)) {
          DALLE_UNROLL for (int j = 0; j < M; j++)
            DALLE_UNROLL for (int v = 0; v < N; v++) store(scores + (i + j) * kQueries + lane + v * kLanes, s[j][v]);
        });
      });
    if (softcap != 0) cap_scores(scores, here * kQueries, softcap);
    for (int lane = 0; lane < kQueries; lane += kLanes) {
      float* s = scores + lane;
      F high = set(-INFINITY);
      for (int j = 0; j < here; j++) high = max(high, load(s + j * kQueries));
      const F before = load(highest + lane), now = max(high, before);
      const F base = select(equal(now, set(-INFINITY)), zero(), now);
      const F factor = select(equal(before, set(-INFINITY)), zero(), power((before - base) * set(kLog2E)));
      F added = zero();
      for (int j = 0; j < here; j++) {
        const F x = load(s + j * kQueries);
        const F e = select(equal(x, set(-INFINITY)), zero(), power((x - base) * set(kLog2E)));
        store(s + j * kQueries, e);
        added += e;
      }
      store(highest + lane, now);
      store(decay + lane, factor);
      store(total + lane, fma(load(total + lane), factor, added));
    }
    if (begin == first) {
      mix<FloatProduct, Start::zero, kQueries>(scores, value_units, here, out, rounded, nullptr);
    } else {
      mix<FloatProduct, Start::scale, kQueries>(scores, value_units, here, out, rounded, decay);
    }
  }
  for (int i = 0; i < count; i++) {
    parts[i * step] = {highest[i], total[i]};
    float* to = sums + i * step * stride;
    for (int d = 0; d < rounded; d += kLanes) store(to + d, first < last ? load(out + i * rounded + d) : zero());
  }
}

template <class Q, class T>
static void attend_many(const void* const* q, int count, const decode::Held& held, int width, float scale, float softcap,
                        const decode::Visible& visible, int32_t first, int32_t last, decode::Part* parts, float* sums,
                        int64_t step, int64_t stride, float* memory) {
  const auto run = [&](auto queries) __attribute__((always_inline)) {
    attend_block<Q, T, queries.value>(q, count, held, width, scale, softcap, visible, first, last, parts, sums, step, stride,
                                      memory);
  };
  if (count <= 16) return run(Int<16>{});
  if (count <= 32) return run(Int<32>{});
  run(Int<decode::kMostQueries>{});
}

template <class T>
static void combine(const decode::Part* parts, const float* sums, int64_t stride, int count, int width, void* out) {
  float highest = -INFINITY, total = 0.f;
  for (int i = 0; i < count; i++) highest = parts[i].highest > highest ? parts[i].highest : highest;
  float factors[decode::kMostParts];
  for (int i = 0; i < count; i++) {
    factors[i] = parts[i].highest == -INFINITY ? 0.f : expf(parts[i].highest - highest);
    total += factors[i] * parts[i].total;
  }
  const float share = total == 0.f ? 0.f : 1.f / total;
  for (int d = 0; d < width; d += kLanes) {
    F x = zero();
    for (int i = 0; i < count; i++) x = fma(set(factors[i]), load(sums + i * stride + d), x);
    store_row((T*)out, d, width, set(share) * x);
  }
}

template <class T>
static float copy_row(const void* row, int width, void* slot) {
  std::memcpy(slot, row, width * sizeof(T));
  return 1.f;
}

// Nothing here runs more than twice a head: the loops over the cache are what takes time.
template <class T>
static float quantize_row(const void* row, int width, void* slot) {
  constexpr float kMost = 127.f;
  alignas(64) float steps[decode::kWidest];
  F high = zero();
  Mask strange = is_nan(high);
  for (int d = 0; d < width; d += kLanes) {
    const F x = load_row((const T*)row, d, width);
    strange = strange | is_nan(x);
    high = max(high, max(x, zero() - x));
    store(steps + d, x);
  }
  const float most = largest(high) / kMost;
  const bool finite = !any(strange) && most <= FLT_MAX;
  const float scale = !finite ? NAN : most < FLT_MIN ? 0.f : most;
  for (int d = 0; d < width; d += kLanes)
    store(steps + d, scale > 0.f ? ::dalle::DALLE_ISA::round(load(steps + d) / set(scale)) : zero());
  for (int d = 0; d < width; d++) ((int8_t*)slot)[d] = int8_t(steps[d]);
  return scale;
}

const DecodeKernels& decode_kernels() {
  static constexpr DecodeKernels table{
      {attend<float, float>, attend_many<float, float>, combine<float>, copy_row<float>},
      {attend<bf16, bf16>, attend_many<bf16, bf16>, combine<bf16>, copy_row<bf16>},
      {attend<float, int8_t>, attend_many<float, int8_t>, combine<float>, quantize_row<float>},
      {attend<bf16, int8_t>, attend_many<bf16, int8_t>, combine<bf16>, quantize_row<bf16>}};
  return table;
}

}  // namespace dalle::DALLE_ISA
DALLE_TARGET_END

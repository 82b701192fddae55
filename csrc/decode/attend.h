// Attention of one query. Its work is to read the keys and values once, so both loops go through the rows one after
// another in memory order: scores a vector of keys at a time (a row each, then the transpose adds up the lanes), and
// the weighted sum of value rows in registers. A block of 256 entries keeps its scores in the first cache.
#pragma once

#include "attention/tiles.h"
#include "decode/kernels.h"

namespace dalle::DALLE_ISA {

constexpr int kBlock = 256;

template <class T>
DALLE_INLINE const T* visible_row(const T* base, int64_t stride, const decode::Visible& visible, int32_t entry) {
  return base + (entry < visible.prefix ? entry : visible.slots[entry - visible.prefix]) * stride;
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

template <class T>
static decode::Part attend(const void* q_in, const void* keys, const void* values, int64_t stride, int width,
                           float scale, const decode::Visible& visible, int32_t first, int32_t last, float* sums) {
  constexpr int kWidest = 256;
  alignas(64) float q[kWidest], weights[kBlock];
  const T *key_rows[kBlock], *value_rows[kBlock];
  const int rounded = round_up(width, kLanes);
  const F factor = set(scale);
  for (int d = 0; d < width; d += kLanes) {
    store(q + d, factor * load_row((const T*)q_in, d, width));
    store(sums + d, zero());
  }
  decode::Part part{-INFINITY, 0.f};
  for (int32_t begin = first; begin < last; begin += kBlock) {
    const int count = last - begin < kBlock ? last - begin : kBlock;
    const int padded = round_up(count, kLanes);
    for (int j = 0; j < padded; j++) {
      const int32_t entry = begin + (j < count ? j : count - 1);
      key_rows[j] = visible_row((const T*)keys, stride, visible, entry);
      value_rows[j] = visible_row((const T*)values, stride, visible, entry);
    }
    F high = set(-INFINITY);
    for (int j = 0; j < padded; j += kLanes) {
      const int alive = count - j < kLanes ? count - j : kLanes;
      for (int i = 0; i < alive; i++) prefetch_row(value_rows[j + i], width * int64_t(sizeof(T)));
      const F s = select(::dalle::DALLE_ISA::first(alive), scores_of(q, key_rows + j, width), set(-INFINITY));
      store(weights + j, s);
      high = max(high, s);
    }
    const float block = largest(high), now = block > part.highest ? block : part.highest;
    const float base = now == -INFINITY ? 0.f : now;  // no visible key so far
    const float decay = expf(part.highest - base);
    F total = zero();
    for (int j = 0; j < padded; j += kLanes) {
      const F s = load(weights + j);
      const F e = select(equal(s, set(-INFINITY)), zero(), power((s - set(base)) * set(kLog2E)));
      store(weights + j, e);
      total += e;
    }
    part = {now, part.total * decay + sum(total)};
    for_columns(rounded / kLanes, [&](auto n, int lane) __attribute__((always_inline)) {
      add_values<n.value>(value_rows, weights, count, lane, width, set(decay), sums);
    });
  }
  return part;
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
constexpr decode::Kernels decode_kernels() {
  return {attend<T>, combine<T>};
}

}  // namespace dalle::DALLE_ISA

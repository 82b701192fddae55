// Attention backward. A tile of 64 keys lies across the lanes and meets, one after another, the queries that see it;
// with P = exp(scale s - lse) and delta = sum(dO O) - d lse,
//
//     dV += P^T dO      dS = P (dO V^T - delta)      dK += dS^T Q      dQ += dS K
//
// dK and dV of the tile stay in the first cache; dQ is summed by position in a buffer of the whole head. P and dS are
// made in the registers that hold the scores, so neither scores nor dO V^T are ever stored.
#pragma once

#include "attention/tiles.h"

namespace dalle::DALLE_ISA {

template <class T, class Dot>
struct Backward {
  using Source = Rows<T, Dot>;
  static constexpr bool kPairs = Dot::kPer == 2;
  static constexpr int kListedQueries = 128;  // pairs of queries that a group of keys takes at a time

  Source q, k, v, out, grad;
  float *transposed_k, *transposed_v, *keys;
  float *weights, *slopes, *slope_rows;  // P, dS: a row a query (or a pair of them); dS again, in pairs of keys
  float *dk, *dv, *dq, *normaliser, *delta;
  uint8_t *statistics_ready, *reached, *padded, *tile_padded;
  Pair* listed;
  const Problem& problem;
  int width, rounded;
  float scale;

  static int64_t floats(const Problem& problem) { return Backward(problem, nullptr).carve(nullptr); }

  Backward(const Problem& problem, float* memory)
      : problem(problem), width(int(problem.width)), rounded(round_up(int(problem.width), kLanes)) {
    scale = problem.scale;
    carve(memory);
  }

  int64_t carve(float* memory) {
    Carver carver{memory};
    const int tiles = problem.plan->tiles;
    const int64_t positions = int64_t(tiles) * kTile;
    const int units = width / Dot::kPer;
    float* zeros = carver.floats(rounded);
    transposed_k = carver.floats(int64_t(units) * kTile);
    transposed_v = carver.floats(int64_t(units) * kTile);
    keys = carver.floats(int64_t(kTile) / Dot::kPer * rounded);
    weights = carver.floats(kTile * kTile);
    slopes = carver.floats(kTile * kTile);
    slope_rows = kPairs ? carver.floats(kTile * kTile / 2) : slopes;
    dk = carver.floats(int64_t(kTile) * rounded);
    dv = carver.floats(int64_t(kTile) * rounded);
    normaliser = carver.floats(positions);
    delta = carver.floats(positions);
    statistics_ready = carver.of<uint8_t>(tiles);
    reached = carver.of<uint8_t>(tiles);
    listed = carver.of<Pair>(kTile / 2);
    padded = problem.padding ? carver.of<uint8_t>(positions) : nullptr;
    tile_padded = problem.padding ? carver.of<uint8_t>(tiles) : nullptr;
    q = k = v = out = grad =
        Source{nullptr, 0, problem.plan->order, problem.plan->length, width, rounded, nullptr, nullptr, zeros};
    for (Source* rows : {&q, &grad})
      if (Source::packing(width)) {
        rows->packed = carver.floats(positions / Dot::kPer * rounded);
        rows->ready = carver.of<uint8_t>(tiles);
      }
    dq = carver.floats(positions * rounded);
    return carver.used;
  }

  void enter(const BackwardArrays& arrays, int64_t head, Scratch& scratch) {
    const int64_t b = head / problem.heads, h = head % problem.heads;
    const auto attach = [&](Source& rows, const Array& array) {
      rows.base = (const T*)array.data + b * array.batch + h * array.head;
      rows.stride = array.row;
    };
    attach(q, arrays.q);
    attach(k, arrays.k);
    attach(v, arrays.v);
    attach(out, arrays.out);
    attach(grad, arrays.grad_out);
    const Plan& plan = *problem.plan;
    std::memset(reached, 0, size_t(plan.tiles));
    if (scratch.owner == head) return;
    scratch.owner = head;
    std::memset((void*)q.zeros, 0, size_t(rounded) * sizeof(float));
    std::memset(statistics_ready, 0, size_t(plan.tiles));
    if (q.ready) std::memset(q.ready, 0, size_t(plan.tiles));
    if (grad.ready) std::memset(grad.ready, 0, size_t(plan.tiles));
    if (padded) {
      const uint8_t* row = problem.padding + b * plan.length;
      for (int t = 0; t < plan.tiles; t++) {
        tile_padded[t] = 0;
        for (int p = t * kTile; p < (t + 1) * kTile; p++) {
          padded[p] = p < plan.length && row[plan.order[p]];
          tile_padded[t] |= padded[p];
        }
      }
    }
  }

  // What the walk needs of a tile of queries: log-sum-exp and delta, packed rows, dq of zero.
  void reach(const BackwardArrays& arrays, int64_t head, int tile) {
    if (!reached[tile]) {
      reached[tile] = 1;
      std::memset(dq + int64_t(tile) * kTile * rounded, 0, size_t(kTile) * rounded * sizeof(float));
    }
    if (statistics_ready[tile]) return;
    statistics_ready[tile] = 1;
    q.prepare(tile);
    grad.prepare(tile);
    for (int p = tile * kTile; p < (tile + 1) * kTile; p++) {
      normaliser[p] = 1e30f;  // no key, or no query: every weight is 0
      delta[p] = 0;
      if (p >= problem.plan->length) continue;
      const int64_t row = head * problem.plan->length + problem.plan->order[p];
      const float lse = arrays.lse[row];
      if (lse == -INFINITY) continue;
      normaliser[p] = lse;
      F sums = zero();
      for (int d = 0; d < width; d += kLanes)
        sums = fma(load_row(grad.row(p), d, width), load_row(out.row(p), d, width), sums);
      delta[p] = sum(sums) - (arrays.grad_lse ? arrays.grad_lse[row] : 0.f);
    }
  }

  // Weights and slopes of M queries (rows i .. of the buffers, kLd keys each) for N vectors of keys from lane `lane`.
  template <bool kMasked, int kLd, int M, int N, int kChains>
  DALLE_METHOD void weigh(const float* const* queries, const float* const* grads, const int* positions, int i, int lane,
                          int lane_in_tile, const Pair* pairs) {
    const int units = width / Dot::kPer;
    F p[M][N], d[M][N];
    const auto seen = [&](int j, int w) __attribute__((always_inline)) {
      return from_bits(uint32_t(pairs[(i + j) / 2].bits[j % 2]) >> (w * kLanes));
    };
    dot_rows<Dot, M, N, kChains>(queries + i, transposed_k + lane_in_tile, kTile, units,
                                 [&](const F(&sums)[M][N]) __attribute__((always_inline)) {
      DALLE_UNROLL for (int j = 0; j < M; j++) {
        const F lse = set(normaliser[positions[i + j]]);
        DALLE_UNROLL for (int w = 0; w < N; w++) {
          const F x = fma(set(scale), sums[j][w], zero() - lse) * set(kLog2E);
          p[j][w] = kPairs ? power_coarse(x) : power(x);
          if constexpr (kMasked) p[j][w] = select(seen(j, w), p[j][w], zero());
        }
      }
    });
    dot_rows<Dot, M, N, kChains>(grads + i, transposed_v + lane_in_tile, kTile, units,
                                 [&](const F(&sums)[M][N]) __attribute__((always_inline)) {
      DALLE_UNROLL for (int j = 0; j < M; j++) {
        const F mean = set(delta[positions[i + j]]);
        DALLE_UNROLL for (int w = 0; w < N; w++) {
          d[j][w] = p[j][w] * (sums[j][w] - mean);
          if constexpr (kMasked) d[j][w] = select(seen(j, w), d[j][w], zero());
        }
      }
    });
    DALLE_UNROLL for (int j = 0; j < M; j += 2)
      DALLE_UNROLL for (int w = 0; w < N; w++) {
        const int column = lane + w * kLanes;
        if constexpr (kPairs) {
          store(weights + (i + j) / 2 * kLd + column, as_float(pair(p[j][w], p[j + 1][w])));
          store(slopes + (i + j) / 2 * kLd + column, as_float(pair(d[j][w], d[j + 1][w])));
          store((bf16*)slope_rows + (i + j) * kLd + column, d[j][w]);
          store((bf16*)slope_rows + (i + j + 1) * kLd + column, d[j + 1][w]);
        } else {
          DALLE_UNROLL for (int h = 0; h < 2; h++) {
            store(weights + (i + j + h) * kLd + column, p[j + h][w]);
            store(slopes + (i + j + h) * kLd + column, d[j + h][w]);
          }
        }
      }
  }

  void full_tile(const BackwardArrays& arrays, int64_t head, int tile) {
    reach(arrays, head, tile);
    const float *query_rows[kTile], *grad_rows[kTile];
    float* dq_rows[kTile];
    int positions[kTile];
    for (int i = 0; i < kTile; i++) {
      const int p = tile * kTile + i;
      positions[i] = p;
      query_rows[i] = q.units(p);
      grad_rows[i] = grad.units(p);
      dq_rows[i] = dq + int64_t(p) * rounded;
    }
    for (int lane = 0; lane < kTile; lane += 2 * kLanes)
      for_rows<6>(kTile, [&](auto m, int i) __attribute__((always_inline)) {
        weigh<false, kTile, m.value, 2, 1>(query_rows, grad_rows, positions, i, lane, lane, nullptr);
      });
    constexpr int kRows = kTile / Dot::kPer;
    for (int u = 0; u < kRows; u++) {
      query_rows[u] = q.mixed(tile * kRows + u);
      grad_rows[u] = grad.mixed(tile * kRows + u);
    }
    mix<Dot, Start::add>(weights, kTile, grad_rows, kRows, kTile, dv, rounded, nullptr);
    mix<Dot, Start::add>(slopes, kTile, query_rows, kRows, kTile, dk, rounded, nullptr);
    accumulate<Dot, kRows>(slope_rows, keys, rounded, kRows, kTile, dq_rows);
  }

  // Group g of the tile of keys against n <= kListedQueries pairs of queries.
  void some_pairs(const BackwardArrays& arrays, int64_t head, const Pair* pairs, int n, int g) {
    const float *query_rows[2 * kListedQueries], *grad_rows[2 * kListedQueries];
    float* dq_rows[2 * kListedQueries];
    int positions[2 * kListedQueries];
    for (int i = 0; i < 2 * n; i++) {
      const int p = 2 * pairs[i / 2].index + i % 2;
      if (i % 2 == 0) reach(arrays, head, p / kTile);
      positions[i] = p;
      query_rows[i] = q.units(p);
      grad_rows[i] = grad.units(p);
      dq_rows[i] = dq + int64_t(p) * rounded;
    }
    const int lane = g * kGroup;
    for_rows<kListRows>(2 * n, [&](auto m, int i) __attribute__((always_inline)) {
      weigh<true, kGroup, m.value, kVectors, kListChains>(query_rows, grad_rows, positions, i, 0, lane, pairs);
    });
    for (int u = 0; u < 2 * n / Dot::kPer; u++) {
      const int row = kPairs ? pairs[u].index : positions[u];
      query_rows[u] = q.mixed(row);
      grad_rows[u] = grad.mixed(row);
    }
    mix<Dot, Start::add>(weights, kGroup, grad_rows, 2 * n / Dot::kPer, kGroup, dv + lane * int64_t(rounded), rounded,
                         nullptr);
    mix<Dot, Start::add>(slopes, kGroup, query_rows, 2 * n / Dot::kPer, kGroup, dk + lane * int64_t(rounded), rounded,
                         nullptr);
    accumulate<Dot, kGroup / Dot::kPer>(slope_rows, keys + lane / Dot::kPer * int64_t(rounded), rounded,
                                        kGroup / Dot::kPer, 2 * n, dq_rows);
  }

  void key_tile(const BackwardArrays& arrays, int64_t head, int tile) {
    const Plan& plan = *problem.plan;
    const Lists& lists = plan.by_key;
    std::memset(dk, 0, size_t(kTile) * rounded * sizeof(float));
    std::memset(dv, 0, size_t(kTile) * rounded * sizeof(float));
    k.transpose_into(tile, transposed_k);
    v.transpose_into(tile, transposed_v);
    k.pack_into(tile, keys);
    const bool holes = padded && tile_padded[tile];
    for (int32_t i = lists.full_offsets[tile]; i < lists.full_offsets[tile + 1]; i++)
      if (!holes) full_tile(arrays, head, lists.full_tiles[i]);
    for (int g = 0; g < kGroups; g++) {
      const Pair* pairs = lists.pairs + lists.pair_offsets[tile * kGroups + g];
      const int count = lists.pair_offsets[tile * kGroups + g + 1] - lists.pair_offsets[tile * kGroups + g];
      if (!holes) {
        for (int i = 0; i < count; i += kListedQueries)
          some_pairs(arrays, head, pairs + i, count - i < kListedQueries ? count - i : kListedQueries, g);
        continue;
      }
      uint16_t alive = 0;
      for (int i = 0; i < kGroup; i++)
        if (!padded[tile * kTile + g * kGroup + i]) alive |= uint16_t(1u << i);
      if (!alive) continue;
      for (int32_t i = lists.full_offsets[tile]; i < lists.full_offsets[tile + 1]; i++) {
        for (int p = 0; p < kTile / 2; p++) listed[p] = {lists.full_tiles[i] * (kTile / 2) + p, {alive, alive}};
        some_pairs(arrays, head, listed, kTile / 2, g);
      }
      int n = 0;
      for (int i = 0; i < count; i++) {
        const Pair kept{pairs[i].index, {uint16_t(pairs[i].bits[0] & alive), uint16_t(pairs[i].bits[1] & alive)}};
        if (kept.bits[0] | kept.bits[1]) listed[n++] = kept;
        if (n == kTile / 2 || (n > 0 && i + 1 == count)) {
          some_pairs(arrays, head, listed, n, g);
          n = 0;
        }
      }
    }
    const int64_t b = head / problem.heads, h = head % problem.heads;
    T* dk_base = (T*)arrays.dk.data + b * arrays.dk.batch + h * arrays.dk.head;
    T* dv_base = (T*)arrays.dv.data + b * arrays.dv.batch + h * arrays.dv.head;
    const F factor = set(problem.scale);
    for (int i = 0; i < kTile && tile * kTile + i < plan.length; i++) {
      const int token = plan.order[tile * kTile + i];
      T *dk_row = dk_base + token * arrays.dk.row, *dv_row = dv_base + token * arrays.dv.row;
      for (int d = 0; d < width; d += kLanes) {
        store_row(dk_row, d, width, factor * load(dk + int64_t(i) * rounded + d));
        store_row(dv_row, d, width, load(dv + int64_t(i) * rounded + d));
      }
    }
  }

  // dq of a tile of queries: the sum of `shares` buffers `stride` floats apart, of those that reached the tile.
  static void write_dq(const Problem& problem, const BackwardArrays& arrays, int64_t head, int tile, int shares,
                       const float* partial, int64_t stride, const uint8_t* touched) {
    const Plan& plan = *problem.plan;
    const int width = int(problem.width), rounded = round_up(width, kLanes);
    const int64_t b = head / problem.heads, h = head % problem.heads;
    T* base = (T*)arrays.dq.data + b * arrays.dq.batch + h * arrays.dq.head;
    const F factor = set(problem.scale);
    for (int p = tile * kTile; p < (tile + 1) * kTile && p < plan.length; p++) {
      T* row = base + plan.order[p] * arrays.dq.row;
      for (int d = 0; d < width; d += kLanes) {
        F total = zero();
        for (int s = 0; s < shares; s++)
          if (touched[int64_t(s) * plan.tiles + tile]) total += load(partial + s * stride + int64_t(p) * rounded + d);
        store_row(row, d, width, factor * total);
      }
    }
  }

  static void run(const Problem& problem, const BackwardArrays& arrays, int64_t head, int32_t first, int32_t last,
                  float* partial_dq, uint8_t* touched, Scratch& scratch) {
    Backward backward(problem, scratch.memory);
    if (partial_dq) backward.dq = partial_dq;
    backward.enter(arrays, head, scratch);
    for (int32_t tile = first; tile < last; tile++) backward.key_tile(arrays, head, tile);
    const int tiles = problem.plan->tiles;
    if (partial_dq) {
      std::memcpy(touched, backward.reached, size_t(tiles));
    } else {
      for (int tile = 0; tile < tiles; tile++)
        write_dq(problem, arrays, head, tile, 1, backward.dq, 0, backward.reached);
    }
  }

  static void reduce(const Problem& problem, const BackwardArrays& arrays, int64_t head, int32_t tile, int32_t shares,
                     const float* partial_dq, const uint8_t* touched) {
    const int64_t stride = int64_t(problem.plan->tiles) * kTile * round_up(int(problem.width), kLanes);
    write_dq(problem, arrays, head, tile, shares, partial_dq, stride, touched);
  }

 private:
  static constexpr int kListRows = kLanes == 16 ? 8 : 6;
  static constexpr int kListChains = kLanes == 16 ? 2 : 1;
};

}  // namespace dalle::DALLE_ISA
